"""``image convert``: the bytes of an image, whatever its chain, into a new one.

Runs on an event loop of its own; files of the host are copied by workers. What the chain says is
zeros is not read, and zeros in its data take no space in the target. The target is durable when the
command ends, unless ``-t unsafe`` says that nobody needs that.

Invariants: pieces are written in the order of their offsets, so that what is contiguous for the
guest is so in the file. Exit status and words are those of ``qemu-img convert``.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Final, NamedTuple

import numpy as np

from liveblockd.errors import BlockError
from liveblockd.graph import chain
from liveblockd.graph.backend import Backend
from liveblockd.graph.node import Node
from liveblockd.imagetool import create, creation
from liveblockd.imagetool.images import Images, ToolError, reason, size_of
from liveblockd.imagetool.output import Progress
from liveblockd.storage.copy_engine import copy_extent, copy_nonzero, zero_clusters
from liveblockd.storage.driver import Buffer, ExtentKind, HostFile

#: bytes read and written at a time
PIECE: Final = 2 << 20
#: pieces that are read before the one that is written
AHEAD: Final = 4
#: bytes a worker copies between files before it tells how far it is
_SPAN: Final = 64 << 20
_SECTOR: Final = 512


class _Run(NamedTuple):
    """Bytes of the source that are not known to be zeros."""

    offset: int
    length: int
    file: HostFile | None  # where a worker finds them
    host_offset: int


async def run(args: argparse.Namespace) -> int:
    """The command."""
    if args.compress:
        raise ToolError("Compression is not supported for new images")
    sparse = (
        size_of(args.sparse_size, "buffer size for sparse output") if args.sparse_size else 4096
    )
    if sparse % _SECTOR or sparse > PIECE:
        raise ToolError(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up "
            f"to {PIECE}. Select 0 to disable sparse detection (fully allocates output)."
        )
    options = creation.parse_options(args.options, args.output_format)
    async with Images(args.objects) as images:
        source = await images.open(args.source, args.format, force_share=args.force_share)
        reader = await images.use(source)
        size = source.driver.virtual_size
        if not args.no_create:
            await _create(images, args, options, size)
        target = await images.open(
            args.target,
            args.output_format,
            writable=True,
            backing=False,
            no_flush=args.target_cache == "unsafe",
        )
        writer = await images.use(target, writable=True)
        if writer.length < size:
            raise ToolError("output file is smaller than input file")
        job = _Convert(images, reader, writer, args, sparse)
        try:
            await job.run()
        except OSError as error:
            raise ToolError(f"error while converting: {reason(error)}") from error
    return 0


async def _create(
    images: Images, args: argparse.Namespace, options: creation.Options, size: int
) -> None:
    if args.backing is not None:
        if args.backing_format is None:
            raise ToolError("Use of backing file requires explicit backing format")
        options |= {"backing_file": args.backing, "backing_fmt": args.backing_format}
    options.setdefault("size", size)
    try:
        await create.create_image(images, args.target, args.output_format, options)
    except (BlockError, OSError) as error:
        raise ToolError(
            f"{args.target}: error while converting {args.output_format}: {reason(error)}"
        ) from error


class _Convert:
    """One copy."""

    def __init__(
        self,
        images: Images,
        source: Backend,
        target: Backend,
        args: argparse.Namespace,
        sparse: int,
    ) -> None:
        self._workers = images.workers
        self._source = source
        self._target = target
        self._sparse = sparse
        self._progress = Progress(args.progress)
        # A new image reads as zeros, unless there is something below it.
        blank = not args.no_create and args.backing is None
        self._blank = blank or args.target_is_zero
        self._file = self._target_file() if self._blank else None

    def _target_file(self) -> HostFile | None:
        """The file that the target is, if its bytes are those of the guest."""
        node = self._target.node
        return None if node.driver_class.driver_name == "qcow2" else chain.host_file(node)

    async def run(self) -> None:
        """All of it."""
        length = self._source.length
        position = 0
        pending: deque[tuple[int, asyncio.Task[Buffer]]] = deque()
        self._progress.update(0, length)
        try:
            async for found in self._runs():
                if not self._blank and position < found.offset:
                    await self._drain(pending, length)
                    await self._zero(position, found.offset)
                position = found.offset + found.length
                if found.file is not None and self._file is not None:
                    await self._copy(found, length)
                    continue
                for offset in range(found.offset, position, PIECE):
                    part = min(PIECE, position - offset)
                    task = asyncio.ensure_future(self._source.read(offset, part))
                    pending.append((offset, task))
                    if len(pending) > AHEAD:
                        await self._write_next(pending, length)
            await self._drain(pending, length)
            if not self._blank and position < length:
                await self._zero(position, length)
            await self._target.flush()
            self._progress.update(length, length)
        finally:
            for _, task in pending:
                task.cancel()
            await asyncio.gather(*(task for _, task in pending), return_exceptions=True)
            self._progress.end()

    async def _runs(self) -> AsyncIterator[_Run]:
        """What has to be copied."""
        position = 0
        length = self._source.length
        async for run in chain.resolve(self._source.node, None, 0, length):
            if not run.zero:
                file = None
                if run.kind is ExtentKind.DATA and isinstance(run.layer, Node):
                    file = chain.host_file(run.layer)
                yield _Run(position, run.length, file, run.host_offset)
            position += run.length

    async def _drain(self, pending: deque[tuple[int, asyncio.Task[Buffer]]], total: int) -> None:
        while pending:
            await self._write_next(pending, total)

    async def _write_next(
        self, pending: deque[tuple[int, asyncio.Task[Buffer]]], total: int
    ) -> None:
        offset, task = pending[0]
        data = await task
        pending.popleft()
        length = len(data)
        for first, last in self._data_in(data):
            await self._target.write(offset + first, memoryview(data)[first:last])
        self._progress.update(offset + length, total)

    def _data_in(self, data: Buffer) -> list[tuple[int, int]]:
        """Ranges that are to be written: all but the zeros that the target has anyway."""
        length = len(data)
        unit = self._sparse
        if not unit or not self._blank:
            return [(0, length)]
        whole = length // unit * unit
        zero = np.zeros(-(-length // unit), np.bool_)
        if whole:
            zero[: whole // unit] = zero_clusters(memoryview(data)[:whole], unit)
        edges = np.flatnonzero(np.diff(~zero, prepend=False, append=False))
        return [
            (int(first) * unit, min(int(last) * unit, length))
            for first, last in edges.reshape(-1, 2)
        ]

    async def _copy(self, found: _Run, total: int) -> None:
        """From file to file, by a worker."""
        assert found.file is not None and self._file is not None
        source, target = found.file.fd, self._file.fd
        for done in range(0, found.length, _SPAN):
            part = min(_SPAN, found.length - done)
            here, there = found.host_offset + done, found.offset + done
            if self._sparse:
                await self._workers.run(
                    copy_nonzero, source, here, target, there, part, self._sparse
                )
            else:
                await self._workers.run(copy_extent, source, here, target, there, part)
            self._progress.update(there + part, total)

    async def _zero(self, start: int, end: int) -> None:
        for offset in range(start, end, 1 << 30):
            await self._target.write_zeroes(offset, min(1 << 30, end - offset), may_unmap=True)
