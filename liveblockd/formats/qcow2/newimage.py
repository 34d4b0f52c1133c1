"""The bytes of a new, empty qcow2 image.

Specification: docs/interop/qcow2. The layout is that of qemu-img: header, refcount table, refcount
blocks, L1 table, each from a cluster boundary on.

Runs on: pure. Invariants: ``qemu-img check`` finds nothing to complain about.
Errors: ``BlockError`` in the words of qemu-img.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from errno import EFBIG, ENOSPC

import numpy as np

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.allocator import Write, pack_counts
from liveblockd.formats.qcow2.header import Header, feature_name_table, serialise
from liveblockd.formats.qcow2.layout import (
    ENTRY_BYTES,
    HEADER_LENGTH_V2,
    HEADER_LENGTH_V3,
    MAX_BACKING_FORMAT,
    MAX_BACKING_NAME,
    MAX_DISK_SIZE,
    MAX_L1_BYTES,
    SECTOR,
    Autoclear,
    Compatible,
    Compression,
    Crypt,
    Extension,
    Geometry,
    Incompatible,
)
from liveblockd.formats.qcow2.subclusters import SUBCLUSTERS
from liveblockd.formats.qcow2.tables import to_disk


@dataclass(frozen=True, slots=True)
class NewImage:
    """What is asked for; sizes in bytes."""

    size: int
    cluster_size: int = 65536
    version: int = 3
    refcount_bits: int = 16
    backing_file: str | None = None
    backing_format: str | None = None
    lazy_refcounts: bool = False
    extended_l2: bool = False
    compression: Compression = Compression.ZLIB
    #: the name of the external data file as the header has it, "" for none there
    data_file: str | None = None
    data_file_raw: bool = False
    #: a LUKS header: the image is encrypted
    crypto_header: bytes = b""


@dataclass(frozen=True, slots=True)
class Layout:
    """The bytes: all ``tables`` are durable before ``header`` is written at offset 0."""

    header: bytes
    tables: tuple[Write, ...]


def check_options(new: NewImage) -> Geometry:
    """The geometry; raises BlockError, in the order in which qemu-img looks."""
    if new.size % SECTOR:
        raise BlockError("Image size must be a multiple of 512 bytes")
    size = new.cluster_size
    if size & (size - 1) or not 512 <= size <= 2 << 20:
        raise BlockError("Cluster size must be a power of two between 512 and 2048k")
    if new.version not in (2, 3):
        raise BlockError(f"Unsupported qcow2 version {new.version}")
    if new.extended_l2:
        _needs_version_3(new, "Extended L2 entries are only")
        if size < SUBCLUSTERS * SECTOR:
            raise BlockError(
                "Extended L2 entries are only supported with cluster sizes of at least "
                f"{SUBCLUSTERS * SECTOR} bytes"
            )
    if new.backing_format is not None and new.backing_file is None:
        raise BlockError("Backing format cannot be used without backing file")
    if new.lazy_refcounts:
        _needs_version_3(new, "Lazy refcounts only")
    bits = new.refcount_bits
    if bits & (bits - 1) or not 1 <= bits <= 64:
        raise BlockError("Refcount width must be a power of two and may not exceed 64 bits")
    if new.version < 3 and bits != 16:
        raise BlockError(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above "
            "(use version=v3 or greater)"
        )
    _check_data_file(new)
    if new.compression is not Compression.ZLIB:
        _needs_version_3(new, "Non-zlib compression type is only")
    geometry = Geometry(new.version, size.bit_length() - 1, bits.bit_length() - 1, new.extended_l2)
    l1_bytes = geometry.l1_size(new.size) * ENTRY_BYTES
    if new.size < 0 or new.size > MAX_DISK_SIZE or l1_bytes > MAX_L1_BYTES:
        raise BlockError(
            "The image size is too large for file format 'qcow2' (try using a larger cluster size)",
            errno=EFBIG,
        )
    return geometry


def _check_data_file(new: NewImage) -> None:
    if new.data_file_raw and new.data_file is None:
        raise BlockError("data-file-raw requires data-file")
    if new.data_file_raw and new.backing_file is not None:
        raise BlockError("Backing file and data-file-raw cannot be used at the same time")
    if new.data_file is not None:
        _needs_version_3(new, "External data files are only")


def _needs_version_3(new: NewImage, what: str) -> None:
    if new.version < 3:
        raise BlockError(
            f"{what} supported with compatibility level 1.1 and above (use version=v3 or greater)"
        )


def lay_out(new: NewImage) -> Layout:
    """The bytes of the image; raises BlockError."""
    geometry = check_options(new)
    size = geometry.cluster_size
    l1_size = max(1, geometry.l1_size(new.size))
    l1_clusters = geometry.clusters(l1_size * ENTRY_BYTES)
    table_clusters = blocks = 1
    while True:  # the tables must describe themselves
        total = (
            1 + table_clusters + blocks + l1_clusters + geometry.clusters(len(new.crypto_header))
        )
        needed_blocks = -(-total // geometry.refcounts_per_block)
        needed_clusters = geometry.clusters(needed_blocks * ENTRY_BYTES)
        if (needed_blocks, needed_clusters) == (blocks, table_clusters):
            break
        blocks, table_clusters = needed_blocks, needed_clusters
    table_offset = size
    blocks_offset = table_offset + table_clusters * size
    l1_offset = blocks_offset + blocks * size
    crypto_offset = l1_offset + l1_clusters * size
    table = np.zeros(table_clusters * geometry.table_entries, np.uint64)
    table[:blocks] = np.arange(blocks, dtype=np.uint64) * np.uint64(size) + np.uint64(blocks_offset)
    counts = np.zeros(blocks * geometry.refcounts_per_block, np.uint64)
    counts[:total] = 1
    header = Header(
        version=new.version,
        cluster_bits=geometry.cluster_bits,
        size=new.size,
        l1_size=l1_size,
        l1_table_offset=l1_offset,
        refcount_table_offset=table_offset,
        refcount_table_clusters=table_clusters,
        refcount_order=geometry.refcount_order,
        crypt_method=int(Crypt.LUKS if new.crypto_header else Crypt.NONE),
        incompatible=_incompatible(new),
        compression_type=int(new.compression),
        autoclear=int(Autoclear.RAW_DATA_FILE) if new.data_file_raw else 0,
        compatible=int(Compatible.LAZY_REFCOUNTS) if new.lazy_refcounts else 0,
        header_length=HEADER_LENGTH_V3 if new.version >= 3 else HEADER_LENGTH_V2,
        backing_file=_encoded(new.backing_file, MAX_BACKING_NAME, "file"),
        extensions=_extensions(new, crypto_offset),
    )
    tables = (
        Write(table_offset, to_disk(table)),
        Write(blocks_offset, pack_counts(counts, geometry.refcount_order)),
        Write(l1_offset, bytes(l1_clusters * size)),
        *((Write(crypto_offset, new.crypto_header),) if new.crypto_header else ()),
    )
    return Layout(_serialise(header).ljust(size, b"\0"), tables)


def _incompatible(new: NewImage) -> int:
    bits = Incompatible.EXTENDED_L2 if new.extended_l2 else 0
    if new.compression is not Compression.ZLIB:
        bits |= Incompatible.COMPRESSION_TYPE
    if new.data_file is not None:
        bits |= Incompatible.DATA_FILE
    return int(bits)


def _serialise(header: Header) -> bytes:
    try:
        return serialise(header)
    except BlockError as error:
        if error.errno != ENOSPC:
            raise
    # The names of the features are a help for messages: they give way in a small cluster.
    lean = tuple(e for e in header.extensions if e[0] != Extension.FEATURE_NAMES)
    return serialise(replace(header, extensions=lean))


def _encoded(text: str | None, limit: int, what: str) -> bytes | None:
    if text is None:
        return None
    data = text.encode("utf-8", "surrogateescape")
    if len(data) > limit or b"\0" in data:
        raise BlockError(f"Backing {what} name too long")
    return data or None


def _extensions(new: NewImage, crypto_offset: int) -> tuple[tuple[int, bytes], ...]:
    found: list[tuple[int, bytes]] = []
    backing_format = _encoded(new.backing_format, MAX_BACKING_FORMAT, "format")
    if backing_format is not None:
        found.append((int(Extension.BACKING_FORMAT), backing_format))
    if new.crypto_header:
        place = struct.pack(">QQ", crypto_offset, len(new.crypto_header))
        found.append((int(Extension.ENCRYPTION), place))
    if new.data_file:
        name = new.data_file.encode("utf-8", "surrogateescape")
        if len(name) > MAX_BACKING_NAME or b"\0" in name:
            raise BlockError("Data file name too long")
        found.append((int(Extension.DATA_FILE), name))
    if new.version >= 3:
        found.append((int(Extension.FEATURE_NAMES), feature_name_table()))
    return tuple(found)
