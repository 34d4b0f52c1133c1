"""The journal's lines and its file: cut off, full of nonsense, on a disk that is full."""

import asyncio
import json
import logging
import random
import shutil
from errno import ENOSPC

import pytest

from liveblockd.errors import BlockError
from liveblockd.jobs import journal as module
from liveblockd.jobs.history import (
    KEPT,
    History,
    Image,
    JobRecord,
    began_line,
    drive_line,
    ended_line,
    speed_line,
)
from liveblockd.jobs.journal import Journal
from tests.support.workers import InlineWorkers


def image(name):
    return Image(f"/{name}", "qcow2", 7)


def job(job_id, time=1.0):
    return JobRecord(job_id, "stream", time, (image("top"), image("mid")), image("base"), {"a": 1})


def encoded(lines):
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def random_lines(rng):
    for _ in range(rng.randrange(60)):
        name = rng.choice("abc")
        match rng.randrange(4):
            case 3:
                yield speed_line(name, rng.randrange(1 << 40))
            case 0:
                yield began_line(job(name, rng.random()))
            case 1:
                yield ended_line(name, 2.0, rng.choice(["completed", "failed"]), None)
            case _:
                yield drive_line(name, image("f"), image(rng.choice("fg")))


def content(history):
    return list(history.jobs.values()), history.drives


@pytest.mark.parametrize("seed", range(20))
def test_it_may_end_anywhere(seed):
    rng = random.Random(seed)
    data = encoded([*History().lines(), *random_lines(rng)])
    cut = rng.randrange(len(data) + 1)
    whole, torn = History(), History()
    whole.load(data[:cut][: data[:cut].rfind(b"\n") + 1])
    torn.load(data[:cut])
    if content(whole) != content(torn):
        # the cut was just before the end of a line, which counts then
        whole.load(data[:cut] + b"\n")
    assert content(whole) == content(torn)
    again = History()
    assert again.load(encoded(torn.lines())) == 0
    assert content(again) == content(torn)


@pytest.mark.parametrize(
    "line",
    [b"{", b"[]", b"3", b"null", b'{"began": "x"}', b'{"ended": "unknown", "time": 1}', b"\xff",
     b'{"job": "unknown", "speed": 1}', b'{"job": [], "speed": 1}', b'{"speed": 1}',
     b'{"began": "x", "time": "t", "type": "s", "images": [], "base": null, "parameters": {}}',
     b'{"began": "x", "time": 1, "type": "s", "images": [3], "base": null, "parameters": {}}',
     b'{"drive": "d", "opened": "/f", "active": []}'],
)  # fmt: skip
def test_nonsense_is_left_out(line):
    history = History()
    data = encoded([*History().lines(), began_line(job("a"))]) + line + b"\n"
    history.load(data + encoded([ended_line("a", 2.0, "completed", None)]))
    assert list(history.jobs) == ["a"] and history.jobs["a"].result == "completed"


def test_another_version_is_refused():
    with pytest.raises(ValueError, match="another version"):
        History().load(b'{"journal": "liveblockd jobs", "version": 2}\n')


def test_it_remembers_only_so_many_that_have_ended():
    history = History()
    history.apply(began_line(job("under way")))
    for number in range(KEPT + 50):
        history.apply(began_line(job(f"j{number}")))
        history.apply(ended_line(f"j{number}", 2.0, "completed", None))
    assert len(history.jobs) == KEPT + 1
    assert [record.id for record in history.under_way()] == ["under way"]


def full(*_):
    raise OSError(ENOSPC, "No space left on device")


async def reread(path):
    history = History()
    assert history.load(path.read_bytes()) == 0
    return history


class TestFile:
    async def test_what_was_told_is_there(self, tmp_path):
        path = tmp_path / "journal"
        journal = Journal.open(str(path), InlineWorkers())
        journal._add(began_line(job("a")))
        journal._add(began_line(job("b")))
        journal.give_up("a", "failed", "why")
        journal.give_up("unknown", "failed")
        await journal.synced()
        assert content(await reread(path)) == content(journal.history)
        with pytest.raises(BlockError, match="belongs to a running daemon"):
            Journal.open(str(path), InlineWorkers())
        await journal.close()
        again = Journal.open(str(path), InlineWorkers())
        assert content(again.history) == content(journal.history)
        await again.close()

    async def test_it_does_not_grow_without_end(self, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "MOST", 4000)
        path = tmp_path / "journal"
        journal = Journal.open(str(path), InlineWorkers())
        for _ in range(500):
            journal._add(drive_line("d", image("f"), image("g")))
            await asyncio.sleep(0)
        await journal.synced()
        assert path.stat().st_size <= 4000
        assert content(await reread(path)) == content(journal.history)
        await journal.close()

    async def test_a_full_disk(self, tmp_path, monkeypatch, caplog):
        """What could not be written is written with the next line; a torn line harms nothing."""
        path = tmp_path / "journal"
        journal = Journal.open(str(path), InlineWorkers())

        def full(fd, data):
            module._write(fd, data[:10])
            raise OSError(ENOSPC, "No space left on device")

        with monkeypatch.context() as context, caplog.at_level(logging.ERROR):
            context.setattr(module, "_append", full)
            journal._add(began_line(job("a")))
            await journal.synced()
        assert "No space left on device" in caplog.text
        journal._add(began_line(job("b")))
        await journal.synced()
        assert list((await reread(path)).jobs) == ["a", "b"]
        await journal.close()

    async def test_a_full_disk_is_tried_again(self, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "RETRY", 0.01)
        path = tmp_path / "journal"
        journal = Journal.open(str(path), InlineWorkers())
        with monkeypatch.context() as context:
            context.setattr(module, "_append", full)
            context.setattr(module, "_write", full)
            journal._add(began_line(job("a")))
            await journal.synced()
            await asyncio.sleep(0.05)
            await journal.synced()
            assert not path.with_name("journal.outdated").exists()  # no drive is elsewhere
        for _ in range(3000):
            await asyncio.sleep(0.01)
            if (await reread(path)).jobs:
                break
        assert list((await reread(path)).jobs) == ["a"]
        await journal.close()

    async def test_no_daemon_starts_by_a_wrong_place_of_a_drive(self, tmp_path, monkeypatch):
        path, outdated = tmp_path / "journal", tmp_path / "journal.outdated"
        journal = Journal.open(str(path), InlineWorkers())
        with monkeypatch.context() as context:
            context.setattr(module, "_append", full)
            journal._add(drive_line("d", image("f"), image("g")))
            await journal.synced()
        assert outdated.exists() and not path.exists()
        killed = tmp_path / "killed"
        killed.mkdir()
        shutil.copy(outdated, killed)
        with pytest.raises(BlockError, match=r"then remove '.*journal\.outdated'"):
            Journal.open(str(killed / "journal"), InlineWorkers())
        await journal.close()  # tries once more
        assert path.exists() and not outdated.exists()
        again = Journal.open(str(path), InlineWorkers())
        assert again.drive("d").active == image("g")
        await again.close()

    async def test_not_a_journal(self, tmp_path):
        path = tmp_path / "journal"
        path.write_bytes(b'{"journal": "of somebody else"}\n')
        with pytest.raises(BlockError, match="another version"):
            Journal.open(str(path), InlineWorkers())
        assert path.read_bytes() == b'{"journal": "of somebody else"}\n'

    @pytest.mark.parametrize("data", [b"QFI\xfb" + bytes(4096), bytes(65536), b"\n", b"[jobs]\n"])
    async def test_a_disk_image_is_not_replaced(self, tmp_path, data):
        path = tmp_path / "journal"
        path.write_bytes(data)
        with pytest.raises(BlockError, match="something else than a journal of jobs is there"):
            Journal.open(str(path), InlineWorkers())
        assert path.read_bytes() == data

    async def test_an_empty_file_is_taken(self, tmp_path):
        path = tmp_path / "journal"
        path.touch()
        await Journal.open(str(path), InlineWorkers()).close()
        assert path.read_bytes().startswith(b'{"journal"')


def test_the_last_speed_counts():
    history = History()
    lines = [began_line(job("a")), speed_line("a", 7), speed_line("a", 8)]
    assert history.load(encoded([*history.lines(), *lines])) == 0
    assert history.jobs["a"].parameters == {"a": 1, "speed": 8}
    again = History()
    again.load(encoded(history.lines()))
    assert content(again) == content(history)
