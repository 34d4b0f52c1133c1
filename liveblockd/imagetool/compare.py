"""``image compare``: do two images hold the same bytes?

Runs on an event loop of its own. Exit status and words are those of ``qemu-img compare``: 0 equal,
1 different, 2 an image cannot be opened, 4 it cannot be read. What both images say are zeros is
not read.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable
from typing import Final, TypeVar

import numpy as np

from liveblockd.graph.backend import Backend, StatusRun
from liveblockd.imagetool.images import Images, ToolError, reason
from liveblockd.imagetool.output import Progress, say
from liveblockd.storage.driver import Buffer

T = TypeVar("T")

#: bytes compared at a time
_PIECE: Final = 2 << 20
_SECTOR: Final = 512
DIFFERENT, NOT_OPENED, NOT_READ = 1, 2, 4


async def run(args: argparse.Namespace) -> int:
    """The command."""
    async with Images(args.objects) as images:
        sides = []
        for filename, image_format in (
            (args.filename1, args.format),
            (args.filename2, args.format2),
        ):
            try:
                node = await images.open(filename, image_format, force_share=args.force_share)
                sides.append(_Side(filename, await images.use(node)))
            except ToolError as error:
                raise ToolError(error.message, NOT_OPENED) from error
        return await _compare(sides[0], sides[1], args)


class _Side:
    """One image, and what is known of the range that comes next."""

    def __init__(self, filename: str, backend: Backend) -> None:
        self.filename = filename
        self.backend = backend
        self.length = backend.node.driver.virtual_size
        self._end = backend.length  # a file may end within its last sector
        self._start = 0
        self._runs: list[StatusRun] = []

    async def status(self, offset: int) -> tuple[StatusRun, int]:
        """The run at ``offset``, and how many bytes of it come from there on."""
        if offset >= self._end:
            return StatusRun(1 << 62, True, True, 0), 1 << 62
        while self._runs and offset >= self._start + self._runs[0].length:
            self._start += self._runs.pop(0).length
        if not self._runs:
            self._start = offset
            # `status` is asked for a prefix: what is far away is not worth the memory.
            span = min(self._end - offset, 1 << 30)
            self._runs = await self._guard(self.backend.block_status(offset, span, limit=1024))
        run = self._runs[0]
        return run, self._start + run.length - offset

    async def read(self, offset: int, length: int) -> Buffer:
        """Bytes; zeros beyond the end."""
        inside = max(0, min(length, self._end - offset))
        if not inside:
            return bytes(length)
        data = await self._guard(self.backend.read(offset, inside))
        return data if inside == length else bytes(data).ljust(length, b"\0")

    async def _guard(self, request: Awaitable[T]) -> T:
        try:
            return await request
        except OSError as error:
            message = f"Error while reading '{self.filename}': {reason(error)}"
            raise ToolError(message, NOT_READ) from error


async def _compare(one: _Side, two: _Side, args: argparse.Namespace) -> int:
    if one.length != two.length and args.strict:
        say("Strict mode: Image size mismatch!", quiet=args.quiet)
        return DIFFERENT
    total, common = max(one.length, two.length), min(one.length, two.length)
    progress = Progress(args.progress)
    offset = 0
    while offset < total:
        if offset == common:
            say("Warning: Image size mismatch!", quiet=args.quiet)
        first, length1 = await one.status(offset)
        second, length2 = await two.status(offset)
        length = min(length1, length2, (common if offset < common else total) - offset)
        if args.strict and (first.zero, first.hole) != (second.zero, second.hole):
            say(f"Strict mode: Offset {offset} block status mismatch!", quiet=args.quiet)
            return DIFFERENT
        if not (first.zero and second.zero):
            length = min(length, _PIECE)
            data = await asyncio.gather(one.read(offset, length), two.read(offset, length))
            if (where := difference(*data)) is not None:
                say(f"Content mismatch at offset {offset + where}!", quiet=args.quiet)
                return DIFFERENT
        offset += length
        progress.update(offset, total)
    progress.end()
    say("Images are identical.", quiet=args.quiet)
    return 0


def difference(one: Buffer, two: Buffer) -> int | None:
    """The offset of the first sector that differs, in bytes; None without one."""
    left, right = np.frombuffer(one, np.uint8), np.frombuffer(two, np.uint8)
    if np.array_equal(left, right):
        return None
    return int((left != right).argmax()) // _SECTOR * _SECTOR
