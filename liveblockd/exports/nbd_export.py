"""The export type ``nbd``: a name under which the NBD server offers a node.

Specification: qapi/block-export.json, BlockExportOptionsNbd.

Runs on the loop. The size told to a client is the one at that moment; requests are checked against
the size when they come. Errors: ``BlockError`` from ``create``.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

from liveblockd.errors import BlockError
from liveblockd.exports.backend import DirtySource, ExportBackend
from liveblockd.exports.export import Export, register_export
from liveblockd.exports.options import BlockExportOptions
from liveblockd.nbd.constants import (
    ALLOCATION_DEPTH,
    BASE_ALLOCATION,
    DIRTY_BITMAP,
    MAX_STRING,
)
from liveblockd.nbd.options import ExportInfo
from liveblockd.qapi import Alternate, QapiModel

if TYPE_CHECKING:
    from liveblockd.exports.nbd_connection import NbdConnection
    from liveblockd.exports.registry import ExportRegistry


class BlockDirtyBitmap(QapiModel):
    """A dirty bitmap by node and name."""

    node: str
    name: str


BlockDirtyBitmapOrStr = Annotated[str | BlockDirtyBitmap, Alternate("BlockDirtyBitmapOrStr")]


class NbdExportOptions(BlockExportOptions):
    """``block-export-add`` with type nbd."""

    name: str | None = None  # default: the node name
    description: str | None = None
    bitmaps: list[BlockDirtyBitmapOrStr] | None = None
    allocation_depth: bool = False


@register_export
class NbdExport(Export):
    """One name of the NBD server."""

    type_name = "nbd"
    Options = NbdExportOptions

    def __init__(
        self,
        export_id: str,
        name: str,
        backend: ExportBackend,
        *,
        writable: bool = False,
        writethrough: bool = False,
        description: str = "",
        allocation_depth: bool = False,
        bitmaps: dict[str, DirtySource] | None = None,
    ) -> None:
        self.id = export_id
        self.name = name
        self.description = description
        self.backend = backend
        self.writable = writable
        self.writethrough = writethrough
        #: connected, or gone with requests still in flight
        self.clients: set[NbdConnection] = set()
        #: dirty bitmaps by the name of their context
        self.bitmaps = {DIRTY_BITMAP + n: source for n, source in (bitmaps or {}).items()}
        depth = (ALLOCATION_DEPTH,) if allocation_depth else ()
        self.contexts = (BASE_ALLOCATION, *depth, *self.bitmaps)
        self._registry: ExportRegistry | None = None
        self._idle: asyncio.Future[None] | None = None

    @classmethod
    async def create(
        cls, registry: ExportRegistry, options: NbdExportOptions, backend: ExportBackend
    ) -> NbdExport:
        """An export that the running NBD server offers from now on."""
        server = registry.nbd_server
        if not server.running:
            raise BlockError("NBD server not running")
        name = options.node_name if options.name is None else options.name
        if len(name.encode()) > MAX_STRING:
            raise BlockError(f"export name '{name}' too long")
        if len((options.description or "").encode()) > MAX_STRING:
            raise BlockError(f"description '{options.description}' too long")
        if name in server.exports:
            raise BlockError(f"NBD server already has export named '{name}'")
        bitmaps = {}
        for bitmap in options.bitmaps or []:
            node, bitmap_name = (
                (None, bitmap) if isinstance(bitmap, str) else (bitmap.node, bitmap.name)
            )
            bitmaps[bitmap_name] = registry.source.dirty_bitmap(backend, node, bitmap_name)
        export = cls(
            options.id,
            name,
            backend,
            writable=options.writable,
            writethrough=options.writethrough,
            description=options.description or "",
            allocation_depth=options.allocation_depth,
            bitmaps=bitmaps,
        )
        export._registry = registry
        server.exports[name] = export
        return export

    @property
    def read_only(self) -> bool:
        """Whether writes are refused, by the export or by the node."""
        return not self.writable or self.backend.read_only

    @property
    def in_use(self) -> bool:
        """Whether a client is connected."""
        return bool(self.clients)

    def info(self) -> ExportInfo:
        """What a client that negotiates now is told."""
        return ExportInfo(
            self.name, self.backend.length, self.read_only, self.description, self.contexts
        )

    def request_shutdown(self) -> None:
        """The name is free at once, clients are disconnected."""
        if self._registry is not None:
            self._registry.nbd_server.exports.pop(self.name, None)
        for client in tuple(self.clients):
            client.abort()

    async def drained(self) -> None:
        """Return when the last request of the last client has ended."""
        while self.clients:
            self._idle = asyncio.get_running_loop().create_future()
            await self._idle

    def client_gone(self, client: NbdConnection) -> None:
        """A connection is closed and none of its requests is in flight."""
        self.clients.discard(client)
        if not self.clients and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)
