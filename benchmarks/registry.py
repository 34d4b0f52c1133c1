"""What a measure is, and the list of all of them.

A measure makes its images once (``prepare``) and is then sampled for one daemon after the other;
every sample checks the bytes that came out and raises ``WrongResult`` if they are not right, so
that a fast wrong answer never counts.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from benchmarks.daemons import Daemon, Kind
    from benchmarks.lab import Lab


class WrongResult(Exception):
    """The daemon's answer or image is not what it has to be; its time does not count."""


class CannotRun(Exception):
    """This machine lacks what the measure needs; the table says what."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure of a sample. ``target`` is a gain (ours over QSD's, or inverse if less is better).

    ``limit`` is what our own figure has to keep to, whatever QSD's is.
    """

    name: str
    title: str
    unit: str
    target: float | None = None
    less: bool = False
    limit: float | None = None
    strict: bool = False  # the target has to be exceeded


class Measure:
    """``name`` is what ``ONLY=`` selects; ``metrics`` are the rows of the table."""

    name: str
    metrics: tuple[Metric, ...]
    order: int = 50  # place in the table

    def prepare(self, lab: Lab) -> None:
        """Make what all samples share; not timed. ``CannotRun`` if that is not possible here."""

    def sample(self, lab: Lab, kind: Kind) -> dict[str, float]:
        """Start the daemon, take the figures (one for each metric), verify the result."""
        raise NotImplementedError

    def floor(self, lab: Lab) -> dict[str, float]:
        """What this machine allows without a daemon, for some of the metrics; sets ``floor_how``.

        ``CannotRun`` if that cannot be taken here: the line is then without.
        """
        del lab
        return {}

    #: by which means the figures of ``floor`` came about
    floor_how = ""

    def __init__(self) -> None:
        self.peaks: list[int] = []
        self.cpu: list[float] = []

    def note(self, daemon: Daemon, work: float = 1) -> None:
        """Note the daemon's peak memory and its processor time since the start, per unit of work.

        Call it when the work is done, before anything is verified through the daemon. On a machine
        that others use, processor time tells more than the clock.
        """
        self.peaks.append(daemon.peak_memory())
        self.cpu.append((daemon.cpu_seconds() - daemon.cpu_start) / max(work, 1))


M = TypeVar("M", bound=Measure)
_measures: dict[str, Measure] = {}


def register(measure: M) -> M:
    """Add a measure; two of one name are a mistake."""
    if measure.name in _measures:
        raise ValueError(f"two measures are named {measure.name}")
    _measures[measure.name] = measure
    return measure


def load_measures() -> list[Measure]:
    """All of them, in the order of the table."""
    from benchmarks import measures

    for module in pkgutil.iter_modules(measures.__path__):
        importlib.import_module(f"benchmarks.measures.{module.name}")
    return sorted(_measures.values(), key=lambda measure: (measure.order, measure.name))
