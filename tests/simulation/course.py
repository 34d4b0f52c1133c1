"""What is to happen on a simulated machine, and what has happened: values only."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.simulation.disks import Entry


@dataclass
class Plan:
    """What is to happen; ``None`` is left to the seed."""

    seed: int
    depth: int | None = None
    cluster_size: int | None = None
    #: one of ``forms.KINDS``, of all images
    kind: str | None = None
    #: names of steps (see ``Scene``), in order
    steps: tuple[str, ...] | None = None
    faults: bool | None = None
    guest: bool = True
    #: the file of the top is so large already that its refcount table must grow soon
    large: bool | None = None
    #: many L2 tables with a few clusters in each, in images of one form
    wide: bool = False
    bitmap: bool | None = None
    #: of the disk, in bytes
    size: int | None = None
    #: of mirrors
    copy_mode: str | None = None
    #: how many there are, all of this plan and in one daemon
    drives: int = 1


@dataclass
class Course:
    """What has happened to a drive."""

    plan: Plan
    #: of all drives, as ``initial`` and ``names``
    log: list[Entry]
    initial: list[bytes]
    names: dict[str, int]
    #: those that are raw images
    raw: set[str]
    top: str
    size: int
    content: bytes  # of the guest's disk at first, zeros up to the largest size
    #: the image with a persistent bitmap of all that changes ``content``
    bitmap_in: str | None = None
    story: list[str] = field(default_factory=list)
    requests: int = 0
    #: the other drives
    beside: list[Course] = field(default_factory=list)
