"""blockdev-backup over images in memory: the copy is of the instant at which it began."""

import asyncio
import random
from errno import EIO, ENOSPC

import pytest

from liveblockd.errors import BlockError
from liveblockd.graph import dirty
from liveblockd.graph.before_write import OnCbwError
from liveblockd.graph.opening import check_depth
from liveblockd.jobs.backup import BackupParameters, BitmapSyncMode
from liveblockd.jobs.backup_start import create_backup, start_backup
from liveblockd.jobs.job import BlockdevOnError
from liveblockd.jobs.mirror_job import MirrorSyncMode
from liveblockd.storage.driver import Permission
from tests.simulation.bench import Bench
from tests.simulation.overlay import ZERO
from tests.support.workers import InlineWorkers

KIB = 1024
CLUSTER = 64 * KIB
SIZE = 16 * CLUSTER + 4 * KIB
GOOD = ["created", "running", "waiting", "pending", "COMPLETED", "concluded", "null"]
FULL = MirrorSyncMode.FULL


class Disks(Bench):
    """``disk`` above ``base`` with some clusters of their own, and an empty ``target``."""

    def __init__(self, seed=0):
        super().__init__(InlineWorkers())
        self.random = random.Random(seed)
        self.model = bytearray(SIZE)

    async def make(self, cluster_size=4 * KIB):
        below = None
        for name in ("base", "disk"):
            node = await self.image(name, cluster_size, below)
            for cluster in range(-(-SIZE // cluster_size)):
                kind = random.Random(f"{name} {cluster}").randrange(5)
                if kind < 2:
                    node.driver.clusters[cluster] = bytes([cluster % 255 + 1]) * cluster_size
                elif kind == 2:
                    node.driver.clusters[cluster] = ZERO
            below = name
        await self.image("target", cluster_size)
        self.guest = await self.graph.attach(
            self.graph.nodes["disk"], Permission.CONSISTENT_READ | Permission.WRITE
        )
        self.model[:] = await self.content("disk")
        return self

    async def image(self, name, cluster_size=4 * KIB, backing=None):
        members = {"driver": "overlay", "node-name": name, "size": SIZE, "seed": 7}
        return await self.open(**members, **{"cluster-size": cluster_size, "backing": backing})

    async def content(self, name):
        node = self.graph.nodes[name]
        return bytes(await node.read(0, node.length))

    async def backup(self, job_id="b", sync=FULL, target="target", **options):
        parameters = BackupParameters(job_id, "disk", target, MirrorSyncMode(sync), **options)
        return await start_backup(self.graph, self.scheduler, parameters)

    async def write(self):
        """One request of a guest, which the model follows."""
        offset = self.random.randrange(SIZE - 1)
        length = min(self.random.choice((512, 4096, 70_000)), SIZE - offset)
        if self.random.randrange(4):
            data = self.random.randbytes(length)
            self.model[offset : offset + length] = data
            await self.guest.write(offset, data)
        else:
            self.model[offset : offset + length] = bytes(length)
            await self.guest.write_zeroes(offset, length, may_unmap=True)

    async def write_until(self, job, status="null"):
        """A guest at work until the job has ``status``."""
        async with asyncio.timeout(30):
            while job.status != status:
                await self.write()
                await asyncio.sleep(0)

    async def close(self):
        await self.graph.detach(self.guest)
        await super().close()


@pytest.mark.parametrize("seed", range(12))
async def test_full_is_of_the_instant_it_began(seed):
    bench = await Disks(seed).make(random.Random(seed).choice((512, 4 * KIB, 128 * KIB)))
    before = await bench.content("disk")
    job = await bench.backup()
    await bench.write_until(job)
    assert bench.course("b") == GOOD
    assert await bench.content("target") == before
    assert bench.graph.nodes["target"].driver.durable == bench.graph.nodes["target"].driver.clusters
    assert await bench.content("disk") == bytes(bench.model)
    assert bench.completion("b") == {
        "type": "backup", "device": "b", "len": SIZE, "offset": SIZE, "speed": 0
    }  # fmt: skip
    assert sorted(bench.graph.nodes) == ["base", "disk", "target"]
    await bench.close()


async def test_a_target_that_is_not_empty_is_overwritten():
    bench = await Disks().make()
    target = bench.graph.nodes["target"].driver
    for cluster in range(SIZE // (4 * KIB)):
        target.clusters[cluster] = b"\xee" * 4 * KIB
    before = await bench.content("disk")
    await bench.end(await bench.backup())
    assert await bench.content("target") == before
    await bench.close()


async def test_top_copies_what_the_top_layer_has():
    bench = await Disks().make()
    await bench.image("over", backing="base")
    for cluster in range(16, 48):
        bench.graph.nodes["disk"].driver.clusters.pop(cluster, None)
    bench.model[:] = await bench.content("disk")
    before = await bench.content("disk")
    job = await bench.backup(sync="top", target="over")
    await bench.write_until(job)
    assert await bench.content("over") == before
    assert 0 < job.length < SIZE
    assert job.offset == job.length
    await bench.close()


async def test_none_keeps_what_is_overwritten():
    bench = await Disks().make()
    before = await bench.content("disk")
    job = await bench.backup(sync="none")
    for _ in range(20):
        await bench.write()
    assert job.status == "running"
    assert 0 < job.offset < job.length == SIZE
    target = bench.graph.nodes["target"]
    for cluster in range(-(-SIZE // CLUSTER)):
        start, end = cluster * CLUSTER, min(SIZE, (cluster + 1) * CLUSTER)
        if not job.core.todo.any_dirty(start, end - start):
            assert bytes(await target.read(start, end - start)) == before[start:end]
    bench.scheduler.cancel(job)
    await bench.end(job)
    assert bench.course("b")[-4:] == ["aborting", "CANCELLED", "concluded", "null"]
    assert await bench.content("disk") == bytes(bench.model)
    await bench.close()


async def bitmap_of(bench, **options):
    dirty.add(bench.graph, "disk", "b0", granularity=CLUSTER, **options)
    return bench.graph.nodes["disk"].find_bitmap("b0")


@pytest.mark.parametrize("seed", range(6))
async def test_incremental_chain_restores_every_point(seed):
    """A full backup and three increments on top of each other, with a guest at work throughout."""
    bench = await Disks(seed).make()
    bitmap = await bitmap_of(bench)
    below, points = None, []
    for number in range(4):
        name = f"inc{number}"
        await bench.image(name, backing=below)
        for _ in range(bench.random.randrange(8)):
            await bench.write()
        points.append(await bench.content("disk"))
        if number:
            how = {"sync": "incremental", "bitmap": "b0"}
        else:
            how = {"sync": "full", "bitmap": "b0", "bitmap_mode": BitmapSyncMode.ON_SUCCESS}
        job = await bench.backup(job_id=f"j{number}", target=name, **how)
        assert bitmap.busy
        await bench.write_until(job)
        assert not bitmap.busy
        below = name
    for number, point in enumerate(points):
        assert await bench.content(f"inc{number}") == point
    await bench.close()


@pytest.mark.parametrize(
    ("mode", "fails", "left"),
    [
        (BitmapSyncMode.ON_SUCCESS, False, {5}),
        (BitmapSyncMode.ON_SUCCESS, True, {1, 2, 5}),
        (BitmapSyncMode.NEVER, False, {1, 2, 5}),
        (BitmapSyncMode.NEVER, True, {1, 2, 5}),
        (BitmapSyncMode.ALWAYS, False, {5}),
        (BitmapSyncMode.ALWAYS, True, {2, 5}),
    ],
)
async def test_what_becomes_of_the_bitmap(mode, fails, left):
    bench = await Disks().make()
    bitmap = await bitmap_of(bench)
    for cluster in (1, 2):
        await bench.guest.write(cluster * CLUSTER, b"x" * 512)
    job = await bench.backup(sync="bitmap", bitmap="b0", bitmap_mode=mode, speed=1)
    await bench.guest.write(CLUSTER, b"")  # nothing
    await bench.guest.write(5 * CLUSTER, b"y")
    assert bitmap.count == 2
    if fails:
        while job.offset < CLUSTER:  # noqa: ASYNC110 (the first piece)
            await asyncio.sleep(0)
        bench.scheduler.cancel(job, force=True)
    else:
        bench.scheduler.set_speed(job, 0)
    await bench.end(job)
    found = {n for n in range(-(-SIZE // CLUSTER)) if bitmap.is_dirty(n * CLUSTER)}
    if fails and mode is BitmapSyncMode.ALWAYS:
        assert 5 in found
        assert found <= {1, 2, 5}
    else:
        assert found == left
    await bench.close()


async def test_a_guest_write_fails_if_the_old_data_cannot_be_kept():
    bench = await Disks().make()
    await bench.backup(sync="none")
    bench.graph.nodes["target"].driver.faults = {"write": ENOSPC}
    before = await bench.content("disk")
    with pytest.raises(OSError, match="injected"):
        await bench.guest.write(0, b"new")
    assert await bench.content("disk") == before
    await bench.guest.write(0, b"new")  # the next one finds room
    await bench.close()


async def test_or_the_backup_does():
    bench = await Disks().make()
    job = await bench.backup(sync="none", on_cbw_error=OnCbwError.BREAK_SNAPSHOT)
    bench.graph.nodes["target"].driver.faults = {"write": ENOSPC}
    await bench.guest.write(0, b"new")
    await bench.end(job)
    assert bench.completion("b")["error"] == "injected"
    assert bytes(await bench.graph.nodes["disk"].read(0, 3)) == b"new"
    await bench.close()


@pytest.mark.parametrize("side", ["disk", "target"])
@pytest.mark.parametrize("bad", [0, 5, 16])
async def test_a_bitmap_that_is_always_synced_keeps_the_cluster_that_failed(side, bad):
    """The others of the piece are on the target, and are told so."""
    bench = await Disks().make()
    for cluster in range(SIZE // (4 * KIB)):
        bench.graph.nodes["disk"].driver.clusters[cluster] = b"data" * KIB
    bitmap = await bitmap_of(bench)
    bitmap.set(0, SIZE)
    driver = bench.graph.nodes[side].driver
    name = "read" if side == "disk" else "write"
    call = getattr(driver, name)

    async def fails(offset, what):
        length = what if side == "disk" else len(what)
        if offset <= bad * CLUSTER < offset + length:
            raise OSError(EIO, "Input/output error")
        return await call(offset, what)

    node = bench.graph.nodes[side]
    setattr(driver, name, fails)
    setattr(node, name, fails)
    for nowait in ("read_nowait", "write_nowait"):
        setattr(node, nowait, lambda *_: None)
        setattr(driver, nowait, lambda *_: None)
    job = await bench.backup(
        sync=MirrorSyncMode.BITMAP, bitmap="b0", bitmap_mode=BitmapSyncMode.ALWAYS
    )
    await bench.end(job)
    assert bench.completion("b")["error"] == "Input/output error"
    assert list(bitmap.runs()) == [(bad * CLUSTER, min(CLUSTER, SIZE - bad * CLUSTER))]
    await bench.close()


@pytest.mark.parametrize(("side", "fault"), [("disk", "read"), ("target", "write")])
async def test_an_error_stops_it_and_it_goes_on(side, fault):
    bench = await Disks().make()
    before = await bench.content("disk")
    job = await bench.backup(
        on_source_error=BlockdevOnError.STOP, on_target_error=BlockdevOnError.STOP
    )
    bench.graph.nodes[side].driver.faults = {fault: EIO}
    await bench.end(job, "paused")
    assert ("BLOCK_JOB_ERROR", {"device": "b", "operation": fault, "action": "stop"}) in (
        bench.events
    )
    bench.scheduler.resume(job)
    await bench.write_until(job)
    assert bench.course("b")[-1] == "null"
    assert await bench.content("target") == before
    await bench.close()


@pytest.mark.parametrize(
    ("side", "fault"), [("disk", "read"), ("disk", "map"), ("target", "write")]
)
async def test_what_is_ignored_is_tried_again(side, fault):
    bench = await Disks().make()
    before = await bench.content("disk")
    ignore = BlockdevOnError.IGNORE
    bench.graph.nodes[side].driver.faults = {fault: EIO}
    job = await bench.backup(on_source_error=ignore, on_target_error=ignore)
    await bench.end(job)
    told = "write" if side == "target" else "read"
    error = {"device": "b", "operation": told, "action": "ignore"}
    assert bench.events.count(("BLOCK_JOB_ERROR", error)) == 1
    assert "error" not in bench.completion("b")
    assert await bench.content("target") == before
    await bench.close()


async def test_a_failed_flush_of_the_target_fails_the_backup():
    bench = await Disks().make()
    job = await bench.backup()
    bench.graph.nodes["target"].driver.faults = {"flush": EIO}
    await bench.end(job)
    assert "error" in bench.completion("b")
    await bench.close()


@pytest.mark.parametrize("turns", range(0, 40, 3))
async def test_cancel_at_any_moment_leaves_disk_and_bitmap(turns):
    bench = await Disks(turns).make()
    bitmap = await bitmap_of(bench)
    for _ in range(5):
        await bench.write()
    was = bitmap.count
    job = await bench.backup(sync="incremental", bitmap="b0")
    for _ in range(turns):
        await asyncio.sleep(0)
    if job.status == "running":
        bench.scheduler.cancel(job, force=True)
        await bench.end(job)
        assert bitmap.count == was
    else:
        await bench.end(job)
    assert sorted(bench.graph.nodes) == ["base", "disk", "target"]
    assert await bench.content("disk") == bytes(bench.model)
    await bench.close()


@pytest.mark.parametrize("seed", range(4))
async def test_none_to_an_overlay_of_the_disk_that_others_read(seed):
    """Fleecing as it was done before snapshot-access; who reads on at the end is let alone."""
    bench = await Disks(seed).make()
    await bench.image("temp", backing="disk")
    before = await bench.content("disk")
    with pytest.raises(BlockError, match="Permission conflict"):
        await bench.graph.attach(bench.graph.nodes["temp"])
    job = await bench.backup(sync="none", target="temp")
    reader = await bench.graph.attach(bench.graph.nodes["temp"])

    async def read():
        for _ in range(30):
            offset = bench.random.randrange(SIZE)
            length = min(SIZE - offset, 5000)
            assert bytes(await reader.read(offset, length)) == before[offset : offset + length]

    async def write():
        for _ in range(15):
            await bench.write()

    await asyncio.gather(read(), read(), write())
    if seed % 2:
        await bench.graph.detach(reader)
    bench.scheduler.cancel(job)
    await bench.end(job)
    await bench.write()
    assert await bench.content("disk") == bytes(bench.model)
    if not seed % 2:
        await reader.read(0, 512)
        await bench.graph.detach(reader)
    assert sorted(bench.graph.nodes) == ["base", "disk", "target", "temp"]
    await bench.close()


async def test_a_target_that_stands_on_the_disk_does_not_come_to_stand_on_itself():
    """It did, on the job's filter: what walks up from the chain went round for ever."""
    bench = await Disks().make()
    await bench.image("temp", backing="disk")
    job = await bench.backup(sync="none", target="temp")
    nodes = bench.graph.nodes
    assert nodes["temp"].children["backing"].child is nodes["disk"]
    assert bench.guest.node is job.filter
    check_depth(nodes["base"], nodes["base"])
    bench.scheduler.cancel(job)
    await bench.end(job)
    assert bench.guest.node is nodes["disk"]
    await bench.close()


async def test_two_of_one_instant_and_one_taken_back():
    bench = await Disks().make()
    await bench.image("second")
    before = await bench.content("disk")
    jobs = []
    async with bench.graph.lock, bench.graph.drained(bench.graph.nodes["disk"]):
        for name in ("target", "second"):
            parameters = BackupParameters(f"j-{name}", "disk", name, FULL)
            jobs.append(await create_backup(bench.graph, bench.scheduler, parameters))
        await bench.scheduler.discard(jobs.pop())
    await bench.write()
    await bench.scheduler.start(jobs[0])
    await bench.write_until(jobs[0])
    assert await bench.content("target") == before
    assert bench.course("j-second") == ["created", "aborting", "concluded", "null"]
    await bench.end(await bench.backup(target="second"))
    assert await bench.content("second") == bytes(bench.model)
    await bench.close()


async def test_two_at_once():
    bench = await Disks(3).make()
    await bench.image("second")
    first = await bench.backup(speed=1)
    before = bytes(bench.model)
    for _ in range(3):
        await bench.write()
    later = await bench.content("disk")
    second = await bench.backup(job_id="c", target="second")
    await bench.write_until(second)
    bench.scheduler.set_speed(first, 0)
    await bench.write_until(first)
    assert await bench.content("target") == before
    assert await bench.content("second") == later
    await bench.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "disk"}, "Source and target cannot be the same"),
        ({"sync": "none", "bitmap": "b0", "bitmap_mode": BitmapSyncMode.ALWAYS},
         "sync mode 'none' does not produce meaningful bitmap outputs"),
        ({"bitmap": "b0", "bitmap_mode": BitmapSyncMode.NEVER},
         "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode 'full'"),
        ({"bitmap": "b0"}, "Bitmap sync mode must be given when providing a bitmap"),
        ({"bitmap_mode": BitmapSyncMode.NEVER}, "Cannot specify bitmap sync mode without a bitmap"),
        ({"max_workers": 0}, "max-workers must be between 1 and 2147483647"),
        ({"max_chunk": -1}, "max-chunk must be zero (which means no limit) or positive"),
        ({"max_chunk": 4096}, "Required max-chunk (4096) is less than backup cluster size (65536)"),
        ({"compress": True}, "Compression is not supported for this drive target"),
        ({"min_cluster_size": 100}, "min-cluster-size needs to be a power of 2"),
        ({"speed": -1}, "Parameter 'speed' expects a non-negative value"),
    ],
)  # fmt: skip
async def test_refused_and_nothing_has_changed(options, message):
    bench = await Disks().make()
    bitmap = await bitmap_of(bench)
    with pytest.raises(BlockError) as caught:
        await bench.backup(**options)
    assert caught.value.message == message
    assert sorted(bench.graph.nodes) == ["base", "disk", "target"]
    assert not bench.graph.nodes["disk"].op_blockers
    assert not bitmap.busy
    await bench.close()


async def test_the_source_keeps_its_size_meanwhile():
    bench = await Disks().make()
    await bench.backup(sync="none")
    with pytest.raises(BlockError):
        await bench.graph.resize(bench.graph.nodes["disk"], 2 * SIZE)
    await bench.close()


async def test_one_that_stands_on_the_filter_of_another_outlives_it():
    """So a drive's second backup begins; the first one takes its filter away while it reads."""
    bench = await Disks().make()
    await bench.image("other")
    before = await bench.content("disk")
    first = await bench.backup("b", speed=4 * KIB)
    name = first.filter.name
    parameters = BackupParameters("c", name, "other", MirrorSyncMode(FULL), speed=4 * KIB)
    second = await start_backup(bench.graph, bench.scheduler, parameters)
    for _ in range(5):
        await bench.write()
    bench.scheduler.cancel(first, force=True)
    await bench.write_until(first)
    bench.scheduler.set_speed(second, 0)
    await bench.write_until(second)
    assert second.error is None
    assert await bench.content("other") == before
    assert sorted(bench.graph.nodes) == ["base", "disk", "other", "target"]
    await bench.close()
