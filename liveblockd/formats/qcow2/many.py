"""Requests of one length that came together: looked up in one loop, done by one call below.

Specification: docs/interop/qcow2, "Cluster mapping".

Runs on: the event loop, on the request path; nothing waits.

Invariants: those of ``inplace``: written are only clusters that this image has alone, read only
plain ones of this image or of the chain below it. The first request for which that is not so, and
all behind it, are left to ``read_nowait`` and ``write_nowait``. Errors: none; those tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from liveblockd.formats.qcow2.l2table import L2Table
from liveblockd.formats.qcow2.layout import COMPRESSED, COPIED, MIXED, OFFSET_MASK, ZERO
from liveblockd.storage.driver import BlockIO, Buffer

if TYPE_CHECKING:
    from liveblockd.formats.qcow2.metadata import Metadata
    from liveblockd.storage.flatmap import FlatMap

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
    below: FlatMap

    def read_many_nowait(self, offsets: Sequence[int], length: int) -> list[Buffer]:
        """The first ones that lie in clusters of this image or below it, if they are at hand."""
        found: list[int] = []
        bits, l2_bits, l2_mask = self._bits, self._l2_bits, self._l2_mask
        in_cluster, tables = self._in_cluster, self._tables
        room, end = in_cluster + 1 - length, self._file_end - length
        number, view, all_here = -1, None, True
        for offset in offsets:
            cluster, inside = offset >> bits, offset & in_cluster
            if cluster >> l2_bits != number:
                number = cluster >> l2_bits
                table = tables.get(number)
                if table is None:
                    if self._metadata.l1_view[number]:
                        break
                    view = None
                elif table.bad:
                    break
                else:
                    table.used = True
                    view = table.view
            if inside > room:
                break
            entry = 0 if view is None else view[cluster & l2_mask]
            if not entry:
                all_here = False
                found.append(~offset)
                continue
            host_offset = (entry & OFFSET_MASK) + inside
            if entry & _SPECIAL or host_offset > end:
                break
            found.append(host_offset)
        if not found:
            return []
        store = self._stores[self._data_role]
        if all_here:
            return store.read_many_nowait(found, length)
        return self.below.read_each_nowait(store, found, length)

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
