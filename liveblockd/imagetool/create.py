"""``image create``: a new image.

Runs on an event loop of its own. Words and exit status are those of ``qemu-img create``.
Invariants: an image that is in use is not overwritten (its locks are asked for first); a file that
was made for an image that could not be made is removed again.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from errno import EEXIST
from typing import Any, Final

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.create import create_qcow2
from liveblockd.graph import filenames
from liveblockd.imagetool.images import Images, ToolError, reason, size_of
from liveblockd.imagetool.output import say
from liveblockd.keyval import split_commas
from liveblockd.storage.registry import find_driver

_SECTOR: Final = 512
_ON: Final = {"on": True, "off": False, "yes": True, "no": False, "true": True, "false": False}
_VERSIONS: Final = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
#: options of qemu-img that this engine does not create images with
_NOT_YET: Final = (
    "encryption", "encrypt.", "data_file", "data_file_raw", "extended_l2", "nocow",
    "extent_size_hint",
)  # fmt: skip
_QCOW2: Final = (
    "backing_file", "backing_fmt", "cluster_size", "compat", "compression_type",
    "lazy_refcounts", "preallocation", "refcount_bits", "size",
)  # fmt: skip
_RAW: Final = ("preallocation", "size")


async def run(args: argparse.Namespace) -> int:
    """The command."""
    filename = args.filename
    options = parse_options(args.options, args.format, filename)
    for name, value in (("backing_file", args.backing), ("backing_fmt", args.backing_format)):
        if value is not None:
            if args.format == "raw":
                raise ToolError(f"{filename}: Backing file not supported for file format 'raw'")
            options[name] = value
    if args.size is not None:
        options["size"] = str(size_of(args.size))
    async with Images() as images:
        await _look_at_backing(images, options, args)
        if "size" not in options:
            raise ToolError(f"{filename}: Image creation needs a size parameter")
        size = size_of(options["size"])
        say(_formatting(filename, args.format, size, options), quiet=args.quiet)
        try:
            await create_image(images, filename, args.format, size, options)
        except (BlockError, OSError) as error:
            raise ToolError(f"{filename}: {reason(error)}") from error
    return 0


def parse_options(texts: list[str], image_format: str, filename: str = "") -> dict[str, str]:
    """``-o key=value,...``, several times; the last of a name counts. ToolError."""
    prefix = f"{filename}: " if filename else ""
    if image_format not in ("raw", "qcow2"):
        try:
            find_driver(image_format)
        except BlockError:
            raise ToolError(f"{prefix}Unknown file format '{image_format}'") from None
        raise ToolError(f"{prefix}Format driver '{image_format}' does not support image creation")
    found: dict[str, str] = {}
    for text in texts:
        for part in split_commas(text):
            name, equals, value = part.partition("=")
            known = _QCOW2 if image_format == "qcow2" else _RAW
            if image_format == "qcow2" and name.startswith(_NOT_YET):
                raise ToolError(f"{prefix}Option '{name}' is not supported")
            if name not in known:
                raise ToolError(f"{prefix}Invalid parameter '{name}'")
            found[name] = value if equals else "on"
    return found


async def _look_at_backing(
    images: Images, options: dict[str, str], args: argparse.Namespace
) -> None:
    """The backing image must be there, unless -u; without a size its size is taken."""
    backing = options.get("backing_file")
    if backing is None:
        if "backing_fmt" in options:
            raise ToolError(f"{args.filename}: Backing format cannot be used without backing file")
        return
    if args.unsafe and "size" in options:
        return
    try:
        path = filenames.combine(args.filename, backing)
        node = await images.open(path, options.get("backing_fmt"), backing=False)
    except (BlockError, ToolError) as error:
        message = error.message.removeprefix(f"Could not open '{backing}': ")
        raise ToolError(f"{args.filename}: {message}\nCould not open backing image.") from error
    if "backing_fmt" not in options:
        detected = node.driver_class.driver_name
        raise ToolError(
            f"{args.filename}: Backing file specified without backing format\n"
            f"Detected format of {detected}."
        )
    options.setdefault("size", str(node.driver.virtual_size))


def _formatting(filename: str, image_format: str, size: int, options: Mapping[str, str]) -> str:
    parts = [f"fmt={image_format}"]
    if image_format == "qcow2":
        cluster_size = size_of(options.get("cluster_size", "65536"), "cluster size")
        parts += [f"cluster_size={cluster_size}", "extended_l2=off"]
        if "preallocation" in options:
            parts.append(f"preallocation={options['preallocation']}")
        parts.append(f"compression_type={options.get('compression_type', 'zlib')}")
    parts.append(f"size={size}")
    names = ("compat", "backing_file", "backing_fmt")
    parts += [f"{name}={options[name]}" for name in names if name in options]
    if image_format == "qcow2":
        lazy = "on" if _flag(options, "lazy_refcounts") else "off"
        parts += [f"lazy_refcounts={lazy}", f"refcount_bits={options.get('refcount_bits', 16)}"]
    elif "preallocation" in options:
        parts.append(f"preallocation={options['preallocation']}")
    return f"Formatting '{filename}', {' '.join(parts)}"


def _flag(options: Mapping[str, str], name: str) -> bool:
    text = options.get(name, "off")
    if text not in _ON:
        raise BlockError(f"Parameter '{name}' expects 'on' or 'off'")
    return _ON[text]


async def create_image(
    images: Images, filename: str, image_format: str, size: int, options: Mapping[str, str]
) -> None:
    """A new image, durable on return; raises BlockError, OSError, ToolError."""
    size = -(-size // _SECTOR) * _SECTOR
    arguments = _qcow2_arguments(options) if image_format == "qcow2" else {}
    preallocation = options.get("preallocation", "off")
    if image_format == "raw" and preallocation not in ("off", "falloc", "full"):
        raise BlockError(f"Invalid parameter '{preallocation}'")
    made = _make_file(filename)
    try:
        file = await images.open_file(filename, writable=True)
        await file.truncate(0)
        if image_format == "qcow2":
            await create_qcow2(file, size=size, **arguments)
        else:
            await file.truncate(size)
            await _preallocate(images, filename, size, preallocation)
            await file.flush()
        for backend in tuple(images.graph.backends):
            if backend.node is file:
                await images.graph.detach(backend)
        await images.graph.delete(file.name)
    except BaseException:
        if made:
            os.unlink(filename)
        raise


def _qcow2_arguments(options: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of ``create_qcow2``; raises BlockError."""
    version = options.get("compat", "1.1")
    if version not in _VERSIONS:
        raise BlockError(f"Invalid compatibility level: '{version}'")
    if (kind := options.get("compression_type", "zlib")) != "zlib":
        raise BlockError(f"Compression type '{kind}' is not supported for new images")
    bits = options.get("refcount_bits", "16")
    if not bits.isdecimal():
        raise BlockError("Parameter 'refcount_bits' expects a number")
    return {
        "cluster_size": size_of(options.get("cluster_size", "65536"), "cluster size"),
        "version": _VERSIONS[version],
        "refcount_bits": int(bits),
        "backing_file": options.get("backing_file"),
        "backing_format": options.get("backing_fmt"),
        "lazy_refcounts": _flag(options, "lazy_refcounts"),
        "preallocation": options.get("preallocation", "off"),
    }


def _make_file(filename: str) -> bool:
    """Whether there was no such file; it is there now, and whatever it had is untouched."""
    if filenames.has_protocol(filename):
        return False
    try:
        os.close(os.open(filename, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    except OSError as error:
        if error.errno == EEXIST:
            return False
        raise BlockError(f"Could not create '{filename}': {error.strerror}") from error
    return True


async def _preallocate(images: Images, filename: str, size: int, mode: str) -> None:
    if mode == "off" or not size:
        return

    def allocate() -> None:
        fd = os.open(filename, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.posix_fallocate(fd, 0, size)
        finally:
            os.close(fd)

    await images.workers.run(allocate)
