"""Guests that go on writing where there is no room, beside a stream: each byte is old or new.

In this process, on real file systems: a full one, and a quota, under which what is there cannot be
overwritten either, tables of images among it. When there is room again all goes on.
"""

import asyncio
import random
import shutil
import subprocess

import numpy as np
import pytest

from liveblockd.errors import NO_SPACE
from liveblockd.jobs.job import BlockdevOnError
from liveblockd.storage.driver import Permission
from tests.simulation.bench import Bench
from tests.simulation.guest import Guest
from tests.support.patience import until
from tests.support.room import KINDS, Room

MIB = 1 << 20
SIZE = 16 * MIB
#: requests that are made where there is no room
CROWDED = 300

pytestmark = pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is not installed")


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


class Crowded(Guest):
    """A guest whose flushes may fail for want of room, too; ``unsure`` is not durable (1)."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.may_fail = 1
        self.failed = 0
        self.unsure = bytearray(len(self.model))

    def _take(self, writing):
        place = super()._take(writing)
        if place is not None and writing:
            offset, length = place
            self.unsure[offset : offset + length] = b"\1" * length
        return place

    async def _failed(self, offset, data, error):
        assert error.errno in NO_SPACE
        self.failed += 1
        await super()._failed(offset, data, error)

    async def _flush(self):
        try:
            await super()._flush()
        except OSError as error:
            assert error.errno in NO_SPACE
            self.failed += 1
        else:
            self.unsure[:] = bytes(len(self.unsure))


@pytest.fixture(params=KINDS)
def room(tmp_path, request):
    with Room(tmp_path / "small", request.param, mib=6) as room:
        yield room


async def crowd(bench, room, tmp_path, seed, at_once):
    """A disk of 16 MiB, half of it in its base, in 6 MiB; and a guest that found it full."""
    rng = random.Random(seed)
    data = rng.randbytes(SIZE // 2) + bytes(SIZE // 2)
    (tmp_path / "base.raw").write_bytes(data)
    size = rng.choice((4, 16, 64)) * 1024
    top = room.path / "top.qcow2"
    backing = ("-b", str(tmp_path / "base.raw"), "-F", "raw", "-o", f"cluster_size={size}")
    assert run("qemu-img", "create", "-q", "-f", "qcow2", *backing, str(top))[0] == 0
    file = {"driver": "file", "filename": str(top), "discard": "unmap"}
    node = await bench.open(driver="qcow2", node_name="disk", file=file, discard="unmap")
    used = Permission.CONSISTENT_READ | Permission.WRITE
    backend = await bench.graph.attach(node, used, Permission.ALL)
    guest = Crowded(backend, bytearray(data), rng, f"guest {seed}")
    job = await bench.stream("disk", on_error=BlockdevOnError.ENOSPC)
    task = asyncio.create_task(guest.run(at_once))
    await until(lambda: task.done() or job.status in ("paused", "null"))
    before = guest.requests
    await until(lambda: task.done() or guest.requests > before + CROWDED)
    assert not task.done(), await task
    assert (job.status, job.io_status) == ("paused", "nospace") and guest.failed
    return job, guest, task


@pytest.mark.parametrize("seed", range(4))
async def test_all_goes_on_when_there_is_room(room, tmp_path, seed):
    bench = Bench()
    job, guest, task = await crowd(bench, room, tmp_path, seed, at_once=4)
    room.more(96)
    bench.scheduler.resume(job)
    await bench.end(job)
    assert job.error is None
    guest.stop.set()
    await task
    guest.stop.clear()
    guest.failed = 0
    task = asyncio.create_task(guest.run())
    before = guest.requests
    await until(lambda: task.done() or guest.requests > before + CROWDED)
    guest.stop.set()
    await task
    assert not guest.failed
    await guest.compare_all()
    await bench.close()
    top = str(room.path / "top.qcow2")
    code, said = run("qemu-img", "check", "-f", "qcow2", top)
    assert code == 0, said
    (tmp_path / "base.raw").unlink()
    raw = tmp_path / "top.raw"
    assert run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", top, str(raw))[0] == 0
    assert raw.read_bytes() == guest.model


@pytest.mark.parametrize("seed", range(10, 14))
async def test_what_was_flushed_is_there_after_a_kill(room, tmp_path, seed):
    """A copy of the files is what a killed daemon leaves."""
    bench = Bench()
    job, guest, task = await crowd(bench, room, tmp_path, seed, at_once=1)
    guest.stop.set()
    await task
    raw = tmp_path / "left.raw"
    left = tmp_path / "left.qcow2"
    shutil.copy(room.path / "top.qcow2", left)
    code, said = run("qemu-img", "check", "-f", "qcow2", str(left))
    assert code in (0, 3), said
    assert run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(left), str(raw))[0] == 0
    found, wanted, unsure = (
        np.frombuffer(part, np.uint8) for part in (raw.read_bytes(), guest.model, guest.unsure)
    )
    lost = np.flatnonzero((found != wanted) & (unsure == 0))
    assert not len(lost), f"guest {seed}: a byte at {lost[0]:#x} is lost"
    assert 0 < unsure.sum() < SIZE
    room.more(96)
    bench.scheduler.cancel(job, force=True)
    await bench.end(job)
    await bench.close()
