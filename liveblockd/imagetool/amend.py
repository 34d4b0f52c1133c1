"""``image amend``: another version, refcount width or size of a qcow2 image, other passphrases.

Runs on an event loop of its own. Options and messages are those of ``qemu-img amend``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, Final

from liveblockd.errors import BlockError
from liveblockd.formats.luks_image import Luks
from liveblockd.formats.luks_slots import KeyslotState, LuksAmendment
from liveblockd.formats.qcow2.amend import Amendment
from liveblockd.formats.qcow2.image import Qcow2
from liveblockd.graph.node import Node
from liveblockd.imagetool.creation import VERSIONS, Kind, Value, known_options, option_value
from liveblockd.imagetool.images import Images, ToolError, reason
from liveblockd.imagetool.output import Progress
from liveblockd.keyval import split_commas

_SLOTS: Final = {
    "state": Kind.TEXT,
    "new-secret": Kind.TEXT,
    "old-secret": Kind.TEXT,
    "keyslot": Kind.NUMBER,
    "iter-time": Kind.NUMBER,
}
_ENCRYPT: Final = "encrypt."
_QCOW2: Final = {
    "backing_file": Kind.TEXT,
    "backing_fmt": Kind.TEXT,
    "compat": Kind.TEXT,
    "data_file": Kind.TEXT,
    "data_file_raw": Kind.FLAG,
    "lazy_refcounts": Kind.FLAG,
    "refcount_bits": Kind.NUMBER,
    "size": Kind.SIZE,
    **{_ENCRYPT + name: kind for name, kind in _SLOTS.items()},
}
#: the options, by format
KNOWN: Final[Mapping[str, Mapping[str, Kind]]] = {"qcow2": _QCOW2, "luks": _SLOTS}


async def run(args: argparse.Namespace) -> int:
    """The command."""
    async with Images(args.objects) as images:
        node = await images.open(args.filename, args.format, writable=True)
        progress = Progress(args.progress)
        try:
            await _amend(images, node, args, progress)
        except (BlockError, OSError) as error:
            raise ToolError(reason(error)) from error
        finally:
            progress.end()
    return 0


async def _amend(images: Images, node: Node, args: argparse.Namespace, progress: Progress) -> None:
    driver = node.driver
    if isinstance(driver, Luks):
        options = _parse(args.options, "luks")
        await _change_slots(images, driver, getattr(node.given, "key_secret", None), options, args)
    elif isinstance(driver, Qcow2):
        options = _parse(args.options, "qcow2")
        slots = {
            name.removeprefix(_ENCRYPT): value
            for name, value in options.items()
            if name.startswith(_ENCRYPT)
        }
        amendment = _amendment(driver, options)
        if slots:
            if not driver.encrypted:
                raise BlockError("Can't amend encryption options - encryption not present")
            encrypt: dict[str, Any] = getattr(node.given, "encrypt", None) or {}
            await _change_slots(images, driver, encrypt.get("key-secret"), slots, args)
        if amendment != Amendment():
            await driver.amend(amendment, progress.update)
    else:
        raise ToolError(f"Format driver '{driver.driver_name}' does not support option amendment")
    progress.update(1, 1)


def _parse(texts: list[str], image_format: str) -> dict[str, Value]:
    known = KNOWN[image_format]
    found: dict[str, Value] = {}
    for part in (part for text in texts for part in split_commas(text)):
        name, equals, value = part.partition("=")
        if name not in known:
            created = name in known_options(image_format)
            hint = "\nThis option is only supported for image creation" if created else ""
            raise ToolError(f"Invalid parameter '{name}'{hint}")
        found[name] = option_value(name, known[name], value if equals else "on")
    return found


def _amendment(driver: Qcow2, options: Mapping[str, Any]) -> Amendment:
    if options.keys() & {"backing_file", "backing_fmt"}:
        raise ToolError("Cannot amend the backing file\nYou can use 'qemu-img rebase' instead.")
    if "data_file" in options:
        if "data-file" not in driver.children:
            raise BlockError("data-file can only be set for images that use an external data file")
        raise BlockError("Changing the name of the data file is not supported", errno=95)
    version = options.get("compat")
    if version is not None and version not in VERSIONS:
        raise ToolError(f"Unknown compatibility level {version}")
    return Amendment(
        None if version is None else VERSIONS[version],
        options.get("lazy_refcounts"),
        options.get("refcount_bits"),
        options.get("size"),
        options.get("data_file_raw"),
    )


async def _change_slots(
    images: Images,
    driver: Luks | Qcow2,
    key_secret: str | None,
    options: Mapping[str, Any],
    args: argparse.Namespace,
) -> None:
    state = options.get("state")
    if state is None:
        raise BlockError("Parameter 'state' is missing")
    if state not in tuple(KeyslotState):
        raise BlockError(f"Parameter 'state' does not accept value '{state}'")
    secret = images.graph.environment.secret

    def passphrase(name: str) -> bytes | None:
        return secret(options[name]) if name in options else None

    amendment = LuksAmendment(
        KeyslotState(state),
        new_secret=passphrase("new-secret"),
        old_secret=passphrase("old-secret"),
        keyslot=options.get("keyslot"),
        iter_time=options.get("iter-time"),
    )
    opened_by = b"" if key_secret is None else secret(key_secret)
    await driver.amend_encryption(opened_by, amendment, force=args.force)
