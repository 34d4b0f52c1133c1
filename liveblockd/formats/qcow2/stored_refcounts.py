"""The refcounts that an image has on the disk, for a check: read block by block, never changed.

Specification: docs/interop/qcow2, "Host cluster management".

Runs on: the event loop. Invariants: no more than ``_KEPT`` blocks are in memory, whatever the
refcount table names. Errors: ``OSError``.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

import numpy as np
import numpy.typing as npt

from liveblockd.formats.qcow2.allocator import Counts, unpack_counts
from liveblockd.formats.qcow2.layout import REFCOUNT_TABLE_RESERVED, Geometry
from liveblockd.formats.qcow2.metadata import read_bytes
from liveblockd.formats.qcow2.tables import Entries
from liveblockd.storage.driver import BlockIO

_KEPT: Final = 16

_U = np.uint64


class StoredRefcounts:
    """The refcounts on the disk; a block is read when it is asked for."""

    def __init__(self, file: BlockIO, geometry: Geometry, table: Entries) -> None:
        self._file = file
        self._geometry = geometry
        self.table = table
        self._blocks: OrderedDict[int, Counts] = OrderedDict()

    def offset(self, index: int) -> int:
        """Host offset of a block; 0 where there is none, -1 where there can be none."""
        if index >= len(self.table):
            return 0
        offset = int(self.table[index]) & ~REFCOUNT_TABLE_RESERVED
        return -1 if offset % self._geometry.cluster_size else offset

    async def block(self, index: int) -> Counts | None:
        """The refcounts of a block, zeros where there is none; None: it cannot be read."""
        found = self._blocks.get(index)
        if found is not None:
            self._blocks.move_to_end(index)
            return found
        offset = self.offset(index)
        if offset < 0:
            return None
        size = self._geometry.cluster_size
        data = await read_bytes(self._file, offset, size) if offset else bytes(size)
        counts = unpack_counts(data, self._geometry.refcount_order)
        if len(self._blocks) >= _KEPT:
            self._blocks.popitem(last=False)
        self._blocks[index] = counts
        return counts

    def forget(self) -> None:
        """Read them again: they were written."""
        self._blocks.clear()

    async def lookup(self, clusters: Entries) -> npt.NDArray[np.int64]:
        """The refcount of each cluster; -1 where it cannot be read."""
        per_block = _U(self._geometry.refcounts_per_block)
        blocks = clusters // per_block
        result = np.zeros(len(clusters), np.int64)
        for index in np.unique(blocks).tolist():
            here = blocks == _U(index)
            block = await self.block(index)
            if block is None:
                result[here] = -1
            else:
                stored = np.minimum(block[clusters[here] % per_block].astype(np.uint64), 1 << 62)
                result[here] = stored.astype(np.int64)
        return result
