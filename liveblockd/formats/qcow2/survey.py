"""What an image holds of a long range, of which that mostly is little: many tables at a time.

Specification: docs/interop/qcow2, "Cluster mapping"; ``storage.driver.BlockDriver.survey``.

An immense disk has thousands of L2 tables with next to nothing in them. To load each, and to make
an array of all its cells, costs a hundred times what reading it does; here workers read them by
the batch and hand out the entries that are not 0.

Runs on: the event loop; ``scan_tables`` on workers. Invariants: tables that are in memory are used,
for the disk may not have what they say; others are read and not kept. Clusters of tables that are
freed meanwhile are not given to somebody else before they were read (``quarantine``). Whatever
is not simply right is left to ``cells``, which says what is wrong, and only to who needs it. The
loop is held for a fraction of a millisecond at a time: guests are served meanwhile.
Errors: OSError from the file.
"""

from __future__ import annotations

import asyncio
import os
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from liveblockd.formats.qcow2.layout import OFFSET_MASK
from liveblockd.formats.qcow2.mapping import kinds
from liveblockd.formats.qcow2.metadata import Metadata
from liveblockd.formats.qcow2.tables import Entries, drop_idle_flags
from liveblockd.runtime.demand import Demand
from liveblockd.runtime.workers import WorkerPool
from liveblockd.storage import hostcalls, many_requests
from liveblockd.storage.cells import Survey, pack
from liveblockd.storage.copy_engine import piece_buffer

#: bytes of tables that a worker reads into one buffer
BUFFER = 1 << 20
#: tables of one job: some milliseconds
JOB_TABLES = 64
#: entries after which a job leaves the rest of its tables to another survey
JOB_ENTRIES = 16384
#: tables that are read at first, to see how full they are
FIRST_TABLES = 4
#: so many times more may be read after that, where there is little in them
MOST_GROWTH = 32
#: the same where those before had little in them
MOST_AT_ONCE = 256
#: entries that the loop looks at in one step
STEP = 4096
#: entries that are looked at together: most of such pieces are empty
PIECE = 512

Places = npt.NDArray[np.int64]


class Found(NamedTuple):
    """Entries that are not 0."""

    #: numbers of guest clusters
    places: Places
    entries: Entries


def scan_tables(
    fd: int, tables: list[tuple[int, int]], table_size: int, direct: bool
) -> tuple[list[Found], int]:
    """On a worker: what tables, each (L1 index, host offset), have, and of how many that is.

    Closes the (duplicated) descriptor.
    """
    try:
        found: list[Found] = []
        per_buffer = max(1, BUFFER // table_size)
        buffer = piece_buffer(min(per_buffer, len(tables)) * table_size)
        for start in range(0, len(tables), per_buffer):
            part = tables[start : start + per_buffer]
            if direct or not _read_together(fd, part, buffer, table_size):
                for number, (_, host_offset) in enumerate(part):
                    place = buffer[number * table_size : (number + 1) * table_size]
                    if direct:
                        hostcalls.read_aligned(fd, place, host_offset, hostcalls.MEMORY_ALIGNMENT)
                    else:
                        hostcalls.read_into(fd, place, host_offset)
            indices = np.array([l1_index for l1_index, _ in part], np.int64)
            found.append(_nonzero(buffer[: len(part) * table_size], indices, table_size // 8))
            if sum(len(some.places) for some in found) > JOB_ENTRIES:
                return found, start + len(part)
        return found, len(tables)
    finally:
        os.close(fd)


def _read_together(
    fd: int, tables: list[tuple[int, int]], buffer: memoryview, table_size: int
) -> bool:
    """All of them by one system call; False where some are not there as a whole."""
    own = many_requests.context()
    if own is None or len(tables) > many_requests.MOST:
        return False
    offsets = np.array([host_offset for _, host_offset in tables], np.int64)
    first = many_requests.address_of(np.frombuffer(buffer, np.uint8))
    addresses = (first + table_size * np.arange(len(tables))).astype(np.uint64)
    found = own.read(fd, offsets, addresses, table_size, 0)
    return found is not None and bool((found == table_size).all())


def _nonzero(buffer: memoryview, l1_indices: Places, entries: int) -> Found:
    """What tables of so many ``entries``, one after the other in a buffer, have."""
    piece = min(PIECE, entries)
    pieces = np.frombuffer(buffer, np.uint64).reshape(-1, piece)
    used = np.flatnonzero(pieces.max(axis=1))  # the order of the bytes does not matter to that
    row, column = np.nonzero(pieces[used])
    piece_numbers = used[row]
    table, within = np.divmod(piece_numbers, entries // piece)
    places = l1_indices[table] * entries + within * piece + column
    return Found(places, pieces[piece_numbers, column].byteswap())


class Surveyor:
    """Of one image; it remembers how full the tables were that it has seen."""

    def __init__(self, metadata: Metadata, workers: WorkerPool) -> None:
        self._metadata = metadata
        self._workers = workers
        #: cells of a table, as it was last seen
        self._fullness: float | None = None

    async def survey(
        self, offset: int, length: int, bits: int, tables: int, most: int
    ) -> Survey | None:
        """See ``BlockDriver.survey``."""
        metadata, workers = self._metadata, self._workers
        indices = _tables_of(metadata, offset, length, bits)
        if indices is None:
            return None
        geometry = metadata.geometry
        end = offset + length
        if len(indices) > tables:
            end = min(end, int(indices[tables]) * geometry.span)
            indices = indices[:tables]
        if metadata.bad_l1[indices[indices < len(metadata.bad_l1)]].any():
            return None
        answers: list[Survey] = []
        count = cells = 0
        while count < len(indices) and cells < most:
            part = indices[count : count + self._next_tables(count, cells, most)]
            count += len(part)
            stop = end if count == len(indices) else int(indices[count]) * geometry.span
            found, scanned = await _find(metadata, workers, part.tolist())
            if found is None:
                return None
            if scanned < len(part):
                count += scanned - len(part)
                stop = int(part[scanned]) * geometry.span
            await _turn(workers.demand)
            answer = await _answer(metadata, workers.demand, found, (offset, stop), most - cells)
            if answer is None:
                return None
            answers.append(answer)
            self._fullness = sum(len(some.places) for some in found) / scanned
            cells += len(answer.places)
            if answer.end < stop:
                break
        return _joined(answers, answers[-1].end if answers else end)

    def _next_tables(self, count: int, cells: int, most: int) -> int:
        """How many tables to read, after ``count`` that had so many of ``most`` cells."""
        if count:
            wanted = (most - cells) * count // max(cells, 1)
            return max(1, min(wanted, count * MOST_GROWTH))
        if self._fullness is None:
            return FIRST_TABLES
        # What follows may be fuller.
        return max(1, min(int(most / max(self._fullness, 1)), MOST_AT_ONCE))


def _tables_of(metadata: Metadata, offset: int, length: int, bits: int) -> Places | None:
    """The L1 indices of the tables there are for a range; None: this is not for such an image."""
    geometry = metadata.geometry
    host = metadata.file.host_file()
    if bits != geometry.cluster_bits or geometry.extended_l2 or metadata.has_data_file:
        return None
    if metadata.stores is not metadata.children or host is None:
        return None
    if host.direct and geometry.cluster_size % hostcalls.MEMORY_ALIGNMENT:
        return None
    first = offset // geometry.span
    last = min(-(-(offset + length) // geometry.span), len(metadata.l1))
    return first + np.flatnonzero(metadata.l1[first:last])


def _joined(answers: list[Survey], end: int) -> Survey:
    if len(answers) == 1:
        return answers[0]._replace(end=end)
    nothing = np.zeros(0, np.int64)
    return Survey(
        end,
        np.concatenate([nothing, *(answer.places for answer in answers)]),
        np.concatenate([nothing, *(answer.cells for answer in answers)]),
    )


async def _find(
    metadata: Metadata, workers: WorkerPool, l1_indices: list[int]
) -> tuple[list[Found] | None, int]:
    """What these tables have, or at least so many of the first; None where one is not right.

    Raises OSError.
    """
    found: list[Found] = []
    wanted: list[tuple[int, int]] = []
    for l1_index in l1_indices:
        table = metadata.tables.get(l1_index)
        if table is None:
            wanted.append((l1_index, metadata.l1_view[l1_index] & OFFSET_MASK))
        elif table.bad:
            return None, 0
        else:
            places = np.flatnonzero(table.entries)
            entries = table.entries[places]
            found.append(Found(places + l1_index * metadata.geometry.l2_entries, entries))
    scanned = len(l1_indices)
    if wanted:
        more, end = await _read(metadata, workers, wanted)
        found += more
        if end is not None:
            scanned = l1_indices.index(end)
    return found, scanned


async def _read(
    metadata: Metadata, workers: WorkerPool, tables: list[tuple[int, int]]
) -> tuple[list[Found], int | None]:
    """Tables that are not in memory, and the L1 index of the first one that was left; OSError."""
    host = metadata.file.host_file()
    assert host is not None
    size = metadata.geometry.cluster_size
    # A scan of tables in memory is one more copy that only wants a processor.
    lane = workers.lane(waits=host.read_flags != 0)
    epoch = metadata.quarantine.enter()
    try:
        parts = [tables[start : start + JOB_TABLES] for start in range(0, len(tables), JOB_TABLES)]
        jobs = [
            lane.submit(scan_tables, hostcalls.duplicate(host.fd), part, size, host.direct)
            for part in parts
        ]
        answers = await asyncio.gather(*jobs, return_exceptions=True)
    finally:
        metadata.leave(epoch)
    found: list[Found] = []
    left: int | None = None
    for part, answer in zip(parts, answers, strict=True):
        if isinstance(answer, BaseException):
            raise answer
        found += answer[0]
        if left is None and answer[1] < len(part):
            left = part[answer[1]][0]
    return found, left


async def _turn(demand: Demand) -> None:
    """Between two steps that are only worth one for a guest."""
    if demand.is_served():
        await demand.give_turn()


async def _answer(
    metadata: Metadata, demand: Demand, found: list[Found], stretch: tuple[int, int], most: int
) -> Survey | None:
    """Cells, in order, cut to the stretch and to ``most``; None where an entry cannot be."""
    offset, end = stretch
    bits = metadata.geometry.cluster_bits
    places = np.concatenate([part.places for part in found])
    entries = np.concatenate([part.entries for part in found])
    order = np.argsort(places, kind="stable")
    places = places[order]
    low, high = places.searchsorted((offset >> bits, -(-end >> bits)))
    if high - low > most:
        high = low + most
        end = int(places[high]) << bits
    entries, places = entries[order[low:high]], places[low:high]
    await _turn(demand)
    cells = np.zeros(len(places), np.int64)
    for start in range(0, len(places), STEP):
        if start:
            await demand.give_turn()
        part = entries[start : start + STEP]
        drop_idle_flags(part)
        if metadata.bad_entries(part):
            return None
        cells[start : start + STEP] = pack(kinds(part), part & np.uint64(OFFSET_MASK))
    held = cells != 0
    return Survey(end, places[held], cells[held])
