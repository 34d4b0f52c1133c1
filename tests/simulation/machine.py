"""One seed: a machine with a chain of images, a guest, and what management does meanwhile.

``run_machine`` gives the log of it (``disks``) and all that ``crash`` and ``history`` need to judge
every moment of it afterwards.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any
from unittest import mock

from liveblockd.errors import BlockError
from liveblockd.events import BlockJobCompleted, Event
from liveblockd.formats.qcow2.create import create_qcow2
from liveblockd.formats.qcow2.image import Qcow2
from liveblockd.graph import chain, dirty
from liveblockd.graph.node import Node
from liveblockd.graph.snapshot import snapshot
from liveblockd.storage.driver import Permission
from tests.simulation import forms, virtual
from tests.simulation.bench import Bench
from tests.simulation.copies import Copies
from tests.simulation.course import Course, Plan
from tests.simulation.crashed import plain_name
from tests.simulation.crashguest import CrashGuest
from tests.simulation.disks import Machine, SimulatedDisk, SimulatedWorkers
from tests.simulation.merging import Merging
from tests.simulation.upkeep import BITMAP, REFUSED, Upkeep
from tests.support.qcow2_images import open_qcow2
from tests.support.unlocked import unlocked_once

KIB, MIB = 1024, 1024 * 1024
#: what management does, each as often as it is here
STEPS = (
    "stream", "stream", "stream_to_base", "snapshot", "resize", "rename", "restart", "rest",
    "internal", "internal_gone", "internal_apply", "amend", "commit", "commit_active",
    "mirror", "mirror", "backup", "increment", "increment",
    "mirror_none", "backup_top", "several", "unflushable",
)  # fmt: skip
#: what is no good on another image
OF_QCOW2 = ("resize", "internal", "internal_gone", "internal_apply", "amend", "check")
GRANULARITY = 4096


class Scene(Upkeep, Merging, Copies):
    """A machine at work."""

    def __init__(self, plan: Plan, machine: Machine, bench: Bench) -> None:
        self.plan = plan
        self.machine = machine
        self.bench = bench
        number = machine.drive
        #: of names: those of the first drive stay as they are when there are others
        self.mark, self.directory = (f"d{number}", f"/sim{number}") if number else ("", "/sim")
        self.drive = f"drive{number}"
        self.seed = f"{plan.seed} {self.drive}" if number else str(plan.seed)
        self.random = random.Random(f"scene {self.seed}")
        self.story: list[str] = []
        self.streams = self.overlays = self.commits = 0
        #: (node, name) of internal snapshots
        self.internal: list[tuple[str, str]] = []
        #: what is in them, where that is known: (size, bytes)
        self.kept: dict[tuple[str, str], tuple[int, bytes]] = {}
        self._under_way = {}
        self._early = set()
        self._on_chain = []
        #: by the name of its file
        self.forms: dict[str, dict[str, Any]] = {}
        bench.publisher.subscribe(self._note)

    async def prepare(self) -> Course:
        """The chain, the drive on it and its guest; ``log`` and ``initial`` are nobody's yet."""
        options = await self._build()
        await self._open(options)
        return Course(
            self.plan,
            self.machine.log,
            [],
            {},
            set(),
            self.top,
            self.guest.size,
            bytes(self.guest.model),
            self.bitmap_in,
            self.story,
        )

    def _note(self, event: Event) -> None:
        if isinstance(event, BlockJobCompleted) and event.error is None:
            self.machine.note("note", 0, 0, event.name)
            self._copy_ended(event)

    # -- before

    async def _build(self) -> dict[str, object]:
        """The images; what blockdev-add takes to open them."""
        rng, plan = self.random, self.plan
        depth = plan.depth or rng.randrange(1, 5)
        form = forms.choose(rng, plan.cluster_size, plan.kind)
        large = plan.large if plan.large is not None else rng.random() < 0.06 and not plan.wide
        if large:
            form = {"cluster_size": 512, "refcount_bits": 64}
        cluster_size = form["cluster_size"]
        size = rng.randrange(24, 72) * max(cluster_size, 2 * KIB)
        if cluster_size > 8192:
            size = rng.randrange(6, 24) * cluster_size
        if large:
            size = 2 * MIB + 256 * KIB
        if plan.wide:
            form, cluster_size, size = {"cluster_size": 512}, 512, MIB + 128 * KIB
        size = plan.size or size
        self.largest = size * 2
        options: dict[str, object] = {}
        model = bytearray()
        last: str | None = None
        for number in range(depth):
            name = f"{self.directory}/{number}.qcow2"
            own = (
                form
                if plan.wide or rng.random() < 0.7
                else forms.choose(rng, plan.cluster_size, plan.kind)
            )
            own_size = size
            if number < depth - 1 and not plan.wide and rng.random() < 0.3:
                own_size = rng.randrange(1, size * 5 // 4 // 512) * 512
            model = bytearray(model[:own_size].ljust(own_size, b"\0"))
            filled = 2 * MIB - 90 * KIB if large and number == depth - 1 else 0
            await self._create(name, own_size, own, last)
            await self._fill(name, model, filled)
            below = options or None
            options = {
                "node-name": f"{self.mark}n{number}",
                "l2-cache-size": rng.choice((4, 8, 64)) * cluster_size,
                "backing": below,
                **forms.members(name, self.forms[name]),
            }
            last = name
        assert last is not None
        self.top = last
        self.model = model
        self.detect_zeroes = rng.choice(("off", "off", "on", "unmap"))
        return options

    async def _create(
        self, name: str, size: int, form: dict[str, Any], backing: str | None
    ) -> None:
        """A new, empty image; what its form says for images without a backing file is dropped."""
        if backing is not None:
            form = {k: v for k, v in form.items() if k != "data_file_raw"}
        self.forms[name] = form
        options = {k: v for k, v in form.items() if k not in ("data_file", "encrypt")}
        if form.get("data_file"):
            other = forms.data_name(name)
            options["data_file"] = SimulatedDisk(self.machine.add(other))
            options["data_file_name"] = other
        if form.get("encrypt"):
            options["crypto_header"] = forms.crypto_header(self.random)
        await create_qcow2(
            SimulatedDisk(self.machine.add(name)),
            size=size,
            backing_file=backing,
            backing_format=backing and forms.driver(self.forms.get(plain_name(backing), {})),
            **options,
        )

    async def _alone(self, name: str) -> Qcow2:
        """An image opened without a graph, and without what is below it."""
        form = self.forms[name]
        names = self.machine.names
        data_file = None
        if form.get("data_file"):
            data_file = SimulatedDisk(names[forms.data_name(name)])
        members = forms.members(name, form)
        for child in ("driver", "file", "data-file"):
            members.pop(child, None)
        return await open_qcow2(
            SimulatedDisk(names[name]),
            data_file=data_file,
            workers=self.bench.workers,
            secret=forms.secret,
            **members,
        )

    async def _fill(self, name: str, model: bytearray, filled: int) -> None:
        """Give an image clusters of its own; what is below it does not matter to whole ones."""
        rng = self.random
        image = await self._alone(name)
        packs = rng.random() < 0.3 and forms.can_compress(self.forms[name])
        size = image.cluster_size
        assert size is not None
        if filled:
            filled = filled // size * size
            data = rng.randbytes(filled)
            await image.write(0, data)
            model[:filled] = data
        for _ in range(rng.randrange(30, 60) if self.plan.wide else rng.randrange(1, 9)):
            offset = rng.randrange(len(model)) // size * size
            length = rng.randrange(1, 6) * size
            end = min(offset + length, len(model))
            if rng.random() < 0.75:
                data = rng.randbytes(end - offset)
                # The last cluster may be longer than the disk.
                if packs:
                    data = squeezable(rng, end - offset)
                    await image.write_compressed(offset, data)
                else:
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
            random.Random(f"guest {self.seed}"),
            limit=min(size // 2, 8 * cluster_size if cluster_size > 4096 else 64 * cluster_size),
            cluster_size=cluster_size,
            can_compress=lambda: forms.can_compress(self.forms[self.top]),
        )
        bitmap = self.plan.bitmap if self.plan.bitmap is not None else self.random.random() < 0.4
        self.bitmap_in = None
        if bitmap and node.driver.format_specific()["data"]["compat"] != "0.10":
            dirty.add(self.bench.graph, node.name, BITMAP, granularity=GRANULARITY, persistent=True)
            self.bitmap_in = self.top
            await self._restart()  # so that the image has it

    async def _attach(self, options: dict[str, object]) -> Node:
        """Open the chain and put the drive on it."""
        options = {**options, "detect-zeroes": self.detect_zeroes}
        node = await self.bench.graph.open(self.bench.options(**options))
        self.backend = await self.bench.graph.attach(
            node, Permission.CONSISTENT_READ | Permission.WRITE, name=self.drive
        )
        node.monitor_owned = False
        self._node = node
        self.backend.on_change.append(self._changed)
        return node

    async def _restart(self, between: Callable[[], Awaitable[None]] | None = None) -> None:
        """Close the whole chain and open it again as its headers say; the guest is halted.

        ``between``: what is done to images that nobody has open.
        """
        names = [
            (layer.name, layer.file.driver.medium.name)
            for layer in chain.chain(self.backend.node)
            if layer.file is not None and isinstance(layer.file.driver, SimulatedDisk)
        ]
        options: dict[str, object] = {}
        for node_name, name in reversed(names):
            below = {} if self.forms[name].get("raw") else {"backing": options or None}
            options = {
                "node-name": node_name,
                **below,
                **forms.members(name, self.forms[name]),
            }
        await self.bench.graph.detach(self.backend)
        left = [node for node in self.bench.graph.nodes.values() if self._is_mine(node)]
        assert not left, left
        if between is not None:
            await between()
        self.guest.backend = (await self._attach(options)) and self.backend

    def _is_mine(self, node: Node) -> bool:
        driver = node.driver
        return isinstance(driver, SimulatedDisk) and driver.medium.machine is self.machine

    def _changed(self) -> None:
        """The drive may stand on another image now."""
        node = chain.skip_filters(self.backend.node)
        if node is not None and node is not self._node:  # None: a filter is on its way in
            self._node = node
            assert node.file is not None and isinstance(node.file.driver, SimulatedDisk)
            self.top = node.file.driver.medium.name
            self.machine.note("switch", 0, 0, self.top)

    # -- meanwhile

    async def play(self) -> None:
        """The guest, the weather and the steps; until all of them have ended."""
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
        if step in OF_QCOW2 and self.forms[self.top].get("raw"):
            self.story.append("  not a qcow2 image")
            return
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
        job = await self.bench.stream(
            self.drive, f"{self.mark}stream{self.streams}", speed=speed, **options
        )
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
            full = "No space" in str(job.error)  # a long backing name, a small header cluster
            assert job.cancelled or self.machine.injected or full, f"stream failed: {job.error}"

    async def _do_snapshot(self) -> None:
        rng = self.random
        self.overlays += 1
        name = f"{self.directory}/overlay{self.overlays}.qcow2"
        node = chain.skip_filters(self.backend.node)
        assert node is not None
        cluster_size = rng.choice((512, 4096, node.driver.cluster_size or 512))
        if self.guest.size > MIB:
            cluster_size = node.driver.cluster_size or 4096
        form: dict[str, Any] = {"cluster_size": cluster_size, "version": rng.choice((2, 3, 3))}
        if rng.random() < 0.4 and self.guest.size <= MIB:
            form = forms.choose(rng, kind=self.plan.kind)
        await self._create(name, node.length, form, node.filename)
        overlay = await self.bench.open(
            node_name=f"{self.mark}overlay{self.overlays}",
            backing=None,
            detect_zeroes=self.detect_zeroes,
            **forms.members(name, self.forms[name]),
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
        """A clean close makes all durable, as a flush does. Nobody could go on if it failed."""
        guest, machine = self.guest, self.machine
        async with guest.halted(), self._calm():
            if machine.injected:
                return  # what could not be written back is not there afterwards
            await self._sync_and_restart()

    async def _sync_and_restart(self, between: Callable[[], Awaitable[None]] | None = None) -> None:
        machine = self.machine
        number = machine.number()
        machine.note("sync", number)

        async def synced() -> None:
            if not machine.injected:
                machine.note("synced", number)
            if between is not None:
                await between()

        await self._restart(synced)

    async def _do_rename(self) -> None:
        """change-backing-file to another name of the same image, and back."""
        node = chain.skip_filters(self.backend.node)
        assert node is not None
        if node.backing is None or node.driver.backing_file is None:
            return
        old = node.driver.backing_file
        space = max(20, (node.driver.cluster_size or 512) - 360)
        long = (
            f"{self.directory}/"
            + "x" * self.random.randrange(1, min(900, space))
            + str(len(self.story))
        )
        self.machine.names[long] = self.machine.names[plain_name(old)]
        for name in (long, old):
            try:
                await node.driver.change_backing_file(name, "qcow2")
            except BlockError as error:
                if "No space" not in error.message:
                    raise
                self.story.append(f"  {error.message}")


def squeezable(rng: random.Random, length: int) -> bytes:
    """Bytes that are no zeros and take little space."""
    piece = rng.randbytes(max(1, rng.choice((16, 200, length // 3))))
    return (piece * (length // len(piece) + 1))[:length]


async def _course(plan: Plan) -> Course:
    """All drives of one daemon at once."""
    machines = [Machine(plan.seed)]
    while len(machines) < plan.drives:
        machines.append(Machine(plan.seed, machines[-1]))
    SimulatedDisk.machine = machines[0]
    bench = Bench(SimulatedWorkers(machines[0]), virtual.VirtualClock(), secret=forms.secret)
    scenes = [Scene(plan, machine, bench) for machine in machines]
    courses = [await scene.prepare() for scene in scenes]
    initial = [medium.content() for medium in machines[0].media]
    for machine in machines:
        machine.quiet = False
    try:
        async with asyncio.timeout(600), asyncio.TaskGroup() as group:
            for scene in scenes:
                group.create_task(scene.play())
    finally:
        for machine in machines:
            machine.quiet = True
    names = {name: medium.index for name, medium in machines[0].names.items()}
    for scene, course in zip(scenes, courses, strict=True):
        course.initial, course.names = initial, names
        course.raw = {name for name, form in scene.forms.items() if form.get("raw")}
        course.requests = scene.guest.requests
    await _end(bench, machines)
    courses[0].beside = courses[1:]
    return courses[0]


async def _end(bench: Bench, machines: list[Machine]) -> None:
    """Let everything go; errors no longer matter."""
    for medium in machines[0].media:
        medium.flush_failed = False
    for machine in machines:
        machine.faults = {}
    await bench.close()
    machines[0].close()
    SimulatedDisk.machine = None


def run_machine(plan: Plan) -> Course:
    """Let a machine run in simulated time."""
    # Internal snapshots have a date.
    with mock.patch("time.time_ns", lambda: 1_700_000_000 * 10**9), unlocked_once():
        return virtual.run(_course(plan))
