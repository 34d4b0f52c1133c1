"""Requests of one length that came together: looked up in one loop, done by one call below.

Specification: docs/interop/qcow2, "Cluster mapping".

Runs on: the event loop, on the request path; nothing waits.

Invariants: those of ``inplace``: only clusters are read or written that this image has in its own
file, written only those that it has alone. The first request for which that is not so, and all
behind it, are left to ``read_nowait`` and ``write_nowait``. Errors: none; those tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from liveblockd.formats.qcow2.l2table import L2Table
from liveblockd.formats.qcow2.layout import COMPRESSED, COPIED, MIXED, OFFSET_MASK, ZERO
from liveblockd.storage.driver import BlockIO, Buffer

if TYPE_CHECKING:
    from liveblockd.formats.qcow2.metadata import Metadata

#: an entry of a cluster that this image has alone, with one of these, is not that
_NOT_PLAIN: Final = ~OFFSET_MASK & (1 << 64) - 1
#: nor is there plain data to be read with one of these
_SPECIAL: Final = COMPRESSED | ZERO | MIXED


class Many:
    """A part of the driver."""

    children: dict[str, BlockIO]
    read_only: bool
    _damaged: bool
    _metadata: Metadata
    _tables: dict[int, L2Table]
    _stores: Mapping[str, BlockIO]
    _data_role: str
    _bits: int
    _in_cluster: int
    _l2_bits: int
    _l2_mask: int
    _file_end: int

    def read_many_nowait(self, offsets: Sequence[int], length: int) -> list[Buffer]:
        """The first ones that lie in clusters of this image, if the child has them at hand."""
        found: list[int] = []
        bits, l2_bits, l2_mask = self._bits, self._l2_bits, self._l2_mask
        in_cluster, tables = self._in_cluster, self._tables
        room, end = in_cluster + 1 - length, self._file_end - length
        number, view = -1, None
        for offset in offsets:
            cluster = offset >> bits
            if cluster >> l2_bits != number:
                number = cluster >> l2_bits
                table = tables.get(number)
                if table is None or table.bad:
                    break
                table.used = True
                view = table.view
            assert view is not None
            entry, inside = view[cluster & l2_mask], offset & in_cluster
            host_offset = (entry & OFFSET_MASK) + inside
            if not entry or entry & _SPECIAL or inside > room or host_offset > end:
                break
            found.append(host_offset)
        return self._stores[self._data_role].read_many_nowait(found, length) if found else []

    def write_many_nowait(self, offsets: Sequence[int], parts: Sequence[Buffer]) -> int:
        """The first ones that lie in clusters which this image has alone, if the child can."""
        if self.read_only or self._damaged:
            return 0
        found: list[int] = []
        bits, l2_bits, l2_mask = self._bits, self._l2_bits, self._l2_mask
        in_cluster, tables = self._in_cluster, self._tables
        room = in_cluster + 1 - len(parts[0])
        # The coroutine says what is wrong where data lie in a table.
        guarded = self._metadata.refcounts.metadata.added if self._data_role == "file" else ()
        number, view = -1, None
        for offset in offsets:
            cluster = offset >> bits
            if cluster >> l2_bits != number:
                number = cluster >> l2_bits
                table = tables.get(number)
                if table is None or table.bad or not table.exclusive:
                    break
                table.used = True
                view = table.view
            assert view is not None
            host_offset, inside = view[cluster & l2_mask] ^ COPIED, offset & in_cluster
            if host_offset & _NOT_PLAIN or inside > room or host_offset >> bits in guarded:
                break
            found.append(host_offset + inside)
        if not found:
            return 0
        if len(found) < len(parts):
            parts = parts[: len(found)]
        return self._stores[self._data_role].write_many_nowait(found, parts)
