"""Cuts the power at many moments of one course and looks at what is left.

Every cut is judged by ``crashed`` and ``history``; one in a few also by the engine itself, which
opens the images for writing and reads the same bytes, and one in many by qemu-img.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from liveblockd.formats.qcow2.image import Qcow2
from liveblockd.storage.driver import BlockDriver, BlockIO, Buffer
from tests.simulation import forms, virtual
from tests.simulation.copies import SINCE
from tests.simulation.course import Course
from tests.simulation.crash import Bytes, Replay
from tests.simulation.crashed import Chains, Crashed, Flat, Image, NoImageError
from tests.simulation.history import History
from tests.simulation.upkeep import BITMAP
from tests.support.qcow2_images import open_qcow2
from tests.support.unlocked import unlocked_once

#: one cut in so many is looked at by the engine, by qemu-img
ENGINE_SHARE, QEMU_SHARE = 24, 400


@dataclass
class Found:
    """What was wrong after one cut."""

    seed: int
    position: int
    how: str
    corrupt: str | None = None  # the images are
    lost: str | None = None  # the guest's bytes are

    def __str__(self) -> str:
        return (
            f"seed {self.seed}, cut at {self.position}, {self.how}: "
            f"{'CORRUPT ' + self.corrupt if self.corrupt else ''}"
            f"{'LOST ' + self.lost if self.lost else ''}"
        )


@dataclass
class Figures:
    """Of all cuts together."""

    machines: int = 0
    requests: int = 0
    cuts: int = 0
    kills: int = 0
    by_engine: int = 0
    by_qemu: int = 0
    leaking: int = 0
    bitmaps: int = 0
    snapshots: int = 0
    backups: int = 0
    corrupt: int = 0
    lost: int = 0
    found: list[Found] = field(default_factory=list)

    def add(self, other: Figures) -> None:
        """Sum up."""
        for part in fields(self):
            setattr(self, part.name, getattr(self, part.name) + getattr(other, part.name))

    def note(self, found: Found) -> None:
        """One more that is wrong."""
        self.corrupt += found.corrupt is not None
        self.lost += found.lost is not None
        self.found.append(found)

    def __str__(self) -> str:
        return (
            f"machines {self.machines}, guest requests {self.requests}, cuts {self.cuts} (of which "
            f"SIGKILL {self.kills}; reopened by the engine {self.by_engine}, by qemu-img "
            f"{self.by_qemu}), leaking {self.leaking}, bitmaps {self.bitmaps}, "
            f"internal snapshots {self.snapshots}, backups {self.backups}, "
            f"corrupt {self.corrupt}, lost {self.lost}"
        )


def moments(course: Course, cuts: int, rng: random.Random) -> list[int]:
    """Where to cut, ascending: all over the log, and close to what changes much at once."""
    log = course.log
    turning = [
        number
        for number, entry in enumerate(log)
        if entry.kind in ("switch", "note", "resized", "flushed")
        or (entry.kind == "write" and entry.offset == 0)
    ]
    found = []
    for _ in range(cuts):
        if turning and rng.random() < 0.5:
            found.append(min(len(log), max(0, rng.choice(turning) + rng.randrange(-2, 12))))
        else:
            found.append(rng.randrange(len(log) + 1))
    return sorted(found)


class Judge:
    """Walks along one course."""

    def __init__(self, course: Course, figures: Figures) -> None:
        self.course = course
        self.figures = figures
        self.random = random.Random(f"cuts {course.plan.seed}")
        self.replay = Replay(course.log, course.initial)
        courses = [course, *course.beside]
        raw = set[str]().union(*(one.raw for one in courses))
        chains = Chains(course.names, forms.KEY, raw)
        self.drives = [DriveJudge(one, figures, chains, self.random) for one in courses]
        self.replay.listeners.extend(drive.history for drive in self.drives)

    def cut_at(self, position: int, *, kill: bool | None = None) -> None:
        """One more cut, not before the last one."""
        rng, replay = self.random, self.replay
        replay.advance(position)
        if kill is None:
            kill = rng.random() < 0.15
        if kill:
            disks, how = replay.kill(), "SIGKILL"
            self.figures.kills += 1
        else:
            choice = replay.choose(rng)
            disks, how = replay.power_cut(choice, rng), str(choice)
        self.figures.cuts += 1
        versions = [disk.version if not disk.pending else None for disk in replay.disks]
        for number, drive in enumerate(self.drives):
            where = f"{how}, drive {number}" if number else how
            found = drive.look(disks, versions, Found(self.course.plan.seed, position, where))
            if found is not None:
                self.figures.note(found)


class DriveJudge:
    """What one drive of the course has after a cut."""

    def __init__(
        self, course: Course, figures: Figures, chains: Chains, rng: random.Random
    ) -> None:
        self.course = course
        self.figures = figures
        self.random = rng
        self.first = np.frombuffer(course.content, np.uint8)
        self.history = History(self.first.copy(), course.size, course.top)
        self.chains = chains

    def look(self, disks: list[Bytes], versions: list[int | None], found: Found) -> Found | None:
        """``found`` with what is wrong; None when nothing is."""
        try:
            images, views = self.chains.read(self.history.top, disks, versions)
        except (NoImageError, KeyError) as error:
            found.corrupt = repr(error)
            return found
        for name, image in images:
            if image.errors:
                found.corrupt = f"{name}: {image.errors}"
                return found
        self.figures.leaking += any(image.leaks for _, image in images)
        view = views[0]
        found.lost = (
            self.history.wrong(view)
            or self._bitmap_misses(images, views)
            or self._bitmap_misses_since(images, views)
            or self._snapshots_wrong(images, views)
            or self._copies_wrong(disks, versions)
        )
        if found.lost is None and images[0][1].raw:
            wrong = self.history.wrong(images[0][1].raw_view())
            found.lost = wrong and f"in the raw data file: {wrong}"
        if found.lost is not None:
            return found
        names = [n for name, image in images for n in (name, image.data_file) if n is not None]
        content = {name: disks[self.course.names[name]] for name in names}
        if self.random.randrange(ENGINE_SHARE) == 0:
            self.figures.by_engine += 1
            with unlocked_once():
                found.lost = virtual.run(_reopen(images, content, view))
        if self.random.randrange(QEMU_SHARE) == 0 and shutil.which("qemu-img"):
            self.figures.by_qemu += 1
            found.corrupt = _ask_qemu(images, content)
        return found if found.corrupt or found.lost else None

    def _snapshots_wrong(self, images: list[tuple[str, Image]], views: list[Bytes]) -> str | None:
        """Internal snapshots are there, and read as the disk did when they were taken."""
        for number, (name, image) in enumerate(images):
            if not any(kept.image == name for kept in self.history.kept.values()):
                continue
            below = views[number + 1] if number + 1 < len(views) else None
            found = image.snapshot_views(below)
            self.figures.snapshots += len(found)
            if wrong := self.history.wrong_snapshots(name, image.backing, found):
                return wrong
        return None

    def _bitmap_misses(self, images: list[tuple[str, Image]], views: list[Bytes]) -> str | None:
        """A bitmap that may be believed has a bit for all that is not as at first."""
        for (name, image), view in zip(images, views, strict=True):
            if name != self.course.bitmap_in or BITMAP not in image.bitmaps:
                continue
            self.figures.bitmaps += 1
            granularity, bits = image.bitmaps[BITMAP]
            end = min(len(view), self.course.size, self.history.least)
            changed = np.flatnonzero(view[:end] != self.first[:end]) // granularity
            if not bits[changed].all():
                missed = changed[~bits[changed]]
                return f"{name}: the bitmap misses granule {int(missed[0])}"
        return None

    def _bitmap_misses_since(
        self, images: list[tuple[str, Image]], views: list[Bytes]
    ) -> str | None:
        """The bitmap of increments has all that is not as in the backup that they build on."""
        if self.history.base is None:
            return None
        source, base = self.history.base
        for (name, image), view in zip(images, views, strict=True):
            if name != source or SINCE not in image.bitmaps or len(view) != len(base.content):
                continue
            self.figures.bitmaps += 1
            granularity, bits = image.bitmaps[SINCE]
            changed = np.flatnonzero((view != base.content) & base.known) // granularity
            if not bits[changed].all():
                missed = changed[~bits[changed]]
                return f"{name}: increments would miss granule {int(missed[0])}"
        return None

    def _copies_wrong(self, disks: list[Bytes], versions: list[int | None]) -> str | None:
        """A backup is sound, and exact once its job has completed."""
        for copy in self.history.copies.values():
            images, views = self.chains.read(copy.image, disks, versions)
            for name, image in images:
                if image.errors:
                    return f"{name}: {image.errors}"
            if copy.done:
                self.figures.backups += 1
                if wrong := copy.wrong(views[0]):
                    return wrong
        return None


class _Found(BlockDriver):
    """The bytes of a crashed file, to be opened again."""

    driver_name = "found"

    def __init__(self, content: Bytes) -> None:
        self.children: dict[str, BlockIO] = {}
        self.read_only = False
        self.content = bytearray(content.tobytes())

    @property
    def length(self) -> int:
        return len(self.content)

    def read_nowait(self, offset: int, length: int) -> Buffer:
        return bytes(self.content[offset : offset + length]).ljust(length, b"\0")

    async def read(self, offset: int, length: int) -> Buffer:
        return self.read_nowait(offset, length)

    async def write(self, offset: int, data: Buffer) -> None:
        end = offset + len(data)
        self.content.extend(bytes(max(0, end - len(self.content))))
        self.content[offset:end] = data

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, fast_only: bool = False
    ) -> None:
        await self.write(offset, bytes(length))

    async def flush(self) -> None:
        return


async def _reopen(
    images: list[tuple[str, Image]], content: dict[str, Bytes], view: Bytes
) -> str | None:
    """The engine reads the same, goes on writing, and leaves a sound image."""
    below: BlockIO | None = None
    if isinstance(images[0][1], Flat):
        return None  # there is nothing to open
    for name, image in reversed(images):
        file, data_file = _Found(content[name]), None
        if isinstance(image, Flat):
            below = file
            continue
        if image.data_file is not None:
            data_file = _Found(content[image.data_file])
        below = await open_qcow2(
            file,
            below,
            read_only=name != images[0][0],
            data_file=data_file,
            secret=forms.secret,
            **forms.unlocking(encrypted=image.key is not None),
        )
        usable = {stored.name for stored in below.stored_bitmaps() if not stored.inconsistent}
        if usable != set(image.bitmaps):
            return f"{name}: of the bitmaps {usable} are believed, {set(image.bitmaps)} may be"
    assert isinstance(below, Qcow2)
    wanted = bytearray(view.tobytes())
    if bytes(await below.read(0, below.length)) != wanted:
        return "the engine reads something else"
    text = b"after the crash "
    for offset in range(0, below.length - len(text), max(4096, below.length // 7)):
        await below.write(offset, text)
        wanted[offset : offset + len(text)] = text
    await below.close()
    data = None if data_file is None else np.frombuffer(bytes(data_file.content), np.uint8)
    after = Crashed(np.frombuffer(bytes(file.content), np.uint8), data, forms.KEY)
    if after.errors:
        return f"after more writes: {after.errors}"
    if len(images) == 1 and after.view(None).tobytes() != wanted:
        return "after more writes: it reads as something else"
    return None


def _ask_qemu(images: list[tuple[str, Image]], content: dict[str, Bytes]) -> str | None:
    """qemu-img check of every image of the chain; its word on corruptions."""
    key = f"secret,id={forms.SECRET},data={forms.PASSPHRASE.decode()}"
    with tempfile.TemporaryDirectory(prefix="liveblockd-powercut-") as directory:
        for name, image in images:
            if isinstance(image, Flat):
                continue
            path, data_path = Path(directory, "image.qcow2"), Path(directory, "image.data")
            path.write_bytes(content[name].tobytes())
            node: dict[str, object] = {
                "driver": "qcow2",
                "backing": None,
                "file": {"driver": "file", "filename": str(path)},
                **forms.unlocking(encrypted=image.key is not None),
            }
            if image.data_file is not None:
                data_path.write_bytes(content[image.data_file].tobytes())
                node["data-file"] = {"driver": "file", "filename": str(data_path)}
            done = subprocess.run(
                ["qemu-img", "check", "--object", key, "--output=json", f"json:{json.dumps(node)}"],
                capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
            if not done.stdout:
                return f"{name}: qemu-img: {done.stderr}"
            report = json.loads(done.stdout)
            if report.get("corruptions") or report.get("check-errors"):
                return f"{name}: qemu-img: {report}"
    return None


def judge(course: Course, cuts: int) -> Figures:
    """Cut the power ``cuts`` times."""
    figures = Figures(machines=1, requests=course.requests)
    walk = Judge(course, figures)
    for position in moments(course, cuts, walk.random):
        walk.cut_at(position)
    return figures


def judge_at(
    course: Course, positions: Iterator[int], *, kill: bool | None, each: int = 1
) -> Figures:
    """Cut at given, ascending moments."""
    figures = Figures(machines=1, requests=course.requests)
    walk = Judge(course, figures)
    for position in positions:
        for _ in range(each):
            walk.cut_at(position, kill=kill)
    return figures
