"""blockdev-mirror over images in memory: what it copies while guests write, and how it ends."""

import asyncio
import random
import time
from errno import EIO, ENOSPC
from itertools import pairwise

import pytest

from liveblockd.errors import BlockError
from liveblockd.jobs import mirror
from liveblockd.jobs.job import BlockdevOnError
from liveblockd.jobs.mirror import READY_REST, SLICE
from liveblockd.jobs.mirror_job import Mirror, MirrorParameters, MirrorSyncMode
from liveblockd.jobs.mirror_options import MirrorCopyMode, MirrorOptions
from liveblockd.jobs.mirror_start import start_mirror
from liveblockd.jobs.transitions import JobStatus
from liveblockd.storage.driver import Permission
from tests.simulation.bench import Bench
from tests.simulation.overlay import ZERO
from tests.support import memory
from tests.support.workers import InlineWorkers

KIB, MIB = 1024, 1024 * 1024
CLUSTER = 4 * KIB
SIZE = 64 * CLUSTER + 512
assert memory.MemoryDriver.driver_name  # registers it
READY = ["created", "running", "ready", "READY"]
ENDED = ["waiting", "pending", "COMPLETED", "concluded", "null"]
ACTIVE = MirrorCopyMode.WRITE_BLOCKING


class Mirrors(Bench):
    """An overlay ``top`` on ``base``, and an empty ``target``; the guest's drive is on the top."""

    def __init__(self, seed=0):
        super().__init__(InlineWorkers())
        self.random = random.Random(seed)

    async def make(
        self, *, size=SIZE, target_size=None, target_cluster=CLUSTER, target_below=None, old=False
    ):
        """``old``: the target holds something else."""
        for number, name in enumerate(("base", "top", "target")):
            members = {"driver": "overlay", "node-name": name, "seed": self.random.random()}
            members["seed"] = self.random.randrange(1 << 30)
            members["size"] = size if name != "target" else target_size or size
            members["cluster-size"] = target_cluster if name == "target" else CLUSTER
            below = {"top": "base", "target": target_below}.get(name)
            node = await self.open(**members, backing=below, discard="unmap")
            for cluster in range(-(-size // CLUSTER)):
                kind = self.random.randrange(4)
                if name != "target" and kind < 2:
                    data = bytes([16 * number + 1 + cluster % 15]) * CLUSTER
                    node.driver.clusters[cluster] = data
                elif kind == 2 and name == "top":
                    node.driver.clusters[cluster] = ZERO
            if name == "target" and old:
                for cluster in range(-(-node.length // target_cluster)):
                    node.driver.clusters[cluster] = b"old " * (target_cluster // 4)
        top = self.graph.nodes["top"]
        used = Permission.CONSISTENT_READ | Permission.WRITE
        self.drive = await self.graph.attach(top, used, name="virtio0")
        self.model = bytearray(await self.drive.read(0, size))
        return self

    async def mirror(
        self,
        job_id="m",
        *,
        device="virtio0",
        target="target",
        sync="full",
        replaces=None,
        granularity=CLUSTER,
        filter_node_name=None,
        **options,
    ):
        parameters = MirrorParameters(
            job_id,
            device,
            target,
            MirrorSyncMode(sync),
            replaces=replaces,
            filter_node_name=filter_node_name,
            granularity=granularity,
            options=MirrorOptions(**options),
        )
        return await start_mirror(self.graph, self.scheduler, parameters)

    async def content(self, name):
        node = self.graph.nodes[name]
        return bytes(await node.read(0, node.length))

    async def guest(self, writes, *, lanes=3, pause=0.0):
        """Random writes of several lanes, each in a part of the disk of its own."""

        async def lane(low, high):
            for _ in range(writes):
                await self.change(low, high)
                await asyncio.sleep(pause)

        size = len(self.model)
        cuts = [size * n // lanes // 512 * 512 for n in range(lanes)] + [size]
        await asyncio.gather(*(lane(a, b) for a, b in pairwise(cuts)))

    async def change(self, low, high):
        rng = self.random
        offset = rng.randrange(low, high) // 512 * 512
        length = min(rng.choice((512, CLUSTER, 3 * CLUSTER, 10 * KIB)), high - offset)
        kind = rng.randrange(8)
        if kind == 0:
            await self.drive.write_zeroes(offset, length, may_unmap=True)
            self.model[offset : offset + length] = bytes(length)
        elif kind == 1:
            await self.drive.discard(offset, length)
            self.model[offset : offset + length] = await self.drive.read(offset, length)
        else:
            data = bytes([rng.randrange(1, 256)]) * length
            await self.drive.write(offset, data)
            self.model[offset : offset + length] = data

    async def drain(self, name):
        async with self.graph.drained(self.graph.nodes[name]):
            pass

    async def turns(self):
        for _ in range(20):
            await asyncio.sleep(0)

    async def until(self, job, status):
        await self.end(job, status)


@pytest.mark.parametrize("sync", ["full", "top", "none"])
@pytest.mark.parametrize("mode", list(MirrorCopyMode))
@pytest.mark.parametrize("seed", range(6))
async def test_a_guest_writes_and_nothing_is_lost(seed, mode, sync):
    bench = Mirrors(seed)
    below = {"full": None, "top": "base", "none": "top"}[sync]
    granularity = bench.random.choice((512, CLUSTER, 4 * CLUSTER))
    cluster = bench.random.choice((512, CLUSTER, 2 * CLUSTER))
    await bench.make(
        target_cluster=cluster,
        target_below=None if below == "top" else below,
        old=sync == "full" and seed % 2 == 0,
    )
    job = await bench.mirror(sync=sync, granularity=granularity, copy_mode=mode)
    guest = asyncio.create_task(bench.guest(60))
    await bench.until(job, JobStatus.READY)
    assert bench.course("m") == READY, seed
    await asyncio.sleep(0.001)
    bench.scheduler.complete(job)
    bench.scheduler.complete(job)
    await bench.end(job)
    await guest
    await bench.guest(5)
    assert bench.course("m") == READY + ENDED, seed
    assert bench.drive.node.name == "target"
    if sync != "none":
        assert await bench.content("target") == bytes(bench.model), seed
    assert not bench.graph.nodes["top"].parents
    assert not bench.graph.nodes["top"].bitmaps
    assert sorted(bench.graph.nodes) == ["base", "target", "top"]
    await bench.close()


@pytest.mark.parametrize("mode", list(MirrorCopyMode))
@pytest.mark.parametrize("seed", range(3))
async def test_a_gentle_cancel_leaves_a_copy(seed, mode):
    bench = await Mirrors(seed).make()
    job = await bench.mirror(copy_mode=mode)
    await bench.guest(10)
    await bench.until(job, JobStatus.READY)
    await bench.guest(10)
    bench.scheduler.cancel(job)
    await bench.end(job)
    assert bench.course("m") == READY + ENDED
    assert bench.drive.node.name == "top"
    assert await bench.content("target") == bytes(bench.model), seed
    assert await bench.content("top") == bytes(bench.model), seed
    await bench.close()


async def test_a_forced_cancel():
    bench = await Mirrors().make()
    job = await bench.mirror()
    await bench.until(job, JobStatus.READY)
    bench.scheduler.cancel(job, force=True)
    await bench.end(job)
    assert bench.course("m") == [*READY, "aborting", "CANCELLED", "concluded", "null"]
    assert bench.drive.node.name == "top"
    job = await bench.mirror("n", speed=1)
    await asyncio.sleep(0.01)
    bench.scheduler.cancel(job)
    await bench.end(job)
    assert bench.course("n") == [
        "created", "running", "aborting", "CANCELLED", "concluded", "null"
    ]  # fmt: skip
    await bench.close()


@pytest.mark.parametrize("mode", list(MirrorCopyMode))
async def test_a_full_target_stops_the_job_and_it_goes_on(mode):
    bench = await Mirrors().make()
    bench.graph.nodes["target"].driver.faults["write"] = ENOSPC
    job = await bench.mirror(on_target_error=BlockdevOnError.STOP, copy_mode=mode)
    await bench.until(job, JobStatus.PAUSED)
    assert job.io_status == "nospace"
    await bench.guest(10)
    bench.scheduler.resume(job)
    await bench.until(job, JobStatus.READY)
    bench.graph.nodes["target"].driver.faults["write"] = ENOSPC
    await bench.guest(10)
    await bench.until(job, JobStatus.STANDBY)
    await bench.guest(10)
    bench.scheduler.resume(job)
    await bench.until(job, JobStatus.READY)
    bench.scheduler.complete(job)
    await bench.end(job)
    assert await bench.content("target") == bytes(bench.model)
    assert bench.drive.node.name == "target"
    await bench.close()


@pytest.mark.parametrize("operation", ["read", "write"])
@pytest.mark.parametrize("policy", [BlockdevOnError.REPORT, BlockdevOnError.IGNORE])
async def test_errors(operation, policy):
    bench = await Mirrors().make()
    side = {"read": "top", "write": "target"}[operation]
    bench.graph.nodes[side].driver.faults[operation] = EIO
    options = {"read": "on_source_error", "write": "on_target_error"}
    job = await bench.mirror(**{options[operation]: policy})
    if policy is BlockdevOnError.REPORT:
        await bench.end(job)
        assert bench.course("m") == [
            "created", "running", "ERROR", "aborting", "COMPLETED", "concluded", "null"
        ]  # fmt: skip
        assert bench.completion("m")["error"] == "injected"
    else:
        await bench.until(job, JobStatus.READY)
        bench.scheduler.complete(job)
        await bench.end(job)
        assert await bench.content("target") == bytes(bench.model)
    error = next(d for n, d in bench.events if n == "BLOCK_JOB_ERROR")
    assert error == {"device": "m", "operation": operation, "action": str(policy)}
    assert bench.drive.node.name == ("top" if policy is BlockdevOnError.REPORT else "target")
    await bench.close()


async def test_a_target_that_cannot_be_flushed_is_asked_again_at_leisure():
    """Under on-target-error=ignore; until then the job does not succeed."""
    bench = await Mirrors().make()
    target = bench.graph.nodes["target"]
    flush, broken = target.flush, True

    async def failing():
        if broken:
            raise OSError(EIO, "injected")
        await flush()

    target.flush = failing
    times = []
    bench.publisher.subscribe(
        lambda e: times.append(time.monotonic()) if e.name == "BLOCK_JOB_ERROR" else None
    )
    job = await bench.mirror(on_target_error=BlockdevOnError.IGNORE)
    await bench.until(job, JobStatus.READY)
    bench.scheduler.complete(job)
    async with asyncio.timeout(30):
        while len(times) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert times[2] - times[0] > SLICE
    assert job.status is JobStatus.READY
    broken = False
    await bench.end(job)
    assert bench.completion("m").get("error") is None
    assert await bench.content("target") == bytes(bench.model)
    assert bench.drive.node.name == "target"
    await bench.close()


async def test_an_error_at_the_very_end_leaves_the_source():
    bench = await Mirrors().make()
    job = await bench.mirror(auto_finalize=False)
    await bench.until(job, JobStatus.READY)
    bench.scheduler.complete(job)
    await bench.until(job, JobStatus.PENDING)
    await bench.guest(5)
    bench.graph.nodes["target"].driver.faults["write"] = ENOSPC
    await bench.scheduler.finalize(job)
    assert bench.completion("m")["error"] == "injected"
    assert bench.drive.node.name == "top"
    assert await bench.content("top") == bytes(bench.model)
    await bench.guest(2)
    await bench.close()


async def test_pending_for_long_loses_nothing():
    bench = await Mirrors().make()
    job = await bench.mirror(auto_finalize=False)
    await bench.until(job, JobStatus.READY)
    bench.scheduler.complete(job)
    await bench.until(job, JobStatus.PENDING)
    await bench.guest(20)
    await bench.scheduler.finalize(job)
    await bench.end(job)
    assert await bench.content("target") == bytes(bench.model)
    assert bench.drive.node.name == "target"
    await bench.close()


async def test_what_piled_up_while_pending_does_not_stop_the_guest():
    bench = await Mirrors().make(size=1024 * CLUSTER)
    job = await bench.mirror(auto_finalize=False)
    await bench.until(job, JobStatus.READY)
    bench.scheduler.complete(job)
    await bench.until(job, JobStatus.PENDING)
    data = b"new1" * (256 * KIB)
    for offset in range(0, 1024 * CLUSTER, len(data)):
        await bench.drive.write(offset, data)
        bench.model[offset : offset + len(data)] = data
    rests = []
    copy_rest = job._copy_rest

    async def watched():
        rests.append(job.chunks.rest)
        await copy_rest()

    job._copy_rest = watched
    await bench.scheduler.finalize(job)
    assert await bench.content("target") == bytes(bench.model)
    assert rests and rests[0] <= MIB, "the guest stands still for this"
    await bench.close()


@pytest.mark.parametrize("switch", [True, False])
async def test_a_guest_that_writes_as_fast_as_is_copied_does_not_keep_it_from_its_end(
    switch, monkeypatch
):
    monkeypatch.setattr(mirror, "LAST_REST", 0)
    bench = await Mirrors().make(size=1024 * CLUSTER)
    job = await bench.mirror(copy_mode=MirrorCopyMode.BACKGROUND)
    await bench.until(job, JobStatus.READY)
    data, transfer, copy_rest, copies = b"new1" * (256 * KIB), job._transfer, job._copy_rest, []

    async def chased(offset, length):
        await transfer(offset, length)
        copies.append(length)
        if not job.source_user.quiesced:
            await bench.drive.write(0, data)

    async def alone():
        assert job.chunks.rest <= READY_REST, "the guest stands still for this"
        job._transfer = transfer
        await copy_rest()

    job._transfer, job._copy_rest = chased, alone
    await bench.drive.write(0, data)
    if switch:
        bench.scheduler.complete(job)
    else:
        bench.scheduler.cancel(job)
    await bench.end(job)
    assert 3 <= len(copies) < 30
    bench.model[: len(data)] = data
    assert await bench.content("target") == bytes(bench.model)
    assert (bench.drive.node.name == "target") is switch
    await bench.close()


async def test_guests_that_never_leave_the_last_cluster_do_not_keep_it_from_its_end(monkeypatch):
    """They write to all that is left to copy, one after the other."""
    bench = await Mirrors().make(size=CLUSTER)
    enough, store = asyncio.Event(), Mirror._store

    async def slowly(job, offset, data):
        await bench.turns()
        await store(job, offset, data)

    async def writer(offset):
        value = 0
        while not enough.is_set():
            value = value % 255 + 1
            await bench.drive.write(offset, bytes([value]) * 512)
            bench.model[offset : offset + 512] = bytes([value]) * 512

    monkeypatch.setattr(Mirror, "_store", slowly)
    guests = [asyncio.create_task(writer(offset)) for offset in range(0, 2 * KIB, 512)]
    async with asyncio.timeout(10):
        job = await bench.mirror(copy_mode=ACTIVE)
        await bench.until(job, JobStatus.READY)
        bench.scheduler.complete(job)
        await bench.end(job)
    enough.set()
    await asyncio.gather(*guests)
    assert bench.drive.node.name == "target"
    assert await bench.content("target") == bytes(bench.model)
    await bench.close()


async def test_what_is_durable_at_the_end():
    bench = await Mirrors().make()
    job = await bench.mirror()
    await bench.until(job, JobStatus.READY)
    await bench.guest(10)
    target = bench.graph.nodes["target"].driver
    durable = []
    bench.publisher.subscribe(
        lambda event: (
            durable.append(dict(target.durable)) if event.name == "BLOCK_JOB_COMPLETED" else None
        )
    )
    bench.scheduler.complete(job)
    await bench.end(job)
    assert durable == [target.clusters]
    await bench.close()


async def test_a_change_to_write_blocking():
    bench = await Mirrors().make()
    job = await bench.mirror()
    await bench.until(job, JobStatus.READY)
    assert not job.actively_synced
    job.change_copy_mode(ACTIVE)
    guest = asyncio.create_task(bench.guest(30))
    await asyncio.sleep(0.01)
    with pytest.raises(BlockError, match="Change to copy mode 'background' is not implemented"):
        job.change_copy_mode(MirrorCopyMode.BACKGROUND)
    await guest
    await asyncio.sleep(0.15)
    assert job.actively_synced
    assert await bench.content("target") == bytes(bench.model), "before anything was completed"
    await bench.guest(3)
    assert await bench.content("target") == bytes(bench.model), "at once"
    await bench.close()


async def test_refusals():
    bench = await Mirrors().make()
    for options, message in (
        ({"device": "top", "target": "top"}, "Can't mirror node into itself"),
        ({"target": "virtio0"}, "Can't mirror node into itself"),
        ({"device": "base"}, "Need a root block node"),
        ({"target": "nobody"}, "Cannot find device='nobody' nor node-name='nobody'"),
        ({"device": "nobody"}, "Cannot find device='nobody' nor node-name='nobody'"),
        ({"granularity": 1000}, "Parameter 'granularity' expects a power of 2"),
        ({"granularity": 256}, r"expects a value in range \[512B, 64MB\]"),
        ({"granularity": 1 << 27}, r"expects a value in range \[512B, 64MB\]"),
        ({"sync": "incremental"}, "Sync mode 'incremental' not supported"),
        ({"sync": "bitmap"}, "Sync mode 'bitmap' not supported"),
        ({"target": "base"}, "Node 'base' is busy: node is used as backing hd of 'top'"),
        ({"speed": -1}, "Parameter 'speed' expects a non-negative value"),
        ({"job_id": "-"}, "Invalid job ID '-'"),
        ({"replaces": "nobody"}, "Failed to find node with node-name='nobody'"),
        ({"replaces": "base"}, "Node 'base' is busy: node is used as backing hd of 'top'"),
    ):
        with pytest.raises(BlockError, match=message):
            await bench.mirror(**options)
        assert sorted(bench.graph.nodes) == ["base", "target", "top"], options
        assert not any(n.op_blockers or n.bitmaps for n in bench.graph.nodes.values()), options
    job = await bench.mirror(filter_node_name="flt")
    busy = "is busy: block device is in use by block job: mirror"
    for options, message in (
        ({"job_id": "x"}, "Need a root block node"),
        ({"job_id": "x", "device": "target", "target": "top"}, "Need a root block node"),
    ):
        with pytest.raises(BlockError, match=message):
            await bench.mirror(**options)
    with pytest.raises(BlockError, match=f"Node 'top' {busy}"):
        await bench.graph.resize(bench.graph.nodes["top"], 1 << 20)
    await bench.end(job, JobStatus.READY)
    await bench.close()


async def test_another_size():
    bench = await Mirrors().make(target_size=SIZE + 512)
    job = await bench.mirror()
    await bench.end(job)
    assert bench.completion("m")["error"] == "Source and target image have different sizes"
    await bench.close()


async def test_a_disk_without_bytes():
    bench = await Mirrors().make(size=0)
    job = await bench.mirror()
    await bench.until(job, JobStatus.READY)
    bench.scheduler.complete(job)
    await bench.end(job)
    assert bench.drive.node.name == "target"
    await bench.close()


async def test_quit_while_ready():
    bench = await Mirrors().make()
    job = await bench.mirror()
    await bench.until(job, JobStatus.READY)
    await bench.close()
    assert bench.course("m")[-4:] == ["aborting", "CANCELLED", "concluded", "null"]


async def test_zeros_that_a_late_copy_may_not_undo():
    """A guest who writes the same chunk again and again, in both modes, against a slow target."""
    for mode in MirrorCopyMode:
        bench = await Mirrors(7).make(size=8 * CLUSTER)
        job = await bench.mirror(copy_mode=mode)

        async def rewrite(bench=bench):
            for number in range(200):
                data = bytes([number + 1]) * CLUSTER
                await bench.drive.write(0, data)
                bench.model[:CLUSTER] = data

        await rewrite()
        await bench.until(job, JobStatus.READY)
        await rewrite()
        bench.scheduler.complete(job)
        await bench.end(job)
        assert await bench.content("target") == bytes(bench.model)
        await bench.close()


async def test_a_write_that_fails_on_the_target_is_copied_later():
    bench = await Mirrors(3).make()
    job = await bench.mirror(on_target_error=BlockdevOnError.STOP, copy_mode=ACTIVE)
    await bench.until(job, JobStatus.READY)
    target = bench.graph.nodes["target"].driver
    target.faults["write"] = ENOSPC
    await bench.drive.write(0, b"new1" * KIB)
    await bench.until(job, JobStatus.STANDBY)
    before = dict(target.clusters)
    await bench.drive.write(CLUSTER, b"new2" * KIB)
    await bench.drive.write_zeroes(2 * CLUSTER, CLUSTER)
    assert target.clusters == before, "while the job is paused nothing is written"
    assert not job.actively_synced
    bench.scheduler.resume(job)
    async with asyncio.timeout(30):
        while not job.actively_synced:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    content = await bench.content("target")
    assert content[: 3 * CLUSTER] == b"new1" * KIB + b"new2" * KIB + bytes(CLUSTER)
    await bench.close()


async def test_a_drain_of_the_target_keeps_writes_from_it():
    bench = await Mirrors(4).make()
    job = await bench.mirror(copy_mode=ACTIVE)
    await bench.until(job, JobStatus.READY)
    target = bench.graph.nodes["target"]
    async with bench.graph.drained(target):
        before = dict(target.driver.clusters)
        async with asyncio.timeout(30):
            await bench.drive.write(0, b"new1" * KIB)
        assert target.driver.clusters == before
    async with asyncio.timeout(30):
        while not job.actively_synced:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert (await bench.content("target"))[:CLUSTER] == b"new1" * KIB
    await bench.close()


@pytest.mark.parametrize("how", ["nowait", "begin", "coroutine"])
async def test_every_way_of_writing_is_mirrored(how):
    bench = Bench(InlineWorkers())
    source = await bench.open(driver="memory", node_name="top", size=SIZE)
    target = await bench.open(driver="memory", node_name="target", size=SIZE)
    source.driver.begins = True
    used = Permission.CONSISTENT_READ | Permission.WRITE
    drive = await bench.graph.attach(source, used, name="virtio0")
    job = await Mirrors.mirror(bench, copy_mode=ACTIVE)
    await bench.end(job, JobStatus.READY)
    data = b"new1" * KIB
    if how == "nowait":
        assert not drive.write_nowait(0, data), "that would pass the target by"
    elif how == "begin":
        assert not drive.begin_write(0, data, lambda _: None)
    await drive.write(0, data)
    assert target.driver.content()[:CLUSTER] == data
    bench.scheduler.cancel(job)
    await bench.end(job)
    assert drive.write_nowait(0, data)
    await bench.close()


async def test_a_write_into_a_hole_that_is_being_made_on_the_target():
    bench = Bench(InlineWorkers())
    source = await bench.open(
        driver="overlay", node_name="top", size=8 * CLUSTER, cluster_size=CLUSTER
    )
    target = await bench.open(driver="memory", node_name="target", size=8 * CLUSTER)
    await target.write(0, b"old " * (2 * CLUSTER))
    reached, go_on = asyncio.Event(), asyncio.Event()

    def hook(operation, offset, length):
        if operation == "write_zeroes":
            reached.set()
            return go_on.wait()
        return None

    target.driver.hook = hook
    used = Permission.CONSISTENT_READ | Permission.WRITE
    drive = await bench.graph.attach(source, used, name="virtio0")
    job = await Mirrors.mirror(bench, copy_mode=ACTIVE)
    async with asyncio.timeout(30):
        await reached.wait()
        await drive.write(CLUSTER, b"new1" * KIB)
    go_on.set()
    await bench.end(job, JobStatus.READY)
    expected = bytes(CLUSTER) + b"new1" * KIB + bytes(6 * CLUSTER)
    assert target.driver.content() == expected
    await bench.close()


async def test_a_write_that_waited_for_the_filter_is_copied():
    """It begins when the filter is in its place: before or after the bitmap is there."""
    bench = Bench(InlineWorkers())
    source = await bench.open(driver="memory", node_name="top", size=8 * CLUSTER)
    target = await bench.open(driver="memory", node_name="target", size=8 * CLUSTER)
    gates = [asyncio.Event(), asyncio.Event()]
    waiting = list(gates)
    source.driver.nowait = False
    source.driver.hook = lambda operation, offset, length: (
        waiting.pop(0).wait() if operation == "write" and waiting else None
    )

    async def slow(used, shared):
        await asyncio.sleep(0.02)  # as a file is locked by a worker

    target.driver.set_permissions = slow
    used = Permission.CONSISTENT_READ | Permission.WRITE
    drive = await bench.graph.attach(source, used, name="virtio0")
    first = asyncio.create_task(drive.write(0, b"new1" * KIB))
    await asyncio.sleep(0.01)
    starting = asyncio.create_task(Mirrors.mirror(bench))
    await asyncio.sleep(0.01)
    second = asyncio.create_task(drive.write(CLUSTER, b"new2" * KIB))
    await asyncio.sleep(0.01)
    gates[0].set()
    await first
    await asyncio.sleep(0.05)
    gates[1].set()
    job = await starting
    await second
    await bench.end(job, JobStatus.READY)
    bench.scheduler.complete(job)
    await bench.end(job)
    assert target.driver.content() == b"new1" * KIB + b"new2" * KIB + bytes(6 * CLUSTER)
    assert drive.node is target
    await bench.close()


async def test_a_drain_ends_although_copies_wait_for_its_end():
    """A guest's write in flight waits for the claim of a copy: that must not wait for the drain."""
    bench = await Mirrors().make()
    job = await bench.mirror(copy_mode=ACTIVE, granularity=CLUSTER)
    await bench.until(job, JobStatus.READY)
    first = await job.chunks.enter(0, CLUSTER)
    data = b"w" * (2 * CLUSTER)
    write = asyncio.create_task(bench.drive.write(0, data))
    await bench.turns()
    drain = asyncio.create_task(bench.drain("top"))
    await bench.turns()
    job.bitmap.set(CLUSTER, 1)
    job.wake()
    await bench.turns()
    job.chunks.leave(first)
    async with asyncio.timeout(30):
        await drain
        await write
    bench.model[: len(data)] = data
    bench.scheduler.complete(job)
    await bench.end(job)
    assert await bench.content("target") == bench.model
    await bench.close()


async def test_a_mirror_told_to_end_as_a_copy_does_not_switch_any_more():
    bench = await Mirrors().make()
    job = await bench.mirror()
    await bench.until(job, JobStatus.READY)
    bench.scheduler.cancel(job)
    with pytest.raises(BlockError, match="The active block job 'm' cannot be completed"):
        bench.scheduler.complete(job)
    await bench.end(job)
    assert bench.drive.node.name == "top"
    assert job.error is None
    await bench.close()


async def test_a_drain_of_the_target_waits_for_a_guests_write_that_will_reach_it():
    """Or it would be missing in a bitmap that is added to the target meanwhile."""
    bench = await Mirrors().make()
    job = await bench.mirror(copy_mode=ACTIVE)
    await bench.until(job, JobStatus.READY)
    go_on = asyncio.Event()
    data = b"w" * CLUSTER
    write = asyncio.create_task(job.mirror_write(0, CLUSTER, go_on.wait, data))
    await bench.turns()
    drain = asyncio.create_task(bench.drain("target"))
    await bench.turns()
    assert not drain.done()
    go_on.set()
    await asyncio.wait_for(asyncio.gather(drain, write), 30)
    assert (await bench.content("target"))[:CLUSTER] == data
    bench.scheduler.cancel(job, force=True)
    await bench.end(job)
    await bench.close()
