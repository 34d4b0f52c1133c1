"""One seed: a machine with a chain of images, a guest, and what management does meanwhile.

``run_machine`` gives the log of it (``disks``) and all that ``crash`` and ``history`` need to judge
every moment of it afterwards.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from unittest import mock

from liveblockd.errors import BlockError
from liveblockd.events import BlockJobCompleted, Event
from liveblockd.formats.qcow2.create import create_qcow2
from liveblockd.formats.qcow2.image import Qcow2
from liveblockd.graph import chain, dirty, internal_snapshot
from liveblockd.graph.node import Node
from liveblockd.graph.snapshot import snapshot
from liveblockd.storage.driver import Permission
from tests.simulation import virtual
from tests.simulation.bench import Bench
from tests.simulation.crashguest import CrashGuest
from tests.simulation.disks import Entry, Machine, Medium, SimulatedDisk, SimulatedWorkers
from tests.support.qcow2_images import open_qcow2

KIB, MIB = 1024, 1024 * 1024
FORMATS = (
    {"cluster_size": 512},
    {"cluster_size": 512, "refcount_bits": 64},
    {"cluster_size": 512, "version": 2},
    {"cluster_size": 1024, "refcount_bits": 1},
    {"cluster_size": 4096},
    {"cluster_size": 4096, "refcount_bits": 4},
    {"cluster_size": 4096, "version": 2},
    {"cluster_size": 65536},
    {"cluster_size": 65536, "refcount_bits": 8},
)
#: what management does, each as often as it is here
STEPS = (
    "stream", "stream", "stream_to_base", "snapshot", "resize", "rename", "restart", "rest",
    "internal", "internal_gone",
)  # fmt: skip
#: what an image may be unable to do
REFUSED = ("which has snapshots", "would have more than", "No space left")
#: persistent dirty bitmaps that are tracked from the first request on
BITMAP, GRANULARITY = "tracked", 4096


@dataclass
class Plan:
    """What is to happen; ``None`` is left to the seed."""

    seed: int
    depth: int | None = None
    cluster_size: int | None = None
    #: names of steps (see ``Scene``), in order
    steps: tuple[str, ...] | None = None
    faults: bool | None = None
    guest: bool = True
    #: the file of the top is so large already that its refcount table must grow soon
    large: bool | None = None
    bitmap: bool | None = None


@dataclass
class Course:
    """What has happened."""

    plan: Plan
    log: list[Entry]
    initial: list[bytes]
    names: dict[str, int]
    top: str
    size: int
    content: bytes  # of the guest's disk at first, zeros up to the largest size
    #: the image with a persistent bitmap of all that changes ``content``
    bitmap_in: str | None = None
    story: list[str] = field(default_factory=list)
    requests: int = 0


class Scene:
    """A machine at work."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.random = random.Random(f"scene {plan.seed}")
        self.machine = Machine(plan.seed)
        self.story: list[str] = []
        self.streams = self.overlays = 0
        #: (node, name) of internal snapshots
        self.internal: list[tuple[str, str]] = []

    async def run(self) -> Course:
        """The whole course."""
        SimulatedDisk.machine = self.machine
        self.bench = Bench(SimulatedWorkers(self.machine), virtual.VirtualClock())
        self.bench.publisher.subscribe(self._note)
        options = await self._build()
        await self._open(options)
        content = bytes(self.guest.model)
        course = Course(
            self.plan,
            self.machine.log,
            [medium.content() for medium in self.machine.media],
            {},
            self.top,
            self.guest.size,
            content,
            self.bitmap_in,
            self.story,
        )
        self.machine.quiet = False
        try:
            async with asyncio.timeout(600):
                await self._play()
        finally:
            self.machine.quiet = True
        course.names = {name: medium.index for name, medium in self.machine.names.items()}
        course.requests = self.guest.requests
        await self._end()
        return course

    def _note(self, event: Event) -> None:
        if isinstance(event, BlockJobCompleted) and event.error is None:
            self.machine.note("note", 0, 0, event.name)

    # -- before

    async def _build(self) -> dict[str, object]:
        """The images; what blockdev-add takes to open them."""
        rng, plan = self.random, self.plan
        depth = plan.depth or rng.randrange(1, 5)
        formats = [f for f in FORMATS if plan.cluster_size in (None, f["cluster_size"])]
        form = rng.choice(formats)
        large = plan.large if plan.large is not None else rng.random() < 0.06
        if large:
            form = {"cluster_size": 512, "refcount_bits": 64}
        cluster_size = form["cluster_size"]
        size = rng.randrange(24, 72) * max(cluster_size, 2 * KIB)
        if cluster_size == 65536:
            size = rng.randrange(6, 24) * cluster_size
        if large:
            size = 2 * MIB + 256 * KIB
        self.largest = size * 2
        options: dict[str, object] = {}
        model = bytearray()
        last: str | None = None
        for number in range(depth):
            name = f"/sim/{number}.qcow2"
            medium = self.machine.add(name)
            own = form if rng.random() < 0.7 else rng.choice(formats)
            own_size = size
            if number < depth - 1 and rng.random() < 0.3:
                own_size = rng.randrange(1, size * 5 // 4 // 512) * 512
            model = bytearray(model[:own_size].ljust(own_size, b"\0"))
            disk = SimulatedDisk(medium)
            await create_qcow2(
                disk, size=own_size, backing_file=last, backing_format=last and "qcow2", **own
            )
            filled = 2 * MIB - 90 * KIB if large and number == depth - 1 else 0
            await self._fill(disk, model, filled)
            below = options or None
            options = {
                "driver": "qcow2",
                "node-name": f"n{number}",
                "discard": "unmap",
                "l2-cache-size": rng.choice((4, 8, 64)) * cluster_size,
                "file": {"driver": "simdisk", "filename": name},
                "backing": below,
            }
            last = name
        assert last is not None
        self.top = last
        self.model = model
        return options

    async def _fill(self, disk: SimulatedDisk, model: bytearray, filled: int) -> None:
        """Give an image clusters of its own; what is below it does not matter to whole ones."""
        rng = self.random
        image = await open_qcow2(disk)
        size = image.cluster_size
        assert size is not None
        if filled:
            data = rng.randbytes(filled)
            await image.write(0, data)
            model[:filled] = data
        for _ in range(rng.randrange(1, 9)):
            offset = rng.randrange(len(model)) // size * size
            length = rng.randrange(1, 6) * size
            end = min(offset + length, len(model))
            if rng.random() < 0.75:
                data = rng.randbytes(end - offset)
                # The last cluster may be longer than the disk.
                await image.write(offset, data)
                model[offset:end] = data
            elif not filled:
                await image.write_zeroes(offset, end - offset)
                model[offset:end] = bytes(end - offset)
        await image.close()

    async def _open(self, options: dict[str, object]) -> None:
        node = await self._attach(options)
        size = node.length
        content = bytes(await self.backend.read(0, size))
        assert content == self.model, "the chain was not built right"
        cluster_size = node.driver.cluster_size or 1
        self.guest = CrashGuest(
            self.machine,
            self.backend,
            content.ljust(self.largest, b"\0"),
            random.Random(f"guest {self.plan.seed}"),
            limit=min(size // 2, 8 * cluster_size if cluster_size > 4096 else 64 * cluster_size),
            cluster_size=cluster_size,
        )
        bitmap = self.plan.bitmap if self.plan.bitmap is not None else self.random.random() < 0.4
        self.bitmap_in = None
        if bitmap and node.driver.format_specific()["data"]["compat"] != "0.10":
            dirty.add(self.bench.graph, node.name, BITMAP, granularity=GRANULARITY, persistent=True)
            self.bitmap_in = self.top
            await self._restart()  # so that the image has it

    async def _attach(self, options: dict[str, object]) -> Node:
        """Open the chain and put the drive on it."""
        node = await self.bench.graph.open(self.bench.options(**options))
        assert isinstance(node.driver, Qcow2)
        self.backend = await self.bench.graph.attach(
            node, Permission.CONSISTENT_READ | Permission.WRITE, name="drive0"
        )
        node.monitor_owned = False
        self._node = node
        self.backend.on_change.append(self._changed)
        return node

    async def _restart(self) -> None:
        """Close the whole chain and open it again as its headers say; the guest is halted."""
        layers = chain.chain(self.backend.node)
        options: dict[str, object] = {}
        for layer in reversed(layers):
            assert layer.file is not None and isinstance(layer.file.driver, SimulatedDisk)
            options = {
                "driver": "qcow2",
                "node-name": layer.name,
                "discard": "unmap",
                "file": {"driver": "simdisk", "filename": layer.file.driver.medium.name},
                "backing": options or None,
            }
        await self.bench.graph.detach(self.backend)
        assert not self.bench.graph.nodes, self.bench.graph.nodes
        self.guest.backend = (await self._attach(options)) and self.backend

    def _changed(self) -> None:
        """The drive may stand on another image now."""
        node = chain.skip_filters(self.backend.node)
        if node is not None and node is not self._node:  # None: a filter is on its way in
            self._node = node
            assert node.file is not None and isinstance(node.file.driver, SimulatedDisk)
            self.top = node.file.driver.medium.name
            self.machine.note("switch", 0, 0, self.top)

    # -- meanwhile

    async def _play(self) -> None:
        rng = self.random
        steps = self.plan.steps
        if steps is None:
            steps = tuple(rng.choice(STEPS) for _ in range(rng.randrange(1, 5)))
        faults = self.plan.faults
        if faults is None:
            faults = rng.random() < 0.15
        async with asyncio.TaskGroup() as group:
            if self.plan.guest:
                group.create_task(self.guest.work(rng.randrange(1, 6)))
            if faults:
                group.create_task(self._weather())
            try:
                await self._wait(0.15)
                for step in steps:
                    await self._step(step)
                    await self._wait(rng.choice((0.0, 0.05, 0.2)))
            finally:
                self.guest.stopping = True
        # What the machine does by itself afterwards: a commit by the timer.
        await self._wait(rng.choice((0.0, 1.5)))

    async def _step(self, step: str) -> None:
        self.story.append(step)
        try:
            await getattr(self, f"_do_{step}")()
        except (OSError, BlockError) as error:
            if not self.machine.injected and not any(text in str(error) for text in REFUSED):
                raise
            self.story.append(f"  failed: {error}")

    async def _wait(self, most: float) -> None:
        await asyncio.sleep(self.random.random() * most)

    async def _weather(self) -> None:
        """Bad weather for a while."""
        rng = self.random
        await self._wait(0.3)
        kinds = rng.choice((("write",), ("write", "read"), ("flush",), ("read", "write", "flush")))
        self.machine.faults = {kind: rng.choice((0.02, 0.1, 0.4)) for kind in kinds}
        self.story.append(f"faults {self.machine.faults}")
        await self._wait(0.3)
        self.machine.faults = {}

    async def _do_rest(self) -> None:
        await self._wait(1.5)

    async def _do_stream(self) -> None:
        await self._stream({})

    async def _do_stream_to_base(self) -> None:
        layers = chain.chain(self.backend.node)
        if len(layers) < 3:
            await self._stream({})
            return
        base = self.random.choice(layers[2:])
        self.story.append(f"  base {base.filename}")
        await self._stream({"base_node": base.name})

    async def _stream(self, options: dict[str, object]) -> None:
        rng = self.random
        self.streams += 1
        top = chain.skip_filters(self.backend.node)
        assert top is not None
        if top.backing is None:
            return
        speed = rng.choice((0, 0, 256 * KIB))
        job = await self.bench.stream("drive0", f"stream{self.streams}", speed=speed, **options)
        cancel = rng.random() < 0.1
        if cancel:
            await self._wait(0.2)
        while job.status != "null":
            if cancel and job.status == "running":
                self.bench.scheduler.cancel(job, force=True)
                cancel = False
            await asyncio.sleep(0.001)
        if job.error is not None:
            self.story.append(f"  ended: {job.error}")
            assert job.cancelled or self.machine.injected, f"stream failed: {job.error}"

    async def _do_snapshot(self) -> None:
        rng = self.random
        self.overlays += 1
        name = f"/sim/overlay{self.overlays}.qcow2"
        medium: Medium = self.machine.add(name)
        node = chain.skip_filters(self.backend.node)
        assert node is not None
        cluster_size = rng.choice((512, 4096, node.driver.cluster_size or 512))
        if self.guest.size > MIB:
            cluster_size = node.driver.cluster_size or 4096
        await create_qcow2(
            SimulatedDisk(medium),
            size=node.length,
            cluster_size=cluster_size,
            backing_file=node.filename,
            backing_format="qcow2",
            version=rng.choice((2, 3, 3)),
        )
        overlay = await self.bench.open(
            driver="qcow2",
            node_name=f"overlay{self.overlays}",
            discard="unmap",
            file={"driver": "simdisk", "filename": name},
            backing=None,
        )
        await snapshot(self.bench.graph, node.name, overlay.name)
        # As blockdev-snapshot-sync does it: the header leads to where it stands.
        overlay.implied_backing = (overlay.driver.backing_file or "", node.filename)
        overlay.monitor_owned = False

    async def _do_resize(self) -> None:
        rng, guest = self.random, self.guest
        size = rng.randrange(guest.size // 3, self.largest) // 512 * 512
        if self.plan.large:
            size = rng.randrange(guest.size // 512, self.largest // 512) * 512
        await guest.resize(max(size, 4 * KIB))

    async def _do_restart(self) -> None:
        """A clean close makes all durable, as a flush does."""
        guest, machine = self.guest, self.machine
        async with guest.halted():
            if machine.injected:
                return  # what could not be written back is not there afterwards
            number = machine.number()
            machine.note("sync", number)
            await self._restart()
            if not machine.injected:
                machine.note("synced", number)

    async def _do_internal(self) -> None:
        """An internal snapshot: tables and clusters are shared from then on."""
        name = f"snapshot{len(self.story)}"
        with mock.patch("time.time_ns", lambda: 1_700_000_000 * 10**9):
            await internal_snapshot.create(self.bench.graph, self._node.name, name)
        self.internal.append((self._node.name, name))

    async def _do_internal_gone(self) -> None:
        mine = [pair for pair in self.internal if pair[0] == self._node.name]
        if not mine:
            await self._do_internal()
            return
        pair = self.random.choice(mine)
        self.internal.remove(pair)
        await internal_snapshot.delete(self.bench.graph, pair[0], None, pair[1])

    async def _do_rename(self) -> None:
        """change-backing-file to another name of the same image, and back."""
        node = chain.skip_filters(self.backend.node)
        assert node is not None
        if node.backing is None or node.driver.backing_file is None:
            return
        old = node.driver.backing_file
        space = max(20, (node.driver.cluster_size or 512) - 360)
        long = "/sim/" + "x" * self.random.randrange(1, min(900, space)) + str(len(self.story))
        self.machine.names[long] = self.machine.names[old]
        for name in (long, old):
            try:
                await node.driver.change_backing_file(name, "qcow2")
            except BlockError as error:
                if "No space" not in error.message:
                    raise
                self.story.append(f"  {error.message}")

    # -- after

    async def _end(self) -> None:
        """Let everything go; errors no longer matter."""
        for medium in self.machine.media:
            medium.flush_failed = False
        self.machine.faults = {}
        await self.bench.close()
        self.machine.close()
        SimulatedDisk.machine = None


async def _course(plan: Plan) -> Course:
    return await Scene(plan).run()


def run_machine(plan: Plan) -> Course:
    """Let a machine run in simulated time."""
    return virtual.run(_course(plan))
