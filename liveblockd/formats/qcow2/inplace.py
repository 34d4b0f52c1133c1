"""Guest writes that need no coroutine.

Specification: docs/interop/qcow2, "Cluster mapping"; README.md, invariant 1.

Runs on: the event loop, on the request path: one lookup and one call below, nothing waits.

``write_nowait`` is for clusters that this image has alone, and for the first write to a cluster
where its files are in memory: copied, stored and published in one step. ``begin_write`` takes the
former as well, where the file below has to leave the transfer to a worker, and the first write to a
cluster: what the guest saw there is read, a cluster allocated, both written at once, the entry
published.

Invariants: those of ``cow``. Between looking at an entry and the epoch of the write in place, the
claim on its cluster or its new entry there is no await. A write in place under way is in an epoch
of the quarantine, so that its host cluster is not given to somebody else; a new cluster under way
is claimed and its table pinned. ``_settle`` of the image waits for all of them.

Errors: OSError from below, to ``done``; what cannot be done here is refused, having done nothing,
and the coroutine says why.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Final

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.allocator import BlockNeeded
from liveblockd.formats.qcow2.l2table import L2Table
from liveblockd.formats.qcow2.layout import MIXED, OFFSET_MASK
from liveblockd.formats.qcow2.mapping import NOT_IN_PLACE, contiguous_count
from liveblockd.formats.qcow2.subclusters import mask
from liveblockd.storage.driver import BlockIO, Buffer, Done, Source

if TYPE_CHECKING:
    from liveblockd.formats.qcow2.claims import Claim, Claims
    from liveblockd.formats.qcow2.commit import Committer
    from liveblockd.formats.qcow2.cow import Writer
    from liveblockd.formats.qcow2.metadata import Metadata
    from liveblockd.storage.flatmap import FlatMap

#: a larger cluster is copied by the coroutine; bytes
LARGEST_COPY: Final = 64 << 10
#: bytes of copies under way at most; then the coroutines have to queue
MAX_BEGUN: Final = 16 << 20
_NEW: Final = -2


class InPlace:
    """A part of the driver."""

    children: dict[str, BlockIO]
    read_only: bool
    _damaged: bool
    _metadata: Metadata
    _committer: Committer
    _claims: Claims
    below: FlatMap
    _writer: Writer
    #: a first write to a cluster is one write of a cluster of the image file
    _copies_clusters: bool
    _tables: dict[int, L2Table]
    _stores: Mapping[str, BlockIO]
    _data_role: str
    _bits: int
    _in_cluster: int
    _l2_bits: int
    _l2_mask: int
    #: writes that were begun and have not ended
    _begun: int
    _settling: asyncio.Future[None] | None

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        """Write to clusters that this image has alone, if the child can at once.

        Where all of it is in memory also to one that this image does not have yet.
        """
        host_offset = self._place(offset, len(data))
        if host_offset >= 0:
            return self._stores[self._data_role].write_nowait(host_offset, data)
        return host_offset == _NEW and self._write_new_nowait(offset, data)

    def begin_write(self, offset: int, data: Buffer, done: Done) -> bool:
        """Begin a write in place, or to one cluster that this image does not have yet."""
        cluster = offset >> self._bits
        table = self._tables.get(cluster >> self._l2_bits)
        if table is None:
            return False
        if not table.view[cluster & self._l2_mask]:
            return self._begin_new(table, cluster, offset, data, done)
        host_offset = self._place(offset, len(data))
        if host_offset < 0:
            return False
        quarantine = self._metadata.quarantine
        epoch = quarantine.enter()
        self._begun += 1
        ended = partial(self._ended_in_place, epoch, done)
        if self._stores[self._data_role].begin_write(host_offset, data, ended):
            return True
        quarantine.leave(epoch)
        self._one_less()
        return False

    def _place(self, offset: int, length: int) -> int:
        """Where a range lies in clusters that this image has alone, adjacent; -1: nowhere.

        ``_NEW``: in one cluster that this image has nothing of.
        """
        if self.read_only or self._damaged or not length:
            return -1
        cluster = offset >> self._bits
        table = self._tables.get(cluster >> self._l2_bits)
        if table is None or table.bad or not table.exclusive:
            return -1
        table.used = True
        index = cluster & self._l2_mask
        entry = table.view[index]
        count = (offset + length - 1 >> self._bits) - cluster + 1
        if entry >> 62 != 2 or entry & NOT_IN_PLACE:  # ``in_place``, without a call
            if not entry and count == 1:
                return _NEW
            if count > 1 or not self._mixed_in_place(table, index, offset, length):
                return -1
        elif count > 1 and (
            index + count > self._l2_mask + 1
            or contiguous_count(table.entries, index, count, self._in_cluster + 1) < count
        ):
            return -1
        host_offset: int = (entry & OFFSET_MASK) + (offset & self._in_cluster)
        if self._data_role == "file":
            first, tables = host_offset >> self._bits, self._metadata.refcounts.metadata.added
            if (
                first in tables
                if count == 1
                else not tables.isdisjoint(range(first, first + count))
            ):
                return -1  # the coroutine says what is wrong
        return host_offset

    def _mixed_in_place(self, table: L2Table, index: int, offset: int, length: int) -> bool:
        """Whether the subclusters of a range within a cluster are all there, and not shared."""
        entry = table.view[index]
        if entry >> 62 != 2 or not entry & MIXED:
            return False
        inside, bits = offset & self._in_cluster, self._bits - 5
        wanted = mask(inside >> bits, (inside + length - 1 >> bits) + 1)
        return table.bitmap(index) & wanted == wanted

    def _ended_in_place(self, epoch: int, done: Done, error: OSError | None) -> None:
        if self._metadata.quarantine.leave(epoch):
            self._committer.kick()
        self._one_less()
        done(error)

    # -- the first write to a cluster

    def _write_new_nowait(self, offset: int, data: Buffer) -> bool:
        """What ``_begin_new`` does, in one step, where the files are memory: no claim, no end."""
        host = self.children["file"].host_file()
        if not self._copies_clusters or host is None or not host.in_memory:
            return False
        cluster, size, length = offset >> self._bits, self._in_cluster + 1, len(data)
        if cluster in self._claims:
            return False
        source = None
        if length < size and self.children.get("backing") is not None:
            start = cluster << self._bits
            seen = min(size, self._writer.disk_size - start)
            # What lies behind the end of the disk is not to come into it
            source = self.below.source_now(start, size) if seen == size else None
            if source is None:
                if not self.below.zeroes_now(start, seen):
                    return False
            elif not source.file.in_memory:
                return False
        refcounts = self._metadata.refcounts
        try:
            host_offset, _ = refcounts.allocate(1)
        except (BlockNeeded, OSError, BlockError):
            return False  # the coroutine loads the block, or says what is wrong
        if not self._filled_at_once(host_offset, source, offset & self._in_cluster, data):
            refcounts.give_back(host_offset)
            return False
        table = self._tables[cluster >> self._l2_bits]
        self._metadata.publish_run(table, cluster & self._l2_mask, host_offset, 1)
        return True

    def _filled_at_once(
        self, host_offset: int, source: Source | None, inside: int, data: Buffer
    ) -> bool:
        """Whether a new cluster has the source, or zeros, and ``data`` now."""
        refcounts, file, size = (
            self._metadata.refcounts,
            self.children["file"],
            self._in_cluster + 1,
        )
        fresh = refcounts.is_fresh(host_offset)
        refcounts.touched(host_offset, 1)
        if source is not None:
            return file.copy_nowait(host_offset, source, inside, data)
        if len(data) == size or fresh:  # zeros are there already
            return self._written_at_once(file, host_offset + inside, data)
        return self._written_at_once(file, host_offset, _around(data, inside, b"", size))

    def _begin_new(
        self, table: L2Table, cluster: int, offset: int, data: Buffer, done: Done
    ) -> bool:
        """For a cluster that this image has nothing of."""
        length, size = len(data), self._in_cluster + 1
        metadata = self._metadata
        if (
            table.bad
            or not table.exclusive
            or self.read_only
            or self._damaged
            or not 0 < length <= size - (offset & self._in_cluster)
            or not self._copies_clusters
            or self._begun << self._bits > MAX_BEGUN
        ):
            return False
        index = cluster & self._l2_mask
        if cluster in self._claims:
            return False
        found = b"" if length == size else self._seen(cluster)
        if found is None:
            return False
        refcounts = metadata.refcounts
        try:
            host_offset, _ = refcounts.allocate(1)
        except (BlockNeeded, OSError, BlockError):
            return False  # the coroutine loads the block, or says what is wrong
        place, contents = host_offset, data
        if length < size:
            if not found and refcounts.is_fresh(host_offset):
                place += offset & self._in_cluster  # zeros are there already
            else:
                contents = _around(data, offset & self._in_cluster, found, size)
        refcounts.touched(host_offset, 1)
        file = self.children["file"]
        if self._written_at_once(file, place, contents):
            metadata.publish_run(table, index, host_offset, 1)
            done(None)
            return True
        claim = self._claims.take(cluster, 1)
        table.pins += 1
        self._begun += 1
        metadata.on_dirty()
        ended = partial(self._ended_new, table, claim, index, host_offset, done)
        if file.begin_write(place, contents, ended):
            return True
        self._let_go_of_new(table, claim)
        metadata.free_data(host_offset, 1)
        self._one_less()
        return False

    @staticmethod
    def _written_at_once(file: BlockIO, host_offset: int, contents: Buffer) -> bool:
        try:
            return file.write_nowait(host_offset, contents)
        except OSError:
            return False  # begun again, that one tells

    def _seen(self, cluster: int) -> Buffer | None:
        """What the guest sees in a cluster that is not here: empty for zeros; None: not at hand."""
        if self.children.get("backing") is None:
            return b""
        start = cluster << self._bits
        length = min(self._in_cluster + 1, self._writer.disk_size - start)
        below = self.below  # not the node below: its tables need not be in memory
        return b"" if below.zeroes_now(start, length) else below.read_nowait(start, length)

    def _ended_new(
        self,
        table: L2Table,
        claim: Claim,
        index: int,
        host_offset: int,
        done: Done,
        error: OSError | None,
    ) -> None:
        if error is None:
            self._metadata.publish_run(table, index, host_offset, 1)
        else:
            self._metadata.free_data(host_offset, 1)
        self._let_go_of_new(table, claim)
        self._one_less()
        done(error)

    def _let_go_of_new(self, table: L2Table, claim: Claim) -> None:
        table.pins -= 1
        self._claims.release(claim)

    # -- who waits for all of it

    def _one_less(self) -> None:
        self._begun -= 1
        if not self._begun and self._settling is not None:
            if not self._settling.done():
                self._settling.set_result(None)
            self._settling = None

    async def _begun_ended(self) -> None:
        """Return when no write that was begun is under way."""
        while self._begun:
            if self._settling is None:
                self._settling = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._settling)


def _around(data: Buffer, inside: int, seen: Buffer, size: int) -> Buffer:
    """``size`` bytes: ``data`` at ``inside``, what was ``seen`` and zeros elsewhere."""
    # What a read has given belongs to us; what cannot be written to is somebody's constant.
    contents: bytearray | memoryview
    if len(seen) == size and not isinstance(seen, bytes) and not memoryview(seen).readonly:
        contents = seen
    else:
        contents = bytearray(size)
        contents[: len(seen)] = seen
    contents[inside : inside + len(data)] = data
    return contents
