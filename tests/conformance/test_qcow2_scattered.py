"""Data here and there on an immense disk: copied by the batch, with the result of the slow way."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from errno import ENOSPC
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from liveblockd.formats.qcow2 import descriptors as duplicates
from liveblockd.formats.qcow2 import new_tables, survey
from liveblockd.formats.qcow2.image import Qcow2
from liveblockd.storage import copy_engine, many_requests, many_writes
from liveblockd.storage.cells import UNALLOCATED, Survey, cell_runs, overlaid, survey_runs
from liveblockd.storage.driver import ExtentKind, Source
from tests.conformance.test_qcow2_qemu import Host
from tests.support.descriptors import descriptors
from tests.support.patience import until
from tests.support.qcow2_images import check, needs, open_qcow2, run
from tests.support.turns import turns_of_loop

pytestmark = needs("qemu-img")

K = 1024
CLUSTER = 64 * K
SPAN = 8192 * CLUSTER
DISK = 64 * SPAN
MOST = 16384


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    host = Host()
    yield host
    await host.close()
    host.workers.close()


class Scattered:
    """A base with clusters all over it, some of them zeros, and an empty image over it."""

    def __init__(self, host: Host, directory: Path, seed: int) -> None:
        self.host, self.directory = host, directory
        self.rng = random.Random(seed)
        self.model: dict[int, bytes] = {}  # clusters by offset

    async def make(self, *options: str, direct: bool = False) -> Qcow2:
        base = self.directory / "base.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", base, str(DISK))
        image = await self.host.qcow2(base)
        for l1_index in range(DISK // SPAN):
            if l1_index % 5 == 3:
                continue
            for _ in range(self.rng.choice((1, 1, 2, 30))):
                offset = l1_index * SPAN + self.rng.randrange(SPAN // CLUSTER) * CLUSTER
                zero = self.rng.random() < 0.1
                self.model[offset] = bytes(CLUSTER) if zero else self.rng.randbytes(CLUSTER)
                await image.write(offset, self.model[offset])
        await self.host.close()
        self.path = self.directory / "top.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", *options,
            self.path)  # fmt: skip
        self.below = await self._open(base, direct, None, read_only=True)
        self.file = self.below.data_host_file()
        assert self.file is not None and self.file.direct is direct
        return await self._open(self.path, direct, self.below)

    async def _open(
        self, path: Path, direct: bool, below: Qcow2 | None, **options: object
    ) -> Qcow2:
        cache = {"cache": {"direct": True, "no-flush": False}} if direct else {}
        members = {"read-only": True} if options else {}
        file = await self.host.file(path, **members, **cache)
        image = await open_qcow2(file, below, workers=self.host.workers, **options)
        self.host.open_drivers.append(image)
        return image

    async def sources(self) -> list[Source]:
        """All that the base has, as a survey finds it."""
        found = await self.below.survey(0, DISK, 16, 1000, 1 << 20)
        assert found is not None and found.end == DISK
        runs, end = survey_runs(overlaid([found], 16), 16, 1 << 20)
        assert end == DISK
        return [Source(at, run.length, self.file, run.host_offset) for at, run in runs]

    async def judge(self, image: Qcow2) -> None:
        """The image has it all and needs its base no more."""
        await image.change_backing_file(None, None)
        image.children.pop("backing")
        for offset, data in self.model.items():
            assert await image.read(offset, len(data)) == data, offset
        await self.host.close()
        assert check(self.path) == {}
        whole = self.directory / "whole.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", whole, str(DISK))
        image = await self.host.qcow2(whole)
        for offset, data in self.model.items():
            await image.write(offset, data)
        await self.host.close()
        run("qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2", self.path, whole)


def direct_or_skip(directory: Path) -> None:
    try:
        fd = os.open(directory / "probe", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    except OSError:
        pytest.skip("no O_DIRECT on this file system")
    os.close(fd)


@pytest.mark.parametrize("direct", [False, True])
async def test_tables_are_made_by_the_batch(tmp_path: Path, host: Host, direct: bool) -> None:
    if direct:
        direct_or_skip(tmp_path)
    scattered = Scattered(host, tmp_path, 1)
    image = await scattered.make(direct=direct)
    sources = await scattered.sources()
    scattered.rng.shuffle(sources)
    await image.populate_many(sources)
    maker = image._gatherer._maker
    assert maker.made == len({offset // SPAN for offset in scattered.model})
    assert not image._metadata.tables, "they are not kept"
    # Written by their pages: the file has few bytes besides the data.
    await image.flush()
    data = sum(any(data) for data in scattered.model.values()) * CLUSTER
    assert scattered.path.stat().st_blocks * 512 < data + maker.made * 24 * K + 20 * CLUSTER
    # They can be changed, as any table.
    for offset in list(scattered.model)[:20]:
        other = offset // SPAN * SPAN
        scattered.model[other] = scattered.rng.randbytes(CLUSTER)
        await image.write(other, scattered.model[other])
    await scattered.judge(image)


@pytest.mark.parametrize("option", ["extended_l2=on", "compat=0.10", "refcount_bits=1"])
async def test_other_images(tmp_path: Path, host: Host, option: str) -> None:
    scattered = Scattered(host, tmp_path, 2)
    image = await scattered.make("-o", option)
    await image.populate_many(await scattered.sources())
    assert (image._gatherer._maker.made > 0) is (option == "refcount_bits=1")
    await scattered.judge(image)


async def test_clusters_that_were_used_before(tmp_path: Path, host: Host) -> None:
    """What a discard left in the file must not be read as a table: those are written whole."""
    scattered = Scattered(host, tmp_path, 3)
    image = await scattered.make()
    await image.write(DISK - 300 * CLUSTER, b"\xff" * 300 * CLUSTER)
    await image.write_zeroes(DISK - 300 * CLUSTER, 300 * CLUSTER, may_unmap=True)
    for offset in range(DISK - 300 * CLUSTER, DISK, CLUSTER):
        scattered.model[offset] = bytes(CLUSTER)
    await image.flush()
    await image._committer.close()
    await image.populate_many(await scattered.sources())
    assert image._gatherer._maker.made
    await scattered.judge(image)


async def test_what_the_guest_wrote_stays(
    tmp_path: Path, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest's write makes a table while a worker makes the same: the guest's stays."""
    scattered = Scattered(host, tmp_path, 4)
    image = await scattered.make()
    loop = asyncio.get_running_loop()
    copied, go_on = asyncio.Event(), asyncio.Event()
    plain = new_tables.copy_with_tables

    def slow(*args: object) -> copy_engine.Copied:
        answer = plain(*args)  # type: ignore[arg-type]
        loop.call_soon_threadsafe(copied.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(30)
        return answer

    async def guest(offset: int, length: int) -> None:
        cluster = offset // CLUSTER * CLUSTER
        inside = offset - cluster
        old = scattered.model.get(cluster, bytes(CLUSTER))
        data = scattered.rng.randbytes(length)
        scattered.model[cluster] = old[:inside] + data + old[inside + length :]
        await image.write(offset, data)

    monkeypatch.setattr(new_tables, "copy_with_tables", slow)
    offsets = sorted(scattered.model)
    await guest(offsets[3] + 5, 100)
    sources = await scattered.sources()
    job = asyncio.create_task(image.populate_many(sources))
    async with asyncio.timeout(30):
        await copied.wait()
        for offset in (offsets[20], offsets[21] + 512, offsets[40] // SPAN * SPAN + 7):
            await guest(offset, 1000)
        # A second batch for the same: it does not make their tables as well.
        again = asyncio.create_task(image.populate_many(sources[-3:] + sources[30:33]))
        await asyncio.sleep(0.02)
        go_on.set()
        await asyncio.gather(job, again)
    assert image._gatherer._maker.made
    await scattered.judge(image)


@pytest.mark.parametrize("fails", ["read", "write", "dup", "table"])
async def test_a_failed_copy_leaves_nothing(
    tmp_path: Path, host: Host, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    scattered = Scattered(host, tmp_path, 5)
    image = await scattered.make()
    sources = await scattered.sources()

    def broken(*args: object) -> None:
        raise OSError(ENOSPC, os.strerror(ENOSPC))

    before = descriptors()
    with monkeypatch.context() as patch:
        if fails == "dup":
            patch.setattr(duplicates, "duplicate", broken)
        elif fails == "table":
            patch.setattr(new_tables, "table_writes", broken)
        else:
            name = "read_into" if fails == "read" else "write"
            patch.setattr(copy_engine.hostcalls, name, broken)
            patch.setattr(many_writes, "context", lambda: None)
        with pytest.raises(OSError, match="No space left"):
            await image.populate_many(sources)
    await until(lambda: not descriptors() - before)  # others of its workers may still be at it
    assert not image._metadata.l1.any() and not image._gatherer._maker._making
    for offset, data in list(scattered.model.items())[:5]:
        assert await image.read(offset, CLUSTER) == data
    await image.populate_many(sources)
    await scattered.judge(image)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("cached", [False, True])
async def test_a_survey_is_what_the_cells_say(
    tmp_path: Path, host: Host, monkeypatch: pytest.MonkeyPatch, cached: bool, cut: bool
) -> None:
    """Of tables in memory and on the disk, of the whole disk and of parts of it.

    ``cut``: tables are fuller than expected, so that each job leaves most of its own to others.
    """
    if cut:
        monkeypatch.setattr(survey, "BUFFER", CLUSTER)
        monkeypatch.setattr(survey, "JOB_TABLES", 2)
        monkeypatch.setattr(survey, "JOB_ENTRIES", 3)
        monkeypatch.setattr(survey, "FIRST_TABLES", 100)
        monkeypatch.setattr(survey, "MOST_AT_ONCE", 100)
    scattered = Scattered(host, tmp_path, 6)
    await scattered.make()
    below = scattered.below
    if cached:
        for offset in list(scattered.model)[::3]:
            await below.read(offset, 1)
    rng = scattered.rng
    for _ in range(12):
        first = rng.randrange(DISK // CLUSTER)
        length = min(DISK - first * CLUSTER, rng.randrange(1, 9) * SPAN + 5 * CLUSTER)
        tables = 40 if cut else 3
        found = await below.survey(first * CLUSTER, length, 16, tables, rng.choice((7, 1 << 20)))
        assert found is not None and first * CLUSTER < found.end <= first * CLUSTER + length
        count = (found.end >> 16) - first
        cells = await below.cells(first * CLUSTER, count * CLUSTER, 16)
        expected = np.zeros(count, np.int64) if cells is None else cells
        answer = np.zeros(count, np.int64)
        answer[found.places - first] = found.cells
        assert (answer == expected).all()
        each, end = survey_runs(found, 16, 1 << 20)
        runs = list(each)
        assert end == found.end
        held = [r for r in cell_runs(expected, 16, 0, count << 16) if r.kind != UNALLOCATED]
        assert [run for _, run in runs] == held
        few, end = survey_runs(found, 16, 2)
        assert list(few) == runs[:2] and end == (runs[2][0] if len(runs) > 2 else found.end)


async def test_a_survey_leaves_what_is_wrong_to_others(
    tmp_path: Path, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    scattered = Scattered(host, tmp_path, 7)
    await scattered.make()
    offset = min(scattered.model)
    below = scattered.below
    assert await below.survey(0, DISK, 15, 100, MOST) is None, "other cells"
    table = below._metadata.l1_view[offset // SPAN] & survey.OFFSET_MASK
    place = table + offset % SPAN // CLUSTER * 8
    with (tmp_path / "base.qcow2").open("r+b") as file:
        file.seek(place)
        file.write((0x200 | 1 << 63).to_bytes(8, "big"))
    assert await below.survey(0, DISK, 16, 100, MOST) is None, "an entry that cannot be"

    def broken(*args: object) -> None:
        raise OSError(ENOSPC, os.strerror(ENOSPC))

    monkeypatch.setattr(survey, "_read_together", lambda *_: False)
    monkeypatch.setattr(survey.hostcalls, "read_into", broken)
    with pytest.raises(OSError, match="No space left"):
        await below.survey(0, DISK, 16, 100, MOST)


async def test_tables_that_are_read_together_say_the_same(
    tmp_path: Path, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one system call where there is AIO, else one by one."""
    if many_requests.context() is None:
        pytest.skip("no Linux AIO here")
    scattered = Scattered(host, tmp_path, 8)
    await scattered.make()
    answers, taken = [], []
    real = survey._read_together

    def counted(*asked: Any) -> bool:
        taken.append(real(*asked))
        return taken[-1]

    for way in (counted, lambda *_: False):
        monkeypatch.setattr(survey, "_read_together", way)
        answers.append(await scattered.below.survey(0, DISK, 16, 100, MOST))
    assert taken and all(taken)
    assert answers[0].end == answers[1].end and len(answers[0].places)
    assert (answers[0].places == answers[1].places).all()
    assert (answers[0].cells == answers[1].cells).all()


@pytest.mark.parametrize("seed", range(5))
def test_layers_over_each_other(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = 200
    whole = np.zeros(count, np.int64)
    surveys = []
    for layer in range(4):
        places = np.flatnonzero(rng.random(count) < 0.3)
        kinds = rng.integers(1, 4, len(places)).astype(np.int64)
        cells = (kinds << 47) + np.where(kinds == int(ExtentKind.DATA), places * 128, 0)
        surveys.append(Survey((count - layer) << 16, places, cells))
        free = whole[places] == 0
        whole[places[free]] = cells[free] + (layer << 49)
    found = overlaid(surveys, 16)
    end = count - 3
    assert found.end == end << 16
    answer = np.zeros(end, np.int64)
    answer[found.places] = found.cells
    assert (answer == whole[:end]).all()


async def test_a_full_image_is_surveyed_in_parts(tmp_path: Path, host: Host) -> None:
    """No answer is long, no step of the loop either, and nothing is left out."""
    path = tmp_path / "full.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", path,
        str(6 * SPAN))  # fmt: skip
    image = await open_qcow2(await host.file(path), None, workers=host.workers)
    host.open_drivers.append(image)
    for l1_index in range(6):
        await image.read(l1_index * SPAN, 1)  # nobody waits for a worker now
    offset, places, parts = 0, [], 0
    while offset < 6 * SPAN:
        found, turns = await turns_of_loop(image.survey(offset, 6 * SPAN - offset, 16, 64, MOST))
        assert found is not None and 0 < len(found.places) <= MOST
        assert turns >= len(found.places) // survey.STEP
        places.append(found.places)
        assert offset < found.end
        offset, parts = found.end, parts + 1
    assert parts == 6 * SPAN // CLUSTER // MOST
    assert (np.concatenate(places) == np.arange(6 * SPAN // CLUSTER)).all()


async def test_a_survey_knows_how_full_tables_were(
    tmp_path: Path, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads with care at first; after that no more than it can use, and all of that at once."""
    scattered = Scattered(host, tmp_path, 8)
    await scattered.make()
    below = scattered.below
    read: list[int] = []
    real = survey._find

    async def counting(*arguments: object) -> object:
        read.append(len(arguments[2]))  # type: ignore[arg-type]
        return await real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(survey, "_find", counting)
    first = await below.survey(0, DISK, 16, 1000, 4096)
    assert read[0] == survey.FIRST_TABLES and len(read) > 1, "nobody knows how full they are"
    there = sum(read)
    read.clear()
    again = await below.survey(0, DISK, 16, 1000, 4096)
    assert read == [min(there, survey.MOST_AT_ONCE)]
    assert first is not None and again is not None
    assert (first.places == again.places).all() and (first.cells == again.cells).all()
    # Full ones are not read by the hundred for a few cells.
    below._surveyor._fullness = 8192.0
    read.clear()
    await below.survey(0, DISK, 16, 1000, 4096)
    assert read[0] == 1
