"""Steps of a machine that copy the disk: mirrors that the guest goes over to, and backups.

A part of ``machine.Scene``. The log gets ``backup`` when the instant of a copy has passed (the
image, its bytes, and where those are not known), ``backed`` when its job has completed, ``gone``
when what it stands on changes, and ``base`` when that is what the bitmap of increments counts from.
What is unfinished is nobody's backup.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from liveblockd.errors import BlockError
from liveblockd.events import BlockJobCompleted
from liveblockd.graph import chain, dirty
from liveblockd.graph.actions import Abort, BitmapAction, InternalSnapshot
from liveblockd.graph.backend import Backend
from liveblockd.graph.before_write import OnCbwError
from liveblockd.graph.node import Node
from liveblockd.graph.transaction import Action, perform
from liveblockd.jobs.backup import BackupParameters, BitmapSyncMode
from liveblockd.jobs.backup_start import create_backup
from liveblockd.jobs.job import BlockdevOnError, Job
from liveblockd.jobs.mirror_job import Mirror, MirrorParameters, MirrorSyncMode
from liveblockd.jobs.mirror_options import MirrorCopyMode, MirrorOptions
from liveblockd.jobs.mirror_start import launch, make_mirror, start_mirror
from liveblockd.jobs.starting import start_job
from liveblockd.jobs.transaction import JobAction
from tests.simulation import forms
from tests.simulation.bench import Bench
from tests.simulation.crashed import plain_name
from tests.simulation.crashguest import CrashGuest
from tests.simulation.disks import Machine, SimulatedDisk

KIB = 1024
#: the persistent bitmap of what was written since the last backup
SINCE = "since"
#: seconds of the machine after which a job that cannot go on is ended
PATIENCE = 3.0
#: steps after which an increment does not fit what it is to build on
BREAKS = ("resize", "internal_apply", "amend")
Span = tuple[int, int]


@dataclass
class Instant:
    """What the disk held then, and where nobody knows."""

    content: bytes = b""
    unknown: list[Span] = field(default_factory=list)


@dataclass
class Base:
    """The image that increments build on, the source that has the bitmap, what broke since."""

    name: str
    source: str
    breaks: int


class Copies:
    """See the module."""

    if TYPE_CHECKING:
        random: random.Random
        machine: Machine
        guest: CrashGuest
        bench: Bench
        backend: Backend
        story: list[str]
        drive: str
        mark: str
        directory: str
        internal: list[tuple[str, str]]
        forms: dict[str, dict[str, Any]]
        detect_zeroes: str
        plan: Any
        top: str

        async def _wait(self, most: float) -> None: ...
        async def _create(
            self, name: str, size: int, form: dict[str, Any], backing: str | None
        ) -> None: ...

    copies = 0
    _base: Base | None = None
    #: no flush of the next target succeeds
    _unflushable = False
    #: backups that stand on images of the disk
    _on_chain: list[int]
    #: by job: the number of its ``backup`` in the log, None until that is written
    _under_way: dict[str, int | None]
    #: jobs that completed before that
    _early: set[str]

    def _copy_ended(self, event: BlockJobCompleted) -> None:
        """Of any job, at the very moment."""
        number = self._under_way.get(event.device)
        if number is not None:
            self.machine.note("backed", number)
        elif event.device in self._under_way:
            self._early.add(event.device)

    async def _new_image(
        self, name: str, backing: str | None, node: str | None, *, may_be_raw: bool
    ) -> Node:
        """An empty image as long as the disk, named ``backing``, opened on ``node``."""
        rng, size = self.random, self.backend.length
        if may_be_raw and self.plan.kind is None and rng.random() < 0.3:
            self.forms[name] = {"raw": True}
            await SimulatedDisk(self.machine.add(name)).truncate(size)
        else:
            cluster_size = self.plan.cluster_size if rng.random() < 0.5 else None
            form = forms.choose(rng, cluster_size, self.plan.kind)
            if self.guest.size > KIB * KIB:
                form = {"cluster_size": 4096}
            await self._create(name, size, form, backing)
        if self._unflushable:
            for file in {name, forms.data_name(name)} & self.machine.names.keys():
                self.machine.names[file].faults["flush"] = 1.0
        return await self.bench.open(
            node_name=self.mark + name.rsplit("/", maxsplit=1)[-1].split(".", maxsplit=1)[0],
            detect_zeroes=self.detect_zeroes,
            **forms.members(name, self.forms[name]),
            **({} if self.forms[name].get("raw") else {"backing": node}),
        )

    # -- mirrors

    async def _do_mirror(self) -> None:
        """The guest goes over to a copy; or it does not, and the copy is of one instant."""
        layers = chain.chain(self.backend.node)
        top = len(layers) > 1 and self.random.random() < 0.35
        await self._mirror(MirrorSyncMode.TOP if top else MirrorSyncMode.FULL)

    async def _do_mirror_none(self) -> None:
        """The guest goes over to an image on the one it had."""
        await self._mirror(MirrorSyncMode.NONE)

    async def _mirror(self, sync: MirrorSyncMode) -> Job:
        rng = self.random
        self.copies += 1
        layers = chain.chain(self.backend.node)
        below = {MirrorSyncMode.TOP: 1, MirrorSyncMode.NONE: 0}.get(sync)
        below = None if below is None else layers[below]
        name = f"{self.directory}/mirror{self.copies}.img"
        if below is None:
            target = await self._new_image(name, None, None, may_be_raw=True)
        else:
            node = None if sync is MirrorSyncMode.NONE else below.name
            target = await self._new_image(name, below.filename, node, may_be_raw=False)
        modes, policies = tuple(MirrorCopyMode), ("report", "ignore", "stop")
        parameters = MirrorParameters(
            f"{self.mark}mirror{self.copies}",
            self.drive,
            target.name,
            sync,
            granularity=rng.choice((512, 4 * KIB, 64 * KIB)),
            options=MirrorOptions(
                speed=rng.choice((0, 0, 256 * KIB)),
                copy_mode=MirrorCopyMode(self.plan.copy_mode or rng.choice(modes)),
                on_target_error=BlockdevOnError(rng.choice(policies)),
                on_source_error=BlockdevOnError(rng.choice(policies)),
            ),
        )
        self.story.append(f"  {parameters} {self.forms[name]}")
        try:
            if sync is MirrorSyncMode.NONE:
                job = await start_job(self.bench.scheduler, self._start_on_source(parameters))
            else:
                job = await start_mirror(self.bench.graph, self.bench.scheduler, parameters)
            await self._end_mirror(job, name)
            return job
        finally:
            if chain.skip_filters(self.backend.node) is target:
                target.monitor_owned = False
                self._base = None
            else:
                await self.bench.graph.delete(target.name)

    async def _start_on_source(self, parameters: MirrorParameters) -> Mirror:
        """As drive-mirror does it: at the end the target comes to stand on the source."""
        graph = self.bench.graph
        async with graph.lock:
            source, target = graph.lookup_root(self.drive), graph.find(parameters.target)
            job = make_mirror(parameters, graph, source, target)
            job.new_backing, job.backing_to_come = (source,), True
            job.held.block(source)
            return await launch(job, self.bench.scheduler)

    async def _end_mirror(self, job: Mirror, name: str) -> None:
        rng, scheduler = self.random, self.bench.scheduler
        cancel = 0.2 if rng.random() < 0.1 else None
        await self._until(job, ("ready", "null"), cancel)
        await self._wait(rng.choice((0.0, 0.1, 0.3)))
        how = rng.choices(("switch", "stop here", "cancel"), (8, 2, 1))[0]
        if job.nothing_yet and how == "stop here":
            how = "cancel"  # it has what was written meanwhile, which nobody knows
        if job.status != "ready":
            pass
        elif how == "switch":
            scheduler.complete(job)
        elif how == "cancel":
            scheduler.cancel(job, force=True)
        else:
            async with self.guest.halted():
                content, unknown = bytes(self.guest.model[: self.guest.size]), self.guest.unknown
                self._under_way[job.id] = number = self.machine.number()
                self.machine.note("backup", number, 0, (name, content, tuple(unknown)))
                scheduler.cancel(job)
                await self._until(job)
        await self._until(job)

    async def _until(
        self, job: Job, statuses: tuple[str, ...] = ("null",), cancel: float | None = None
    ) -> None:
        """What an error has stopped goes on; ``cancel``: it is ended within so many seconds."""
        loop, scheduler = asyncio.get_running_loop(), self.bench.scheduler
        end = loop.time() + (PATIENCE if cancel is None else self.random.random() * cancel)
        while job.status not in statuses:
            if job.user_paused:
                scheduler.resume(job)
            working = job.status in ("running", "paused", "ready", "standby")
            if working and loop.time() > end:
                if cancel is not None or self.machine.injected:
                    scheduler.cancel(job, force=True)
                elif job.speed:
                    scheduler.set_speed(job, 0)  # guests can be faster than the limit for ever
            await asyncio.sleep(0.001)
        if job.status == "null" and job.error is not None:
            self.story.append(f"  ended: {job.error}")
            assert job.cancelled or self.machine.injected, f"{job.id} failed: {job.error}"

    # -- backups

    def _breaks(self) -> int:
        return sum(step in BREAKS for step in self.story)

    async def _do_backup(self) -> None:
        """A full one, often with a bitmap from the same instant on, perhaps with a snapshot."""
        rng, node = self.random, chain.chain(self.backend.node)[0]
        await self._forget_since(node)
        actions: list[Action] = []
        if rng.random() < 0.8 and self._keeps_bitmaps(node):
            actions.append(
                BitmapAction(
                    node.name,
                    lambda: dirty.add(
                        self.bench.graph, node.name, SINCE, granularity=4096, persistent=True
                    ),
                )
            )
        await self._back_up(None, actions, sync=MirrorSyncMode.FULL)

    async def _do_increment(self) -> None:
        """What was written since, on top of the backup before; or a full one."""
        rng, node, base = self.random, chain.chain(self.backend.node)[0], self._base
        bitmap = node.find_bitmap(SINCE)
        fits = base and base.source == self.top and base.breaks == self._breaks()
        if base is None or not fits or bitmap is None or bitmap.inconsistent:
            await self._do_backup()
            return
        mode = rng.choice((None, *BitmapSyncMode))
        sync = MirrorSyncMode.INCREMENTAL if mode is None else MirrorSyncMode.BITMAP
        await self._back_up(base.name, [], sync=sync, bitmap=SINCE, bitmap_mode=mode)

    def _keeps_bitmaps(self, node: Node) -> bool:
        specific = node.driver.format_specific()
        return specific is not None and specific["data"]["compat"] != "0.10"

    async def _do_backup_top(self) -> None:
        """What the active image has, on the one below it; good as long as that one is as it is."""
        layers = chain.chain(self.backend.node)
        if len(layers) < 2:
            await self._do_backup()
            return
        below = layers[1]
        assert below.file is not None and isinstance(below.file.driver, SimulatedDisk)
        number = await self._back_up(below.file.driver.medium.name, [], sync=MirrorSyncMode.TOP)
        if number is not None:
            self._on_chain.append(number)

    def _chain_changes(self) -> None:
        """Images below the active one are written to from now on."""
        for number in self._on_chain:
            self.machine.note("gone", number)
        self._on_chain.clear()

    async def _do_unflushable(self) -> None:
        """A mirror or backup to a disk of which no flush succeeds does not succeed either."""
        self._unflushable = True
        try:
            if self.random.random() < 0.5:
                job = await self._mirror(MirrorSyncMode.FULL)
                assert job.error is not None, f"{job.id}: the target is not durable"
            else:
                await self._back_up(None, [], sync=MirrorSyncMode.FULL)
        finally:
            self._unflushable = False

    async def _forget_since(self, node: Node) -> None:
        self._base = None
        self.machine.note("base", 0, 0, None)
        if node.find_bitmap(SINCE) is not None:
            await dirty.remove(self.bench.graph, node.name, SINCE)

    async def _back_up(
        self, below: str | None, actions: list[Action], **options: Any
    ) -> int | None:
        """The number of the copy, if there is one."""
        rng, graph, scheduler = self.random, self.bench.graph, self.bench.scheduler
        self.copies += 1
        job_id = f"{self.mark}backup{self.copies}"
        name = f"{self.directory}/backup{self.copies}.img"
        may_be_raw = below is None and not actions
        target = await self._new_image(name, below, None, may_be_raw=may_be_raw)
        form = self.forms[name]
        parameters = BackupParameters(
            job_id,
            self.drive,
            target.name,
            speed=rng.choice((0, 0, 256 * KIB)),
            compress=rng.random() < 0.2 and forms.can_compress(form),
            on_target_error=BlockdevOnError(rng.choice(("report", "ignore", "stop"))),
            on_source_error=BlockdevOnError(rng.choice(("report", "ignore", "stop"))),
            on_cbw_error=rng.choice(tuple(OnCbwError)),
            **options,
        )
        self.story.append(f"  {parameters} {form}")
        has_bitmap = bool(actions)
        actions.insert(
            rng.randrange(len(actions) + 1),
            JobAction(
                scheduler,
                (self.drive, target.name),
                lambda transaction: create_backup(graph, scheduler, parameters, transaction),
            ),
        )
        try:
            started = await self._at_once(name, job_id, actions)
            if started:
                await self._end_backup(job_id, name, parameters, has_bitmap)
            return self._under_way[job_id]
        finally:
            await graph.delete(target.name)

    async def _at_once(self, name: str, job_id: str, actions: list[Action]) -> bool:
        """The transaction; whether it took place."""
        rng, machine = self.random, self.machine
        snapshot = f"with{self.copies}" if rng.random() < 0.25 else None
        if snapshot is not None and "raw" not in self.forms[self.top]:
            actions.insert(0, InternalSnapshot(self.bench.graph, self.drive, snapshot))
        else:
            snapshot = None
        if rng.random() < 0.1:
            actions.append(Abort())
        exact = rng.random() < 0.5
        if exact:
            async with self.guest.halted():
                return await self._perform(name, job_id, actions, snapshot)
        del machine
        return await self._perform(name, job_id, actions, snapshot)

    async def _perform(
        self, name: str, job_id: str, actions: list[Action], snapshot: str | None
    ) -> bool:
        machine, top = self.machine, self.top
        self._under_way[job_id] = None
        kept = machine.number()
        if snapshot is not None:
            backing = chain.chain(self.backend.node)[0].driver.backing_file
            place = (top, snapshot, None, backing and plain_name(backing))
            machine.note("keep", kept, 0, place)
        try:
            with self._instant() as instant:
                await perform(self.bench.graph, actions)
        except BlockError as error:
            if "using Abort action" not in str(error):
                raise
            self.story.append("  aborted")
            if snapshot is not None:
                machine.note("forget", kept, 0, (top, snapshot))
                machine.note("forgotten", kept)
            return False
        if snapshot is not None:
            machine.note("kept", kept)
            self.internal.append((chain.chain(self.backend.node)[0].name, snapshot))
        number = machine.number()
        machine.note("backup", number, 0, (name, instant.content, tuple(instant.unknown)))
        self._under_way[job_id] = number
        if job_id in self._early:
            machine.note("backed", number)
        return True

    @contextmanager
    def _instant(self) -> Iterator[Instant]:
        """The instant is within this block."""
        guest, instant = self.guest, Instant()
        instant.unknown = guest.under_way()
        guest.watchers.append(instant.unknown)
        try:
            yield instant
        finally:
            guest.watchers.remove(instant.unknown)
            instant.unknown.extend(guest.unknown)
            instant.content = bytes(guest.model[: guest.size])

    async def _end_backup(
        self, job_id: str, name: str, parameters: BackupParameters, has_bitmap: bool
    ) -> None:
        rng, base, top = self.random, self._base, self.top
        job = self.bench.scheduler.find(job_id)
        failed = False
        if job is not None:
            cancel = rng.choice((0.0, 0.03, 0.3)) if rng.random() < 0.3 else None
            await self._until(job, cancel=cancel)
            failed = job.error is not None
            assert failed or not self._unflushable, f"{job_id}: the target is not durable"
        mode = parameters.bitmap_mode
        if failed and mode is BitmapSyncMode.ALWAYS:
            # What it has is no backup, but the bitmap counts from there: increments build on it.
            assert base is not None
            self.machine.note("base", 0, 0, None)
            self._base = Base(name, top, base.breaks)
        elif not failed and (has_bitmap or parameters.bitmap is not None):
            if mode is BitmapSyncMode.NEVER and rng.random() < 0.5:
                return  # the bitmap counts from the one before; it is good for both
            self._base = Base(name, top, self._breaks())
            self.machine.note("base", 0, 0, (top, name))
