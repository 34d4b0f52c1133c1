"""The exports of a daemon: made, listed, removed, whatever their type.

Specification: qapi/block-export.json. The id of an export is unique over all types.

An export is gone, and BLOCK_EXPORT_DELETED says so, when the last request of its last client has
ended and its node has been let go of; until then it is listed as shutting down and its id stays
taken.

Runs on the loop. Errors: ``BlockError``. A cancelled ``add`` leaves nothing behind; a removal that
has begun goes on to its end whoever is cancelled.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from typing import Final

from liveblockd.errors import BlockError
from liveblockd.events import BlockExportDeleted, Publisher
from liveblockd.exports.backend import BackendSource
from liveblockd.exports.export import Export, export_type
from liveblockd.exports.nbd_server import NbdServer
from liveblockd.exports.options import BlockExportOptions
from liveblockd.runtime.demand import Demand

log = logging.getLogger(__name__)

#: seconds a removal is waited for before the command returns and leaves the rest to the event
REMOVAL_WAIT: Final = 0.2

_ID: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*", re.ASCII)


class ExportRegistry:
    """All exports, by id, in the order in which they were made."""

    def __init__(
        self, publisher: Publisher, source: BackendSource, demand: Demand | None = None
    ) -> None:
        self.exports: dict[str, Export] = {}
        self.source = source
        self.nbd_server = NbdServer(demand)
        self._publisher = publisher
        self._removals: dict[str, asyncio.Task[None]] = {}

    async def add(
        self, options: BlockExportOptions, *, poll_ns: Callable[[str], int | None] | None = None
    ) -> None:
        """``block-export-add``; ``poll_ns`` gives ``poll-max-ns`` of an iothread that there is.

        The loop serves all exports: that, of the first one, is all that it takes of iothreads.
        """
        if not _ID.fullmatch(options.id):
            raise BlockError("Invalid block export id")
        if options.id in self.exports:
            raise BlockError(f"Block export id '{options.id}' is already in use")
        cls = export_type(options.type)
        backend = await self.source.attach(
            options.node_name, writable=options.writable, allow_inactive=options.allow_inactive
        )
        try:
            limits = _iothread_limits(options, poll_ns)
            if options.id in self.exports:  # somebody was faster
                raise BlockError(f"Block export id '{options.id}' is already in use")
            export = self.exports[options.id] = await cls.create(self, options, backend)
            if limits:
                export.poll_ns = limits[0]
        except BaseException:
            await asyncio.shield(self.source.release(backend))
            raise

    def find(self, export_id: str) -> Export:
        """The export with that id; raises BlockError."""
        try:
            return self.exports[export_id]
        except KeyError:
            raise BlockError(f"Export '{export_id}' is not found") from None

    async def remove(self, export_id: str, *, hard: bool = False) -> None:
        """``block-export-del``. Returns early if requests in flight take their time."""
        export = self.find(export_id)
        if export.shutting_down:
            raise BlockError(f"Export '{export_id}' is already shutting down")
        if not hard and export.in_use:
            raise BlockError(f"export '{export_id}' still in use")
        await asyncio.wait({self._begin_removal(export)}, timeout=REMOVAL_WAIT)

    async def remove_all(self, type_name: str | None = None) -> None:
        """Remove all (of one type), disconnect their clients, and wait for the end of that."""
        removals = {
            self._begin_removal(export)
            for export in self.exports.values()
            if type_name in (None, export.type_name)
        }
        if removals:
            await asyncio.wait(removals)

    async def stop_nbd_server(self) -> None:
        """``nbd-server-stop``: the socket, its clients and all NBD exports."""
        self.nbd_server.stop_listening()
        await self.remove_all("nbd")
        await self.nbd_server.closed()

    async def close(self) -> None:
        """The daemon ends."""
        if self.nbd_server.running:
            await self.stop_nbd_server()
        await self.remove_all()

    def _begin_removal(self, export: Export) -> asyncio.Task[None]:
        removal = self._removals.get(export.id)
        if removal is None:
            export.shutting_down = True
            export.request_shutdown()
            removal = asyncio.get_running_loop().create_task(self._removed(export))
            self._removals[export.id] = removal
        return removal

    async def _removed(self, export: Export) -> None:
        try:
            # What a client that is gone has asked for may be a thousand seconds of a low limit.
            with self.source.unhindered(export.backend):
                await export.drained()
            await self.source.release(export.backend)
        except Exception:  # the export is gone all the same: nobody can use it any more
            log.exception("export %s: its node could not be let go of", export.id)
        del self.exports[export.id]
        del self._removals[export.id]
        self._publisher.publish(BlockExportDeleted(id=export.id))


def _iothread_limits(
    options: BlockExportOptions, poll_ns: Callable[[str], int | None] | None
) -> list[int]:
    named, limits = options.iothread, []
    for name in [named] if isinstance(named, str) else named or []:
        limit = None if poll_ns is None else poll_ns(name)
        if limit is None:
            raise BlockError(f'iothread "{name}" not found')
        limits.append(limit)
    return limits
