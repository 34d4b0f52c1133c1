"""The table of internal snapshots.

Specification: docs/interop/qcow2, "Snapshots".

Runs on: pure. Invariants: a ``Snapshot`` is within the bounds of ``layout``.
Errors: ``BlockError`` for a table that cannot be; ``Incomplete`` where more bytes are needed.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from errno import EFBIG

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.layout import (
    ENTRY_BYTES,
    MAX_HOST_OFFSET,
    MAX_L1_BYTES,
    MAX_SNAPSHOT_EXTRA_BYTES,
    MAX_SNAPSHOT_TABLE_BYTES,
    MAX_SNAPSHOTS,
    Geometry,
)
from liveblockd.storage.snapshot_info import SnapshotInfo

_ENTRY = struct.Struct(">QIHHIIQII")
_BIG_STATE = struct.Struct(">Q")
_EXTRA = struct.Struct(">QQ")
_ICOUNT = struct.Struct(">Q")
_NO_ICOUNT = (1 << 64) - 1


class Incomplete(Exception):  # noqa: N818 - a request, not an error
    """The table goes on beyond the bytes given."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One internal snapshot; sizes and offsets in bytes."""

    raw_id: bytes
    raw_name: bytes
    l1_table_offset: int
    l1_size: int
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size: int
    #: None in tables of old programs: that of the image
    disk_size: int | None
    #: instructions executed when it was taken, None if that was not counted
    icount: int | None = None
    #: extra data that this version of the format does not know
    unknown_extra: bytes = b""

    @property
    def id(self) -> str:
        """The number as a string, mostly."""
        return self.raw_id.decode("utf-8", "replace")

    @property
    def name(self) -> str:
        """What the user called it."""
        return self.raw_name.decode("utf-8", "replace")

    def info(self, disk_size: int) -> SnapshotInfo:
        """For those above; ``disk_size`` is that of the image."""
        return SnapshotInfo(
            self.id,
            self.name,
            self.vm_state_size,
            self.date_sec,
            self.date_nsec,
            self.vm_clock_nsec,
            self.icount,
            disk_size if self.disk_size is None else self.disk_size,
        )


def next_id(snapshots: Iterable[Snapshot]) -> bytes:
    """One more than the largest number that an id begins with."""
    largest = 0
    for snapshot in snapshots:
        found = re.match(rb"\s*\+?(\d{1,19})", snapshot.raw_id)
        if found:
            largest = max(largest, int(found[1]))
    return b"%d" % (largest + 1)


def serialise_snapshots(snapshots: Iterable[Snapshot]) -> bytes:
    """The table; raises BlockError where a limit of the format is passed."""
    parts = []
    count = 0
    for snapshot in snapshots:
        count += 1
        if max(len(snapshot.raw_id), len(snapshot.raw_name)) > 0xFFFF:
            raise BlockError("The name of the snapshot is too long")
        extra = b""
        if snapshot.disk_size is not None:
            icount = _NO_ICOUNT if snapshot.icount is None else snapshot.icount
            extra = _EXTRA.pack(snapshot.vm_state_size, snapshot.disk_size)
            extra += _ICOUNT.pack(icount) + snapshot.unknown_extra
        small_state = snapshot.vm_state_size if snapshot.vm_state_size < 1 << 32 else 0
        part = _ENTRY.pack(
            snapshot.l1_table_offset, snapshot.l1_size, len(snapshot.raw_id),
            len(snapshot.raw_name), snapshot.date_sec, snapshot.date_nsec, snapshot.vm_clock_nsec,
            small_state, len(extra),
        )  # fmt: skip
        part += extra + snapshot.raw_id + snapshot.raw_name
        parts.append(part.ljust(-(-len(part) // 8) * 8, b"\0"))
    data = b"".join(parts)
    if count > MAX_SNAPSHOTS or len(data) > MAX_SNAPSHOT_TABLE_BYTES:
        raise BlockError("There are too many snapshots", errno=EFBIG)
    return data


def parse_snapshots(
    data: bytes, count: int, geometry: Geometry, *, check_l1: bool = True
) -> tuple[list[Snapshot], int]:
    """``count`` snapshots from the start of ``data``, and the length of the table in bytes.

    Without ``check_l1`` an L1 table that cannot be is left for the caller to find.
    """
    found: list[Snapshot] = []
    position = 0
    for _ in range(count):
        if position + _ENTRY.size > len(data):
            raise Incomplete
        (l1_offset, l1_size, id_length, name_length, seconds, nanoseconds, clock, state,
         extra_length) = _ENTRY.unpack_from(data, position)  # fmt: skip
        if extra_length > MAX_SNAPSHOT_EXTRA_BYTES:
            raise BlockError("Too much extra metadata in snapshot table entry")
        if check_l1:
            _check_l1(l1_offset, l1_size, geometry)
        start = position + _ENTRY.size
        strings = start + extra_length
        end = strings + id_length + name_length
        if end > len(data):
            raise Incomplete
        disk_size = icount = None
        if extra_length >= _BIG_STATE.size:
            (state,) = _BIG_STATE.unpack_from(data, start)
        if extra_length >= _EXTRA.size:
            _, disk_size = _EXTRA.unpack_from(data, start)
        if extra_length >= _EXTRA.size + _ICOUNT.size:
            (icount,) = _ICOUNT.unpack_from(data, start + _EXTRA.size)
        found.append(
            Snapshot(
                raw_id=bytes(data[strings : strings + id_length]),
                raw_name=bytes(data[strings + id_length : end]),
                l1_table_offset=l1_offset,
                l1_size=l1_size,
                date_sec=seconds,
                date_nsec=nanoseconds,
                vm_clock_nsec=clock,
                vm_state_size=state,
                disk_size=disk_size,
                icount=None if icount == _NO_ICOUNT else icount,
                unknown_extra=bytes(data[start + _EXTRA.size + _ICOUNT.size : strings]),
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
