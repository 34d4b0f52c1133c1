"""The members of ``blockdev-add`` of a qcow2 image, and the cache sizes that follow from them.

Specification: qapi/block-core.json, BlockdevOptionsQcow2. Runs on: pure.
Errors: ``BlockError`` in QEMU's words from ``cache_sizes`` and ``check_options``.
"""

from __future__ import annotations

import enum
from typing import Annotated, Any, NamedTuple

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.layout import Geometry
from liveblockd.qapi import Alternate, QapiModel
from liveblockd.storage.options import BlockdevOptions, BlockdevRef, BlockdevRefOrNull

#: bytes, as QEMU on Linux: enough for 256 GiB with clusters of 64 KiB
DEFAULT_L2_CACHE = 32 << 20


class Qcow2OverlapCheckMode(enum.StrEnum):
    """Which overlaps are looked for; this engine always looks for all that it can know."""

    NONE = "none"
    CONSTANT = "constant"
    CACHED = "cached"
    ALL = "all"


class Qcow2OverlapCheckFlags(QapiModel):
    """The same, structure by structure."""

    template: Qcow2OverlapCheckMode | None = None
    main_header: bool | None = None
    active_l1: bool | None = None
    active_l2: bool | None = None
    refcount_table: bool | None = None
    refcount_block: bool | None = None
    snapshot_table: bool | None = None
    inactive_l1: bool | None = None
    inactive_l2: bool | None = None
    bitmap_directory: bool | None = None


OverlapChecks = Annotated[
    Qcow2OverlapCheckFlags | Qcow2OverlapCheckMode, Alternate("Qcow2OverlapChecks")
]


class Qcow2Options(BlockdevOptions):
    """Members of ``blockdev-add``; sizes in bytes, the interval in seconds."""

    file: BlockdevRef
    backing: BlockdevRefOrNull = None
    lazy_refcounts: bool | None = None
    pass_discard_request: bool | None = None
    pass_discard_snapshot: bool | None = None
    pass_discard_other: bool | None = None
    discard_no_unref: bool | None = None
    overlap_check: OverlapChecks | None = None
    cache_size: int | None = None
    l2_cache_size: int | None = None
    l2_cache_entry_size: int | None = None
    refcount_cache_size: int | None = None
    cache_clean_interval: int | None = None
    encrypt: dict[str, Any] | None = None
    data_file: BlockdevRef | None = None


#: what blockdev-reopen may change
CHANGEABLE = frozenset(
    (
        "lazy-refcounts", "pass-discard-request", "pass-discard-snapshot", "pass-discard-other",
        "discard-no-unref", "overlap-check", "cache-size", "l2-cache-size", "l2-cache-entry-size",
        "refcount-cache-size", "cache-clean-interval",
    )
)  # fmt: skip


class CacheSizes(NamedTuple):
    """How much metadata is kept in memory."""

    l2_tables: int
    refcount_blocks: int


def cache_sizes(options: Qcow2Options, geometry: Geometry, disk_size: int) -> CacheSizes:
    """From the options, as QEMU understands them; raises BlockError."""
    total, l2, refcount = options.cache_size, options.l2_cache_size, options.refcount_cache_size
    if total is not None:
        if l2 is not None and refcount is not None:
            raise BlockError(
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time"
            )
        if l2 is not None and l2 > total:
            raise BlockError("l2-cache-size may not exceed cache-size")
        if refcount is not None and refcount > total:
            raise BlockError("refcount-cache-size may not exceed cache-size")
        if l2 is None:
            l2 = total - refcount if refcount is not None else total * 4 // 5
        if refcount is None:
            refcount = total - l2
    entry_size = options.l2_cache_entry_size
    if entry_size is not None and (
        entry_size & (entry_size - 1) or not 512 <= entry_size <= geometry.cluster_size
    ):
        raise BlockError(
            "L2 cache entry size must be a power of two between 512 and the cluster size "
            f"({geometry.cluster_size})"
        )
    if l2 is None:
        l2 = min(DEFAULT_L2_CACHE, geometry.clusters(disk_size) * geometry.l2_entry_bytes)
    if refcount is None:
        refcount = max(4 * geometry.cluster_size, l2 // 4)
    return CacheSizes(l2 // geometry.cluster_size, refcount // geometry.cluster_size)


def check_options(options: Qcow2Options, *, encrypted: bool) -> None:
    """Refuse what this engine does not do; raises BlockError."""
    if options.encrypt is not None and not encrypted:
        raise BlockError(
            "No encryption in image header, but options specified format "
            f"'{options.encrypt.get('format')}'"
        )
