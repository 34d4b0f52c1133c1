"""One L2 table in memory.

Specification: docs/interop/qcow2, "Cluster mapping".

Runs on: pure; ``metadata`` is the only one who changes tables, and keeps the rules for that.
Invariants: ``entries`` and ``view`` are the same memory. Errors: none.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt

from liveblockd.formats.qcow2 import subclusters
from liveblockd.formats.qcow2.allocator import DirtyRange, Write
from liveblockd.formats.qcow2.layout import ENTRY_BYTES
from liveblockd.formats.qcow2.mapping import kinds
from liveblockd.formats.qcow2.tables import Entries, to_disk
from liveblockd.storage.driver import Buffer

#: what a new table is written by: no disk writes less
PAGE = 4096
#: a table that uses more than this part of its pages is written whole
SPARSE_PAGES = 4


class L2Table:
    """See the module; indices are entries within it."""

    __slots__ = (
        "bad", "bitmap_view", "bitmaps", "dirty", "entries", "exclusive", "fresh", "host_offset",
        "is_new", "l1_index", "pins", "used", "view",
    )  # fmt: skip

    def __init__(
        self,
        l1_index: int,
        host_offset: int,
        entries: Entries,
        bitmaps: Entries | None,
        *,
        exclusive: bool,
        is_new: bool,
    ) -> None:
        self.l1_index = l1_index
        self.host_offset = host_offset
        self.entries = entries
        self.view = memoryview(cast(Buffer, entries))
        #: of extended entries (``subclusters``), else None
        self.bitmaps = bitmaps
        self.bitmap_view = None if bitmaps is None else memoryview(cast(Buffer, bitmaps))
        self.dirty = DirtyRange()
        #: the L1 entry says COPIED: no snapshot shares this table
        self.exclusive = exclusive
        #: the L1 table on disk does not name it: it is written whole, before the L1 table
        self.is_new = is_new
        #: its cluster reads as zeros, for nothing was ever written there
        self.fresh = False
        self.pins = 0
        self.used = True
        #: indices of entries that cannot be; using one is an error
        self.bad: frozenset[int] = frozenset()

    def bitmap(self, index: int) -> int:
        """The bitmap of an extended entry."""
        assert self.bitmap_view is not None
        bitmap: int = self.bitmap_view[index]
        return bitmap

    def missing(self, index: int) -> int:
        """The subclusters of a MIXED entry that this image does not hold."""
        return subclusters.missing(self.bitmap(index))

    def holds(self, first: int, count: int) -> npt.NDArray[np.bool_]:
        """Which clusters are held by this image, every part of them."""
        part = self.entries[first : first + count]
        held: npt.NDArray[np.bool_] = part != 0
        if self.bitmaps is not None and subclusters.has_mixed(part):
            bitmaps = self.bitmaps[first : first + count]
            held &= subclusters.have_all(part, bitmaps)
        return held

    def kinds(self, first: int, count: int, skip: int, spare: int) -> npt.NDArray[np.uint8]:
        """``ExtentKind`` of clusters; of subclusters where they differ.

        Then ``skip`` bytes at the start and ``spare`` bytes at the end are left out.
        """
        part = self.entries[first : first + count]
        if self.bitmaps is None or not subclusters.has_mixed(part):
            return kinds(part)
        cluster_bits = len(self.entries).bit_length() + 3
        size = 1 << cluster_bits - 5
        found, _ = subclusters.expand(part, self.bitmaps[first : first + count], cluster_bits)
        return found[skip // size : len(found) - spare // size]

    def to_disk(self, first: int, end: int) -> bytes:
        """The bytes of a range of entries."""
        part = self.entries[first:end]
        if self.bitmaps is None:
            return to_disk(part)
        return subclusters.to_disk(part, self.bitmaps[first:end])

    def take_writes(self, file_length: int) -> list[Write]:
        """All of a new table; where it is known to read as zeros anyway only pages that do not.

        So much is written once: whatever becomes of it, the cluster is not known to be zeros then.
        """
        fresh, self.fresh = self.fresh, False
        per_page = PAGE // (ENTRY_BYTES if self.bitmaps is None else 2 * ENTRY_BYTES)
        if fresh and len(self.entries) > per_page:
            words = self.entries if self.bitmaps is None else self.entries | self.bitmaps
            pages = np.bitwise_or.reduce(words.reshape(-1, per_page), axis=1) != 0
            size = len(pages) * PAGE
            if self.host_offset + size > file_length or not pages.any():
                pages[-1] = True  # no table lies beyond the end of the file
            used = np.flatnonzero(pages).tolist()
            if len(used) * SPARSE_PAGES <= len(pages):
                return [
                    Write(
                        self.host_offset + page * PAGE,
                        self.to_disk(page * per_page, (page + 1) * per_page),
                    )
                    for page in used
                ]
        return [Write(self.host_offset, self.to_disk(0, len(self.entries)))]
