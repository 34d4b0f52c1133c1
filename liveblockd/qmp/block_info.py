"""What the queries of nodes and drives answer, as models: for query-qmp-schema and for tests.

Specification: qapi/block-core.json (BlockDeviceInfo, ImageInfo, BlockInfo, BlockStats and what they
hold). The answers themselves are plain dicts of ``graph.info``, which is faster; a test holds them
against these models. Sizes and offsets are bytes, times nanoseconds.

Pure. Errors: none.
"""

from __future__ import annotations

import builtins
import enum
from collections.abc import Mapping
from typing import ClassVar

from pydantic import ConfigDict, Field

from liveblockd.jobs.job import BlockDeviceIoStatus
from liveblockd.qapi import QapiModel
from liveblockd.qmp.crypto_info import QCryptoBlockInfoLUKS
from liveblockd.storage.options import BlockdevDetectZeroesOptions


class Underscored(QapiModel):
    """Old QAPI types, whose members are spelt with ``_``."""

    model_config = ConfigDict(alias_generator=lambda name: name.rstrip("_"))


class ImageInfoSpecificKind(enum.StrEnum):
    """Formats that tell more about an image."""

    QCOW2 = "qcow2"
    VMDK = "vmdk"
    LUKS = "luks"
    RBD = "rbd"
    FILE = "file"


class Qcow2CompressionType(enum.StrEnum):
    """How clusters are compressed."""

    ZLIB = "zlib"
    ZSTD = "zstd"


class Qcow2BitmapInfoFlags(enum.StrEnum):
    """What the image says of a stored bitmap."""

    IN_USE = "in-use"
    AUTO = "auto"


class Qcow2BitmapInfo(QapiModel):
    """A bitmap stored in an image."""

    name: str
    granularity: int
    flags: list[Qcow2BitmapInfoFlags]


class BlockdevQcow2EncryptionFormat(enum.StrEnum):
    """How an image is encrypted."""

    AES = "aes"
    LUKS = "luks"


class ImageInfoSpecificQCow2Encryption(QapiModel):
    """Encryption of an image."""

    qapi_tag: ClassVar[str] = "format"

    format_: BlockdevQcow2EncryptionFormat

    @classmethod
    def qapi_variants(cls) -> Mapping[str, builtins.type[QapiModel]]:
        """What luks says besides."""
        return {"luks": ImageInfoSpecificQCow2EncryptionLuks}


class ImageInfoSpecificQCow2EncryptionLuks(ImageInfoSpecificQCow2Encryption, QCryptoBlockInfoLUKS):
    """Encryption by luks."""


class ImageInfoSpecificQCow2(QapiModel):
    """What qcow2 adds."""

    compat: str
    data_file: str | None = None
    data_file_raw: bool | None = None
    extended_l2: bool | None = None
    lazy_refcounts: bool | None = None
    corrupt: bool | None = None
    refcount_bits: int
    encrypt: ImageInfoSpecificQCow2Encryption | None = None
    bitmaps: list[Qcow2BitmapInfo] | None = None
    compression_type: Qcow2CompressionType


class ImageInfoSpecificFile(QapiModel):
    """What a host file adds."""

    extent_size_hint: int | None = None


class ImageInfoSpecific(QapiModel):
    """Members of one format."""

    qapi_tag: ClassVar[str] = "type"

    type: ImageInfoSpecificKind

    @classmethod
    def qapi_variants(cls) -> Mapping[str, builtins.type[QapiModel]]:
        """The formats that we describe."""
        return {
            "qcow2": ImageInfoSpecificQCow2Wrapper,
            "luks": ImageInfoSpecificLUKSWrapper,
            "file": ImageInfoSpecificFileWrapper,
        }


class ImageInfoSpecificQCow2Wrapper(ImageInfoSpecific):
    """Of a qcow2 image."""

    data: ImageInfoSpecificQCow2


class ImageInfoSpecificLUKSWrapper(ImageInfoSpecific):
    """Of a luks image."""

    data: QCryptoBlockInfoLUKS


class ImageInfoSpecificFileWrapper(ImageInfoSpecific):
    """Of a host file."""

    data: ImageInfoSpecificFile


class SnapshotInfo(QapiModel):
    """An internal snapshot."""

    id: str
    name: str
    vm_state_size: int
    date_sec: int
    date_nsec: int
    vm_clock_sec: int
    vm_clock_nsec: int
    icount: int | None = None


class BlockLimitsInfo(QapiModel):
    """What requests to a node must keep to."""

    request_alignment: int
    max_discard: int | None = None
    discard_alignment: int | None = None
    max_write_zeroes: int | None = None
    write_zeroes_alignment: int | None = None
    opt_transfer: int | None = None
    max_transfer: int | None = None
    max_hw_transfer: int | None = None
    max_iov: int
    max_hw_iov: int | None = None
    min_mem_alignment: int
    opt_mem_alignment: int


class ImageInfo(QapiModel):
    """An image and the chain below it."""

    filename: str
    format_: str
    dirty_flag: bool | None = None
    actual_size: int | None = None
    virtual_size: int
    cluster_size: int | None = None
    encrypted: bool | None = None
    compressed: bool | None = None
    backing_filename: str | None = None
    full_backing_filename: str | None = None
    backing_filename_format: str | None = None
    snapshots: list[SnapshotInfo] | None = None
    limits: BlockLimitsInfo | None = None
    format_specific: ImageInfoSpecific | None = None
    backing_image: ImageInfo | None = None


class BlockdevCacheInfo(QapiModel):
    """How a node is cached."""

    writeback: bool
    direct: bool
    no_flush: bool


class BlockDirtyInfo(QapiModel):
    """A dirty bitmap; ``count`` in bytes."""

    name: str | None = None
    count: int
    granularity: int
    recording: bool
    busy: bool
    persistent: bool
    inconsistent: bool | None = None


class BlockdevChild(QapiModel):
    """A child of a node, by its role."""

    child: str
    node_name: str


class IOLimits(Underscored):
    """Bytes and requests a second, those of bursts, and how many seconds such last."""

    bps: int
    bps_rd: int
    bps_wr: int
    iops: int
    iops_rd: int
    iops_wr: int
    bps_max: int | None = None
    bps_rd_max: int | None = None
    bps_wr_max: int | None = None
    iops_max: int | None = None
    iops_rd_max: int | None = None
    iops_wr_max: int | None = None
    bps_max_length: int | None = None
    bps_rd_max_length: int | None = None
    bps_wr_max_length: int | None = None
    iops_max_length: int | None = None
    iops_rd_max_length: int | None = None
    iops_wr_max_length: int | None = None
    iops_size: int | None = None
    group: str | None = None


class _BeforeLimits(Underscored):
    """Members of the last base of a class come first."""

    file: str
    node_name: str = Field(alias="node-name")
    ro: bool
    drv: str
    backing_file: str | None = None
    backing_file_depth: int
    children: list[BlockdevChild]
    active: bool
    encrypted: bool
    detect_zeroes: BlockdevDetectZeroesOptions


class BlockDeviceInfo(IOLimits, _BeforeLimits):
    """A node."""

    image: ImageInfo
    cache: BlockdevCacheInfo
    write_threshold: int
    dirty_bitmaps: list[BlockDirtyInfo] | None = Field(default=None, alias="dirty-bitmaps")


class BlockInfo(Underscored):
    """A drive."""

    device: str
    qdev: str | None = None
    type: str
    removable: bool
    locked: bool
    inserted: BlockDeviceInfo | None = None
    tray_open: bool | None = None
    io_status: BlockDeviceIoStatus | None = Field(default=None, alias="io-status")


class BlockDeviceStats(Underscored):
    """Counters since the start."""

    rd_bytes: int
    wr_bytes: int
    zone_append_bytes: int
    unmap_bytes: int
    rd_operations: int
    wr_operations: int
    zone_append_operations: int
    flush_operations: int
    unmap_operations: int
    rd_total_time_ns: int
    wr_total_time_ns: int
    zone_append_total_time_ns: int
    flush_total_time_ns: int
    unmap_total_time_ns: int
    wr_highest_offset: int
    rd_merged: int
    wr_merged: int
    zone_append_merged: int
    unmap_merged: int
    idle_time_ns: int | None = None
    failed_rd_operations: int
    failed_wr_operations: int
    failed_zone_append_operations: int
    failed_flush_operations: int
    failed_unmap_operations: int
    invalid_rd_operations: int
    invalid_wr_operations: int
    invalid_zone_append_operations: int
    invalid_flush_operations: int
    invalid_unmap_operations: int
    account_invalid: bool
    account_failed: bool
    timed_stats: list[dict[str, int]]


class BlockStatsSpecific(QapiModel):
    """What a driver counts for itself."""

    qapi_tag: ClassVar[str] = "driver"

    driver: str

    @classmethod
    def qapi_variants(cls) -> Mapping[str, builtins.type[QapiModel]]:
        """Drivers that count something."""
        return {"file": BlockStatsSpecificFile, "host_device": BlockStatsSpecificFile}


class BlockStatsSpecificFile(BlockStatsSpecific):
    """Discards of a host file, and bytes of those that were done."""

    discard_nb_ok: int
    discard_nb_failed: int
    discard_bytes_ok: int


class BlockStats(QapiModel):
    """Counters of a drive or node, and of what lies below it."""

    device: str | None = None
    qdev: str | None = None
    node_name: str | None = None
    stats: BlockDeviceStats
    driver_specific: BlockStatsSpecific | None = None
    parent: BlockStats | None = None
    backing: BlockStats | None = None


class XDbgBlockGraphNodeType(enum.StrEnum):
    """What a vertex of the graph is."""

    BLOCK_BACKEND = "block-backend"
    BLOCK_JOB = "block-job"
    BLOCK_DRIVER = "block-driver"


class XDbgBlockGraphNode(QapiModel):
    """A vertex."""

    id: int
    type: XDbgBlockGraphNodeType
    name: str


class BlockPermission(enum.StrEnum):
    """What a user does with a node, or lets others do."""

    CONSISTENT_READ = "consistent-read"
    WRITE = "write"
    WRITE_UNCHANGED = "write-unchanged"
    RESIZE = "resize"


class XDbgBlockGraphEdge(QapiModel):
    """An edge."""

    parent: int
    child: int
    name: str
    perm: list[BlockPermission]
    shared_perm: list[BlockPermission]


class XDbgBlockGraph(QapiModel):
    """Return of x-debug-query-block-graph."""

    nodes: list[XDbgBlockGraphNode]
    edges: list[XDbgBlockGraphEdge]
