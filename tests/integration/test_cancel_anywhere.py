"""Each kind of job is cancelled after a random number of steps of the loop, while guests write.

The chain is what the end said, nothing is left of the job, and another one may have its nodes at
once. What the guests wrote is there, in images that qemu-img finds in order.
"""

import asyncio
import random
import shutil

import pytest

from liveblockd.errors import BlockError
from liveblockd.graph import chain
from liveblockd.jobs.backup import BackupParameters
from liveblockd.jobs.backup_start import start_backup
from liveblockd.jobs.check import CheckFix, CheckParameters, start_check
from liveblockd.jobs.mirror_job import MirrorParameters, MirrorSyncMode
from liveblockd.jobs.mirror_options import MirrorCopyMode, MirrorOptions
from liveblockd.jobs.mirror_start import start_mirror
from liveblockd.storage.driver import Permission
from tests.simulation.bench import Bench
from tests.support.qcow2_images import needs, run

pytestmark = needs("qemu-img", "qemu-io")

MIB = 1 << 20
SIZE = 2 * MIB
NAMES = ("disk", "target", "base", "mid", "top")
BELOW = {"mid": "base", "top": "mid"}
#: what the chain of the guest is when the job succeeded
CHAINS = {"stream": ["top"], "below": ["top", "mid"], "commit": ["top", "base"]}
KINDS = (*CHAINS, "active", "mirror", "blocking", "backup", "check")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number, name in enumerate(NAMES):
        path = folder / f"{name}.qcow2"
        backing = ("-b", f"{BELOW[name]}.qcow2", "-F", "qcow2") if name in BELOW else ()
        form = ("-f", "qcow2", "-o", "cluster_size=4k")
        run("qemu-img", "create", "-q", *form, *backing, path, SIZE)
        if name != "target":
            write = f"write -P {number + 1} {number * 256}k {SIZE // 2}"
            run("qemu-io", "-f", "qcow2", "-c", write, path)
    return folder


class Guest:
    """Writes to a disk until it is told to stop; knows what has to be there."""

    def __init__(self, user, content, seed):
        self.user, self.content, self.rng = user, content, random.Random(seed)
        self.stopping = False

    async def work(self):
        rng = self.rng
        while not self.stopping:
            offset, value = rng.randrange(0, SIZE, 512), rng.randrange(20, 200)
            length = min(rng.choice((512, 4096, 70_000)), SIZE - offset)
            self.content[offset : offset + length] = bytes([value]) * length
            await self.user.write(offset, bytes([value]) * length)
            await asyncio.sleep(rng.choice((0, 0, 0, 0.001)))


async def begin(bench, kind, *, auto_finalize=True):
    graph, scheduler, full = bench.graph, bench.scheduler, MirrorSyncMode.FULL
    match kind:
        case "stream" | "below":
            device = "top" if kind == "stream" else "mid"
            return await bench.stream(device, "j", auto_finalize=auto_finalize)
        case "commit" | "active":
            top = "mid" if kind == "commit" else None
            return await bench.commit(
                "top", "j", top_node=top, base_node="base", auto_finalize=auto_finalize
            )
        case "backup":
            backup = BackupParameters("j", "disk", "target", full, auto_finalize=auto_finalize)
            return await start_backup(graph, scheduler, backup)
        case "check":
            check = CheckParameters("j", "top", CheckFix.LEAKS, auto_finalize=auto_finalize)
            return await start_check(graph, scheduler, check, [])
    mode = MirrorCopyMode.BACKGROUND if kind == "mirror" else MirrorCopyMode.WRITE_BLOCKING
    options = MirrorOptions(auto_finalize=auto_finalize, copy_mode=mode)
    mirror = MirrorParameters("j", "disk", "target", full, options=options)
    return await start_mirror(graph, scheduler, mirror)


def ask(command, *arguments, **more):
    """A request that may come at the wrong time."""
    try:
        command(*arguments, **more)
    except BlockError as error:
        assert "cannot accept" in error.message or "cannot be completed" in error.message


async def disturb(bench, rng):
    """Complete or pause it perhaps, and cancel it."""
    for _ in range(rng.randrange(rng.choice((30, 300, 2000)))):
        await asyncio.sleep(0)
    if (job := bench.scheduler.find("j")) is None:
        return
    for command in rng.sample((bench.scheduler.complete, bench.scheduler.pause), rng.randrange(3)):
        ask(command, job)
        for _ in range(rng.randrange(100)):
            await asyncio.sleep(0)
        if bench.scheduler.find("j") is None:
            return
    ask(bench.scheduler.cancel, job, force=rng.random() < 0.5)


async def to_its_end(bench, job, *, switch):
    async with asyncio.timeout(30):
        while bench.scheduler.find("j") is not None:
            if job.status == "pending" and not job.auto_finalize:
                await bench.scheduler.finalize(job)
            elif job.ready and not job.pause_count and not job.ending:
                ask(bench.scheduler.complete if switch else bench.scheduler.cancel, job)
            elif job.status in ("paused", "standby"):
                ask(bench.scheduler.cancel, job, force=True)
            await asyncio.sleep(0.001)


def seeds():
    return [pytest.param(s, marks=[pytest.mark.slow] * (s >= 40)) for s in range(400)]


@pytest.mark.parametrize("seed", seeds())
async def test_cancelled_after_some_steps(seed, images, tmp_path):
    rng = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    bench = Bench()
    for name in NAMES:
        path = str(shutil.copy(images / f"{name}.qcow2", tmp_path))
        file = {"driver": "file", "filename": path}
        more = {"backing": BELOW[name]} if name in BELOW else {}
        await bench.open(driver="qcow2", node_name=name, discard="unmap", file=file, **more)
    used = Permission.CONSISTENT_READ | Permission.WRITE
    guests = []
    for name in ("disk", "top"):
        user = await bench.graph.attach(
            bench.graph.nodes[name], used, Permission.ALL, name=f"v{name}"
        )
        guests.append(Guest(user, bytearray(await user.read(0, SIZE)), seed))
    work = [asyncio.create_task(guest.work()) for guest in guests]
    disturbance = asyncio.create_task(disturb(bench, rng))
    job = await begin(bench, kind, auto_finalize=rng.random() < 0.7)
    await disturbance
    await to_its_end(bench, job, switch=False)
    switched = job.error is None and getattr(job, "switching", False)
    wanted = (
        CHAINS.get(kind, ["top", "mid", "base"]) if job.error is None else ["top", "mid", "base"]
    )
    if kind == "active" and switched:
        wanted = ["base"]
    assert [node.name for node in chain.chain(guests[1].user.node)] == wanted
    mirrored = switched and kind in ("mirror", "blocking")
    assert guests[0].user.node.name == ("target" if mirrored else "disk")
    for node in bench.graph.nodes.values():
        assert not node.op_blockers
        assert not node.bitmaps
        assert not node.is_filter
        assert not any(edge.frozen for edge in node.children.values())
    if job.error is not None:
        assert job.cancelled
        job = await begin(bench, kind)
        await to_its_end(bench, job, switch=True)
        assert job.error is None
    for guest in guests:
        guest.stopping = True
    await asyncio.gather(*work)
    files = []
    for guest in guests:
        assert await guest.user.read(0, SIZE) == guest.content
        files.append(f"{guest.user.node.name}.qcow2")
    await bench.close()
    for name in NAMES:
        run("qemu-img", "check", "-q", tmp_path / f"{name}.qcow2")
    for guest, file in zip(guests, files, strict=True):
        run("qemu-img", "convert", "-O", "raw", tmp_path / file, tmp_path / "out.raw")
        assert (tmp_path / "out.raw").read_bytes() == guest.content
