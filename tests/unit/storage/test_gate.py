"""Guests' writes before copies to the same file."""

import os
import threading
import time

import pytest

from liveblockd.runtime import slices
from liveblockd.storage import gate as gate_module
from liveblockd.storage.gate import (
    LARGE_PIECE,
    LONG_AGO,
    PATIENCE,
    PIECE,
    SELDOM_PIECE,
    WINDOW,
    Gate,
    gate_of,
)


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    for module in (gate_module, slices):
        monkeypatch.setattr(module, "monotonic", lambda: now[0])
    return now


def test_pieces_are_small_while_a_guest_writes_and_for_a_while_after(clock):
    gate = Gate()
    assert gate.piece() == LARGE_PIECE, "nobody has written"
    gate.writes += 1
    assert gate.piece() == PIECE
    clock[0] += WINDOW * 0.9
    assert gate.piece() == PIECE
    gate.writes += 1
    assert gate.piece() == PIECE, "it begins anew"
    clock[0] += WINDOW * 0.9
    assert gate.piece() < LARGE_PIECE
    clock[0] += WINDOW * 0.2
    assert gate.piece() == LARGE_PIECE


def test_a_copy_gives_way_while_a_guest_writes(clock, monkeypatch):
    ways = []
    monkeypatch.setattr(slices, "give_way", lambda: ways.append(1))
    gate = Gate()
    gate.piece()
    assert not ways, "nobody is served"
    gate.writes += 1
    gate.piece()
    gate.piece()
    assert len(ways) == 2
    clock[0] += WINDOW * 2
    gate.piece()
    assert len(ways) == 2


def test_a_copy_waits_for_a_write_under_way():
    gate = Gate()
    gate.writes += 1
    assert gate.enter()
    assert not gate.enter(), "another guest does not wait for it"
    passed = []
    copy = threading.Thread(target=lambda: passed.append((gate.piece(), gate.enter())))
    begun = time.monotonic()
    copy.start()
    copy.join(20)
    # the write did not end, so it was patience that did
    assert passed == [(PIECE, False)] and time.monotonic() - begun >= PATIENCE
    gate.leave()
    assert gate.piece() == PIECE
    assert gate.enter(), "who copies holds nothing afterwards"
    gate.leave()


def test_a_copy_goes_on_when_the_write_ends(monkeypatch):
    monkeypatch.setattr(gate_module, "PATIENCE", 20.0)
    gate = Gate()
    gate.writes += 1
    assert gate.enter()
    passed = []
    copy = threading.Thread(target=lambda: passed.append(gate.piece()))
    copy.start()
    time.sleep(0.02)
    assert not passed
    gate.leave()
    copy.join(10)
    assert passed == [PIECE]


def test_a_write_by_a_worker_is_a_guests():
    gate = Gate()

    def write(number):
        assert not gate.enter(), "it is under way"
        return 8 // number

    assert gate.first(write, 2) == 4 and gate.writes == 1
    with pytest.raises(ZeroDivisionError):
        gate.first(write, 0)
    assert gate.enter()
    # somebody else's is under way: nobody waits, and it is left to end it
    assert gate.first(lambda: "done") == "done"
    assert not gate.enter()
    gate.leave()
    assert gate.writes == 3


def test_a_file_has_one_gate(tmp_path):
    path = tmp_path / "file"
    path.touch()
    first, second = os.open(path, os.O_RDONLY), os.open(path, os.O_RDWR)
    third = os.dup(first)
    try:
        assert gate_of(first) is gate_of(second) is gate_of(third)
    finally:
        for fd in (first, second, third):
            os.close(fd)


def test_a_copy_does_not_give_way_for_ever(clock, monkeypatch):
    """Who computes without end would have the processor for a time slice after each piece."""
    ways = []

    def give_way():
        ways.append(clock[0])
        clock[0] += 0.003

    monkeypatch.setattr(slices, "give_way", give_way)
    gate = Gate()
    begun = clock[0]
    for _ in range(1000):
        gate.writes += 1
        gate.piece()
        clock[0] += 0.0001  # a copy
    given = len(ways) * 0.003
    # what it may give at once, and a tenth of the time after that
    assert 0.05 < given / (clock[0] - begun) < 0.2
    ways.clear()
    begun = clock[0]
    for _ in range(20000):
        gate.writes += 1
        gate.piece()
        clock[0] += 0.0001
    assert 0.08 < len(ways) * 0.003 / (clock[0] - begun) < 0.11


def test_one_long_way_does_not_end_it(clock, monkeypatch):
    """It may have been the loop, with something to plan: the next request would wait for a tick."""
    ways = []

    def give_way():
        ways.append(clock[0])
        clock[0] += 0.002 if len(ways) == 50 else 0.00001

    monkeypatch.setattr(slices, "give_way", give_way)
    gate = Gate()
    for _ in range(200):
        gate.writes += 1
        gate.piece()
        clock[0] += 0.0001
    assert len(ways) == 200


def copies(gate, clock, seconds, *, every):
    """The sizes of its pieces while a guest writes ``every`` so many seconds."""
    sizes, end, write_at = [], clock[0] + seconds, clock[0]
    while clock[0] < end:
        if clock[0] >= write_at:
            gate.writes += 1
            write_at += every
        sizes.append(gate.piece())
        clock[0] += 0.0002
    return sizes


def test_pieces_are_larger_for_a_guest_that_writes_seldom(clock):
    gate = Gate()
    sizes = copies(gate, clock, 0.2, every=0.01)
    assert sizes[0] == PIECE, "nobody knows yet"
    assert sizes[-1] == SELDOM_PIECE
    assert copies(gate, clock, 0.2, every=0.001)[-1] == PIECE
    assert copies(gate, clock, 0.2, every=0.01)[-1] == SELDOM_PIECE
    clock[0] += LONG_AGO
    gate.writes += 3
    assert gate.piece() == PIECE, "what was long ago tells nothing"
