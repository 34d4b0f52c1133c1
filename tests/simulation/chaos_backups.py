"""Steps of a chaos that back the disk up, with the bitmap that increments count by.

A part of ``chaos.Drive``. A backup is compared with what the disk held at its instant as soon as
its job has succeeded.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from liveblockd.errors import BlockError
from liveblockd.graph.node import Node
from liveblockd.jobs.job import Job
from tests.simulation.bench import Bench
from tests.simulation.chaos_faults import POLICIES
from tests.simulation.watched import Moment, Watched


class Backups:
    """See the module."""

    if TYPE_CHECKING:
        bench: Bench
        rng: random.Random
        name: str
        guest: Watched
        leaking: set[str]
        unflushable: dict[str, Any]
        done: Any
        _backup: str | None

        async def qmp(self, name: str, /, **arguments: Any) -> Any: ...
        async def _quietly(self, command: str, /, **arguments: Any) -> None: ...
        async def _target(
            self, below: str | None, backing: str | None = None, *, faulty: bool = False
        ) -> tuple[str, str]: ...
        async def _begin(
            self, command: str, /, *, give_up: str | None = None, **arguments: Any
        ) -> Job: ...
        async def _steer(self, job: Job, **how: Any) -> None: ...
        async def _content(self, path: str) -> bytes: ...
        def _check_end(self, job: Job, faulty: bool, path: str = "") -> bool: ...
        def layers(self) -> list[Node]: ...
        def number(self) -> int: ...

    async def backup(self) -> None:
        """Full, or an increment if there is one to build on."""
        if self._backup is None or self.rng.random() < 0.3:
            await self._full_backup()
            return
        faulty = self.rng.random() < 0.4
        below = self._backup
        target, path = await self._target(below, faulty=faulty)
        if self._backup != below:  # the bitmap tells what is new since another one
            await self.qmp("blockdev-del", node_name=target)
            return
        with self._guest_may_fail(faulty):
            with Moment(self.guest) as moment:
                job = await self._begin_backup(target, "incremental", bitmap="backup")
            # The next one would stand on it, but nobody knows yet whether it will be there.
            self._backup = None
            done = await self._end_backup(job, target, path, moment, "an increment")
        if not done and self._backup is None:
            self._backup = below

    async def _begin_backup(self, target: str, sync: str, **more: str) -> Job:
        more |= self._policies()
        return await self._begin(
            "blockdev-backup", give_up=target, device=self.name, target=target, sync=sync, **more
        )

    def _policies(self) -> dict[str, str]:
        rng = self.rng
        return {
            "on_target_error": rng.choice(POLICIES),
            "on_source_error": rng.choice(POLICIES),
            "on_cbw_error": rng.choice(("break-guest-write", "break-snapshot")),
        }

    @contextmanager
    def _guest_may_fail(self, faulty: bool) -> Iterator[None]:
        """A write that has to wait for the target gets its error."""
        self.guest.may_fail += faulty
        try:
            yield
        finally:
            self.guest.may_fail -= faulty

    async def _full_backup(self) -> None:
        faulty = self.rng.random() < 0.4
        target, path = await self._target(None, faulty=faulty)
        more: dict[str, Any] = {"compress": True} if self.rng.random() < 0.2 else {}
        node = self.layers()[0].name
        job_id = f"{self.name}-job{self.number()}"
        more |= {key.replace("_", "-"): value for key, value in self._policies().items()}
        backup = {"job-id": job_id, "device": self.name, "target": target, "sync": "full", **more}
        actions: list[dict[str, Any]] = [{"type": "blockdev-backup", "data": backup}]
        old = self._backup is not None and self.layers()[0].find_bitmap("backup") is not None
        bitmap = {"node": node, "name": "backup"}
        kind = "block-dirty-bitmap-clear" if old else "block-dirty-bitmap-add"
        actions.insert(self.rng.randrange(2), {"type": kind, "data": bitmap})
        with self._guest_may_fail(faulty):
            done = await self._full_backup_at_once(actions, job_id, target, path)
        if not done:
            with_bitmap = self.bench.graph.nodes.get(node)
            if with_bitmap is not None and with_bitmap.find_bitmap("backup") is not None:
                await self._quietly("block-dirty-bitmap-remove", node=node, name="backup")

    async def _end_backup(
        self, job: Job, target: str, path: str, moment: Moment, what: str
    ) -> bool:
        # The next increment has what one that was cancelled was to have.
        cancels = 0.5 if what == "an increment" else 0.2
        await self._steer(job, hopeless=path in self.unflushable, cancels=cancels)
        await self.qmp("blockdev-del", node_name=target)
        if not self._check_end(job, path in self.leaking, path):
            return False
        moment.compare(await self._content(path), what)
        self._backup = path if path.endswith("qcow2") else None
        self.done[what] += 1
        return True

    async def _full_backup_at_once(
        self, actions: list[dict[str, Any]], job_id: str, target: str, path: str
    ) -> bool:
        try:
            with Moment(self.guest) as moment:
                await self.qmp("transaction", actions=actions)
        except BlockError:
            await self.qmp("blockdev-del", node_name=target)
            raise
        self._backup = None
        job = self.bench.scheduler.find(job_id)
        if job is None:  # it is over already
            await self.qmp("blockdev-del", node_name=target)
            return True
        return await self._end_backup(job, target, path, moment, "a backup")
