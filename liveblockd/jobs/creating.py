"""New images, each by the steps of its driver: what the job ``create`` does.

Specification: qapi/block-core.json, BlockdevCreateOptions. Runs on the event loop; calls of the
file system and the derivation of keys are jobs for workers.

Invariants: what an image is made in has no other writer and stays as it is in the graph until the
image is durable. Cancelled or failed, a file that was made is removed; an image that was begun in a
node is none, for its header is written last.

Errors: BlockError in QEMU's words; OSError.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import os
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from errno import EFBIG, EINVAL
from typing import Any, Final

from liveblockd.errors import BlockError
from liveblockd.formats.luks_new import LuksCreateOptions, new_luks_header
from liveblockd.formats.qcow2.create import create_qcow2
from liveblockd.graph import filenames
from liveblockd.graph.graph import MAX_LENGTH, Graph
from liveblockd.graph.new_file import new_file
from liveblockd.graph.node import Node
from liveblockd.jobs.user import JobUser
from liveblockd.runtime.unbroken import to_its_end
from liveblockd.storage.driver import Permission
from liveblockd.storage.options import BlockdevOptions

_BLOCKER: Final = "block device is in use by block job: create"
_USED: Final = Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE
_SHARED: Final = Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED
_MAX_BACKING_NAME: Final = 1023
_PIECE: Final = 4 << 20
_FALLOC_PIECE: Final = 1 << 30
# of linux/fs.h
_GET_FLAGS, _SET_FLAGS, _NO_COW = 0x80086601, 0x40086602, 0x00800000
_GET_XATTR, _SET_XATTR, _EXTENT_SIZE = 0x801C581F, 0x401C5820, 0x00000800
_XATTR: Final = struct.Struct("=5I8s")
_DEFAULT_EXTENT_HINT: Final = 1 << 20


class PreallocMode(enum.StrEnum):
    """How much of the space is taken beforehand."""

    OFF = "off"
    METADATA = "metadata"
    FALLOC = "falloc"
    FULL = "full"


# -- file


@dataclass(frozen=True, slots=True)
class NewHostFile:
    """Sizes in bytes."""

    filename: str
    size: int
    preallocation: PreallocMode = PreallocMode.OFF
    nocow: bool = False
    extent_size_hint: int | None = None


async def create_file(graph: Graph, new: NewHostFile) -> None:
    """A file of the host that reads as zeros."""
    if (new.extent_size_hint or 0) > 0xFFFFFFFF:
        raise BlockError("Extent size hint is too large")
    if new.preallocation is PreallocMode.METADATA:
        raise BlockError("Unsupported preallocation mode: metadata", errno=95)
    path = filenames.protocol_options(new.filename).get("filename", new.filename)
    async with new_file(graph, path, new.filename) as made:
        file = made.node
        host = file.host_file()
        assert host is not None, "the driver file"
        await graph.environment.workers.run(_set_attributes, host.fd, new)
        try:
            if new.size < 1 << 63:
                await file.truncate(new.size)
            else:  # a negative number, to QEMU
                raise OSError(EINVAL, os.strerror(EINVAL))
        except OSError as error:
            raise BlockError.from_os_error("Could not resize file", error) from error
        await _take_space(graph, file, new.size, new.preallocation)
        await file.flush()


def _set_attributes(fd: int, new: NewHostFile) -> None:
    """On a worker: hints, which not every file system knows."""
    if new.nocow:
        with contextlib.suppress(OSError):
            (flags,) = struct.unpack("@L", fcntl.ioctl(fd, _GET_FLAGS, bytes(8)))
            fcntl.ioctl(fd, _SET_FLAGS, struct.pack("@L", flags | _NO_COW))
    hint = _DEFAULT_EXTENT_HINT if new.extent_size_hint is None else new.extent_size_hint
    if hint:
        with contextlib.suppress(OSError):
            flags, _, *rest = _XATTR.unpack(fcntl.ioctl(fd, _GET_XATTR, bytes(_XATTR.size)))
            fcntl.ioctl(fd, _SET_XATTR, _XATTR.pack(flags | _EXTENT_SIZE, hint, *rest))


async def _take_space(graph: Graph, file: Node, size: int, mode: PreallocMode) -> None:
    """In pieces, so that a cancel does not wait for all of it."""
    host = file.host_file()
    if mode is PreallocMode.FALLOC and host is not None:
        for offset in range(0, size, _FALLOC_PIECE):
            length = min(_FALLOC_PIECE, size - offset)
            try:
                await to_its_end(_allocate(graph, host.fd, offset, length))
            except OSError as error:
                raise BlockError.from_os_error(
                    "Could not preallocate data for the new file", error
                ) from error
    elif mode in (PreallocMode.FALLOC, PreallocMode.FULL):
        zeros = memoryview(bytes(min(_PIECE, size)))
        for offset in range(0, size, _PIECE):
            try:
                await file.write(offset, zeros[: size - offset])
            except OSError as error:
                raise BlockError.from_os_error(
                    "Could not write zeros for preallocation", error
                ) from error


async def _allocate(graph: Graph, fd: int, offset: int, length: int) -> None:
    await graph.environment.workers.run(os.posix_fallocate, fd, offset, length)


# -- formats in nodes


@contextlib.asynccontextmanager
async def place_for_image(graph: Graph, reference: str | BlockdevOptions) -> AsyncIterator[Node]:
    """The node that an image is to be made in; one that was opened for that is closed after it."""
    opened = None
    if isinstance(reference, str):
        node = graph.lookup(reference, reference)
    else:
        node = opened = await graph.open(reference, monitor_owned=False)
    try:
        async with graph.lock:
            if graph.nodes.get(node.name) is not node:
                raise BlockError(f"Node '{node.name}' is gone", errno=2)
            # What others forbid is told before what this forbids.
            user = await JobUser.attach(graph, node, _USED, Permission.ALL)
            try:
                await graph.set_backend_permissions(user, _USED, _SHARED)
                node.op_blockers.append(_BLOCKER)
            except BaseException:
                await graph.detach(user)
                raise
        try:
            yield node
        finally:
            node.op_blockers.remove(_BLOCKER)
            await graph.detach(user)
    finally:
        if opened is not None:
            await graph.unref(opened)


@dataclass(frozen=True, slots=True)
class NewQcow2:
    """``arguments``: of ``create_qcow2``, but for files, size and encryption."""

    file: str | BlockdevOptions
    size: int
    data_file: str | BlockdevOptions | None = None
    encrypt: LuksCreateOptions | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


async def create_qcow2_image(graph: Graph, new: NewQcow2) -> None:
    """A qcow2 image in a node, with or without an external data file."""
    async with contextlib.AsyncExitStack() as stack:
        file = await stack.enter_async_context(place_for_image(graph, new.file))
        arguments = dict(new.arguments)
        if new.data_file is not None:
            if (arguments.get("version") or 3) < 3:
                raise BlockError(
                    "External data files are only supported with compatibility level 1.1 and "
                    "above (use version=v3 or greater)"
                )
            data_file = await stack.enter_async_context(place_for_image(graph, new.data_file))
            arguments |= {"data_file": data_file, "data_file_name": data_file.filename}
        _check_size(new.size)
        _check_backing(arguments.get("backing_file"), arguments.get("backing_format"))
        if new.encrypt is not None:
            arguments["crypto_header"] = await new_luks_header(
                new.encrypt, graph.environment, prefix="encrypt."
            )
        try:
            await create_qcow2(file, size=new.size, **arguments)
        except BlockError as error:
            if error.errno != EFBIG:
                raise
            raise BlockError(
                "Could not resize image: Failed to grow the L1 table: File too large", errno=EFBIG
            ) from None
        for node in [file] if new.data_file is None else [file, data_file]:
            await node.flush()


def _check_size(size: int) -> None:
    if size % 512:
        raise BlockError("Image size must be a multiple of 512 bytes")
    if size >= 1 << 63:  # a negative number, to QEMU
        raise BlockError("Could not resize image: Image size cannot be negative")
    if size > MAX_LENGTH:
        raise BlockError(
            f"Could not resize image: offset({size}) exceeds maximum({MAX_LENGTH})", errno=EFBIG
        )


def _check_backing(name: str | None, image_format: str | None) -> None:
    if name is not None and len(name.encode()) > _MAX_BACKING_NAME:
        shown = "(null)" if image_format is None else image_format
        raise BlockError(
            f"Could not assign backing file '{name}' with format '{shown}': Invalid argument"
        )


@dataclass(frozen=True, slots=True)
class NewLuks:
    """A disk encrypted by LUKS and nothing else; ``size`` is the disk's, in bytes."""

    file: str | BlockdevOptions
    size: int
    options: LuksCreateOptions
    preallocation: PreallocMode = PreallocMode.OFF


async def create_luks_image(graph: Graph, new: NewLuks) -> None:
    """A LUKS image in a node; what it had is lost."""
    async with place_for_image(graph, new.file) as file:
        header = await new_luks_header(new.options, graph.environment)
        if new.size + len(header) > MAX_LENGTH:
            raise BlockError("The requested file size is too large", errno=EFBIG)
        await file.truncate(0)
        await file.truncate(len(header) + new.size)
        try:
            await _take_space(graph, file, len(header) + new.size, new.preallocation)
        except BaseException:
            with contextlib.suppress(OSError, BlockError):
                await to_its_end(file.truncate(0))  # others may need the room
            raise
        await file.flush()
        await file.write(0, header)
        await file.flush()
