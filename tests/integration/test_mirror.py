"""Mirrors of real images while guests write: to other formats, over NBD, through the pivot."""

import asyncio
import contextlib
import json
import random
import signal
import subprocess

import pytest

from liveblockd.jobs import mirror
from liveblockd.jobs.mirror_job import MirrorParameters, MirrorSyncMode
from liveblockd.jobs.mirror_options import MirrorCopyMode, MirrorOptions
from liveblockd.jobs.mirror_start import start_mirror
from liveblockd.jobs.transitions import JobStatus
from liveblockd.storage.driver import Permission
from tests.simulation.bench import Bench
from tests.support.daemon import DaemonProcess, nbd_write
from tests.support.patience import until
from tests.support.qcow2_images import needs, run

pytestmark = needs("qemu-img", "qemu-nbd", "qemu-io")

KIB, MIB = 1024, 1024 * 1024
SIZE = 12 * MIB + 3 * 512
LANES = 4


class Lanes:
    """A guest that writes until it is told to stop, with a model of what the disk holds."""

    def __init__(self, drive, model, seed, *, pause=0.0):
        self.drive, self.model, self.seed, self.pause = drive, model, seed, pause
        self.stopping = False
        self.writes = 0

    async def __aenter__(self):
        self.tasks = [asyncio.create_task(self.lane(number)) for number in range(LANES)]
        return self

    async def __aexit__(self, *exc):
        self.stopping = True
        await asyncio.gather(*self.tasks)

    async def lane(self, number):
        rng = random.Random(f"{self.seed} {number}")
        part = len(self.model) // LANES
        low = number * part
        while not self.stopping:
            offset = low + rng.randrange(part)
            length = min(rng.choice((1, 512, 4 * KIB, 64 * KIB, 300 * KIB)), low + part - offset)
            if rng.randrange(8):
                data = rng.randbytes(length)
                if length > 4 * KIB or not self.drive.write_nowait(offset, data):
                    await self.drive.write(offset, data)
            else:
                data = bytes(length)
                await self.drive.write_zeroes(offset, length, may_unmap=True)
            self.model[offset : offset + length] = data
            self.writes += 1
            await asyncio.sleep(self.pause)


def make_source(directory, seed):
    rng = random.Random(seed)
    base = rng.randbytes(4 * MIB) + bytes(SIZE - 4 * MIB)
    (directory / "base.raw").write_bytes(base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", directory / "base.raw", "-F", "raw",
        directory / "top.qcow2")  # fmt: skip
    return base


def make_target(directory, kind):
    """Members of blockdev-add for the target, and the image to compare."""
    path = directory / f"target.{kind}"
    options = {"raw": ("raw",), "nbd": ("raw",), "qcow2": ("qcow2", "-o", "cluster_size=256k")}
    run("qemu-img", "create", "-q", "-f", *options[kind], path, SIZE)
    if kind != "nbd":
        return path, {"driver": kind, "file": {"driver": "file", "filename": str(path)}}
    socket = str(directory / "nbd.sock")
    return path, {"driver": "nbd", "server": {"type": "unix", "path": socket}, "open-timeout": 10}


@contextlib.contextmanager
def serving(directory, kind):
    """A qemu-nbd, if the target needs one."""
    if kind != "nbd":
        yield None
        return
    command = ["qemu-nbd", "-t", "-f", "raw", "-k", directory / "nbd.sock", "target.nbd"]
    process = subprocess.Popen([str(part) for part in command], cwd=directory)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def begin(directory, kind, seed, mode, sync="full", **options):
    base = make_source(directory, seed)
    path, target = make_target(directory, kind)
    bench = Bench()
    file = {"driver": "file", "filename": str(directory / "top.qcow2")}
    await bench.open(driver="qcow2", node_name="top", file=file, discard="unmap")
    drive = await bench.graph.attach(
        bench.graph.nodes["top"], Permission.CONSISTENT_READ | Permission.WRITE, name="virtio0"
    )
    parameters = MirrorParameters(
        "m",
        "virtio0",
        "target",
        MirrorSyncMode(sync),
        options=MirrorOptions(copy_mode=mode, **options),
    )
    return bench, drive, bytearray(base), path, target, parameters


@pytest.mark.parametrize("mode", list(MirrorCopyMode))
@pytest.mark.parametrize("kind", ["raw", "qcow2", "nbd"])
async def test_the_guest_goes_on_with_the_target(kind, mode, tmp_path):
    seed = f"{kind} {mode}"
    bench, drive, model, path, target, parameters = await begin(tmp_path, kind, seed, mode)
    with serving(tmp_path, kind):
        await bench.open(node_name="target", **target)
        async with Lanes(drive, model, seed) as guest:
            await asyncio.sleep(0.05)
            job = await start_mirror(bench.graph, bench.scheduler, parameters)
            await bench.end(job, JobStatus.READY)
            await asyncio.sleep(0.1)
            bench.scheduler.complete(job)
            await bench.end(job)
            assert job.error is None
            assert drive.node.name == "target"
            writes = guest.writes
            await until(lambda: guest.writes > writes)  # the guest goes on
        assert bytes(await drive.read(0, SIZE)) == model
        await bench.graph.detach(drive)
        await bench.close()
    # What the graph closed is whole, for others too.
    (tmp_path / "model").write_bytes(model)
    image_format = "qcow2" if kind == "qcow2" else "raw"
    run("qemu-img", "compare", "-f", "raw", "-F", image_format, tmp_path / "model", path)
    if kind == "qcow2":
        run("qemu-img", "check", path)


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
@pytest.mark.parametrize("by_worker", [True, False])
async def test_a_worker_copies_what_lies_in_one_piece(kind, by_worker, tmp_path, monkeypatch):
    """And the target is the same when everything is read and written."""
    answers, parts = [], []
    real = mirror.copy_runs

    async def copy_runs(*args, **options):
        whole = [args[-2:]]
        left = await real(*args, **options) if by_worker else whole
        answers.append(left != whole)
        parts.append(0 < sum(length for _, length in left) < whole[0][1])
        return left

    monkeypatch.setattr(mirror, "copy_runs", copy_runs)
    mode = MirrorCopyMode.BACKGROUND
    bench, drive, model, path, target, parameters = await begin(tmp_path, kind, 4, mode)
    data = random.Random(4).randbytes(4 * MIB)
    for offset, part in ((4 * MIB, data), (8 * MIB, bytes(MIB)), (8 * MIB + 70000, data[:5000])):
        await drive.write(offset, part)
        model[offset : offset + len(part)] = part
    if kind == "raw":  # what is there already has to go
        path.write_bytes(b"old" * (SIZE // 3))
    else:
        run("qemu-io", "-f", "qcow2", "-c", "write -P 85 6M 2M", path)
    await bench.open(node_name="target", **target)
    job = await start_mirror(bench.graph, bench.scheduler, parameters)
    await bench.end(job, JobStatus.READY)
    bench.scheduler.complete(job)
    await bench.end(job)
    assert any(answers) is by_worker and answers
    if kind == "qcow2":  # a part of a chunk is there already: that is read and written
        assert any(parts) is by_worker
    assert bytes(await drive.read(0, SIZE)) == model
    await bench.graph.detach(drive)
    await bench.close()
    (tmp_path / "model").write_bytes(model)
    image_format = "qcow2" if kind == "qcow2" else "raw"
    run("qemu-img", "compare", "-f", "raw", "-F", image_format, tmp_path / "model", path)
    if kind == "qcow2":
        run("qemu-img", "check", path)


@pytest.mark.parametrize("kind", ["raw", "nbd"])
async def test_a_copy_of_one_moment(kind, tmp_path):
    """Cancelled when ready, the target is what the source was while nobody wrote."""
    mode = MirrorCopyMode.BACKGROUND
    bench, drive, model, path, target, parameters = await begin(tmp_path, kind, 1, mode)
    with serving(tmp_path, kind):
        await bench.open(node_name="target", **target)
        job = await start_mirror(bench.graph, bench.scheduler, parameters)
        async with Lanes(drive, model, 1):
            await bench.end(job, JobStatus.READY)
        bench.scheduler.cancel(job)
        await bench.end(job)
        assert drive.node.name == "top"
        frozen = bytes(model)
        async with Lanes(drive, model, 2):
            await asyncio.sleep(0.02)
        await bench.close()
    assert path.read_bytes() == frozen


@pytest.mark.parametrize("mode", list(MirrorCopyMode))
async def test_a_server_that_dies_is_no_affair_of_the_guest(mode, tmp_path):
    bench, drive, model, _, target, parameters = await begin(tmp_path, "nbd", 3, mode)
    with serving(tmp_path, "nbd") as server:
        await bench.open(node_name="target", **target)
        async with Lanes(drive, model, 3) as guest:
            job = await start_mirror(bench.graph, bench.scheduler, parameters)
            await bench.end(job, JobStatus.READY)
            server.kill()
            await bench.end(job)
            assert bench.completion("m")["error"] == "Input/output error"
            writes = guest.writes
            await until(lambda: guest.writes > writes)
        assert drive.node.name == "top"
        assert bytes(await drive.read(0, SIZE)) == model
        await bench.close()


async def test_it_converges_while_writing_is_slower_than_copying(tmp_path):
    """24 MiB/s are copied; the guest writes a few MiB/s, all over the disk."""
    bench, drive, model, _, target, parameters = await begin(
        tmp_path, "raw", 5, MirrorCopyMode.BACKGROUND, speed=24 * MIB
    )
    await bench.open(node_name="target", **target)
    async with Lanes(drive, model, 5, pause=0.05) as guest:
        job = await start_mirror(bench.graph, bench.scheduler, parameters)
        await bench.end(job, JobStatus.READY)
        bench.scheduler.complete(job)
        await bench.end(job)
        assert guest.writes > 20
    assert bytes(await drive.read(0, SIZE)) == model
    assert drive.node.name == "target"
    await bench.close()


async def test_write_blocking_converges_whatever_the_guest_does(tmp_path):
    """3 MiB/s are copied; the guest writes as fast as it can."""
    bench, drive, model, _, target, parameters = await begin(
        tmp_path, "raw", 6, MirrorCopyMode.WRITE_BLOCKING, speed=3 * MIB
    )
    await bench.open(node_name="target", **target)
    async with Lanes(drive, model, 6):
        job = await start_mirror(bench.graph, bench.scheduler, parameters)
        await bench.end(job, JobStatus.READY)
        bench.scheduler.complete(job)
        await bench.end(job)
    assert bytes(await drive.read(0, SIZE)) == model
    await bench.close()


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_killed_the_moment_it_has_completed(kind, tmp_path):
    base = bytearray(make_source(tmp_path, 9))
    path, target = make_target(tmp_path, kind)
    with DaemonProcess(
        tmp_path,
        "--blockdev", "driver=qcow2,node-name=top,file.driver=file,file.filename=top.qcow2",
        "--blockdev", json.dumps({"node-name": "target", **target}),
        "--nbd-server", "addr.type=unix,addr.path=nbd.sock",
        "--export", "type=nbd,id=e,node-name=top,name=e,writable=on",
    ) as daemon:  # fmt: skip
        qmp = daemon.qmp()
        qmp("blockdev-mirror", job_id="m", device="top", target="target", sync="full")
        socket = str(tmp_path / "nbd.sock")
        nbd_write(socket, "e", 5 * MIB, b"1" * 70000)
        qmp.wait("BLOCK_JOB_READY")
        nbd_write(socket, "e", 6 * MIB, b"2" * 70000)
        qmp("job-complete", id="m")
        qmp.wait("BLOCK_JOB_COMPLETED")
        daemon.stop(signal.SIGKILL)
    for offset, data in ((5 * MIB, b"1"), (6 * MIB, b"2")):
        base[offset : offset + 70000] = data * 70000
    (tmp_path / "model").write_bytes(base)
    run("qemu-img", "compare", "-f", "raw", "-F", kind, tmp_path / "model", path)
    if kind == "qcow2":
        check = subprocess.run(["qemu-img", "check", path], check=False, timeout=60)
        assert check.returncode in (0, 3), "leaks at most"
