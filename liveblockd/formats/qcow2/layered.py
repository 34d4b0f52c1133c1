"""An image as a layer of the chain of another: the methods of ``Qcow2`` that a flat map uses.

Specification: ``storage/driver.py``, ``storage/flatmap.py``.

Runs on: the event loop. Invariant: who watches this image is told of every entry that changes, in
the step that changes it; an image that nobody watches pays nothing for that.
Errors: OSError from below; ``DamageError``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from liveblockd.formats.qcow2 import cells
from liveblockd.formats.qcow2.encrypted import LegacyAesStore
from liveblockd.formats.qcow2.metadata import read_bytes
from liveblockd.storage.cells import Cells, Survey
from liveblockd.storage.driver import BlockDriver, BlockIO, Buffer, MapWatcher, Packed

if TYPE_CHECKING:
    from liveblockd.formats.qcow2.metadata import Metadata
    from liveblockd.formats.qcow2.reader import Reader
    from liveblockd.formats.qcow2.survey import Surveyor


class Layered(BlockDriver):
    """A part of the class ``Qcow2``."""

    if TYPE_CHECKING:
        _metadata: Metadata
        _reader: Reader
        _surveyor: Surveyor

    def watch(self, watcher: MapWatcher) -> None:
        """See ``BlockDriver``."""
        super().watch(watcher)
        self._tell_watchers()

    def unwatch(self, watcher: MapWatcher) -> None:
        """See ``BlockDriver``."""
        super().unwatch(watcher)
        self._tell_watchers()

    def _tell_watchers(self) -> None:
        self._metadata.on_remap = self.remapped if self._map_watchers else None

    @property
    def cell_unit(self) -> tuple[int, int] | None:
        """See ``BlockDriver``."""
        if isinstance(self._metadata.data, LegacyAesStore):
            return None  # a host offset alone does not say how to read it
        return cells.cell_unit(self._metadata)

    @property
    def data_node(self) -> BlockIO:
        """See ``BlockDriver``."""
        return self._metadata.data

    async def cells(self, offset: int, length: int, bits: int) -> Cells | None:
        """See ``BlockDriver``."""
        return await cells.cells(self._metadata, offset, length, bits)

    def cells_now(self, offset: int, length: int, bits: int) -> Cells | None:
        """See ``BlockDriver``."""
        return cells.cells_now(self._metadata, offset, length, bits)

    async def survey(
        self, offset: int, length: int, bits: int, tables: int, most: int
    ) -> Survey | None:
        """See ``BlockDriver.survey``."""
        return await self._surveyor.survey(offset, length, bits, tables, most)

    async def packed(self, offset: int, length: int) -> Packed | None:
        """See ``BlockDriver.packed``."""
        return await self._reader.packed(offset, length)

    def next_table(self, offset: int) -> int:
        """See ``BlockDriver``."""
        return cells.next_table(self._metadata, offset)

    async def read_host(self, host_offset: int, length: int) -> Buffer:
        """See ``BlockDriver``: what is freed meanwhile is not used again before this has ended."""
        metadata = self._metadata
        epoch = metadata.quarantine.enter()
        try:
            return await read_bytes(metadata.data, host_offset, length)
        finally:
            metadata.leave(epoch)
