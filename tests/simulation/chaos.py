"""One seed: every kind of job, snapshots, bitmaps and guests on several drives, all at once.

``scenario`` disturbs streams; here two operators a drive do whatever QMP offers, by its commands,
without asking what the other does: what does not go together is refused, and that is part of it.

What must hold: every read of a guest is right at any time; a backup holds what the disk held when
it was begun, also as the sum of a full one and its increments; a mirror that ends is a copy; at the
end the whole disk is right, QEMU reads the same bytes and finds nothing wrong with any image.

``python -m tests.simulation.chaos --seeds 200`` runs many, until one fails.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import io
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import uvloop

from liveblockd.errors import BlockError
from liveblockd.graph import chain
from liveblockd.graph.node import Node
from liveblockd.jobs.job import Job
from liveblockd.qapi import parse, to_qmp
from liveblockd.qmp import registry
from liveblockd.qmp.context import Context
from liveblockd.storage.blkdebug import Blkdebug
from liveblockd.storage.driver import Permission
from tests.simulation import images
from tests.simulation.bench import Bench
from tests.simulation.chaos_backups import Backups
from tests.simulation.chaos_copies import Copies, path_of
from tests.simulation.chaos_faults import POLICIES, FaultyPool, below_blkdebug
from tests.simulation.small_chunks import small_chunks
from tests.simulation.watched import Moment, Watched

KIB, MIB = 1024, 1024 * 1024

registry.load()

#: so often, every 4 ms on the average, a job is looked at before it is called stuck: where the
#: processor is not ours for long, time says nothing
PATIENCE = 10_000
#: seconds after which commands are called stuck
LONG = 1000


def _make_raw(path: str, size: int) -> None:
    with open(path, "wb") as file:
        file.truncate(size)


def _content(path: str) -> bytes:
    if not path.endswith("raw"):
        return images.content(path)
    with open(path, "rb") as file:
        return file.read()


def _grown(job: Job) -> bool:
    """Whether the other operator was quicker with the size of the disk."""
    return "different sizes" in str(job.error)


def stuck(*jobs: Job) -> str:
    """Where jobs stand, and all tasks of the loop."""
    text = io.StringIO()
    for job in jobs:
        text.write(f"{job.id} is {job.status} at {job.offset}/{job.length}: {vars(job)}\n")
    for task in asyncio.all_tasks():
        task.print_stack(file=text)
    return text.getvalue()


class Drive(Backups, Copies):
    """A drive, its guest and its two operators."""

    def __init__(self, bench: Bench, rng: random.Random, directory: str, name: str) -> None:
        self.bench = bench
        self.rng = rng
        self.directory = directory
        self.name = name
        self.paths: list[tuple[str, str]] = []
        self.log: list[str] = []
        self.done: Counter[str] = Counter()
        #: images whose requests failed: clusters may have been lost
        self.leaking: set[str] = set()
        #: images of which no flush succeeds, and what stands in between
        self.unflushable: dict[str, Blkdebug] = {}
        #: all drives of the daemon
        self.all: list[Drive] = [self]
        #: commits that have begun, and those under way
        self.commits = self.committing = 0
        #: how many operators are at what cannot be beside something else
        self.busy_with: Counter[str] = Counter()
        #: what operators do; (): everything
        self.only: tuple[str, ...] = ()
        self._numbers = 0
        #: the backup that increments build on, and how many there are
        self._backup: str | None = None
        #: one operator at a time, so that none makes it smaller
        self._sizing = asyncio.Lock()
        self.context = Context(
            graph=bench.graph,
            scheduler=bench.scheduler,
            exports=None,  # type: ignore[arg-type]
            workers=bench.workers,
            publisher=bench.publisher,
            on_quit=lambda _: None,
            console=lambda _: None,
        )

    async def build(self, lock: asyncio.Lock) -> None:
        """Make the chain, open it and start the guest."""
        self.context.command_lock = lock
        paths, contents = await images.make_chain(self.bench, self.rng, self.directory, self.name)
        self.paths = [(path, "qcow2") for path in paths]
        node = await self.bench.open(
            driver="qcow2",
            node_name=f"{self.name}-node",
            discard="unmap",
            file={"driver": "file", "filename": paths[-1]},
        )
        self.backend = await self.bench.graph.attach(
            node,
            Permission.CONSISTENT_READ | Permission.WRITE,
            Permission.ALL,
            name=self.name,
        )
        node.monitor_owned = False
        self.guest = Watched(self.backend, bytearray(contents[-1]), self.rng, self.name)

    async def qmp(self, name: str, /, **arguments: Any) -> Any:
        """One command, as a client would give it; raises BlockError."""
        given = {key.replace("_", "-"): value for key, value in arguments.items()}
        command = registry.find(name)
        async with self.context.command_lock:
            self.log.append(f"{name} {given}")
            try:
                answer = await command.function(self.context, parse(command.args, given))
            except BlockError as error:
                self.log.append(f"  refused: {error.message}")
                raise
        return to_qmp(answer)

    def number(self) -> int:
        """Another one at each call."""
        self._numbers += 1
        return self._numbers

    def layers(self) -> list[Node]:
        """The images, the top first."""
        return chain.chain(self.backend.node)

    # -- operators

    async def run(self) -> None:
        """Two operators; the guest ends with them."""
        await asyncio.gather(self.operate(), self.operate())
        self.guest.stop.set()

    async def operate(self) -> None:
        """Do a few things, whatever is refused."""
        kinds: dict[Callable[[], Awaitable[None]], int] = {
            self.stream: 3,
            self.snapshot: 4,
            self.commit: 4,
            self.mirror: 3,
            self.backup: 4,
            self.grow: 1,
            self.bitmaps: 2,
            self.internal: 1,
            self.several: 2,
            self.drive_mirror: 2,
            self.drive_backup: 2,
            self.backup_top: 1,
            self.backup_none: 2,
            self.fleece: 2,
            self.grouped: 2,
        }
        if self.only:
            kinds = {getattr(self, name): 1 for name in self.only}
        for _ in range(self.rng.randrange(3, 9)):
            await asyncio.sleep(self.rng.random() * 0.02)
            kind = self.rng.choices(list(kinds), list(kinds.values()))[0]
            try:
                await kind()
            except BlockError:
                self.done["refused"] += 1
            else:
                self.done[kind.__name__] += 1  # type: ignore[attr-defined]

    async def stream(self) -> None:
        """Into the top or any other image."""
        layers = self.layers()
        top = self.rng.randrange(len(layers))
        base = None
        if top + 1 < len(layers) and self.rng.random() < 0.6:
            base = self.rng.choice(layers[top + 1 :])
        await self._stream(layers[top], base, device=self.name if top == 0 else None)

    async def _stream(self, top: Node, base: Node | None, device: str | None = None) -> None:
        more: dict[str, Any] = {} if base is None else {"base_node": base.name}
        await self._job("block-stream", device=device or top.name, **more)

    async def snapshot(self) -> None:
        """A new overlay below the running guest."""
        path = f"{self.directory}/{self.name}s{self.number()}.qcow2"
        await self.qmp("blockdev-snapshot-sync", device=self.name, snapshot_file=path)
        self.paths.append((path, "qcow2"))

    async def commit(self) -> None:
        """Any image into any below it."""
        layers = self.layers()
        if len(layers) < 2:
            return
        top = 0 if self.rng.random() < 0.5 else self.rng.randrange(len(layers) - 1)
        await self._commit(layers[top], self.rng.choice(layers[top + 1 :]))

    async def _commit(self, top: Node, base: Node) -> None:
        self.commits += 1
        self.committing += 1
        try:
            await self._job(
                "block-commit", device=self.name, top_node=top.name, base_node=base.name
            )
        finally:
            self.committing -= 1

    @contextlib.contextmanager
    def apart_from(self, others: str, own: str) -> Iterator[None]:
        """Refused while there are ``others``.

        A mirror of a filter that is taken out from under it would go on without the guest's writes,
        and who goes over to its target takes along who looked through the filter.
        """
        if self.busy_with[others]:
            raise BlockError(f"{others} is under way")
        self.busy_with[own] += 1
        try:
            yield
        finally:
            self.busy_with[own] -= 1

    async def mirror(self) -> None:
        """To a new image; ended as a copy, or the guest goes over to it."""
        with self.apart_from("fleece", "mirror"):
            await self._mirror()

    async def _mirror(self) -> None:
        layers = self.layers()
        sync = "top" if len(layers) > 1 and self.rng.random() < 0.3 else "full"
        below = layers[1] if sync == "top" else None
        faulty = self.rng.random() < 0.4
        target, path = await self._target(
            below and path_of(below), below and below.name, faulty=faulty
        )
        with Moment(self.guest) as moment:
            job = await self._begin(
                "blockdev-mirror",
                give_up=target,
                device=self.name,
                target=target,
                sync=sync,
                copy_mode=self.rng.choice(("background", "write-blocking")),
                granularity=self.rng.choice((4, 64)) * KIB,
                on_target_error=self.rng.choice(POLICIES),
                on_source_error=self.rng.choice(POLICIES),
            )
            if below is not None and self.layers()[1:2] != [below]:
                self.bench.scheduler.cancel(job, force=True)  # the other operator was quicker
            hopeless = path in self.unflushable
            await self._steer(job, moment.begin, may_switch=not faulty, hopeless=hopeless)
            self._check_end(job, faulty, path)
        switched = self.backend.node.name == target
        if not switched:
            await self.qmp("blockdev-del", node_name=target)
            # One that stands on the disk's own images goes bad when they are committed into.
            if job.error is None and not job.cancelled and below is None:
                moment.compare(await self._content(path), "a mirror")
                self.done["mirror compared"] += 1
        else:
            self.done["pivot"] += 1

    def _check_end(self, job: Job, faulty: bool, path: str = "") -> bool:
        """Whether it succeeded; AssertionError if it had no reason to fail, or every one."""
        self.log.append(f"  {job.id}: ended: {job.error}")
        if job.error is None:
            assert not self.has_lost(path), f"{job.id}: nothing of {path} is durable"
            return True
        if faulty or self.bench.workers.injected:
            self.done["failed"] += 1
        else:
            assert job.cancelled or _grown(job), f"{job.id}: {job.error}"
        return False

    async def grow(self) -> None:
        """The guest learns of it at once."""
        async with self._sizing:
            old = self.backend.length
            if any(layer.length > old for layer in self.layers()):
                return  # a commit could be quicker and make it larger still
            size = old + self.rng.randrange(1, 300) * KIB
            await self.qmp("block_resize", device=self.name, size=size)
            if old == len(self.guest.model):
                self.guest.model.extend(bytes(size - old))
        self._backup = None

    async def bitmaps(self) -> None:
        """Add, merge and remove some that nobody needs."""
        node = self.layers()[0].name
        one, two = f"a{self.number()}", f"b{self.number()}"
        await self.qmp("block-dirty-bitmap-add", node=node, name=one, granularity=4096)
        await asyncio.sleep(self.rng.random() * 0.01)
        await self.qmp("block-dirty-bitmap-add", node=node, name=two, disabled=True)
        await self.qmp("block-dirty-bitmap-merge", node=node, target=two, bitmaps=[one])
        for name in (one, two):
            await self.qmp("block-dirty-bitmap-remove", node=node, name=name)

    async def internal(self) -> None:
        """Take an internal snapshot, and forget it."""
        name = f"s{self.number()}"
        await self.qmp("blockdev-snapshot-internal-sync", device=self.name, name=name)
        await asyncio.sleep(self.rng.random() * 0.01)
        await self._quietly("blockdev-snapshot-delete-internal-sync", device=self.name, name=name)

    async def _quietly(self, command: str, /, **arguments: Any) -> None:
        """What somebody else may have made impossible meanwhile."""
        try:
            await self.qmp(command, **arguments)
        except BlockError:
            self.done["refused"] += 1

    # -- jobs

    async def _target(
        self, below: str | None, backing: str | None = None, *, faulty: bool = False
    ) -> tuple[str, str]:
        """A new image as large as the disk, named ``below``, and its node on ``backing``."""
        rng, number = self.rng, self.number()
        raw = below is None and rng.random() < 0.25
        path = f"{self.directory}/{self.name}t{number}.{'raw' if raw else 'qcow2'}"
        size = self.backend.length
        node: dict[str, Any] = {
            "driver": "raw" if raw else "qcow2",
            "node-name": f"{self.name}t{number}",
        }
        file: dict[str, Any] = {"driver": "file", "filename": path}
        node["file"] = below_blkdebug(rng, file, size) if faulty else file
        node["discard"] = "unmap"
        if raw:
            await asyncio.to_thread(_make_raw, path, size)
        else:
            await images.create(
                self.bench,
                path,
                size=size,
                cluster_size=rng.choice((4 * KIB, 64 * KIB)),
                backing_file=below,
                backing_format=None if below is None else self._format(below),
            )
            if below is not None:
                node["backing"] = backing
        if faulty:
            self.leaking.add(path)
        await self.qmp("blockdev-add", **node)
        self.paths.append((path, node["driver"]))
        if any(rule.get("once") is False for rule in node["file"].get("inject-error", ())):
            between = self.bench.graph.nodes[node["node-name"]].children["file"].child.driver
            assert isinstance(between, Blkdebug)
            self.unflushable[path] = between
        return node["node-name"], path

    def has_lost(self, path: str) -> bool:
        """Whether no flush succeeds of what was written there; of a disk of zeros nothing is."""
        return path in self.unflushable and self.unflushable[path]._written

    def _format(self, path: str) -> str:
        # One that is not there yet is the overlay of a snapshot whose command is about to return.
        return dict(self.paths).get(path, "qcow2")

    async def _begin(self, command: str, /, *, give_up: str | None = None, **arguments: Any) -> Job:
        """Start a job; ``give_up`` is a node that nobody needs if it is refused."""
        job_id = f"{self.name}-job{self.number()}"
        speed = self.rng.choice((0, 0, 0, 4 * MIB, 32 * MIB))
        try:
            await self.qmp(command, job_id=job_id, speed=speed, **arguments)
        except BlockError:
            if give_up is not None:
                await self.qmp("blockdev-del", node_name=give_up)
            raise
        job = self.bench.scheduler.find(job_id)
        if job is None:
            raise BlockError("over already")
        return job

    async def _job(self, command: str, /, **arguments: Any) -> None:
        on_error = self.rng.choice(POLICIES)
        job = await self._begin(command, on_error=on_error, **arguments)
        await self._steer(job)
        self._check_end(job, False)

    async def _steer(
        self,
        job: Job,
        at_end: Callable[[], object] | None = None,
        *,
        may_switch: bool = True,
        hopeless: bool = False,
        cancels: float = 0.2,
    ) -> None:
        """Pauses, speeds, perhaps a cancel; a job that is ready is completed or ended there.

        ``hopeless``: it cannot succeed, and will be cancelled. ``cancels``: how likely one is.
        """
        scheduler, rng = self.bench.scheduler, self.rng
        may_cancel = rng.random() < cancels
        deadline = asyncio.get_running_loop().time() + rng.random() * 0.15
        looks = 0
        while job.status != "null":
            await asyncio.sleep(rng.choice((0, 0.001, 0.01)))
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                return  # something went wrong elsewhere: whatever comes of this job
            looks += 1
            if looks > PATIENCE:
                raise AssertionError(f"{job.id} does not end\n{stuck(job)}")
            late = asyncio.get_running_loop().time() > deadline
            verb = rng.choice(("pause", "resume", "resume", "speed", "cancel", "end", "end"))
            if late:
                may_cancel = hopeless
                verb = rng.choice(("resume", "no limit", "end", *(("cancel",) if hopeless else ())))
            if verb == "end" and job.status == "ready":
                if at_end is not None:
                    at_end()
                    at_end = None
                verb = rng.choice(("complete", "complete", "stop here"))
                if not may_switch:
                    verb = "stop here"
            try:
                match verb:
                    case "pause":
                        scheduler.pause(job)
                    case "resume":
                        scheduler.resume(job)
                    case "speed":
                        scheduler.set_speed(job, rng.choice((0, MIB, 30 * MIB)))
                    case "no limit":
                        scheduler.set_speed(job, 0)
                    case "complete":
                        scheduler.complete(job)
                    case "stop here":
                        scheduler.cancel(job)
                    case "cancel" if may_cancel:
                        scheduler.cancel(job, force=True)
                    case _:
                        continue
                self.log.append(f"  {job.id}: {verb} at {job.offset}/{job.length}")
            except BlockError:
                pass  # out of turn

    # -- judgement

    async def _content(self, path: str) -> bytes:
        """What QEMU reads from an image that nobody uses."""
        return await asyncio.to_thread(_content, path)

    def judge(self, active: str) -> None:
        """By qemu-img, after all is closed."""
        for path, image_format in self.paths:
            if image_format == "qcow2":
                images.check(path, leaks=path in self.leaking)
        # A commit into a longer image makes the disk as long as that.
        found = _content(active)[: len(self.guest.model)]
        assert found == self.guest.model, "qemu-img reads something else"


async def run_seed(seed: int, directory: str, kinds: tuple[str, ...] = ()) -> str:
    """Raises AssertionError (or whatever went wrong); a line about what was done else.

    ``kinds``: only these are done (names of ``Drive``).
    """
    rng = random.Random(seed)
    unseen: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))
    worst, share = rng.choice((0, 0.001, 0.004)), rng.choice((0, 0, 0, 0.05, 0.3))
    pool = FaultyPool(random.Random(rng.random()), worst, share=share)
    bench = Bench(pool)
    drives = [
        Drive(bench, random.Random(rng.random()), directory, name)
        for name in ("vda", "vdb")[: rng.choice((1, 1, 2))]
    ]
    lock = asyncio.Lock()
    with small_chunks(
        rng.choice((4 * KIB, 64 * KIB, 64 * KIB, 512 * KIB)),
        least_copy=rng.choice((4 * KIB, 64 * KIB, 128 * KIB)),
        look_ahead=rng.choice((1, 7, 2048)),
    ):
        try:
            for drive in drives:
                drive.only, drive.all = kinds, drives
                await drive.build(lock)
            asyncio.get_running_loop().call_later(
                LONG - 5, lambda: sys.stdout.write(stuck(*bench.scheduler.jobs.values()))
            )
            async with asyncio.timeout(LONG), asyncio.TaskGroup() as group:
                for drive in drives:
                    group.create_task(drive.guest.run(rng.choice((2, 5))))
                    group.create_task(drive.run())
            for drive in drives:
                await drive.guest.compare_all()
            active = [path_of(drive.layers()[0]) for drive in drives]
            await bench.close()
            await asyncio.sleep(0)
            gc.collect()  # a task that died unseen says so when it goes
            assert not unseen, unseen
            for drive, path in zip(drives, active, strict=True):
                drive.judge(path)
        except BaseException:
            story = [f"seed {seed} failed", *(line for drive in drives for line in drive.log)]
            sys.stdout.write("\n  ".join(story) + "\n")
            raise
    done = sum((drive.done for drive in drives), Counter())
    requests = sum(drive.guest.requests for drive in drives)
    return f"seed {seed}: {len(drives)} drives, {requests} requests, {dict(done)}"


def run(seed: int, directory: str, kinds: tuple[str, ...] = ()) -> str:
    """``run_seed`` in a loop of its own: every other seed in that of the daemon."""
    return (uvloop if seed % 2 else asyncio).run(run_seed(seed, directory, kinds))


def main() -> int:
    """Exit status 1, with the seed, at the first failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="how many")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--keep", action="store_true", help="leave the images of a failed seed")
    arguments = parser.parse_args()
    started = time.monotonic()
    for seed in range(arguments.start, arguments.start + arguments.seeds):
        directory = tempfile.mkdtemp(prefix="liveblockd-chaos-")
        try:
            line = run(seed, directory)
        except BaseException as error:
            sys.stdout.write(
                f"FAILED: seed {seed}: {error!r}\n"
                f"again: python -m tests.simulation.chaos --start {seed} --seeds 1\n"
            )
            if arguments.keep:
                sys.stdout.write(f"images: {directory}\n")
            else:
                shutil.rmtree(directory, ignore_errors=True)
            raise
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
        shutil.rmtree(directory, ignore_errors=True)
    sys.stdout.write(f"{arguments.seeds} seeds in {time.monotonic() - started:.0f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
