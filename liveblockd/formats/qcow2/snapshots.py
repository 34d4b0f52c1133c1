"""The table of internal snapshots.

Specification: docs/interop/qcow2, "Snapshots".

Runs on: pure. Invariants: a ``Snapshot`` is within the bounds of ``layout``.
Errors: ``BlockError`` for a table that cannot be; ``Incomplete`` where more bytes are needed.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.layout import (
    ENTRY_BYTES,
    MAX_HOST_OFFSET,
    MAX_L1_BYTES,
    MAX_SNAPSHOT_EXTRA_BYTES,
    Geometry,
)

_ENTRY = struct.Struct(">QIHHIIQII")
_BIG_STATE = struct.Struct(">Q")
_EXTRA = struct.Struct(">QQ")


class Incomplete(Exception):  # noqa: N818 - a request, not an error
    """The table goes on beyond the bytes given."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One internal snapshot; sizes and offsets in bytes."""

    id: str
    name: str
    l1_table_offset: int
    l1_size: int
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size: int
    disk_size: int | None


def parse_snapshots(data: bytes, count: int, geometry: Geometry) -> tuple[list[Snapshot], int]:
    """``count`` snapshots from the start of ``data``, and the length of the table in bytes."""
    found: list[Snapshot] = []
    position = 0
    for _ in range(count):
        if position + _ENTRY.size > len(data):
            raise Incomplete
        (l1_offset, l1_size, id_length, name_length, seconds, nanoseconds, clock, state,
         extra_length) = _ENTRY.unpack_from(data, position)  # fmt: skip
        if extra_length > MAX_SNAPSHOT_EXTRA_BYTES:
            raise BlockError("Too much extra metadata in snapshot table entry")
        _check_l1(l1_offset, l1_size, geometry)
        start = position + _ENTRY.size
        strings = start + extra_length
        end = strings + id_length + name_length
        if end > len(data):
            raise Incomplete
        disk_size = None
        if extra_length >= _BIG_STATE.size:
            (state,) = _BIG_STATE.unpack_from(data, start)
        if extra_length >= _EXTRA.size:
            _, disk_size = _EXTRA.unpack_from(data, start)
        found.append(
            Snapshot(
                id=data[strings : strings + id_length].decode("utf-8", "replace"),
                name=data[strings + id_length : end].decode("utf-8", "replace"),
                l1_table_offset=l1_offset,
                l1_size=l1_size,
                date_sec=seconds,
                date_nsec=nanoseconds,
                vm_clock_nsec=clock,
                vm_state_size=state,
                disk_size=disk_size,
            )
        )
        position = -(-end // 8) * 8
    return found, position


def _check_l1(offset: int, size: int, geometry: Geometry) -> None:
    if size * ENTRY_BYTES > MAX_L1_BYTES:
        raise BlockError("Snapshot L1 table too large")
    if size and (
        offset % geometry.cluster_size
        or offset < geometry.cluster_size
        or offset + size * ENTRY_BYTES > MAX_HOST_OFFSET
    ):
        raise BlockError("Snapshot L1 table offset invalid")
