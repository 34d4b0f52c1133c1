"""Steps of a machine that merge images downwards: commits of intermediate and of active images.

A part of ``machine.Scene``. Left out are images with internal snapshots, or with the bitmap that is
judged, between top and base: what they show by themselves changes, which nobody was promised
otherwise. An image that is longer than the guest's disk does not become that disk.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from liveblockd.graph import chain
from liveblockd.graph.backend import Backend
from liveblockd.graph.node import Node
from liveblockd.jobs.job import Job
from tests.simulation.bench import Bench
from tests.simulation.crashguest import CrashGuest
from tests.simulation.disks import Machine, SimulatedDisk


class Merging:
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
        internal: list[tuple[str, str]]
        bitmap_in: str | None
        commits: int
        streams: int

        def _chain_changes(self) -> None: ...
        async def _do_snapshot(self) -> None: ...
        async def _wait(self, most: float) -> None: ...

    async def _do_commit(self) -> None:
        """Of images below the active one."""
        layers = chain.chain(self.backend.node)
        if len(layers) < 3:
            await self._do_commit_active()
            return
        rng = self.random
        top = rng.randrange(1, len(layers) - 1)
        base = rng.randrange(top + 1, len(layers))
        if not self._may_merge(layers[top:base]):
            self.story.append("  not these images")
            return
        self.story.append(f"  {layers[top].filename} into {layers[base].filename}")
        job = await self._commit(layers[top], layers[base])
        await self._until_over(job, cancel=rng.random() < 0.15)

    async def _do_commit_active(self) -> None:
        """Of the active image: ready, then the switch, or none."""
        layers = chain.chain(self.backend.node)
        rng = self.random
        base = rng.randrange(1, len(layers)) if len(layers) > 1 else 0
        if not base or not self._may_merge(layers[:base]):
            self.story.append("  not these images")
            return
        if layers[base].length > layers[0].length:
            self.story.append("  too long")
            return
        self.story.append(f"  into {layers[base].filename}")
        job = await self._commit(layers[0], layers[base])
        if rng.random() < 0.1:
            await self._until_over(job, cancel=True)
            return
        while job.status not in ("ready", "null"):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        if job.status == "ready":
            await self._wait(rng.choice((0.0, 0.1)))
            if job.status == "ready" and rng.random() < 0.2:
                self.bench.scheduler.cancel(job)
            elif job.status == "ready":
                self.bench.scheduler.complete(job)
        await self._until_over(job, cancel=False)

    def _may_merge(self, layers: list[Node]) -> bool:
        with_snapshots = {name for name, _ in self.internal}
        for number, layer in enumerate(layers):
            assert layer.file is not None and isinstance(layer.file.driver, SimulatedDisk)
            tracked = number and layer.file.driver.medium.name == self.bitmap_in
            if layer.name in with_snapshots or tracked:
                return False
        return True

    async def _do_several(self) -> None:
        """A stream and a commit on parts of one chain that have nothing in common."""
        rng = self.random
        for _ in range(max(0, 6 - len(chain.chain(self.backend.node)))):
            await self._do_snapshot()
        layers = chain.chain(self.backend.node)
        # A commit has the active image for itself.
        a, b, c, d = sorted(rng.sample(range(1, len(layers)), 4))
        (top, base), streamed = ((a, b), (c, d)) if rng.random() < 0.5 else ((c, d), (a, b))
        jobs: list[Job] = []
        if self._may_merge(layers[top:base]):
            jobs.append(await self._commit(layers[top], layers[base]))
        self.streams += 1
        name, below = (layers[number].name for number in streamed)
        job_id = f"{self.mark}stream{self.streams}"
        jobs.append(await self.bench.stream(name, job_id, base_node=below))
        self.story.append(f"  {top} into {base}, {streamed}")
        ends = [self._until_over(job, cancel=rng.random() < 0.15) for job in jobs]
        for outcome in await asyncio.gather(*ends, return_exceptions=True):
            if outcome is not None:
                raise outcome

    async def _commit(self, top: Node, base: Node) -> Job:
        self.commits += 1
        self._chain_changes()
        speed = self.random.choice((0, 0, 256 << 10))
        return await self.bench.commit(
            self.drive,
            f"{self.mark}commit{self.commits}",
            top_node=top.name,
            base_node=base.name,
            speed=speed,
        )

    async def _until_over(self, job: Job, *, cancel: bool) -> None:
        if cancel:
            await self._wait(0.2)
        while job.status != "null":
            if cancel and job.status in ("running", "ready"):
                self.bench.scheduler.cancel(job, force=True)
                cancel = False
            await asyncio.sleep(0.001)
        if job.error is not None:
            self.story.append(f"  ended: {job.error}")
            full = "No space" in str(job.error)  # a long backing name, a small header cluster
            assert job.cancelled or self.machine.injected or full, f"{job.id} failed: {job.error}"
