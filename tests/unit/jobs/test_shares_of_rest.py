"""Many pieces together: which, how many, and that no worker is left alone with the last of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import pytest

from liveblockd.jobs.copying import FAIR_CHUNK, FIRST_CHUNK, MIB, MOST_TOGETHER, CopyJob
from liveblockd.jobs.pieces import Run
from liveblockd.storage.driver import ExtentKind

CLUSTER = 64 << 10


class Copies(CopyJob):
    """Without a scheduler: only what it would begin with."""

    speed = 0  # type: ignore[assignment]

    def __init__(self, pieces: Sequence[Run], chunk: int) -> None:
        self._pieces = deque(pieces)
        self._to_do = sum(piece.length for piece in pieces)
        self._moving = 0
        self._copy_chunk = chunk
        self.asked = 0

    def gathers(self, pieces: Sequence[Run]) -> int:
        self.asked += 1
        data = [piece.kind is ExtentKind.DATA for piece in pieces]
        return data.index(False) if False in data else len(data)

    def batches(self) -> list[list[Run]]:
        found = []
        while self._pieces:
            found.append(self._next_chunks())
            self._moving += sum(piece.length for piece in found[-1])
        return found


def pieces(count: int, *, zeros: Sequence[int] = (), length: int = CLUSTER) -> list[Run]:
    return [
        Run(2 * number * length, length, ExtentKind.ZERO if number in zeros else ExtentKind.DATA)
        for number in range(count)
    ]


def lengths(batches: list[list[Run]]) -> list[int]:
    return [sum(piece.length for piece in batch) for batch in batches]


@pytest.mark.parametrize("zeros", [(), (0,), (299,), (5, 6, 100)])
def test_all_of_them_come_once_and_in_order(zeros: tuple[int, ...]) -> None:
    wanted = pieces(300, zeros=zeros)
    batches = Copies(wanted, FIRST_CHUNK).batches()
    assert [piece for batch in batches for piece in batch] == wanted
    for batch in batches:
        assert len(batch) == 1 or all(piece.kind is ExtentKind.DATA for piece in batch)
        assert len(batch) <= MOST_TOGETHER
        assert sum(piece.length for piece in batch) <= FIRST_CHUNK
    alone = {batch[0].offset // (2 * CLUSTER) for batch in batches if len(batch) == 1}
    assert set(zeros) <= alone


def test_the_last_ones_are_shared() -> None:
    """With chunks of 64 MiB one would copy all of it, and two would look on."""
    found = lengths(Copies(pieces(96, length=MIB), 64 * MIB).batches())
    assert found[0] == 96 * MIB // 3
    assert max(found[1:]) < found[0]
    assert found[-1] <= FAIR_CHUNK
    assert min(found[:-1]) == FAIR_CHUNK, "smaller ones cost more than they share out"


def test_one_long_piece_is_shared_too() -> None:
    found = lengths(Copies(pieces(1, length=96 * MIB), 64 * MIB).batches())
    assert sum(found) == 96 * MIB
    assert found[0] == 96 * MIB // 3
    assert found[-1] <= FAIR_CHUNK


def test_who_is_asked_is_asked_once_a_batch() -> None:
    """Each question goes through the graph: hundreds of them would cost as much as the copies."""
    copies = Copies(pieces(128), FIRST_CHUNK)
    batches = copies.batches()
    assert copies.asked == 2 * len(batches) == 8
