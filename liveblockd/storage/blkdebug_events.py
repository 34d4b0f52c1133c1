"""Which of QEMU's debug events a request is, judged from below the format driver.

Specification: qapi/block-core.json, BlkdebugEvent; QEMU docs/interop/qcow2 for the tables.

QEMU's qcow2 driver calls out its steps. Of ours the request itself is looked at. When the image is
qcow2 the header, the L1 and the refcount table say where the metadata is; all else is guest data.
So ``read_aio`` does not fire when the header is read, as nobody would expect. An L2 table that the
L1 table on disk does not name yet counts as data. What cannot be seen so the driver above tells:
``step`` says what kind of data a request is about, ``Blkdebug.debug_event`` what came before it.

PURE: bytes in, values out; the caller reads the tables. Damaged tables give fewer regions.
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final, TypeVar

MAGIC = b"QFI\xfb"
HEADER_LENGTH = 104
#: tables are looked at up to this size: blkdebug is for tests, their images are small
TABLE_LIMIT = 8 << 20

_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
_OFFSET_MASK = 0x00FFFFFFFFFFFE00


@dataclass(frozen=True, slots=True)
class Region:
    """A piece of metadata, and the events of a read and a write that touch it."""

    start: int
    end: int
    on_read: tuple[str, ...]
    on_write: tuple[str, ...]


T = TypeVar("T")
#: the event of requests for data in this context, in place of ``read_aio`` or ``write_aio``
_step: Final[ContextVar[str]] = ContextVar("step", default="")

DATA_READ = ("read_aio",)
DATA_WRITE = ("write_aio", "pwritev")
ZERO_WRITE = ("pwritev_zero",)
FLUSH = ("flush_to_os", "flush_to_disk")
_REFBLOCK_WRITE = ("refblock_update", "refblock_update_part", "pwritev")


def regions(read: Callable[[int, int], bytes]) -> tuple[Region, ...]:
    """The metadata of an image; ``read(offset, length)`` gives its bytes. Empty if not qcow2."""
    header = read(0, HEADER_LENGTH)
    if len(header) < _HEADER.size or header[:4] != MAGIC:
        return ()
    fields = _HEADER.unpack_from(header)
    cluster_bits, l1_size, l1_offset = fields[4], fields[7], fields[8]
    reftable_offset, reftable_clusters = fields[9], fields[10]
    if not 9 <= cluster_bits <= 21:
        return ()
    cluster = 1 << cluster_bits
    l1_bytes, reftable_bytes = l1_size * 8, reftable_clusters * cluster
    found = [
        Region(0, cluster, (), ("pwritev",)),
        Region(l1_offset, l1_offset + l1_bytes, (), ("l1_update", "pwritev")),
        Region(
            reftable_offset,
            reftable_offset + reftable_bytes,
            ("reftable_load",),
            ("reftable_update", "pwritev"),
        ),
    ]
    found.extend(
        Region(start, start + cluster, ("l2_load",), ("l2_update", "pwritev"))
        for start in _entries(read(l1_offset, min(l1_bytes, TABLE_LIMIT)))
    )
    found.extend(
        Region(start, start + cluster, ("refblock_load",), _REFBLOCK_WRITE)
        for start in _entries(read(reftable_offset, min(reftable_bytes, TABLE_LIMIT)))
    )
    return tuple(found)


def events_of(found: Iterable[Region], offset: int, length: int, write: bool) -> tuple[str, ...]:
    """The events of a read or write of ``length`` bytes at ``offset``."""
    for region in found:
        if region.start < offset + length and offset < region.end:
            return region.on_write if write else region.on_read
    if name := _step.get():
        return (name, "pwritev") if write else (name,)
    return DATA_WRITE if write else DATA_READ


async def step(name: str, work: Awaitable[T]) -> T:
    """Await ``work``, whose requests for data are the event ``name``."""
    token = _step.set(name)
    try:
        return await work
    finally:
        _step.reset(token)


def _entries(table: bytes) -> set[int]:
    usable = len(table) // 8
    values = struct.unpack(f">{usable}Q", table[: usable * 8])
    return {value & _OFFSET_MASK for value in filter(None, values)} - {0}
