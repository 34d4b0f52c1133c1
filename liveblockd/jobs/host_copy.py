"""A piece of a job that a worker copies from host file to host file, into another node.

Runs on the event loop, in flight on both nodes; ``clone_or_copy`` and ``populate_from`` run on
workers.

Invariants: who calls has the range of the target to itself until this returns. A target of a format
gets only clusters of which it holds nothing, so what the driver's compare-and-set leaves alone was
never the job's. Requests that a node's options want looked at (detect-zeroes, write-threshold) are
not made here. The source may be in use: bytes of a cluster that a guest rewrites, or gives up,
meanwhile are any bytes, and whoever copies a disk in use copies that range again.

Errors: OSError of either side, HaltedError, and then some of it may have been copied.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import aclosing, suppress
from typing import Final

from liveblockd.formats.qcow2.populate import clone_or_copy
from liveblockd.graph import chain
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Node
from liveblockd.jobs.planning import LEAST_COPY
from liveblockd.runtime import halting
from liveblockd.storage.copy_engine import Transfer
from liveblockd.storage.driver import BlockDriver, ExtentKind, HostFile
from liveblockd.storage.options import BlockdevDetectZeroesOptions

#: bytes that are zeros, or not, together where the target has no clusters
UNIT: Final = 64 << 10
#: O_DIRECT wants blocks; no block is larger
DIRECT_ALIGNMENT: Final = 4096


def guest_is_served(graph: Graph) -> bool:
    """Whether somebody may soon wait for a piece that is being copied: then pieces are small."""
    now = asyncio.get_running_loop().time()
    return graph.environment.workers.demand.guests.is_recent(now)


async def copy_runs(
    graph: Graph, source: Node, target: Node, offset: int, length: int, *, may_unmap: bool
) -> list[tuple[int, int]]:
    """Copy of a range what layers of ``source`` have in long pieces of their files.

    The ranges (offset, length) that are left: they have to be read and written, also where a copy
    failed, for that tells which side it was. Raises OSError of a map.
    """
    left: list[tuple[int, int]] = []
    runs: list[tuple[int, chain.Run]] = []
    position = offset
    if source.is_filter:  # it may do something to what is read
        return [(offset, length)]
    async with aclosing(chain.resolve(source, None, offset, length)) as found:
        async for run in found:
            runs.append((position, run))
            position += run.length
    for start, run in runs:
        for begin, count in await _free_parts(target, start, run.length):
            done = False
            if count >= LEAST_COPY:
                with suppress(OSError):
                    done = await _copy_part(
                        graph, run, start, target, (begin, count), may_unmap=may_unmap
                    )
            if done:
                pass
            elif left and sum(left[-1]) == begin:
                left[-1] = (left[-1][0], left[-1][1] + count)
            else:
                left.append((begin, count))
    return left


async def _free_parts(target: Node, offset: int, length: int) -> list[tuple[int, int]]:
    """A range, cut where a target of a format holds something: there nothing is copied to."""
    if length < LEAST_COPY or type(target.driver).populate_from is BlockDriver.populate_from:
        return [(offset, length)]
    parts: list[tuple[int, int]] = []
    end = offset + length
    while offset < end:
        for extent in await target.map(offset, end - offset):
            parts.append((offset, extent.length))
            offset += extent.length
    return parts


async def _copy_part(
    graph: Graph,
    run: chain.Run,
    start: int,
    target: Node,
    part: tuple[int, int],
    *,
    may_unmap: bool,
) -> bool:
    """A part of a run, which starts at ``start``; as ``copy_piece``."""
    if run.kind is not ExtentKind.DATA or run.layer is None:
        return False
    if run.layer is target:  # the base of a commit has it already
        return False
    file = chain.host_file(run.layer)
    if file is None:
        return False
    at = run.host_offset + part[0] - start
    return await copy_piece(graph, file, at, target, part, may_unmap=may_unmap)


async def copy_piece(
    graph: Graph,
    source: HostFile,
    source_offset: int,
    target: Node,
    piece: tuple[int, int],
    *,
    may_unmap: bool,
    unit: int = UNIT,
) -> bool:
    """Copy to ``piece`` (offset, length) of ``target``; False, and nothing done, where that cannot.

    Raises OSError.
    """
    offset, length = piece
    if (
        target.is_filter
        or target.write_threshold
        or target.detect_zeroes is not BlockdevDetectZeroesOptions.OFF
    ):
        return False
    if type(target.driver).populate_from is not BlockDriver.populate_from:
        if source.direct and source_offset % DIRECT_ALIGNMENT:
            return False
        # What the image holds already would be left as it is.
        held = await target.map(offset, length)
        if held[0].kind is not ExtentKind.UNALLOCATED or held[0].length < length:
            return False
        await target.driver.populate_from(offset, length, source, source_offset)
        target.record(offset, length)
        return True
    host = target.host_file()
    if host is None or host.direct or source.direct:
        return False
    await _copy_to_file(graph, source, source_offset, target, host, piece, may_unmap, unit)
    return True


async def _copy_to_file(
    graph: Graph,
    source: HostFile,
    source_offset: int,
    target: Node,
    host: HostFile,
    piece: tuple[int, int],
    may_unmap: bool,
    unit: int,
) -> None:
    """Where guest offsets are those of the file; what may be there already gives way to zeros."""
    offset, length = piece
    fds: list[int] = []
    try:
        fds += [os.dup(source.fd)]
        fds += [os.dup(host.fd)]
    except OSError:
        for fd in fds:
            os.close(fd)
        raise
    transfer = Transfer(fds[0], source_offset, fds[1], offset, length, unit)
    try:
        copied = await halting.run(graph.environment.workers.copies, clone_or_copy, transfer)
    finally:
        target.record(offset, length)
    first = last = -1
    for index in [*copied.zero.nonzero()[0].tolist(), -1]:
        if index != last:
            if last > first:
                start, end = offset + first * unit, min(offset + last * unit, offset + length)
                await target.write_zeroes(start, end - start, may_unmap=may_unmap)
            first = index
        last = index + 1
