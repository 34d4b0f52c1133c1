"""NBD commands that have to wait: one coroutine each.

Specification: NBD doc/proto.md, "Request types".

Runs on the loop. A request that comes here was checked (``transmission.refusal``). Each coroutine
returns the buffers of the whole reply; an ``OSError`` that escapes becomes an error reply.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from errno import EINVAL, EOPNOTSUPP, EPERM
from typing import Final, TypeAlias

from liveblockd.exports.backend import BlockStatus, Buffer
from liveblockd.exports.nbd_export import NbdExport
from liveblockd.nbd.constants import (
    ALLOCATION_DEPTH,
    BASE_ALLOCATION,
    MAX_EXTENTS,
    Command,
    CommandFlag,
)
from liveblockd.nbd.errno import NbdError, nbd_error
from liveblockd.nbd.metadata import (
    Extent,
    allocation_extents,
    clipped,
    depth_extents,
    merged,
)
from liveblockd.nbd.transmission import (
    Request,
    data_chunk,
    error_chunk,
    hole_chunk,
    none_chunk,
    refusal,
    simple_reply,
    status_chunk,
)
from liveblockd.storage.copy_engine import is_zero

log = logging.getLogger(__name__)

#: a reply to a READ of so many bytes is looked through for zeros; below, sending them is cheaper
HOLE_MINIMUM: Final = 64 << 10
#: bytes that CACHE reads at a time
CACHE_STEP: Final = 1 << 20

Reply: TypeAlias = tuple[Buffer, ...]


@dataclass(frozen=True, slots=True)
class Session:
    """What was negotiated, and the replies to what cannot be done."""

    export: NbdExport
    structured: bool = False
    contexts: tuple[str, ...] = ()  # the id of each is its index

    def refused(self, request: Request) -> bytes:
        """The reply to a request that cannot be taken; nothing for one that can."""
        export = self.export
        refused = refusal(
            request,
            size=export.backend.length,
            read_only=export.read_only,
            structured=self.structured,
            contexts=bool(self.contexts),
        )
        return b"" if refused is None else self._error(request, refused.error, refused.message)

    def failed(self, request: Request, error: Exception) -> bytes:
        """The reply to a request that ended so; anything but an OSError is logged."""
        if isinstance(error, OSError):
            return self._error(request, nbd_error(error.errno), error.strerror or str(error))
        log.error("NBD %s failed by a defect", Command(request.command).name, exc_info=error)
        return self._error(request, NbdError.EIO, "internal error")

    def _error(self, request: Request, error: NbdError, message: str) -> bytes:
        if self.structured:
            return error_chunk(request.cookie, error, message)
        return simple_reply(request.cookie, error)


def read_reply(session: Session, request: Request, data: Buffer) -> Reply:
    """The reply to a READ that got ``data``; a structured one may say that it is a hole."""
    flags, _, cookie, offset, length = request
    if not session.structured:
        return simple_reply(cookie), data
    if not length:
        return (none_chunk(cookie),)
    if length >= HOLE_MINIMUM and not flags & CommandFlag.DF and is_zero(data):
        return (hole_chunk(cookie, offset, length),)
    return data_chunk(cookie, offset, length), data


async def read(session: Session, request: Request, _: Buffer) -> Reply:
    """READ."""
    data: Buffer = b""
    if request.length:
        data = await session.export.backend.read(request.offset, request.length)
    return read_reply(session, request, data)


async def _changed(session: Session, request: Request) -> Reply:
    """The end of a request that changed something: durable first where that was asked for."""
    if request.flags & CommandFlag.FUA or session.export.writethrough:
        await session.export.backend.flush()
    return (simple_reply(request.cookie),)


async def write(session: Session, request: Request, payload: Buffer) -> Reply:
    """WRITE."""
    if request.length:
        await session.export.backend.write(request.offset, payload)
    return await _changed(session, request)


async def flush(session: Session, request: Request, _: Buffer) -> Reply:
    """FLUSH: covers what any connection wrote, for the backend is one for all."""
    await session.export.backend.flush()
    return (simple_reply(request.cookie),)


async def trim(session: Session, request: Request, _: Buffer) -> Reply:
    """TRIM: a hint; a backend that cannot is no error."""
    if request.length:
        try:
            await session.export.backend.discard(request.offset, request.length)
        except OSError as error:
            if error.errno != EOPNOTSUPP:
                raise
    return await _changed(session, request)


async def cache(session: Session, request: Request, _: Buffer) -> Reply:
    """CACHE: read once, so that the page cache of the host has it."""
    offset, end = request.offset, request.offset + request.length
    while offset < end:
        part = min(CACHE_STEP, end - offset)
        await session.export.backend.read(offset, part)
        offset += part
    return (simple_reply(request.cookie),)


async def write_zeroes(session: Session, request: Request, _: Buffer) -> Reply:
    """WRITE_ZEROES; ENOTSUP is an answer to FAST_ZERO alone."""
    fast_only = bool(request.flags & CommandFlag.FAST_ZERO)
    if request.length:
        try:
            await session.export.backend.write_zeroes(
                request.offset,
                request.length,
                may_unmap=not request.flags & CommandFlag.NO_HOLE,
                fast_only=fast_only,
            )
        except OSError as error:
            if error.errno == EOPNOTSUPP and not fast_only:
                raise OSError(EINVAL, "Invalid argument") from error
            raise
    return await _changed(session, request)


async def block_status(session: Session, request: Request, _: Buffer) -> Reply:
    """BLOCK_STATUS: a chunk for each context; each may cover less than was asked for."""
    if not session.export.backend.active:
        raise OSError(EPERM, "export is inactive")
    one = bool(request.flags & CommandFlag.REQ_ONE)
    needs_runs = any(c in (BASE_ALLOCATION, ALLOCATION_DEPTH) for c in session.contexts)
    runs = await _runs(session, request, one=one) if needs_runs else ()
    chunks: list[Buffer] = []
    for context_id, context in enumerate(session.contexts):
        extents = clipped(_extents(session, request, context, runs), request.length, one=one)
        done = context_id == len(session.contexts) - 1
        chunks.append(status_chunk(request.cookie, context_id, extents, done=done))
    return tuple(chunks)


async def _runs(session: Session, request: Request, *, one: bool) -> Sequence[BlockStatus]:
    runs: list[BlockStatus] = []
    offset, end = request.offset, request.offset + request.length
    while offset < end and len(runs) < MAX_EXTENTS:
        part = await session.export.backend.block_status(offset, end - offset)
        assert part, "block status of nothing"
        runs += part
        offset += sum(run[0] for run in part)
        if one:
            break
    return runs


def _extents(
    session: Session, request: Request, context: str, runs: Iterable[BlockStatus]
) -> list[Extent]:
    if context == BASE_ALLOCATION:
        return allocation_extents(runs)
    if context == ALLOCATION_DEPTH:
        return depth_extents(runs)
    return merged(session.export.bitmaps[context](request.offset, request.length))


Handler: TypeAlias = Callable[[Session, Request, Buffer], Awaitable[Reply]]

HANDLERS: Final[dict[int, Handler]] = {
    Command.READ: read,
    Command.WRITE: write,
    Command.FLUSH: flush,
    Command.TRIM: trim,
    Command.CACHE: cache,
    Command.WRITE_ZEROES: write_zeroes,
    Command.BLOCK_STATUS: block_status,
}
