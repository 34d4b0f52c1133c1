"""One seed: random chains, random guests, random streams that are disturbed at random.

What must hold, whatever happens: every read of a guest is right at any time; at the end the whole
disk is; qemu-img finds nothing wrong with any image and reads the same bytes; the images that were
below the top read as they did.
"""

from __future__ import annotations

import asyncio
import gc
import random
import sys

from liveblockd.errors import BlockError
from liveblockd.graph import chain
from liveblockd.graph.node import Node
from liveblockd.graph.snapshot import snapshot_sync
from liveblockd.jobs.stream import Stream
from liveblockd.storage.driver import Permission
from tests.simulation import images
from tests.simulation.bench import Bench
from tests.simulation.guest import Guest
from tests.simulation.jitter import JitterPool
from tests.simulation.small_chunks import small_chunks

KIB, MIB = 1024, 1024 * 1024


class Disk:
    """A drive with its guest and whoever streams into it."""

    def __init__(self, bench: Bench, rng: random.Random, directory: str, name: str) -> None:
        self.bench = bench
        self.rng = rng
        self.directory = directory
        self.name = name
        self.paths: list[str] = []
        self.contents: list[bytes] = []
        self.log: list[str] = []
        self.streams = 0

    async def build(self) -> None:
        """Make the chain, open it and start the guest."""
        rng = self.rng
        self.paths, self.contents = await images.make_chain(
            self.bench, rng, self.directory, self.name
        )
        node = await self.bench.open(
            driver="qcow2",
            node_name=f"{self.name}-node",
            discard="unmap",
            file={"driver": "file", "filename": self.paths[-1]},
        )
        self.backend = await self.bench.graph.attach(
            node,
            Permission.CONSISTENT_READ | Permission.WRITE,
            Permission.ALL,
            name=self.name,
        )
        node.monitor_owned = False
        model = bytearray(self.contents[-1])
        self.contents[-1] = b""  # it is the guest's now
        self.guest = Guest(self.backend, model, rng, self.name)

    def chain(self) -> list[Node]:
        """The layers, the top first."""
        return chain.chain(self.backend.node)

    async def disturb(self) -> None:
        """Stream, snapshot, stream again; then let the guest come to its end."""
        try:
            for _ in range(self.rng.randrange(1, 4)):
                await asyncio.sleep(self.rng.random() * 0.02)
                if self.rng.random() < 0.35:
                    await self.snapshot()
                await self.stream()
            await asyncio.sleep(self.rng.random() * 0.02)
        finally:
            self.guest.stop.set()

    async def snapshot(self) -> None:
        """A new overlay below the running guest."""
        path = f"{self.directory}/{self.name}s{len(self.paths)}.qcow2"
        self.log.append(f"snapshot {path}")
        await snapshot_sync(
            self.bench.graph,
            device=self.name,
            node_name=None,
            snapshot_file=path,
            console=lambda line: None,
        )
        self.paths.append(path)
        self.contents.append(b"")

    def options(self) -> tuple[str, dict[str, object]]:
        """A device and down to where: by node, file or bottom."""
        rng, layers = self.rng, self.chain()
        top = 0 if rng.random() < 0.75 else rng.randrange(len(layers))
        device = self.name if top == 0 else layers[top].name
        below = range(top + 1, len(layers))
        options: dict[str, object] = {"speed": rng.choice((0, 0, 2 * MIB, 16 * MIB))}
        if below and rng.random() < 0.6:
            base = rng.choice(below)
            how = rng.randrange(3)
            if how == 0:
                options["base_node"] = layers[base].name
            elif how == 1:
                options["base"] = layers[base].filename
            else:
                options["bottom"] = layers[base - 1].name
        return device, options

    async def stream(self) -> None:
        """One stream with pauses, speeds and perhaps a cancel, to its end."""
        job_id = f"{self.name}-job{self.streams}"
        self.streams += 1
        device, options = self.options()
        before = [layer.name for layer in self.chain()]
        self.log.append(f"stream {device} {options} in {before}")
        job = await self.bench.stream(device, job_id, **options)
        await self._steer(job)
        if job.error is not None:
            assert job.cancelled, f"{job_id}: {job.error}"
            assert [layer.name for layer in self.chain()] == before
            return
        assert job.offset == job.length
        wanted = list(before)
        for gone in before[before.index(job.top.name) + 1 : before.index(job.bottom.name) + 1]:
            wanted.remove(gone)
        assert [layer.name for layer in self.chain()] == wanted

    async def _steer(self, job: Stream) -> None:
        scheduler, rng = self.bench.scheduler, self.rng
        may_cancel = rng.random() < 0.25
        verbs = {
            "pause": lambda: scheduler.pause(job),
            "resume": lambda: scheduler.resume(job),
            "speed": lambda: scheduler.set_speed(job, rng.choice((0, MIB, 30 * MIB))),
            "cancel": lambda: scheduler.cancel(job, force=True),
        }
        deadline = asyncio.get_running_loop().time() + rng.random()
        async with asyncio.timeout(60):
            while job.status != "null":
                await asyncio.sleep(rng.choice((0, 0.001, 0.01)))
                if asyncio.get_running_loop().time() > deadline:
                    may_cancel, verb = False, rng.choice(("resume", "speed0"))
                    if verb == "speed0" and job.speed:
                        verbs["speed0"] = lambda: scheduler.set_speed(job, 0)
                    elif not job.user_paused:
                        continue
                    else:
                        verb = "resume"
                else:
                    verb = rng.choice(("pause", "resume", "resume", "speed", "cancel"))
                if verb == "cancel" and not may_cancel:
                    continue
                try:
                    verbs[verb]()
                    self.log.append(f"{verb} at {job.offset}/{job.length}")
                except BlockError:
                    pass  # out of turn

    def judge(self, rng: random.Random) -> None:
        """By qemu-img, after all is closed."""
        for path in self.paths:
            images.check(path)
        assert images.content(self.paths[-1]) == self.guest.model, "qemu-img reads something else"
        for path, was in zip(self.paths[:-1], self.contents[:-1], strict=True):
            if was and rng.random() < 0.5:
                assert images.content(path) == was, f"{path} has changed"


async def run_seed(seed: int, directory: str) -> str:
    """Raises AssertionError (or whatever went wrong); a line about what was done else."""
    rng = random.Random(seed)
    unseen: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))
    bench = Bench(JitterPool(random.Random(rng.random()), rng.choice((0, 0.001, 0.004))))
    disks = [
        Disk(bench, random.Random(rng.random()), directory, name)
        for name in ("vda", "vdb")[: rng.choice((1, 1, 2))]
    ]
    with small_chunks(
        rng.choice((4 * KIB, 64 * KIB, 64 * KIB, 512 * KIB)),
        least_copy=rng.choice((4 * KIB, 64 * KIB, 128 * KIB)),
        look_ahead=rng.choice((1, 7, 2048)),
    ):
        try:
            for disk in disks:
                await disk.build()
            guests = [asyncio.create_task(disk.guest.run(rng.choice((3, 8)))) for disk in disks]
            async with asyncio.timeout(100):
                await asyncio.gather(*(disk.disturb() for disk in disks))
                await asyncio.gather(*guests)
            for disk in disks:
                await disk.guest.compare_all()
            await bench.close()
            await asyncio.sleep(0)
            gc.collect()  # a task that died unseen says so when it goes
            assert not unseen, unseen
            for disk in disks:
                disk.judge(rng)
        except BaseException:
            story = [f"seed {seed} failed", *(line for disk in disks for line in disk.log)]
            sys.stdout.write("\n  ".join(story) + "\n")
            raise
    requests = sum(disk.guest.requests for disk in disks)
    streams = sum(disk.streams for disk in disks)
    return f"seed {seed}: {len(disks)} disks, {streams} streams, {requests} requests"
