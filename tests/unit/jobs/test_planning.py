"""What a stream plans from arrays, and that nobody waits for all of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from liveblockd.jobs import planning
from liveblockd.runtime.demand import Demand
from liveblockd.storage.cells import DATA, KIND_SHIFT, Survey
from liveblockd.storage.driver import ExtentKind
from tests.support.turns import turns_of_loop

BITS = 16
RUNS = 1000


def only_layer(monkeypatch: pytest.MonkeyPatch, survey: Any) -> Any:
    """A chain of one, which holds what ``survey`` says."""

    class Layer:
        driver = SimpleNamespace(length=2 * RUNS << BITS, survey=survey)

    monkeypatch.setattr(planning.chain, "skip_filters", lambda base: base)
    monkeypatch.setattr(planning.chain, "chain", lambda top: [top])
    monkeypatch.setattr(planning.chain, "behind_filters", lambda _: frozenset())
    return Layer()


async def test_a_plan_of_many_runs_is_made_in_many_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    places = np.arange(RUNS, dtype=np.int64) * 2
    cells = (DATA << KIND_SHIFT) + np.arange(RUNS, dtype=np.int64)[::-1] * 128

    async def survey(*_: object) -> Survey:
        return Survey(2 * RUNS << BITS, places, cells)

    node = only_layer(monkeypatch, survey)

    def kind_of(found: Any) -> ExtentKind:
        return ExtentKind(found.kind)

    async def plan() -> Any:
        stretch = (0, 2 * RUNS << BITS)
        return await planning.survey_stretch(
            node, None, stretch, 1 << BITS, kind_of, Demand(), first=True
        )

    (pieces, end), turns = await turns_of_loop(plan())
    assert end == 2 * RUNS << BITS
    assert [(p.offset, p.length, p.host_offset) for p in pieces] == [
        (number * 2 << BITS, 1 << BITS, (RUNS - 1 - number) << BITS) for number in range(RUNS)
    ]
    assert turns >= RUNS // planning.STEP_RUNS


@pytest.mark.parametrize("served", [False, True])
async def test_plans_are_short_while_a_guest_is_served(
    monkeypatch: pytest.MonkeyPatch, served: bool
) -> None:
    asked = []

    async def survey(*arguments: int) -> None:
        asked.append(arguments[3:])

    node = only_layer(monkeypatch, survey)
    demand = Demand()
    for first in (True, False):
        demand.guests.requests += served
        stretch = (0, 2 * RUNS << BITS)
        assert not await planning.survey_stretch(
            node, None, stretch, 1 << BITS, lambda found: found.kind, demand, first=first
        )
    later = planning.SERVED_SURVEY if served else planning.SURVEY
    assert asked == [planning.FIRST_SURVEY, later]
