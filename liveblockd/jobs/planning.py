"""What a job has to copy from one stretch of a chain: the layers' answers, cut into pieces.

Runs on the event loop. Invariant: the pieces cover all that the layers from ``top`` down to above
``base`` hold of the stretch, in whole clusters of where it goes (``pieces``).

Errors: OSError of a layer's map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from liveblockd.graph import chain
from liveblockd.graph.node import Node
from liveblockd.jobs.pieces import Planner, Run
from liveblockd.runtime.demand import Demand
from liveblockd.storage.cells import Survey, overlaid, survey_runs
from liveblockd.storage.driver import ExtentKind, HostFile

#: bytes; below this, reading through the chain is cheaper than a worker's copy
LEAST_COPY: Final = 128 << 10
#: O_DIRECT wants blocks; no block is larger
DIRECT_ALIGNMENT: Final = 4096
#: runs that are looked at before the first of them is copied
LOOK_AHEAD: Final = 512
#: the same where they come out of one array
SURVEY_RUNS: Final = 16384
#: of these the loop takes so many in one step
STEP_RUNS: Final = 64
#: (tables of all layers together, cells of each) of a survey
SURVEY: Final = (512, 65536)
#: the same while guests are served: what is done with all cells at once takes no tenth of a
#: millisecond
SERVED_SURVEY: Final = (512, 4096)
#: the same of the first one
FIRST_SURVEY: Final = (128, 1024)


async def plan_stretch(
    top: Node,
    base: Node | None,
    stretch: tuple[int, int],
    granularity: int,
    kind_of: Callable[[chain.Run], ExtentKind],
    *,
    least_copy: int | None = None,
) -> tuple[list[Run], int]:
    """Pieces from the begin of ``stretch`` (bytes from, to), as far as ``LOOK_AHEAD`` runs go.

    ``kind_of`` says as what a run is to be taken; ``least_copy`` (bytes) is that of ``Planner``.
    The second value is where the plan ends.
    """
    offset, length = stretch
    runs: list[Run] = []
    position = end = offset
    async for found in chain.resolve(top, base, offset, length - offset):
        kind = kind_of(found)
        if kind is ExtentKind.DATA:
            run = Run(position, found.length, kind, found.layer, found.host_offset)
        else:
            run = Run(position, found.length, kind)
        runs.append(run)
        position += found.length
        end = position // granularity * granularity
        if len(runs) >= LOOK_AHEAD and end > offset:
            break
    if position == length:
        end = position
    least_copy = LEAST_COPY if least_copy is None else least_copy
    planner = Planner(offset, end, granularity, least_copy=least_copy)
    pieces: list[Run] = []
    for run in runs:
        if run.offset < end:
            pieces.extend(planner.feed(run if run.end <= end else run.part(run.offset, end)))
    pieces.extend(planner.finish())
    return pieces, end


async def survey_stretch(
    top: Node,
    base: Node | None,
    stretch: tuple[int, int],
    granularity: int,
    kind_of: Callable[[chain.Run], ExtentKind],
    demand: Demand,
    *,
    first: bool,
) -> tuple[list[Run], int] | None:
    """``plan_stretch`` of any length in one go, where all layers can say what they hold of it.

    ``first``: nothing is copied meanwhile, a short plan will do. None: the layers cannot. Any DATA,
    however short, is a piece to be copied. Nobody is kept waiting for all of it. ``kind_of`` must
    look at kind and layer only.
    """
    offset, length = stretch
    bits = granularity.bit_length() - 1
    stop = chain.skip_filters(base)
    layers = chain.chain(top)
    layers = layers[: layers.index(stop)] if stop in layers else layers
    if not chain.behind_filters(top).isdisjoint(layers):
        return None  # such a layer is not read past the filter
    tables, cells = FIRST_SURVEY if first else SERVED_SURVEY if demand.is_served() else SURVEY
    tables = max(1, tables // len(layers))
    if any(layer.driver.length < length for layer in layers):
        return None  # zeros follow, which nobody holds
    end = length
    surveys: list[Survey] = []
    # The last one mostly is the fullest: the others need to look no further.
    for layer in reversed(layers):
        found = await layer.driver.survey(offset, end - offset, bits, tables, cells)
        if found is None:
            return None
        surveys.append(found)
        end = found.end
        if demand.is_served():
            await demand.give_turn()
    surveys.reverse()
    runs, end = survey_runs(overlaid(surveys, bits), bits, SURVEY_RUNS)
    await demand.give_turn()
    pieces: list[Run] = []
    kinds: dict[tuple[int, int], ExtentKind] = {}
    for number, (start, run) in enumerate(runs, 1):
        if not number % STEP_RUNS:
            await demand.give_turn()
        layer = layers[run.layer]
        kind = kinds.get((run.layer, run.kind))
        if kind is None:
            kind = ExtentKind(run.kind)
            kind = kind_of(chain.Run(run.length, kind, layer, run.host_offset, run.layer + 1))
            kinds[run.layer, run.kind] = kind
        if kind is ExtentKind.UNALLOCATED:
            continue
        if kind is ExtentKind.DATA:
            pieces.append(Run(start, run.length, kind, layer, run.host_offset))
        else:
            pieces.append(Run(start, run.length, kind, layer))
    return pieces, end


def copyable(piece: Run) -> HostFile | None:
    """The host file that a worker can copy a piece of DATA from, if it can."""
    return copyables()(piece)


def copyables() -> Callable[[Run], HostFile | None]:
    """``copyable`` for many pieces, good in this step of the loop: a layer is asked once."""
    files: dict[Node, HostFile | None] = {}

    def find(piece: Run) -> HostFile | None:
        layer = piece.layer
        if layer not in files:
            files[layer] = chain.host_file(layer)
        source = files[layer]
        if source is None or (source.direct and piece.host_offset % DIRECT_ALIGNMENT):
            return None
        return source

    return find
