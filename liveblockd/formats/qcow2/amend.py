"""Changing what an image is: its version, the width of its refcounts, lazy refcounts.

Specification: docs/interop/qcow2, "Header"; the options and messages of qemu-img amend.

Runs on: the event loop, in a task of the engine, on a disk without users.
Invariants: the image is valid at every instant. New tables, and refcounts of another width, are put
in place by ``switch``; the version is changed after that, with a header that is never torn.
Errors: ``BlockError`` in QEMU's words, before anything is changed where that can be known; OSError.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from errno import ENOTSUP
from typing import TypeAlias

import numpy as np

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.commit import Committer
from liveblockd.formats.qcow2.header import (
    Header,
    Rewrite,
    change_version,
    feature_name_table,
)
from liveblockd.formats.qcow2.layout import (
    COMPRESSED,
    COPIED,
    ENTRY_BYTES,
    HEADER_LENGTH_V2,
    HEADER_LENGTH_V3,
    OFFSET_MASK,
    ZERO,
    Autoclear,
    Compatible,
    Extension,
)
from liveblockd.formats.qcow2.metadata import Metadata
from liveblockd.formats.qcow2.snapshot_store import SnapshotStore
from liveblockd.formats.qcow2.switch import Switch, words
from liveblockd.formats.qcow2.tables import Entries, to_disk

_U = np.uint64
Progress: TypeAlias = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Amendment:
    """What is to be changed; None: as it is. ``size`` in bytes.

    ``data_file_raw`` can only be given up: what the data file holds by then is not known.
    """

    version: int | None = None
    lazy_refcounts: bool | None = None
    refcount_bits: int | None = None
    size: int | None = None
    data_file_raw: bool | None = None

    def check(self, header: Header) -> tuple[int, int, bool]:
        """(version, refcount order, lazy refcounts) as they will be; raises BlockError."""
        version = header.version if self.version is None else self.version
        if version not in (2, 3):
            raise BlockError(f"Unknown compatibility level {version}")
        order = header.refcount_order
        if self.refcount_bits is not None:
            bits = self.refcount_bits
            if bits & (bits - 1) or not 1 <= bits <= 64:
                raise BlockError("Refcount width must be a power of two and may not exceed 64 bits")
            order = bits.bit_length() - 1
        if self.data_file_raw and not header.raw_data_file:
            raise BlockError("data-file-raw cannot be set on existing images")
        lazy = header.lazy_refcounts if self.lazy_refcounts is None else self.lazy_refcounts
        if version == 2:
            if self.lazy_refcounts:
                raise BlockError(
                    "Lazy refcounts only supported with compatibility level 1.1 and above "
                    "(use compat=1.1 or greater)"
                )
            lazy = False
            if order != 4 and self.refcount_bits is not None:
                raise BlockError(
                    "Refcount widths other than 16 bits require compatibility level 1.1 or above "
                    "(use compat=1.1 or greater)"
                )
            if order != 4:
                raise BlockError("compat=0.10 requires refcount_bits=16", errno=ENOTSUP)
            if header.incompatible:
                raise BlockError(
                    "Cannot downgrade an image with incompatible features "
                    f"{header.incompatible:#x} set",
                    errno=ENOTSUP,
                )
        return version, order, lazy

    def check_size(self, header: Header) -> None:
        """Raise BlockError for a size that cannot be set after the rest was done."""
        assert self.size is not None
        if self.size < 0 or self.size % 512:
            raise BlockError("The new size must be a multiple of 512")
        version = header.version if self.version is None else self.version
        if header.nb_snapshots and version < 3 and self.size != header.size:
            raise BlockError("Can't resize a v2 image which has snapshots", errno=ENOTSUP)


async def amend(
    metadata: Metadata,
    committer: Committer,
    snapshots: SnapshotStore,
    amendment: Amendment,
    progress: Progress | None,
) -> None:
    """Do all of it but the size; ``progress`` is told (done, total) in L1 entries."""
    version, order, lazy = amendment.check(metadata.header)
    await committer.close()
    if version > metadata.header.version:
        await _set_version(metadata, committer, version)
    if order != metadata.header.refcount_order:
        async with committer.lock:
            await _recount(metadata, committer, order)
    if version < metadata.header.version:
        async with committer.lock:
            await _Expansion(metadata, committer, snapshots, progress).run()
        await _set_version(metadata, committer, version)
    elif lazy != metadata.header.lazy_refcounts:
        async with committer.lock:
            bit = int(Compatible.LAZY_REFCOUNTS)
            others = metadata.header.compatible & ~bit
            await committer.write_header(
                replace(metadata.header, compatible=others | (bit if lazy else 0))
            )
    if amendment.data_file_raw is False and metadata.header.raw_data_file:
        async with committer.lock:
            others = metadata.header.autoclear & ~int(Autoclear.RAW_DATA_FILE)
            await committer.write_header(replace(metadata.header, autoclear=others))
    if progress is not None:
        progress(1, 1)


async def _set_version(metadata: Metadata, committer: Committer, version: int) -> None:
    header = metadata.header
    others = tuple(e for e in header.extensions if e[0] != Extension.FEATURE_NAMES)
    if version >= 3:
        names = (int(Extension.FEATURE_NAMES), feature_name_table())
        changed = replace(
            header, version=3, header_length=HEADER_LENGTH_V3, refcount_order=4,
            extensions=(*others, names),
        )  # fmt: skip
    else:
        changed = replace(
            header, version=2, header_length=HEADER_LENGTH_V2, compatible=0, autoclear=0,
            unknown_fields=b"", extensions=others,
        )  # fmt: skip

    def rewrite() -> Rewrite:
        return change_version(header, changed)

    await committer.rewrite_header(rewrite)
    metadata.geometry = metadata.header.geometry


async def _recount(metadata: Metadata, committer: Committer, order: int) -> None:
    """Refcounts of another width."""
    switch = Switch(metadata, committer)
    await switch.recount(order)
    await switch.commit(metadata.l1, l1_table_offset=metadata.l1_offset, refcount_order=order)


class _Expansion:
    """Version 2 has no zero clusters: in all tables they become unallocated, or written zeros."""

    def __init__(
        self,
        metadata: Metadata,
        committer: Committer,
        snapshots: SnapshotStore,
        progress: Progress | None,
    ) -> None:
        self._metadata = metadata
        self._snapshots = snapshots
        self._switch = Switch(metadata, committer)
        # What was opened below it may be so again, whatever the header says.
        backing = metadata.children.get("backing")
        self._has_below = backing is not None or bool(metadata.header.backing_file)
        self._progress = progress
        self._total = len(metadata.l1) + sum(s.l1_size for s in snapshots.snapshots)
        self._done = 0

    async def run(self) -> None:
        """Expand in the disk and in every snapshot."""
        metadata, switch = self._metadata, self._switch
        switch.check_l1(metadata.l1)
        l1 = await self._tree(metadata.l1, active=True)
        changed = bool((l1 != metadata.l1).any())
        table = []
        for snapshot in self._snapshots.snapshots:
            old = await switch.read_l1(snapshot.l1_table_offset, snapshot.l1_size)
            new = await self._tree(old, active=False)
            if (old != new).any():
                changed = True
                offset = await switch.write(to_disk(new))
                await switch.drop_range(snapshot.l1_table_offset, len(old) * ENTRY_BYTES)
                snapshot = replace(snapshot, l1_table_offset=offset)
            table.append(snapshot)
        if not changed:
            return
        await switch.drop_range(metadata.l1_offset, len(l1) * ENTRY_BYTES)
        # Where two tables had shared something, only one may do so now.
        l1 = await self._snapshots.own_again(switch, l1)
        await self._snapshots.commit(switch, l1, table)

    async def _tree(self, l1: Entries, *, active: bool) -> Entries:
        result = l1.copy()
        for index in np.flatnonzero(l1 & _U(OFFSET_MASK)).tolist():
            raw = await self._switch.read_l2(int(l1[index]))
            if await self._expand(words(raw, self._switch.geometry), active=active):
                result[index] = await self._switch.write(to_disk(raw)) | (COPIED if active else 0)
                old = int(l1[index]) & OFFSET_MASK
                await self._switch.drop_range(old, self._switch.geometry.cluster_size)
            self._done += 1
            if self._progress is not None:
                self._progress(self._done, max(1, self._total))
        return result

    async def _expand(self, entries: Entries, *, active: bool) -> bool:
        """Replace the zero clusters of a table; whether there were any."""
        plain = (entries & _U(COMPRESSED)) == 0
        indices = np.flatnonzero(plain & ((entries & _U(ZERO)) != 0))
        if not len(indices):
            return False
        hosts = entries[indices] & _U(OFFSET_MASK)
        await self._switch.drop(hosts[hosts != 0] >> _U(self._switch.geometry.cluster_bits))
        if not self._has_below:
            entries[indices] = 0
            return True
        # Below there is something: zeros must be there.
        for index in indices.tolist():
            entries[index] = await self._switch.write_data() | (COPIED if active else 0)
        return True
