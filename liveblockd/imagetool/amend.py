"""``image amend``: another version, refcount width or size of a qcow2 image.

Runs on an event loop of its own. Options and messages are those of ``qemu-img amend``; of its
options ``compat``, ``lazy_refcounts``, ``refcount_bits`` and ``size`` are known.
"""

from __future__ import annotations

import argparse
from typing import Final

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.amend import Amendment
from liveblockd.formats.qcow2.image import Qcow2
from liveblockd.imagetool.images import Images, ToolError, reason, size_of

_VERSIONS: Final = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}


async def run(args: argparse.Namespace) -> int:
    """The command."""
    options = dict(pair.partition("=")[::2] for text in args.options for pair in text.split(","))
    amendment = _amendment(options)
    async with Images(args.objects) as images:
        node = await images.open(args.filename, args.format, writable=True)
        driver = node.driver
        if not isinstance(driver, Qcow2):
            raise ToolError(
                f"Format driver '{driver.driver_name}' does not support option amendment"
            )
        try:
            await driver.amend(amendment)
        except (BlockError, OSError) as error:
            raise ToolError(reason(error)) from error
    return 0


def _amendment(options: dict[str, str]) -> Amendment:
    version = bits = lazy = size = None
    for key, value in options.items():
        if key == "compat":
            if value not in _VERSIONS:
                raise ToolError(f"Unknown compatibility level {value}")
            version = _VERSIONS[value]
        elif key == "lazy_refcounts":
            if value not in ("on", "off"):
                raise ToolError("Parameter 'lazy_refcounts' expects 'on' or 'off'")
            lazy = value == "on"
        elif key == "refcount_bits":
            if not value.isdecimal():
                raise ToolError("Parameter 'refcount_bits' expects a number")
            bits = int(value)
        elif key == "size":
            size = size_of(value)
        elif key in ("backing_file", "backing_fmt"):
            raise ToolError("Cannot amend the backing file\nYou can use 'qemu-img rebase' instead.")
        else:
            raise ToolError(f"Invalid parameter '{key}'")
    return Amendment(version, lazy, bits, size)
