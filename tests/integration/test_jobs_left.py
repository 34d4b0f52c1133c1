"""Jobs whose image hangs, which guests use as well: their end is told, their nodes follow.

The base of a commit, or an image that is amended, is on an NBD server that stops answering. A
cancel takes a moment, guests go on, and nobody else writes to the base. When the server answers
all is as before the job, and the same job succeeds.
"""

import asyncio
import random
import signal
import time
from contextlib import asynccontextmanager, contextmanager

import pytest

from liveblockd.errors import BlockError
from liveblockd.formats.luks import new_luks
from liveblockd.formats.luks_slots import KeyslotState, LuksAmendment
from liveblockd.jobs import hanging
from liveblockd.jobs.amending import amend_encryption
from liveblockd.jobs.job import Job, JobType
from liveblockd.jobs.mirror_options import MirrorCopyMode
from liveblockd.jobs.scheduler import Transaction
from liveblockd.jobs.step import Amend
from liveblockd.jobs.transitions import JobStatus
from liveblockd.storage.driver import Permission
from tests.integration.test_jobs_hang import hung
from tests.integration.test_nbd_client import opened, qemu_nbd
from tests.simulation.bench import Bench
from tests.support.daemon import DaemonProcess, QmpError
from tests.support.qcow2_images import check, needs, run

pytestmark = needs("qemu-img", "qemu-nbd", "qemu-io")

MIB = 1 << 20
SIZE = 16 * MIB
USED = Permission.CONSISTENT_READ | Permission.WRITE
CANCELLED = ["aborting", "CANCELLED", "concluded", "null"]
BASES = ("raw", "qcow2")
KINDS = ("intermediate", "active", "ready", "blocking")


@pytest.fixture
def soon(monkeypatch):
    """Jobs are left earlier than users would like."""
    monkeypatch.setattr(hanging, "PATIENCE", 0.2)
    monkeypatch.setattr(hanging, "SILENCE", 0.3)
    monkeypatch.setattr(hanging, "LEFT", 0.6)
    monkeypatch.setattr(hanging, "LEFT_TOLD", 1.2)


def make_images(directory, form):
    """base (``form``, 1), mid (8 MiB from 2 on: 2) and top (1 MiB from 8 on: 3)."""
    run("qemu-img", "create", "-q", "-f", form, directory / "base.img", SIZE)
    run("qemu-io", "-f", form, "-c", f"write -P 1 0 {SIZE}", directory / "base.img")
    for name, value, offset, length in (("mid", 2, 2, 8), ("top", 3, 8, 1)):
        path = directory / f"{name}.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", path, SIZE)
        write = f"write -P {value} {offset}M {length}M"
        run("qemu-io", "-f", "qcow2", "-c", write, path)


def content():
    model = bytearray(b"\1" * SIZE)
    model[2 * MIB : 10 * MIB] = b"\2" * (8 * MIB)
    model[8 * MIB : 9 * MIB] = b"\3" * MIB
    return model


class Guest:
    """Writes what it knows where the top has clusters, so that no base is asked."""

    def __init__(self, user):
        self.user, self.model = user, content()
        self.done = 0
        self.stopping = False
        self.task = asyncio.create_task(self.work())

    async def work(self):
        number = 0
        while not self.stopping:
            number += 1
            offset, data = 8 * MIB + number % 16 * 65536, bytes([number % 200 + 20]) * 65536
            self.model[offset : offset + len(data)] = data
            await self.user.write(offset, data)
            assert await self.user.read(offset, 512) == data[:512]
            self.done = number
            await asyncio.sleep(0.002)

    async def goes_on(self, seconds=3.0):
        """Returns when it has done something; which may wait for a drain that is tried."""
        before = self.done
        async with asyncio.timeout(seconds):
            while self.done < before + 3:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def stop(self):
        self.stopping = True
        await asyncio.wait_for(self.task, 30)


@asynccontextmanager
async def chain_with(directory, form):
    """A guest on top <- mid <- base, which is on an NBD server."""
    make_images(directory, form)
    bench = Bench()
    with qemu_nbd(directory, directory / "base.img", "raw", "-e", "3") as server:
        await opened(bench, directory)
        if form == "qcow2":
            await bench.open(driver="qcow2", node_name="base", file="n", read_only=True)
        else:
            await bench.open(driver="raw", node_name="base", file="n", read_only=True)
        for name, below in (("mid", "base"), ("top", "mid")):
            file = {"driver": "file", "filename": str(directory / f"{name}.qcow2")}
            read_only = name == "mid"
            await bench.open(
                driver="qcow2", node_name=name, file=file, backing=below, read_only=read_only
            )
        user = await bench.graph.attach(bench.graph.nodes["top"], USED, name="virtio0")
        bench.names = list(bench.graph.nodes)
        bench.guest = Guest(user)
        yield bench, server
        await bench.guest.stop()
        async with asyncio.timeout(20):
            await bench.close()


async def begin(bench, kind, job_id="j", **options):
    # The header of the top names a file, so that qemu-img finds it without the server.
    top = {"top_node": "mid", "backing_file": "base.img"} if kind == "intermediate" else {}
    return await bench.commit("top", job_id, base_node="base", **top, **options)


async def begin_to_hang(bench, kind, **options):
    """The job is at work, and slow, or ready; next, the caller lets its server hang."""
    at_work = kind in ("intermediate", "active")
    job = await begin(bench, kind, speed=MIB if at_work else 0, **options)
    if at_work:
        await asyncio.sleep(0.2)
        assert job.status == JobStatus.RUNNING
    else:
        await bench.end(job, JobStatus.READY)
    if kind == "blocking":
        job.change_copy_mode(MirrorCopyMode.WRITE_BLOCKING)
    return job


def held(bench):
    """What is left of a job in the graph."""
    nodes = bench.graph.nodes.values()
    return [
        *(node.name for node in nodes if node.op_blockers or node.job_filter),
        *(node.name for node in nodes if any(edge.frozen for edge in node.children.values())),
    ]


async def all_given_back(bench):
    async with asyncio.timeout(20):
        while held(bench) or not bench.graph.nodes["base"].read_only:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert list(bench.graph.nodes) == bench.names
    assert not bench.graph.nodes["top"].bitmaps
    assert not bench.scheduler.jobs


async def succeeds(bench, kind, job_id="again"):
    job = await begin(bench, kind, job_id)
    if kind != "intermediate":
        await bench.end(job, JobStatus.READY)
        bench.scheduler.complete(job)
    await bench.end(job)
    assert job.error is None


def compare(directory, form, kind, model):
    """The bytes of the images, after the commit, are the guest's."""
    for name in ("mid", "top") if kind != "intermediate" else ("top",):
        assert not check(directory / f"{name}.qcow2"), name
    if form == "qcow2":
        assert not check(directory / "base.img")
    base = {"driver": form, "file.filename": directory / "base.img"}
    if kind == "untouched":
        for name, below in (("mid", ("base.img", form)), ("top", ("mid.qcow2", "qcow2"))):
            path = directory / f"{name}.qcow2"
            run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", below[0], "-F", below[1], path)
    if kind in ("intermediate", "untouched"):
        image = {"driver": "qcow2", "file.filename": directory / "top.qcow2"}
        base = image
    options = ",".join(f"{key}={value}" for key, value in base.items())
    out = directory / "out.raw"
    run("qemu-img", "convert", "--image-opts", "-O", "raw", options, out)
    assert out.read_bytes() == model


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("form", BASES)
@pytest.mark.parametrize("kind", KINDS)
async def test_a_base_that_does_not_answer(kind, form, tmp_path):
    async with chain_with(tmp_path, form) as (bench, server):
        job = await begin_to_hang(bench, kind)
        with hung(server):
            await asyncio.sleep(0.3)
            before = bench.guest.done
            await asyncio.sleep(0.1)
            assert (bench.guest.done == before) == (kind == "blocking")
            bench.scheduler.cancel(job, force=True)
            await bench.guest.goes_on(0.3)
            await bench.end(job, seconds=3)
            assert bench.course("j")[-4:] == CANCELLED
            assert not bench.scheduler.jobs
            # Nobody else works on these nodes, above all not on the base.
            with pytest.raises(BlockError, match=r"in use by block job: commit|Need a root block"):
                await begin(bench, kind, "other")
            for name in ("base", "mid", "n"):
                with pytest.raises(BlockError, match=r"busy|in use"):
                    await bench.graph.delete(name)
            await bench.guest.goes_on(0.3)
            assert held(bench) and not bench.graph.nodes["base"].read_only
        await all_given_back(bench)
        await succeeds(bench, kind)
    compare(tmp_path, form, kind, bench.guest.model)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("kind", ["intermediate", "ready"])
async def test_a_guest_that_reads_the_base_meanwhile(kind, paused, tmp_path):
    """What the job holds is not given back while that read hangs: other requests would wait too."""
    async with chain_with(tmp_path, "raw") as (bench, server):
        job = await begin_to_hang(bench, kind)
        if paused:  # nothing of the job itself is in flight
            bench.scheduler.pause(job)
            await bench.end(job, JobStatus.STANDBY if kind == "ready" else JobStatus.PAUSED)
        with hung(server):
            read = asyncio.create_task(bench.guest.user.read(SIZE - MIB, 512))
            await asyncio.sleep(0.1)
            bench.scheduler.cancel(job, force=True)
            await bench.end(job, seconds=5)
            assert bench.course("j")[-4:] == CANCELLED
            await bench.guest.goes_on()  # a drain may have been tried
            before = bench.guest.done
            await asyncio.sleep(1.0)
            assert bench.guest.done > before + 10
            assert held(bench) and not read.done() and not bench.graph.lock.locked()
        assert await asyncio.wait_for(read, 5) == b"\1" * 512
        await all_given_back(bench)
        await succeeds(bench, kind)
    compare(tmp_path, "raw", kind, bench.guest.model)


@pytest.mark.usefixtures("soon")
async def test_it_was_cancelled_and_only_its_flush_hangs(tmp_path):
    """Its end was told at once; later its id is free as well."""
    async with chain_with(tmp_path, "qcow2") as (bench, server):
        job = await begin_to_hang(bench, "intermediate")
        bench.scheduler.pause(job)
        await bench.end(job, JobStatus.PAUSED)
        with hung(server):
            bench.scheduler.cancel(job, force=True)
            await bench.end(job, JobStatus.CONCLUDED, seconds=1)
            await asyncio.sleep(0.5)
            assert job.status == JobStatus.CONCLUDED
            await bench.end(job, seconds=3)
            assert held(bench)
            await bench.guest.goes_on()
        await all_given_back(bench)
        await succeeds(bench, "intermediate")


@pytest.mark.usefixtures("soon")
async def test_it_is_kept_until_its_client_has_seen_it(tmp_path):
    async with chain_with(tmp_path, "raw") as (bench, server):
        job = await begin_to_hang(bench, "intermediate", auto_dismiss=False)
        with hung(server):
            await asyncio.sleep(0.1)
            bench.scheduler.cancel(job, force=True)
            bench.scheduler.cancel(job, force=True)
            await bench.end(job, JobStatus.CONCLUDED, seconds=3)
            await asyncio.wait_for(bench.scheduler.dismiss(job), 1)
            assert not bench.scheduler.jobs
            assert held(bench)
        await all_given_back(bench)
        assert bench.course("j").count("CANCELLED") == 1


@pytest.mark.usefixtures("soon")
async def test_what_is_being_made_true_is_not_left(tmp_path):
    async with chain_with(tmp_path, "qcow2") as (bench, server):
        job = await begin(bench, "intermediate", auto_finalize=False)
        await bench.end(job, JobStatus.PENDING)
        with hung(server):
            end = asyncio.create_task(bench.scheduler.finalize(job))
            await asyncio.sleep(0.1)
            bench.scheduler.cancel(job, force=True)
            await asyncio.sleep(1.0)
            assert job.status == JobStatus.PENDING and not job.left.is_set()
        await asyncio.wait_for(end, 10)
        await bench.end(job)
        assert job.error is None
    compare(tmp_path, "qcow2", "intermediate", bench.guest.model)


@pytest.mark.usefixtures("soon")
async def test_others_of_its_transaction_end_as_well(tmp_path):
    async with chain_with(tmp_path, "raw") as (bench, server):
        job = await begin_to_hang(bench, "intermediate")
        job.transaction = group = Transaction()
        group.jobs.append(job)
        other = Idle("k")
        bench.scheduler.create(other, group)
        await bench.scheduler.start(other)
        with hung(server):
            await asyncio.sleep(0.1)
            bench.scheduler.cancel(other, force=True)
            await bench.end(other, seconds=3)
            await bench.end(job, seconds=3)
            assert bench.course("k")[-4:] == bench.course("j")[-4:] == CANCELLED
        await all_given_back(bench)


class Idle(Job):
    """Waits until it is cancelled."""

    type = JobType.BACKUP

    async def run(self):
        while True:
            await self.checkpoint()
            await self.wait()


SECRETS = {"old": b"swordfish", "new": b"another"}


@pytest.mark.usefixtures("soon")
async def test_an_image_that_is_amended(tmp_path):
    """The passphrase is added when the server answers; until then nobody else may work on it."""
    pytest.importorskip("cryptography")
    path = tmp_path / "luks.img"
    path.write_bytes(new_luks(SECRETS["old"], iter_time=1) + bytes(MIB))
    bench = Bench(secret=SECRETS.__getitem__)
    with qemu_nbd(tmp_path, path) as server:
        await opened(bench, tmp_path)
        node = await bench.open(driver="luks", node_name="disk", file="n", key_secret="old")
        add = LuksAmendment(KeyslotState.ACTIVE, new_secret=SECRETS["new"], iter_time=1)

        async def amend(job_id):
            job = Amend(job_id, lambda _: amend_encryption(bench.graph, node, add))
            bench.scheduler.create(job)
            await bench.scheduler.start(job)
            return job

        with hung(server):
            job = await amend("j")
            await asyncio.sleep(0.2)
            for _ in range(3):
                bench.scheduler.cancel(job, force=True)
                await asyncio.sleep(0.05)
            await bench.end(job, JobStatus.CONCLUDED, seconds=3)
            assert job.cancelled
            await asyncio.wait_for(bench.scheduler.dismiss(job), 1)
            with pytest.raises(BlockError, match="in use by block job: amend"):
                await bench.graph.delete("disk")
        async with asyncio.timeout(10):
            while node.op_blockers:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert [slot.active for slot in node.driver.header.slots].count(True) == 2
        job = await amend("again")
        await bench.end(job, JobStatus.CONCLUDED)
        assert job.error is None
        await bench.scheduler.dismiss(job)
        await bench.graph.delete("disk")
        await bench.open(driver="luks", node_name="disk", file="n", key_secret="new")
        await bench.close()


@contextmanager
def daemon_with(directory, form, *options):
    """top <- mid <- base (on an NBD server), exported."""
    make_images(directory, form)
    with (
        qemu_nbd(directory, directory / "base.img", "raw", "-e", "3") as server,
        DaemonProcess(
            directory,
            "--blockdev", "driver=nbd,node-name=n,server.type=unix,server.path=nbd.sock",
            "--blockdev", f"driver={form},node-name=base,file=n,read-only=on",
            "--blockdev", "driver=qcow2,node-name=mid,file.driver=file,file.filename=mid.qcow2,"
            "read-only=on,backing=base",
            "--blockdev", "driver=qcow2,node-name=top,file.driver=file,file.filename=top.qcow2,"
            "backing=mid",
            *options,
        ) as daemon,
    ):  # fmt: skip
        yield daemon, server


def start_to_hang(client, **options):
    client("block-commit", job_id="j", device="top", base_node="base", speed=MIB, **options)
    time.sleep(0.3)


@pytest.mark.parametrize("form", BASES)
def test_a_client_cancels(form, tmp_path):
    """With the patience that users have; a commit of the daemon after it succeeds."""
    with daemon_with(tmp_path, form) as (daemon, server):
        client = daemon.qmp()
        start_to_hang(client)
        with hung(server):
            time.sleep(0.5)
            began = time.monotonic()
            client("block-job-cancel", device="j")
            client.wait("BLOCK_JOB_CANCELLED", device="j")
            client.wait("JOB_STATUS_CHANGE", id="j", status="null")
            assert time.monotonic() - began < 5.0
            assert client("query-jobs") == client("query-block-jobs") == []
            with pytest.raises(QmpError, match=r"busy|in use"):
                client("blockdev-del", node_name="base")
            with pytest.raises(QmpError, match="not found"):
                client("block-job-cancel", device="j")
            assert time.monotonic() - began < 6.0
        deadline = time.monotonic() + 20
        while True:
            try:
                client("block-commit", job_id="j", device="top", base_node="base")
                break
            except QmpError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        client.events.clear()
        client.wait("BLOCK_JOB_READY", device="j")
        client("block-job-complete", device="j")
        client.wait("BLOCK_JOB_COMPLETED", device="j")
        client.wait("JOB_STATUS_CHANGE", id="j", status="null")
        for name in ("top", "mid", "base", "n"):
            client("blockdev-del", node_name=name)
        assert daemon.stop() == 0
    compare(tmp_path, form, "active", content())


def test_the_daemon_is_killed_while_a_job_is_left(tmp_path):
    """Its client was told that it is cancelled: it does not go on when the daemon is back."""
    with daemon_with(tmp_path, "qcow2", "--jobs", "journal=journal") as (daemon, server):
        client = daemon.qmp()
        start_to_hang(client)
        with hung(server):
            time.sleep(0.5)
            client("block-job-cancel", device="j")
            client.wait("JOB_STATUS_CHANGE", id="j", status="null")
            (told,) = client("x-liveblock-query-job-journal")
            assert (told["id"], told["result"]) == ("j", "cancelled")
            daemon.process.kill()
            daemon.process.wait(10)
    compare(tmp_path, "qcow2", "untouched", content())


@pytest.mark.slow  # a server has ten seconds
@pytest.mark.parametrize("how", ["SIGTERM", "quit"])
@pytest.mark.parametrize("when", ["running", "left"])
def test_the_end_of_the_daemon(how, when, tmp_path):
    """Its status says that the base, whose server says nothing, could not be closed."""
    with daemon_with(tmp_path, "qcow2") as (daemon, server):
        client = daemon.qmp()
        start_to_hang(client)
        with hung(server):
            time.sleep(0.5)
            if when == "left":
                client("block-job-cancel", device="j")
                client.wait("JOB_STATUS_CHANGE", id="j", status="null")
            if how == "quit":
                client("quit")
            else:
                daemon.process.send_signal(signal.SIGTERM)
            assert daemon.process.wait(30) == 1
            client.rest()
    compare(tmp_path, "qcow2", "untouched", content())


def seeds():
    return [pytest.param(seed, marks=[pytest.mark.slow] * (seed >= 6)) for seed in range(60)]


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("seed", seeds())
async def test_at_any_time(seed, tmp_path):
    """The server hangs, and the job is cancelled, at random moments; guests lose nothing."""
    rng = random.Random(seed)
    form, kind = BASES[seed % 2], KINDS[seed // 2 % 4]
    async with chain_with(tmp_path, form) as (bench, server):
        await asyncio.sleep(rng.random() * 0.05)
        job = await begin(bench, kind, speed=rng.choice((0, 2 * MIB, 16 * MIB)))
        if kind == "blocking":
            job.change_copy_mode(MirrorCopyMode.WRITE_BLOCKING)
        await asyncio.sleep(rng.random() * rng.choice((0.02, 0.3)))
        with hung(server):
            await asyncio.sleep(rng.random() * rng.choice((0.02, 0.5)))
            reads = [
                asyncio.create_task(bench.guest.user.read(rng.randrange(MIB), 4096))
                for _ in range(rng.choice((0, 0, 2)))
            ]
            if rng.random() < 0.3 and job.status in ("running", "ready"):
                bench.scheduler.pause(job)
            await asyncio.sleep(rng.random() * 0.05)
            making_true = False
            if bench.scheduler.find("j") is job and job.status != JobStatus.CONCLUDED:
                making_true = job.status == JobStatus.PENDING
                bench.scheduler.cancel(job, force=True)
            if not making_true:
                await bench.end(job, seconds=20)
                await bench.guest.goes_on()
            await asyncio.sleep(rng.random() * 0.3)
        for read in reads:
            assert await asyncio.wait_for(read, 10) == b"\1" * 4096
        await bench.end(job, seconds=30)
        if job.error is not None:
            assert job.cancelled
            await all_given_back(bench)
            await succeeds(bench, kind)
    compare(tmp_path, form, kind, bench.guest.model)
