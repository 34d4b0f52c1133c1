"""Jobs are cancelled while what they read or write hangs; guests go on, and so does the daemon."""

import asyncio
import os
import signal
import threading
import time
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace

import pytest

from liveblockd.graph.before_write import OnCbwError
from liveblockd.jobs import hanging
from liveblockd.jobs.backup import BackupParameters
from liveblockd.jobs.backup_start import start_backup
from liveblockd.jobs.check import CheckFix, CheckParameters, start_check
from liveblockd.jobs.mirror_job import MirrorParameters, MirrorSyncMode
from liveblockd.jobs.mirror_options import MirrorCopyMode, MirrorOptions
from liveblockd.jobs.mirror_start import start_mirror
from liveblockd.jobs.transitions import JobStatus
from liveblockd.storage import nbd
from liveblockd.storage.driver import Permission
from liveblockd.storage.filters.buckets import Limits, Rate
from liveblockd.storage.filters.throttle_group import ThrottleGroup
from tests.integration.test_nbd_client import opened, qemu_nbd
from tests.simulation.bench import Bench
from tests.support.daemon import DaemonProcess
from tests.support.qcow2_images import needs, run

pytestmark = needs("qemu-img", "qemu-nbd", "qemu-io")

MIB = 1 << 20
SIZE = 16 * MIB
FULL = MirrorSyncMode.FULL


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Servers that hang are given up earlier than users would like."""
    monkeypatch.setattr(hanging, "PATIENCE", 0.2)
    monkeypatch.setattr(hanging, "SILENCE", 0.3)


@contextmanager
def hung(process):
    """The server does not answer meanwhile."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


@asynccontextmanager
async def bench_with(directory):
    """A guest on the qcow2 node ``disk``, the raw disk of an NBD server as node ``n``."""
    (directory / "far.raw").write_bytes(b"far" + bytes(SIZE - 3))
    run("qemu-img", "create", "-q", "-f", "qcow2", directory / "disk.qcow2", SIZE)
    run("qemu-io", "-f", "qcow2", "-c", f"write -P 7 0 {SIZE}", directory / "disk.qcow2")
    bench = Bench()
    with qemu_nbd(directory, directory / "far.raw", "raw", "-e", "3") as server:
        await opened(bench, directory)
        file = {"driver": "file", "filename": str(directory / "disk.qcow2")}
        await bench.open(driver="qcow2", node_name="disk", file=file)
        used = Permission.CONSISTENT_READ | Permission.WRITE
        bench.guest = await bench.graph.attach(bench.graph.nodes["disk"], used, name="virtio0")
        yield bench, server
        async with asyncio.timeout(10):
            await bench.close()


async def mirror(bench, target="n", **options):
    parameters = MirrorParameters("j", "virtio0", target, FULL, options=MirrorOptions(**options))
    return await start_mirror(bench.graph, bench.scheduler, parameters)


async def backup(bench, target="n", **options):
    parameters = BackupParameters("j", "virtio0", target, FULL, **options)
    return await start_backup(bench.graph, bench.scheduler, parameters)


async def cancelled(bench, job, seconds=5):
    """``job`` is None when it was cancelled before."""
    if job is not None:
        bench.scheduler.cancel(job, force=True)
    async with asyncio.timeout(seconds):
        while bench.scheduler.jobs:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert bench.course("j")[-4:] == ["aborting", "CANCELLED", "concluded", "null"]


@pytest.mark.parametrize("start", [mirror, backup])
@pytest.mark.parametrize("paused", [False, True])
async def test_a_target_that_does_not_answer(start, paused, tmp_path):
    async with bench_with(tmp_path) as (bench, server):
        with hung(server):
            job = await start(bench)
            await asyncio.sleep(0.1)
            if paused:
                bench.scheduler.pause(job)
            await cancelled(bench, job)
            await bench.guest.write(0, b"x" * MIB)
            await bench.graph.delete("n")  # at once: there is nobody to wait for


async def test_a_server_that_is_slow_is_not_left(tmp_path):
    async with bench_with(tmp_path) as (bench, server):
        job = await mirror(bench)
        with hung(server):
            await asyncio.sleep(0.1)
            bench.scheduler.cancel(job, force=True)
            await asyncio.sleep(0.1)
        await bench.end(job)
        await bench.graph.nodes["n"].write(0, b"y" * 512)  # the connection is there


@pytest.mark.parametrize("policy", list(OnCbwError))
async def test_a_guests_write_that_waits_for_the_copy_of_old_data(policy, tmp_path):
    async with bench_with(tmp_path) as (bench, server):
        with hung(server):
            job = await backup(bench, on_cbw_error=policy)
            write = asyncio.create_task(bench.guest.write(SIZE - MIB, b"x" * MIB))
            await asyncio.sleep(0.1)
            assert not write.done()
            await cancelled(bench, job)
            await asyncio.wait_for(write, 5)  # the guest has no part in it
        assert await bench.guest.read(SIZE - MIB, MIB) == b"x" * MIB


async def test_a_guests_write_that_waits_for_the_mirrors_target(tmp_path):
    async with bench_with(tmp_path) as (bench, server):
        job = await mirror(bench, copy_mode=MirrorCopyMode.WRITE_BLOCKING)
        await bench.end(job, JobStatus.READY)
        with hung(server):
            write = asyncio.create_task(bench.guest.write(0, b"x" * MIB))
            await asyncio.sleep(0.1)
            assert not write.done()
            bench.scheduler.cancel(job, force=True)
            await asyncio.wait_for(write, 0.2)  # at once: it is in the source
            await cancelled(bench, None)
        assert await bench.guest.read(0, MIB) == b"x" * MIB


async def test_guests_writes_that_wait_for_copies_to_the_mirrors_target(tmp_path, monkeypatch):
    monkeypatch.setattr(hanging, "PATIENCE", 1.0)  # the target is cut off later than that
    async with bench_with(tmp_path) as (bench, server):
        job = await mirror(bench, copy_mode=MirrorCopyMode.WRITE_BLOCKING, speed=2 * MIB)
        await asyncio.sleep(0.2)
        with hung(server):
            await asyncio.sleep(0.5)
            writes = [
                asyncio.create_task(bench.guest.write(offset, b"x" * MIB))
                for offset in range(0, SIZE, MIB)
            ]
            await asyncio.sleep(0.1)
            assert job.status == JobStatus.RUNNING and job.chunks.claimed
            assert not any(write.done() for write in writes)
            bench.scheduler.cancel(job, force=True)
            await asyncio.wait_for(asyncio.gather(*writes), 0.7)
            await cancelled(bench, None)
        assert await bench.guest.read(0, SIZE) == b"x" * SIZE


async def test_the_switch_waits_for_the_target(tmp_path, monkeypatch):
    """Guests stand still there, so it must come to an end: they go on with the source."""
    async with bench_with(tmp_path) as (bench, server):
        job = await mirror(bench, auto_finalize=False)
        await bench.end(job, JobStatus.READY)
        bench.scheduler.complete(job)
        await bench.end(job, JobStatus.PENDING)
        with hung(server):
            end = asyncio.create_task(bench.scheduler.finalize(job))
            await asyncio.sleep(0.1)
            bench.scheduler.cancel(job, force=True)
            await asyncio.wait_for(end, 5)
            assert bench.completion("j")["error"] == "Input/output error"
            assert bench.guest.node.name == "disk"
            await bench.guest.write(0, b"x" * MIB)


async def test_a_switched_mirror_is_not_cut_off(tmp_path):
    async with bench_with(tmp_path) as (bench, server):
        job = await mirror(bench)
        await bench.end(job, JobStatus.READY)
        bench.scheduler.complete(job)
        await bench.end(job)
        with hung(server):
            write = asyncio.create_task(bench.guest.write(0, b"x" * MIB))
            await asyncio.sleep(0.5)
            job.cut_off(0)
            assert not write.done()
        await asyncio.wait_for(write, 5)


async def test_a_base_that_does_not_answer(tmp_path):
    """The job stops waiting; the guest's disk is not touched, and works when the server does."""
    async with bench_with(tmp_path) as (bench, server):
        path = tmp_path / "top.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", path, SIZE)
        file = {"driver": "file", "filename": str(path)}
        top = await bench.open(driver="qcow2", node_name="top", file=file, backing="n")
        with hung(server):
            job = await bench.stream("top", "j")
            await asyncio.sleep(0.1)
            assert job.status == JobStatus.RUNNING
            read = asyncio.create_task(top.read(0, 512))
            await cancelled(bench, job)
            assert not read.done()
        assert bytes(await asyncio.wait_for(read, 5)).startswith(b"far")
        job = await bench.stream("top", "j")
        await bench.end(job)
        assert job.error is None


@pytest.mark.parametrize("fix", list(CheckFix))
async def test_a_check_of_an_image_that_does_not_answer(fix, tmp_path):
    """It reads only: nobody waits for that. The image can be checked again."""
    async with bench_with(tmp_path) as (bench, server):
        path = tmp_path / "far.raw"  # is an image inside
        run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "i.qcow2", SIZE)
        run("qemu-io", "-f", "qcow2", "-c", "write 0 1M", tmp_path / "i.qcow2")
        os.truncate(tmp_path / "i.qcow2", SIZE)
        path.write_bytes((tmp_path / "i.qcow2").read_bytes())
        await bench.open(driver="qcow2", node_name="far", file="n")

        async def check():
            parameters = CheckParameters("j", "far", fix)
            return await start_check(bench.graph, bench.scheduler, parameters, reports)

        reports = []
        with hung(server):
            job = await check()
            await asyncio.sleep(0.1)
            assert job.status == JobStatus.RUNNING
            bench.scheduler.cancel(job)
            await bench.end(job, seconds=5)
            assert job.cancelled
            async with asyncio.timeout(5), bench.graph.lock:
                pass
        job = await check()
        await bench.end(job, seconds=20)
        assert (job.error, len(reports), reports[0].corruptions) == (None, 1, 0)


@pytest.mark.parametrize("start", [mirror, backup])
async def test_a_throttled_target(start, tmp_path):
    async with bench_with(tmp_path) as (bench, _):
        group = ThrottleGroup(Limits({"bps-total": Rate(1000)}))
        bench.graph.environment = replace(bench.graph.environment, throttle_group=lambda _: group)
        run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "t.qcow2", SIZE)
        file = {"driver": "file", "filename": str(tmp_path / "t.qcow2")}
        target = {"driver": "qcow2", "file": file}
        await bench.open(driver="throttle", node_name="slow", file=target, throttle_group="g")
        job = await start(bench, "slow")
        await asyncio.sleep(0.3)
        began = time.monotonic()
        await cancelled(bench, job)
        assert time.monotonic() - began < 1.0
        write = asyncio.create_task(bench.graph.nodes["slow"].write(0, b"x"))
        await asyncio.sleep(0.2)
        assert not write.done(), "limits are kept again"
        group.configure(Limits())
        await write


@pytest.mark.parametrize("how", ["cancel", "SIGTERM"])
def test_a_command_that_waits_for_a_job_that_hangs(how, tmp_path):
    (tmp_path / "far.raw").write_bytes(bytes(SIZE))
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "disk.qcow2", SIZE)
    with (
        qemu_nbd(tmp_path, tmp_path / "far.raw", "raw", "-e", "3") as server,
        DaemonProcess(
            tmp_path,
            "--blockdev", "driver=qcow2,node-name=disk,file.driver=file,file.filename=disk.qcow2",
            "--blockdev", "driver=nbd,node-name=n,server.type=unix,server.path=nbd.sock",
        ) as daemon,
    ):  # fmt: skip
        one, other = daemon.qmp(), daemon.qmp()
        one("blockdev-mirror", job_id="j", device="disk", target="n", sync="full",
            auto_finalize=False)  # fmt: skip
        one.wait("BLOCK_JOB_READY")
        one("job-complete", id="j")
        one.wait("BLOCK_JOB_PENDING")
        with hung(server):
            waiting = threading.Thread(target=one, args=("job-finalize",), kwargs={"id": "j"})
            waiting.start()
            time.sleep(0.3)
            if how == "cancel":
                other("job-cancel", id="j")  # is not behind the other command
            else:
                daemon.process.terminate()
            waiting.join(15)
            assert not waiting.is_alive()
            one.wait("BLOCK_JOB_COMPLETED", error="Input/output error")
            assert daemon.stop() == 0


async def test_a_node_is_closed_while_its_server_hangs(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(nbd, "PATIENCE", 0.3)
    async with bench_with(tmp_path) as (bench, server):
        with hung(server):
            await asyncio.wait_for(bench.graph.delete("n"), 5)
    assert "closing node n: " in caplog.text
