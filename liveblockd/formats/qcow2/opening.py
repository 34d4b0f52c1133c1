"""Reading what an image says of itself, before anything of it is believed.

Specification: docs/interop/qcow2, "Header", "Snapshots". Runs on: the event loop.
Invariants: nothing is written here; memory is bounded by the limits of ``layout``.
Errors: ``BlockError`` in QEMU's words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from errno import ENOENT, ENOTSUP
from typing import NamedTuple

import numpy as np

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.allocator import Refcounts
from liveblockd.formats.qcow2.compression import HAS_ZSTD
from liveblockd.formats.qcow2.encrypted import crypto_header_place
from liveblockd.formats.qcow2.header import Header, check_supported, parse
from liveblockd.formats.qcow2.layout import (
    ENTRY_BYTES,
    MAX_CLUSTER_BITS,
    MAX_SNAPSHOT_TABLE_BYTES,
    MIN_CLUSTER_BITS,
    SECTOR,
    Autoclear,
    Compression,
    Crypt,
)
from liveblockd.formats.qcow2.metadata import Metadata, read_bytes
from liveblockd.formats.qcow2.options import Qcow2Options, cache_sizes, check_options
from liveblockd.formats.qcow2.snapshots import Incomplete, Snapshot, parse_snapshots
from liveblockd.formats.qcow2.tables import from_disk
from liveblockd.storage.driver import BlockIO

#: clusters of snapshots' L1 tables that are guarded against being written to; above, none is
MAX_GUARDED_CLUSTERS = 1 << 20


class Opened(NamedTuple):
    """An image that may be used."""

    metadata: Metadata
    first_sector: bytes
    snapshots: list[Snapshot]
    #: bytes of the snapshot table
    snapshots_length: int


async def read_header(file: BlockIO) -> tuple[Header, bytes]:
    """The header and the first sector; raises BlockError."""
    try:
        start = bytes(await file.read(0, min(file.length, 4096)))
        bits = int.from_bytes(start[20:24], "big")
        if len(start) >= 24 and MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS:
            length = min(file.length, 1 << bits)
            if length > len(start):
                start = bytes(await file.read(0, length))
    except OSError as error:
        raise BlockError.from_os_error("Could not read qcow2 header", error) from error
    return parse(start), start[:SECTOR].ljust(SECTOR, b"\0")


async def open_image(
    options: Qcow2Options,
    children: Mapping[str, BlockIO],
    *,
    read_only: bool,
    snapshot_id: str | None = None,
) -> Opened:
    """Read and check header, tables and snapshots; raises BlockError.

    With ``snapshot_id`` the disk is that of an internal snapshot, to be read only.
    """
    file = children["file"]
    header, first_sector = await read_header(file)
    check_supported(header, read_only=read_only)
    if header.compression_type == Compression.ZSTD and not HAS_ZSTD:
        raise BlockError(
            "Unsupported qcow2 feature(s): zstd compression (the Python package 'backports.zstd' "
            "is not installed)",
            errno=ENOTSUP,
        )
    _check_data_file(header, children)
    check_options(options, encrypted=bool(header.crypt_method))
    if snapshot_id is not None:
        assert read_only
        header = await _as_it_was(file, header, snapshot_id)
    geometry = header.geometry
    sizes = cache_sizes(options, geometry, header.size)
    l1 = from_disk(
        await _read(file, header.l1_table_offset, header.l1_size * ENTRY_BYTES, "L1 table")
    )
    if len(l1) < geometry.l1_size(header.size):  # of a snapshot; of an image it is refused
        l1 = np.concatenate((l1, np.zeros(geometry.l1_size(header.size) - len(l1), np.uint64)))
    table_length = header.refcount_table_clusters * geometry.cluster_size
    table = from_disk(
        await _read(file, header.refcount_table_offset, table_length, "refcount table")
    )
    snapshots, snapshots_length = await _read_snapshots(file, header)
    refcounts = Refcounts(geometry, table, header.refcount_table_offset)
    refcounts.high_water = geometry.clusters(file.length)
    if snapshots_length:
        refcounts.add_metadata(header.snapshots_offset, geometry.clusters(snapshots_length))
    l1_tables = {(s.l1_table_offset, geometry.clusters(s.l1_size * ENTRY_BYTES)) for s in snapshots}
    if sum(clusters for _, clusters in l1_tables) <= MAX_GUARDED_CLUSTERS:
        for offset, clusters in l1_tables:
            refcounts.add_metadata(offset, clusters)
    if header.crypt_method == Crypt.LUKS:
        place, length = crypto_header_place(header, file.length)
        refcounts.add_metadata(place, geometry.clusters(length))
    metadata = Metadata(
        children,
        header,
        l1,
        refcounts,
        max_tables=sizes.l2_tables,
        max_refcount_blocks=sizes.refcount_blocks,
    )
    return Opened(metadata, first_sector, snapshots, snapshots_length)


async def _as_it_was(file: BlockIO, header: Header, snapshot_id: str) -> Header:
    """The header with the disk of a snapshot."""
    for snapshot in (await _read_snapshots(file, header))[0]:
        if snapshot.id == snapshot_id:
            size = header.size if snapshot.disk_size is None else snapshot.disk_size
            return replace(
                header,
                size=size,
                l1_size=snapshot.l1_size,
                l1_table_offset=snapshot.l1_table_offset,
            )
    raise BlockError("Can't find snapshot", errno=ENOENT)


def _check_data_file(header: Header, children: Mapping[str, BlockIO]) -> None:
    if header.has_data_file:
        if "data-file" not in children:
            raise BlockError("'data-file' is required for this image")
        if children["data-file"] is children["file"]:
            raise BlockError("The data file of an image cannot be the image itself")
        if header.raw_data_file and header.backing_file is not None:
            raise BlockError("Backing file and data-file-raw cannot be used at the same time")
        return
    if "data-file" in children:
        raise BlockError("'data-file' can only be set for images with an external data file")
    if header.autoclear & Autoclear.RAW_DATA_FILE:
        raise BlockError("data-file-raw requires a data file")


async def _read(file: BlockIO, offset: int, length: int, what: str) -> bytes:
    if not length:
        return b""
    # A table that the file does not hold is not read as zeros: the image was cut off.
    if offset + length > -(-file.length // 4096) * 4096 + length:
        raise BlockError(f"Could not read {what}: it lies beyond the end of the file")
    try:
        return bytes(await read_bytes(file, offset, length))
    except OSError as error:
        raise BlockError.from_os_error(f"Could not read {what}", error) from error


async def _read_snapshots(file: BlockIO, header: Header) -> tuple[list[Snapshot], int]:
    """The snapshots and the length of their table in bytes."""
    if not header.nb_snapshots:
        return [], 0
    length = 65536
    while True:
        data = await _read(file, header.snapshots_offset, length, "snapshots")
        try:
            return parse_snapshots(data, header.nb_snapshots, header.geometry)
        except Incomplete:
            length *= 4
        if length > MAX_SNAPSHOT_TABLE_BYTES * 2:
            raise BlockError("Snapshot table is too large")
