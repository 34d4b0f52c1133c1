"""What a mirror or active commit has to copy, found out once: the first pass over the source.

Runs on the event loop. Invariants: nothing is copied here; zeros are made while no copy or mirrored
write to the target is under way. Errors: PieceFailedError, and then the range is looked at again.
"""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Final

from liveblockd.graph import chain
from liveblockd.graph.node import Node
from liveblockd.jobs.copying import KIB, ZERO_CHUNK, PieceFailedError

if TYPE_CHECKING:
    from liveblockd.jobs.mirror import MirrorCore

#: zeros between data are written with it when they are fewer
LEAST_ZEROES: Final = 64 * KIB


async def look_at(job: MirrorCore, offset: int, length: int, base: Node | None) -> None:
    """Call dirty what of a range is to be copied, make zeros of the rest; PieceFailedError."""
    holes: list[tuple[int, int]] = []
    position = offset

    async def ask() -> None:
        nonlocal position
        async with aclosing(chain.resolve(job.source, base, offset, length)) as found:
            async for run in found:
                if run.layer is not None:
                    job.bitmap.set_blocks(position, run.length)
                elif base is None and not job.target_is_zero:
                    holes.append((position, run.length))
                position += run.length

    try:
        with job.reading():
            await job.source_user.run(ask)
    except OSError as error:
        raise PieceFailedError("read", error) from error
    for first, count in holes:
        # In pieces, for there are targets that can only write zeros.
        for start in range(first, first + count, ZERO_CHUNK):
            await job.checkpoint()
            length = min(ZERO_CHUNK, first + count - start)
            try:
                await job.target_user.run(lambda s=start, n=length: _clear(job, s, n))  # type: ignore[misc]
            except OSError as error:
                raise PieceFailedError("write", error) from error


async def _clear(job: MirrorCore, offset: int, length: int) -> None:
    """Zeros where the target has or will have none. No copy or mirrored write is under way."""
    position = offset
    todo: list[tuple[int, int]] = []
    async with aclosing(chain.resolve(job.target, None, offset, length)) as found:
        async for run in found:
            if job.backing_to_come or job.whole_units or not run.zero:
                todo.append((position, run.length))
            position += run.length
    for start, count in todo:
        await job.target_user.store_zeroes(start, count, may_unmap=job.options.unmap)


async def parts_of(source: Node, offset: int, length: int) -> list[tuple[int, int, bool]]:
    """(offset, length, zero) of the range; a little zeros between data is called data."""
    parts: list[tuple[int, int, bool]] = []
    position = offset
    async with aclosing(chain.resolve(source, None, offset, length)) as found:
        async for run in found:
            zero = run.zero and (run.length >= LEAST_ZEROES or run.length == length)
            if parts and parts[-1][2] is zero:
                start, count, _ = parts.pop()
                parts.append((start, count + run.length, zero))
            else:
                parts.append((position, run.length, zero))
            position += run.length
    return parts
