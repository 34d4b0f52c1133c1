"""Where the bytes of a range lie, as an array: one number for each cell of it.

A *cell* is a power of two of bytes, the finest unit in which the layers of a chain allocate. Its
number says which layer answers for it (0 for the first that was asked), what that layer says
(``ExtentKind``; ``COMPRESSED`` means: ask the layer, whatever the reason), and for DATA the host
offset. 0 means that nobody has it.

Runs on: pure. Arrays are native int64, of which a memoryview gives Python ints; a DATA number grows
by ``cell >> SECTOR_BITS`` from one contiguous cell to the next.
Invariants: host offsets are multiples of 512 below 2^56. Errors: none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from liveblockd.storage.driver import ExtentKind

Cells: TypeAlias = npt.NDArray[np.int64]

SECTOR_BITS: Final = 9
HOST_BITS: Final = 47
HOST_MASK: Final = (1 << HOST_BITS) - 1
KIND_SHIFT: Final = HOST_BITS
LAYER_SHIFT: Final = HOST_BITS + 2
#: layers that can be told apart
MAX_LAYERS: Final = 1 << (63 - LAYER_SHIFT)

UNALLOCATED: Final = int(ExtentKind.UNALLOCATED)
ZERO: Final = int(ExtentKind.ZERO)
DATA: Final = int(ExtentKind.DATA)
ASK: Final = int(ExtentKind.COMPRESSED)

ASK_CELL: Final = ASK << KIND_SHIFT


class Survey(NamedTuple):
    """What is held of a long range of which most is not."""

    #: first byte of the disk that the answer does not tell of
    end: int
    #: numbers of cells of the disk, in order, each once
    places: Cells
    #: what is there; none is 0
    cells: Cells


class CellRun(NamedTuple):
    """Adjacent cells, or parts of them, with one answer."""

    length: int  # bytes
    layer: int
    kind: int
    host_offset: int  # bytes, of DATA; else -1


def pack(kinds: npt.NDArray[np.uint8], hosts: npt.NDArray[np.uint64]) -> Cells:
    """Cells of layer 0; ``hosts`` (bytes) counts where the kind is DATA."""
    found = kinds.astype(np.int64) << KIND_SHIFT
    data = kinds == DATA
    if data.any():
        found |= np.where(data, (hosts >> np.uint64(SECTOR_BITS)).astype(np.int64), 0)
    return found


def refine(cells: Cells, factor_bits: int, cell_bits: int) -> Cells:
    """The same range in cells of ``cell_bits``, each of ``cells`` cut into 2^``factor_bits``."""
    if not factor_bits:
        return cells
    steps = np.arange(1 << factor_bits, dtype=np.int64) << (cell_bits - SECTOR_BITS)
    data = (cells >> KIND_SHIFT & 3) == DATA
    return (cells[:, None] + np.where(data[:, None], steps, 0)).reshape(-1)


def add_layer(known: Cells, cells: Cells, layer: int) -> None:
    """Where ``known`` has no answer yet take that of ``layer``."""
    places = np.flatnonzero(cells != 0)
    places = places[known[places] == 0]
    known[places] = cells[places] + (layer << LAYER_SHIFT)


def replace_layer(known: Cells, cells: Cells, layer: int) -> bool:
    """``layer`` says ``cells`` now; False, having done nothing, if what is below it must be asked.

    That is so where it had an answer and has none any more.
    """
    owners = known >> LAYER_SHIFT
    affected = (known == 0) | (owners >= layer)
    nothing = cells == 0
    if (affected & nothing & (known != 0) & (owners == layer)).any():
        return False
    taken = affected & ~nothing
    known[taken] = cells[taken] + (layer << LAYER_SHIFT)
    return True


def overlaid(surveys: Sequence[Survey], cell_bits: int) -> Survey:
    """One answer for all layers, the first one first; as far as all of them tell."""
    end = min(survey.end for survey in surveys)
    last = -(-end >> cell_bits)
    parts = []
    for layer, survey in enumerate(surveys):
        count = int(survey.places.searchsorted(last))
        if count:
            cells = survey.cells[:count] + (layer << LAYER_SHIFT)
            parts.append((survey.places[:count], cells))
    if len(parts) == 1:
        return Survey(end, *parts[0])
    if not parts:
        return Survey(end, np.zeros(0, np.int64), np.zeros(0, np.int64))
    places = np.concatenate([places for places, _ in parts])
    # Stable: of those at one place that of the first layer comes first.
    order = np.argsort(places, kind="stable")
    places = places[order]
    first = np.ones(len(places), np.bool_)
    first[1:] = places[1:] != places[:-1]
    return Survey(end, places[first], np.concatenate([cells for _, cells in parts])[order[first]])


def survey_runs(
    survey: Survey, cell_bits: int, most: int
) -> tuple[Iterator[tuple[int, CellRun]], int]:
    """(offset, run) of all that is held, at most ``most``, and up to where that is all."""
    _, places, cells = survey
    if not len(places):
        return iter(()), survey.end
    step = np.where((cells[:-1] >> KIND_SHIFT & 3) == DATA, 1 << cell_bits >> SECTOR_BITS, 0)
    breaks = (cells[1:] - cells[:-1] != step) | (places[1:] - places[:-1] != 1)
    starts = np.concatenate((np.zeros(1, np.int64), np.flatnonzero(breaks) + 1))
    counts = np.diff(starts, append=len(places))
    end = survey.end
    if len(starts) > most:
        end = int(places[starts[most]]) << cell_bits
        starts, counts = starts[:most], counts[:most]
    offsets = places[starts] << cell_bits
    lengths = counts << cell_bits
    lengths[-1] = min(int(lengths[-1]), end - int(offsets[-1]))  # the disk may end within a cell
    found = zip(offsets.tolist(), lengths.tolist(), cells[starts].tolist(), strict=True)
    return ((offset, _run(cell, 0, length)) for offset, length, cell in found), end


def cell_runs(cells: Cells, cell_bits: int, skip: int, length: int) -> list[CellRun]:
    """Runs of ``length`` bytes, from ``skip`` bytes within the first cell on."""
    size = 1 << cell_bits
    step = np.where((cells[:-1] >> KIND_SHIFT & 3) == DATA, size >> SECTOR_BITS, 0)
    starts = [0, *(np.flatnonzero(cells[1:] - cells[:-1] != step) + 1).tolist()]
    found = []
    end = skip + length
    for start, stop in zip(starts, [*starts[1:], len(cells)], strict=True):
        low, high = max(skip, start << cell_bits), min(end, stop << cell_bits)
        if low < high:
            found.append(_run(int(cells[start]), low - (start << cell_bits), high - low))
    return found


def first_run(cells: Cells, cell_bits: int, skip: int, length: int) -> CellRun:
    """The first of ``cell_runs``; for the few cells of a request."""
    code = int(cells[0])
    count = 1
    step = 1 << (cell_bits - SECTOR_BITS) if code >> KIND_SHIFT & 3 == DATA else 0
    while count < len(cells) and cells[count] == code + step * count:
        count += 1
    return _run(code, skip, min(length, (count << cell_bits) - skip))


def _run(code: int, inside: int, length: int) -> CellRun:
    kind = code >> KIND_SHIFT & 3
    host = ((code & HOST_MASK) << SECTOR_BITS) + inside if kind == DATA else -1
    return CellRun(length, code >> LAYER_SHIFT, kind, host)
