"""``image create``: a new image.

Runs on an event loop of its own. Words and exit status are those of ``qemu-img create``; what the
options mean is in ``creation``.
Invariants: an image that is in use is not overwritten (its locks are asked for first); a file that
was made for an image that could not be made is removed again.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import struct
from contextlib import suppress
from errno import EEXIST
from typing import Any, Final

from liveblockd.errors import BlockError
from liveblockd.formats.luks import new_luks
from liveblockd.formats.qcow2.create import create_qcow2
from liveblockd.graph import filenames
from liveblockd.graph.node import Node
from liveblockd.imagetool import creation
from liveblockd.imagetool.creation import Options
from liveblockd.imagetool.images import Images, ToolError, reason, size_of
from liveblockd.imagetool.output import say

_SECTOR: Final = 512
_GET_FLAGS, _SET_FLAGS, _NO_COW = 0x80086601, 0x40086602, 0x00800000  # of linux/fs.h


async def run(args: argparse.Namespace) -> int:
    """The command."""
    filename = args.filename
    options = creation.parse_options(args.options, args.format, filename)
    for name, value in (("backing_file", args.backing), ("backing_fmt", args.backing_format)):
        if value is not None:
            if args.format in ("raw", "luks"):
                raise ToolError(
                    f"{filename}: Backing file not supported for file format '{args.format}'"
                )
            options[name] = value
    if args.size is not None:
        if "size" in options:
            raise ToolError(f"{filename}: The image size must be specified only once")
        options["size"] = size_of(args.size)
    async with Images(args.objects) as images:
        await _look_at_backing(images, options, args)
        if "size" not in options:
            raise ToolError(f"{filename}: Image creation needs a size parameter")
        say(creation.describe(filename, args.format, options), quiet=args.quiet)
        try:
            await create_image(images, filename, args.format, options)
        except (BlockError, OSError) as error:
            raise ToolError(f"{filename}: {reason(error)}") from error
    return 0


async def _look_at_backing(images: Images, options: Options, args: argparse.Namespace) -> None:
    """The backing image must be there, unless -u; without a size its size is taken."""
    backing = options.get("backing_file")
    if backing is None:
        if "backing_fmt" in options:
            raise ToolError(f"{args.filename}: Backing format cannot be used without backing file")
        return
    _refuse_same(args.filename, str(backing))
    if args.unsafe and "size" in options:
        return
    stated = options.get("backing_fmt")
    try:
        path = filenames.combine(args.filename, str(backing))
        node = await images.look_at(path, None if stated is None else str(stated))
    except (BlockError, ToolError) as error:
        message = error.message.removeprefix(f"Could not open '{backing}': ")
        raise ToolError(f"{args.filename}: {message}\nCould not open backing image.") from error
    if stated is None:
        detected = node.driver_class.driver_name
        raise ToolError(
            f"{args.filename}: Backing file specified without backing format\n"
            f"Detected format of {detected}."
        )
    options.setdefault("size", node.driver.virtual_size)


def _refuse_same(filename: str, backing: str) -> None:
    """ToolError for an image that would be its own backing file, by whatever name."""
    same = backing == filename
    with suppress(OSError, BlockError):  # files that are not there, or are none
        same |= os.path.samefile(filename, filenames.combine(filename, backing))
    if same:
        raise ToolError(
            f"{filename}: Error: Trying to create an image with the same filename as the backing "
            "file"
        )


async def create_image(images: Images, filename: str, image_format: str, options: Options) -> None:
    """A new image of ``options["size"]`` bytes; durable on return.

    Raises BlockError, OSError, ToolError; what was made is gone then.
    """
    size = -(-int(options["size"]) // _SECTOR) * _SECTOR
    arguments = await _arguments(images, image_format, options)
    made: list[str] = []
    files: list[Node] = []
    try:
        file = await _empty_file(images, filename, options, made)
        files.append(file)
        if image_format == "qcow2":
            if (name := options.get("data_file")) is not None:
                data_file = await _empty_file(images, str(name), options, made)
                files.append(data_file)
                arguments |= {"data_file": data_file, "data_file_name": str(name)}
            await create_qcow2(file, size=size, **arguments)
            if name is not None:
                await data_file.flush()
        else:
            header: bytes = arguments.get("crypto_header", b"")
            size += len(header)
            await file.truncate(size)
            await _preallocate(images, file, size, str(options.get("preallocation", "off")))
            if header:
                await file.write(0, header)
            await file.flush()
        for node in files:
            await images.close(node)
    except BaseException:
        for path in made:
            with suppress(OSError):
                os.unlink(path)
        raise


async def _arguments(images: Images, image_format: str, options: Options) -> dict[str, Any]:
    """What ``create_qcow2`` takes; all that is wrong with it is said before a file is touched."""
    if image_format != "qcow2":
        preallocation = options.get("preallocation", "off")
        if preallocation == "metadata" and image_format == "raw":
            raise BlockError("Unsupported preallocation mode: metadata")
        if preallocation not in ("off", "metadata", "falloc", "full"):
            raise BlockError(f"Invalid parameter '{preallocation}'")
    arguments: dict[str, Any] = {}
    wanted: creation.Encryption | None = None
    if image_format == "luks":
        wanted = creation.luks_encryption(options)
    elif image_format == "qcow2":
        arguments = creation.qcow2_arguments(options)
        wanted = creation.encryption(options)
    if wanted is not None:
        passphrase = images.graph.environment.secret(wanted.secret)

        def make() -> bytes:
            return new_luks(
                passphrase,
                cipher=wanted.cipher,
                mode=wanted.mode,
                hash_name=wanted.hash_name,
                key_bytes=wanted.key_bytes,
                iter_time=wanted.iter_time,
            )

        arguments["crypto_header"] = await images.workers.run(make)
    return arguments


async def _empty_file(images: Images, filename: str, options: Options, made: list[str]) -> Node:
    """The protocol node of a file without a byte; in ``made`` if it was not there before."""
    if _make_file(filename):
        made.append(filename)
    file = await images.open_file(filename, writable=True)
    await file.truncate(0)
    host = file.host_file()
    if options.get("nocow") and host is not None:
        with suppress(OSError):  # a file system that always writes in place
            flags = fcntl.ioctl(host.fd, _GET_FLAGS, bytes(8))
            (value,) = struct.unpack("@L", flags)
            fcntl.ioctl(host.fd, _SET_FLAGS, struct.pack("@L", value | _NO_COW))
    return file


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


async def _preallocate(images: Images, file: Node, size: int, mode: str) -> None:
    host = file.host_file()
    if mode in ("falloc", "full") and size and host is not None:
        await images.workers.run(os.posix_fallocate, host.fd, 0, size)
