"""``image rebase``: another backing file for an image, whose disk stays as it is.

Runs on an event loop of its own. Options and exit status are those of ``qemu-img rebase``.
Without ``-u`` both backing chains are read: what differs is first written to the image. The header
names the new one only when all of that is durable (``change_backing_file``), so that a crash at
any time leaves the disk as it was, on the old backing file or the new one.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Final

import numpy as np

from liveblockd.errors import BlockError
from liveblockd.graph import chain, filenames
from liveblockd.graph.backend import Backend
from liveblockd.graph.node import Node
from liveblockd.imagetool.images import Images, ToolError, reason
from liveblockd.imagetool.output import Progress
from liveblockd.imagetool.source import Holds, Source
from liveblockd.storage.driver import Buffer

#: bytes compared at a time; a multiple of every cluster size
PIECE: Final = 2 << 20


async def run(args: argparse.Namespace) -> int:
    """The command."""
    if args.backing_format is not None and not args.backing:
        args.backing_format = None  # nothing has that format
    async with Images(args.objects) as images:
        node = await images.open(args.filename, args.format, writable=True, backing=not args.unsafe)
        if not args.unsafe:
            new = await _open_new(images, args, node)
            try:
                await _copy_differences(images, args, node, new)
            except OSError as error:
                raise ToolError(f"error while rebasing: {reason(error)}") from error
        try:
            if args.backing and args.backing_format is None:
                raise BlockError("backing format must be specified")
            await node.driver.change_backing_file(args.backing or None, args.backing_format)
        except (BlockError, OSError) as error:
            raise ToolError(
                f"Could not change the backing file to '{args.backing}': {reason(error)}"
            ) from error
    return 0


async def _open_new(images: Images, args: argparse.Namespace, node: Node) -> Node | None:
    if not args.backing:
        return None
    name = filenames.full_backing_filename(node, args.backing)
    try:
        return await images.open(name, args.backing_format)
    except ToolError as error:
        message = error.message.removeprefix(f"Could not open '{name}': ")
        raise ToolError(f"Could not open new backing file '{name}': {message}") from error


async def _copy_differences(
    images: Images, args: argparse.Namespace, node: Node, new: Node | None
) -> None:
    """Write to the image what only its old backing file has; raises OSError."""
    image = await images.use(node, writable=True)
    below = chain.layer_below(node)
    old_disk = None if below is None else await images.use(below)
    new_disk = None if new is None else await images.use(new)
    progress = Progress(args.progress)
    unit = node.driver.limits().get("write-zeroes-alignment", 512)  # a cluster, or a part of one
    async for run in Source([image], above_backing=True).runs():
        # Without an old backing file what nobody has reads as zeros, and must stay so.
        unheld = run.holds is Holds.BELOW or (below is None and run.holds is Holds.ZEROES)
        for offset in range(run.offset, run.offset + run.length, PIECE) if unheld else ():
            length = min(PIECE, run.offset + run.length - offset)
            old, other = (
                await _read(old_disk, offset, length),
                await _read(new_disk, offset, length),
            )
            for first, last in differences(old, other, unit):
                part = memoryview(old)[first:last]
                if below is None:
                    # Zeros have to be written: an image without a backing file keeps no note of
                    # zeros that it has anyway, and the new backing file would show.
                    await image.write(offset + first, part)
                else:
                    await _store(image, offset + first, part, unit)
            progress.update(offset + length, image.length)
    await image.flush()
    progress.update(image.length, image.length)
    progress.end()


async def _store(image: Backend, offset: int, data: memoryview, unit: int) -> None:
    """Write what the old backing file has; zeros as such."""
    zero = np.logical_not(np.logical_or.reduceat(data, np.arange(0, len(data), unit)))
    edges = np.flatnonzero(np.diff(zero)) + 1
    for first, last in itertools.pairwise((0, *(int(e) * unit for e in edges), len(data))):
        if zero[first // unit]:
            await image.write_zeroes(offset + first, last - first)
        else:
            await image.write(offset + first, data[first:last])


async def _read(disk: Backend | None, offset: int, length: int) -> Buffer:
    """Bytes of a backing file; zeros past its end, and without one."""
    inside = 0 if disk is None else max(0, min(length, disk.length - offset))
    if disk is None or not inside:
        return bytes(length)
    data = await disk.read(offset, inside)
    return data if inside == length else bytes(data).ljust(length, b"\0")


def differences(old: Buffer, new: Buffer, unit: int) -> list[tuple[int, int]]:
    """Ranges, in whole units but for the end, in which some byte differs."""
    left, right = np.frombuffer(old, np.uint8), np.frombuffer(new, np.uint8)
    if np.array_equal(left, right):
        return []
    differs = np.logical_or.reduceat(left != right, np.arange(0, len(left), unit))
    edges = np.flatnonzero(np.diff(differs, prepend=False, append=False)).reshape(-1, 2)
    return [(int(a) * unit, min(int(b) * unit, len(left))) for a, b in edges]
