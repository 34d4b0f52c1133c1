"""Steps of a chaos that few users take: images by name, copies of what changes, reads of the past.

A part of ``chaos.Drive``. Where a copy stands on the disk's own images it is read through its node:
another program could not open them.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from liveblockd.errors import BlockError
from liveblockd.graph import chain, surgery
from liveblockd.graph.backend import Backend
from liveblockd.graph.node import Node
from liveblockd.jobs.job import Job
from liveblockd.storage.driver import Permission
from tests.simulation import images
from tests.simulation.bench import Bench
from tests.simulation.chaos_faults import POLICIES
from tests.simulation.watched import Moment, Watched

KIB = 1024


def path_of(node: Node) -> str:
    """Of the image file."""
    assert node.file is not None
    return node.file.filename


class Copies:
    """See the module."""

    if TYPE_CHECKING:
        bench: Bench
        rng: random.Random
        directory: str
        name: str
        backend: Backend
        guest: Watched
        paths: list[tuple[str, str]]
        leaking: set[str]
        unflushable: dict[str, Any]
        all: list[Any]
        commits: int
        committing: int
        done: Any

        async def qmp(self, name: str, /, **arguments: Any) -> Any: ...
        async def snapshot(self) -> None: ...
        async def _stream(self, top: Node, base: Node | None) -> None: ...
        async def _commit(self, top: Node, base: Node) -> None: ...
        async def _target(
            self, below: str | None, backing: str | None = None, *, faulty: bool = False
        ) -> tuple[str, str]: ...
        async def _begin(
            self, command: str, /, *, give_up: str | None = None, **arguments: Any
        ) -> Job: ...
        async def _begin_backup(self, target: str, sync: str, **more: str) -> Job: ...
        async def _steer(self, job: Job, at_end: Any = None, **how: bool) -> None: ...
        async def _content(self, path: str) -> bytes: ...
        def _format(self, path: str) -> str: ...
        def _check_end(self, job: Job, faulty: bool, path: str = "") -> bool: ...
        def _guest_may_fail(self, faulty: bool) -> Any: ...
        def apart_from(self, others: str, own: str) -> Any: ...
        def _policies(self) -> dict[str, str]: ...
        def layers(self) -> list[Node]: ...
        def number(self) -> int: ...

    # -- several jobs in one chain

    async def several(self) -> None:
        """Jobs on parts of the chain that have nothing in common, at the same time."""
        rng = self.rng
        while len(self.layers()) < 7:
            await self.snapshot()
        layers = self.layers()
        # A commit has the active image for itself.
        first = int(rng.random() < 0.8)
        cuts = sorted(rng.sample(range(first, len(layers)), rng.choice((4, 4, 6))))
        jobs = []
        for top, base in zip(cuts[::2], cuts[1::2], strict=True):
            work = rng.choice((self._stream, self._commit))
            jobs.append(work(layers[top], layers[base]))
        for outcome in await asyncio.gather(*jobs, return_exceptions=True):
            if isinstance(outcome, BlockError):
                self.done["refused"] += 1
            elif outcome is not None:
                raise outcome

    # -- images by name

    async def _named_target(self, layers: list[Node], sync: str, kind: str) -> dict[str, Any]:
        """Members of drive-mirror and drive-backup; the image may be there already."""
        path = f"{self.directory}/{self.name}n{self.number()}.qcow2"
        mode = self.rng.choice(("existing", "absolute-paths"))
        below = {"top": 1, "none": 0}.get(sync)
        if below is not None and below >= len(layers):
            below = None
        if mode == "existing":
            backing = None if below is None else path_of(layers[below])
            await images.create(
                self.bench,
                path,
                size=self.backend.length,
                cluster_size=self.rng.choice((4, 64)) * KIB,
                backing_file=backing,
                backing_format=None if backing is None else self._format(backing),
            )
        self.paths.append((path, "qcow2"))
        self.done[f"{kind} {mode} {sync}"] += 1
        return {"target": path, "format": "qcow2", "sync": sync, "mode": mode}

    async def drive_mirror(self) -> None:
        """The guest goes over to an image that the job opens; or the job ends with a copy."""
        with self.apart_from("fleece", "mirror"):
            await self._drive_mirror()

    async def _drive_mirror(self) -> None:
        rng, layers = self.rng, self.layers()
        sync = rng.choice(("full", "top", "none"))
        target = await self._named_target(layers, sync, "mirror")
        path = target["target"]
        with Moment(self.guest) as moment:
            try:
                job = await self._begin(
                    "drive-mirror",
                    device=self.name,
                    copy_mode=rng.choice(("background", "write-blocking")),
                    granularity=rng.choice((4, 64)) * KIB,
                    on_target_error=rng.choice(POLICIES),
                    **target,
                )
            except BlockError:
                if target["mode"] != "existing":
                    self.paths.remove((path, "qcow2"))  # it was not made, or is gone again
                raise
            if target["mode"] == "existing" and self.layers()[:2] != layers[:2]:
                self.bench.scheduler.cancel(job, force=True)  # the other operator was quicker
            await self._steer(job, moment.begin)
            copied = self._check_end(job, False) and not job.cancelled
        if path in (path_of(layer) for layer in self.layers()):
            self.done["pivot"] += 1
        elif copied and sync == "full" and not await self._is_open(path):
            moment.compare(await self._content(path), "a drive-mirror")

    async def _is_open(self, path: str) -> bool:
        """The other operator may have taken the guest further already."""
        return any(node.filename == path for node in self.bench.graph.nodes.values())

    async def drive_backup(self) -> None:
        """To an image that the job opens and closes."""
        layers, rng = self.layers(), self.rng
        sync = rng.choice(("full", "top"))
        target = await self._named_target(layers, sync, "backup")
        path = target["target"]
        if rng.random() < 0.2:
            target["compress"] = True
        try:
            with Moment(self.guest) as moment:
                job = await self._begin("drive-backup", device=self.name, **target)
        except BlockError:
            if target["mode"] != "existing":
                self.paths = [(p, f) for p, f in self.paths if p != path]
            raise
        await self._steer(job)
        if self._check_end(job, False) and sync == "full":
            moment.compare(await self._content(path), "a drive-backup")
            self.done["drive-backup compared"] += 1

    # -- copies that stand on the disk's own images

    async def _read_all(self, node: Node, *, slowly: bool) -> bytes:
        """What is to be read from a node while all goes on, in no order."""
        graph = self.bench.graph
        user = await graph.attach(node, Permission.CONSISTENT_READ, Permission.ALL)
        try:
            found = bytearray(user.length)
            step = self.rng.choice((4, 64, 256)) * KIB
            places = list(range(0, user.length, step))
            self.rng.shuffle(places)
            for offset in places:
                length = min(step, user.length - offset)
                found[offset : offset + length] = await user.read(offset, length)
                if slowly and self.rng.random() < 0.3:
                    await asyncio.sleep(self.rng.random() * 0.002)
            return bytes(found)
        finally:
            await graph.detach(user)

    async def backup_top(self) -> None:
        """What the active image has, to an image on the next one."""
        layers, commits = self.layers(), self.commits
        if len(layers) < 2 or self.committing:
            return
        faulty = self.rng.random() < 0.3
        target, path = await self._target(path_of(layers[1]), layers[1].name, faulty=faulty)
        with self._guest_may_fail(faulty):
            with Moment(self.guest) as moment:
                job = await self._begin_backup(target, "top")
                source = chain.skip_filters(job.source)  # type: ignore[attr-defined]
            await self._steer(job, hopeless=path in self.unflushable)
        same = source is layers[0] and commits == self.commits
        if self._check_end(job, faulty, path) and same:
            with suppress(OSError if faulty else ()):
                found = await self._read_all(self.bench.graph.nodes[target], slowly=False)
                if commits == self.commits:
                    moment.compare(found, "a backup of the top")
                    self.done["top compared"] += 1
        await self.qmp("blockdev-del", node_name=target)

    async def backup_none(self) -> None:
        """The old way to read the past: the target stands on the disk, and gets what goes."""
        top = self.layers()[0]
        target, _ = await self._target(path_of(top), top.name)
        with Moment(self.guest) as moment:
            job = await self._begin(
                "blockdev-backup", give_up=target, device=self.name, target=target, sync="none"
            )
        source = chain.skip_filters(job.source)  # type: ignore[attr-defined]
        try:
            for _ in range(self.rng.randrange(1, 4) if source is top else 0):
                found = await self._read_all(self.bench.graph.nodes[target], slowly=True)
                moment.compare(found, "a target of sync=none")
                self.done["none compared"] += 1
        finally:
            self.bench.scheduler.cancel(job, force=self.rng.random() < 0.5)
            await self._steer(job)
            await self.qmp("blockdev-del", node_name=target)

    async def fleece(self) -> None:
        """The new way: copy-before-write under the guest, and snapshot-access beside it."""
        with self.apart_from("mirror", "fleece"):
            await self._fleece()

    async def _fleece(self) -> None:
        graph, top, faulty = self.bench.graph, self.layers()[0], self.rng.random() < 0.25
        target, _ = await self._target(None, faulty=faulty)
        cbw, past = f"{target}cbw", f"{target}past"
        policy = self.rng.choice(("break-guest-write", "break-snapshot"))
        try:
            await self.qmp(
                "blockdev-add",
                driver="copy-before-write",
                node_name=cbw,
                file=top.name,
                target=target,
                on_cbw_error=policy,
            )
        except BlockError:
            await self.qmp("blockdev-del", node_name=target)
            raise
        with self._guest_may_fail(faulty):
            moment = await self._put_in(graph.nodes[cbw], top)
            if moment is not None:
                await self.qmp(
                    "blockdev-add",
                    driver="snapshot-access",
                    node_name=past,
                    file=cbw,
                    read_only=True,
                )
                try:
                    await self._look_back(past, moment, faulty=faulty)
                finally:
                    await self.qmp("blockdev-del", node_name=past)
                    await self._take_out(graph.nodes[cbw])
        await self.qmp("blockdev-del", node_name=cbw)
        await self.qmp("blockdev-del", node_name=target)

    async def _put_in(self, above: Node, top: Node) -> Moment | None:
        """As an export comes to stand on another node; None if the guest is elsewhere by now."""
        graph = self.bench.graph
        async with graph.lock, graph.drained(top, above):
            # One that was made longer before the filter was put in is not the disk of the instant.
            if self.backend.node is not top or above.driver.core.length != top.length:  # type: ignore[attr-defined]
                return None
            with Moment(self.guest) as moment:
                moment.length = top.length
                (own,) = (edge for edge in top.parents if edge.parent is above)
                await surgery.replace_nodes(graph, [top], above, keep=[own])
        return moment

    async def _take_out(self, above: Node) -> None:
        graph = self.bench.graph
        async with graph.lock, graph.drained(above):
            if above.parents:
                assert above.file is not None
                await surgery.replace_nodes(graph, [above], above.file)

    async def _look_back(self, past: str, moment: Moment, *, faulty: bool) -> None:
        """Read it, and back it up as backup products do."""
        for _ in range(self.rng.randrange(1, 4)):
            try:
                found = await self._read_all(self.bench.graph.nodes[past], slowly=True)
            except OSError as error:
                assert faulty or self.bench.workers.injected, error  # type: ignore[attr-defined]
                return
            assert len(found) == moment.length, "the past has another length"
            moment.compare(found, "the past")
            self.done["past compared"] += 1
        if self.rng.random() < 0.5:
            return
        target, path = await self._target(None)
        if self.bench.graph.nodes[target].length != moment.length:
            await self.qmp("blockdev-del", node_name=target)
            return
        job = await self._begin(
            "blockdev-backup", give_up=target, device=past, target=target, sync="full"
        )
        await self._steer(job)
        await self.qmp("blockdev-del", node_name=target)
        if self._check_end(job, faulty):
            moment.compare(await self._content(path), "a backup of the past")
            self.done["past backed up"] += 1

    # -- all or none

    async def grouped(self) -> None:
        """Two backups that succeed together or not at all; of two drives where there are."""
        rng = self.rng
        drives = [self, rng.choice(self.all)]
        targets, faults = [], [rng.random() < 0.3 for _ in drives]
        for drive, faulty in zip(drives, faults, strict=True):
            targets.append(await drive._target(None, faulty=faulty))
        job_ids = [f"{self.name}-job{self.number()}" for _ in drives]
        with ExitStack() as stack:
            for drive in drives:
                stack.enter_context(drive._guest_may_fail(any(faults)))
            moments = await self._together(drives, targets, job_ids)
            jobs = [self.bench.scheduler.find(job_id) for job_id in job_ids]
            running = [job for job in jobs if job is not None]
            doubtful = any(path in drive.unflushable for drive in drives for _, path in targets)
            await asyncio.gather(*(self._steer(job, hopeless=doubtful) for job in running))
        for target, _ in targets:
            await self.qmp("blockdev-del", node_name=target)
        if len(running) < len(jobs):
            return
        outcomes = [self._check_end(job, any(faults) or job.cancelled, "") for job in running]
        assert len(set(outcomes)) == 1, f"{job_ids}: {[job.error for job in running]}"
        if not outcomes[0]:
            return
        lost = [path for drive in drives for _, path in targets if drive.has_lost(path)]
        assert not lost, f"{job_ids}: what cannot be flushed is not durable"
        for (_, path), moment in zip(targets, moments, strict=True):
            moment.compare(await self._content(path), "one of a group")
        self.done["group compared"] += 1

    async def _together(
        self, drives: list[Any], targets: list[tuple[str, str]], job_ids: list[str]
    ) -> list[Moment]:
        actions = [
            {
                "type": "blockdev-backup",
                "data": {
                    "job-id": job_id,
                    "device": drive.name,
                    "target": target,
                    "sync": "full",
                    "speed": self.rng.choice((0, 0, 4 << 20)),
                    **{k.replace("_", "-"): v for k, v in self._policies().items()},
                },
            }
            for drive, (target, _), job_id in zip(drives, targets, job_ids, strict=True)
        ]
        try:
            with ExitStack() as stack:
                moments = [stack.enter_context(Moment(drive.guest)) for drive in drives]
                await self.qmp(
                    "transaction", actions=actions, properties={"completion-mode": "grouped"}
                )
        except BlockError:
            for target, _ in targets:
                await self.qmp("blockdev-del", node_name=target)
            raise
        return moments
