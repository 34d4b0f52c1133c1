"""From a log to the disks that a power cut at any moment of it may leave.

``Replay`` walks a log once. At every moment it knows of each disk what is durable for sure (writes
that had ended before a completed flush began) and what may or may not be there: any subset of the
sectors of the other writes that have begun, in any order as far as they do not overlap.
``disks`` draws one of the possible states. The choice is not by coin flips alone: most defects
of order show only when a certain write is missing, or there, against all others.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.simulation.disks import Entry

SECTOR = 512
Bytes = npt.NDArray[np.uint8]


@dataclass(slots=True)
class Pending:
    """A write that has begun and is not durable for sure; ``ended``: a flush would make it so."""

    number: int
    offset: int
    data: Bytes
    ended: bool = False
    dead: bool = False  # failed: no flush covers it


class Disk:
    """One disk at one moment."""

    def __init__(self, content: bytes) -> None:
        self.durable: Bytes = np.frombuffer(content, np.uint8).copy()
        self.length = len(content)
        self.pending: dict[int, Pending] = {}
        #: by flush: the writes that it covers
        self.flushes: dict[int, list[int]] = {}
        #: changes whenever anything does
        self.version = 0
        self._pieces = 0

    def apply(self, entry: Entry) -> None:
        """Go on by one line of the log."""
        self.version += 1
        number = entry.number
        match entry.kind:
            case "write":
                data = np.frombuffer(entry.data, np.uint8)
                self.pending[number] = Pending(number, entry.offset, data)
            case "end":
                self.pending[number].ended = True
            case "fail":
                self.pending[number].dead = True
            case "flush":
                self.flushes[number] = [p.number for p in self.pending.values() if p.ended]
            case "flushed":
                for covered in self.flushes.pop(number):
                    # An earlier flush that ended meanwhile may have it already.
                    if covered in self.pending:
                        self._make_durable(self.pending.pop(covered))
            case "unflushed":
                for covered in self.flushes.pop(number):
                    if covered in self.pending:
                        self.pending[covered].dead = True
            case _:
                raise AssertionError(entry.kind)

    def _make_durable(self, write: Pending) -> None:
        end = write.offset + len(write.data)
        if end > len(self.durable):
            grown = np.zeros(max(end, 2 * len(self.durable)), np.uint8)
            grown[: self.length] = self.durable[: self.length]
            self.durable = grown
        self.durable[write.offset : end] = write.data
        self.length = max(self.length, end)
        for key, other in tuple(self.pending.items()):
            if other.dead and other.number < write.number:
                self._take_out(key, other, write.offset, end)

    def _take_out(self, key: int, dead: Pending, start: int, stop: int) -> None:
        """A failed write no longer shows where a later one is durable."""
        end = dead.offset + len(dead.data)
        if stop <= dead.offset or start >= end:
            return
        del self.pending[key]
        for low, high in ((dead.offset, start), (stop, end)):
            if low < high:
                part = dead.data[low - dead.offset : high - dead.offset]
                # Pieces keep the number, which orders them; their keys are their own.
                self._pieces -= 1
                self.pending[self._pieces] = Pending(dead.number, low, part, dead=True)

    def _copy(self) -> Bytes:
        end = max((p.offset + len(p.data) for p in self.pending.values()), default=0)
        disk = np.zeros(max(end, self.length), np.uint8)
        disk[: self.length] = self.durable[: self.length]
        return disk

    def after_kill(self) -> Bytes:
        """The process is gone, the page cache is not."""
        disk = self._copy()
        for write in sorted(self.pending.values(), key=lambda p: p.number):
            disk[write.offset : write.offset + len(write.data)] = write.data
        return disk

    def after_power_cut(self, choice: Choice, rng: random.Random) -> Bytes:
        """One of the states that are possible now."""
        disk = self._copy()
        end = self.length
        for write in sorted(self.pending.values(), key=lambda p: p.number):
            share = choice.share(write.number)
            if share <= 0.0:
                continue
            stop = write.offset + len(write.data)
            if share >= 1.0:
                disk[write.offset : stop] = write.data
            else:
                _tear(disk, write, share, rng)
            end = max(end, stop)
        return disk[:end]


def _tear(disk: Bytes, write: Pending, share: float, rng: random.Random) -> None:
    """Some of the sectors."""
    position, stop = write.offset, write.offset + len(write.data)
    while position < stop:
        step = min(SECTOR - position % SECTOR, stop - position)
        if rng.random() < share:
            start = position - write.offset
            disk[position : position + step] = write.data[start : start + step]
        position += step


class Choice:
    """Which writes made it, for all disks of a cut alike."""

    def __init__(self, pending: list[int], rng: random.Random) -> None:
        self.pending = sorted(pending)
        self.kind = rng.randrange(8)
        self.level = rng.choice((0.05, 0.3, 0.5, 0.7, 0.95))
        self.pivot = rng.choice(self.pending) if self.pending else 0
        self.random = rng

    def share(self, number: int) -> float:
        """The probability of each sector of a write."""
        match self.kind:
            case 0:
                return 0.0
            case 1:
                return 1.0
            case 2:
                return self.level  # torn
            case 3:
                return float(self.random.random() < self.level)  # whole or not
            case 4:
                return float(number >= self.pivot)  # only the newest
            case 5:
                return float(number < self.pivot)  # only the oldest
            case 6:
                return float(number != self.pivot) if self.random.random() < 0.9 else 0.5
            case _:
                return float(number == self.pivot)

    def __str__(self) -> str:
        return f"choice {self.kind} level {self.level} pivot {self.pivot}"


class Replay:
    """All disks of a log, from its beginning; ``advance`` takes them to the next moment."""

    def __init__(self, log: list[Entry], initial: list[bytes]) -> None:
        self.log = log
        self.position = 0
        self.disks = [Disk(content) for content in initial]
        #: by drive: gets the lines that are no disk's
        self.listeners: list[Any] = []

    def advance(self, position: int) -> None:
        """Apply the log up to, not including, ``position``."""
        for entry in self.log[self.position : position]:
            if entry.medium >= 0:
                while entry.medium >= len(self.disks):
                    self.disks.append(Disk(b""))
                self.disks[entry.medium].apply(entry)
            elif self.listeners:
                self.listeners[~entry.medium].apply(entry)
        self.position = max(self.position, position)

    def choose(self, rng: random.Random) -> Choice:
        """For one cut at this moment."""
        return Choice([p.number for d in self.disks for p in d.pending.values()], rng)

    def power_cut(self, choice: Choice, rng: random.Random) -> list[Bytes]:
        """What the disks hold afterwards."""
        return [disk.after_power_cut(choice, rng) for disk in self.disks]

    def kill(self) -> list[Bytes]:
        """What the files hold after SIGKILL."""
        return [disk.after_kill() for disk in self.disks]
