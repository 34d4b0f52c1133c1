"""Turns: at most so many, in order, and nobody waits for nothing (against a model, by a seed)."""

import random

import pytest

from liveblockd.jobs.turns import Turns


class Taker:
    def __init__(self, number):
        self.number = number
        self.woken = 0

    def wake(self):
        self.woken += 1


@pytest.mark.parametrize("seed", range(30))
def test_against_a_model(seed):
    rng = random.Random(seed)
    limit = rng.randrange(4)
    turns = Turns(limit)
    inside, resting = [], set()  # in order of arrival
    for step in range(200):
        match rng.choice(["enter", "enter", "rest", "ask", "leave", "limit"]):
            case "enter":
                inside.append(Taker(step))
                turns.enter(inside[-1])
            case "limit":
                turns.limit = limit = rng.randrange(4)
            case verb if inside:
                job = rng.choice(inside)
                getattr(turns, verb)(job)
                if verb == "rest":
                    resting.add(job)
                else:
                    resting.discard(job)
                if verb == "leave":
                    inside.remove(job)
        wanting = [job for job in inside if job not in resting]
        waiting = [job for job in wanting if turns.waits(job)]
        assert waiting == turns.waiting()
        assert not any(turns.waits(job) for job in resting)
        if limit:
            assert len(wanting) - len(waiting) == min(limit, len(wanting)), "nobody waits in vain"
        else:
            assert not waiting


def test_who_gets_or_loses_a_turn_is_woken():
    turns = Turns(1)
    a, b = Taker(0), Taker(1)
    turns.enter(a)
    turns.enter(b)
    before = b.woken
    turns.leave(a)
    assert b.woken > before and not turns.waits(b)
    turns.limit = 2
    turns.enter(a)
    before = a.woken
    turns.limit = 1
    assert a.woken > before and turns.waits(a)
