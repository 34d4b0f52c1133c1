"""Steps of a machine that concern one image: internal snapshots, its version, its refcounts.

A part of ``machine.Scene``. What is done offline has no faults: there the guest could not know
which of two states it will find.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.amend import Amendment
from liveblockd.formats.qcow2.image import Qcow2
from liveblockd.graph import internal_snapshot
from liveblockd.graph.node import Node
from tests.simulation.bench import Bench
from tests.simulation.copies import SINCE
from tests.simulation.crashed import plain_name
from tests.simulation.crashguest import CrashGuest
from tests.simulation.disks import Machine

#: what an image may be unable to do
REFUSED = (
    "which has snapshots", "would have more than", "No space left", "not support internal",
    "Cannot downgrade", "compat=0.10 requires", "other than 16 bits", "Operation not supported",
    "Lazy refcounts only", "Internal snapshots prevent downgrade",
)  # fmt: skip
#: the persistent dirty bitmap that is tracked from the first request on
BITMAP = "tracked"


class Upkeep:
    """See the module."""

    if TYPE_CHECKING:
        random: random.Random
        machine: Machine
        guest: CrashGuest
        bench: Bench
        story: list[str]
        internal: list[tuple[str, str]]
        kept: dict[tuple[str, str], tuple[int, bytes]]
        bitmap_in: str | None
        top: str
        _node: Node

        async def _alone(self, name: str) -> Qcow2: ...
        async def _wait(self, most: float) -> None: ...
        async def _sync_and_restart(
            self, between: Callable[[], Awaitable[None]] | None = None
        ) -> None: ...

    async def _do_internal(self) -> None:
        """An internal snapshot: tables and clusters are shared from then on."""
        name, guest = f"snapshot{len(self.story)}", self.guest
        if self.random.random() < 0.3 and not self.machine.names[self.top].flush_failed:
            await self._take(name, None)  # in the middle of requests: nobody knows what is in it
            return
        async with guest.halted():
            # What failed half may be as it is now, or not.
            await self._take(name, None if guest.unknown else bytes(guest.model[: guest.size]))

    async def _take(self, name: str, content: bytes | None) -> None:
        pair, number = (self._node.name, name), self.machine.number()
        backing = self._node.driver.backing_file
        backing = backing and plain_name(backing)
        place = (self.top, name, content, backing)
        self.machine.note("keep", number, 0, place)
        await internal_snapshot.create(self.bench.graph, self._node.name, name)
        self.machine.note("kept", number)
        self.internal.append(pair)
        if content is not None and backing is None:
            self.kept[pair] = (len(content), content)

    def _mine(self) -> list[tuple[str, str]]:
        return [pair for pair in self.internal if pair[0] == self._node.name]

    async def _do_internal_gone(self) -> None:
        mine = self._mine()
        if not mine:
            await self._do_internal()
            return
        pair = self.random.choice(mine)
        self.internal.remove(pair)
        number = self.machine.number()
        self.machine.note("forget", number, 0, (self.top, pair[1]))
        await internal_snapshot.delete(self.bench.graph, pair[0], None, pair[1])
        self.machine.note("forgotten", number)

    async def _do_internal_apply(self) -> None:
        """Back to an internal snapshot, offline, with other writes since then."""
        known = [pair for pair in self._mine() if pair in self.kept]
        if not known:
            await self._do_internal()
            await self._wait(0.1)
            known = [pair for pair in self._mine() if pair in self.kept]
        if not known:
            return
        pair = self.random.choice(known)
        size, content = self.kept[pair]
        guest, machine = self.guest, self.machine
        applied: list[bool] = []

        async def apply() -> None:
            image = await self._alone(self.top)
            found = next(s for s in image.list_snapshots() if s.name == pair[1])
            await self._forget_bitmap(image)
            number = machine.number()
            machine.note("apply", number, size, content)
            try:
                await image.apply_snapshot(found.id)
            except BlockError as error:
                if not any(text in str(error) for text in REFUSED):
                    raise
                self.story.append(f"  {error.message}")
                machine.note("unapplied", number)
            else:
                machine.note("applied", number)
                applied.append(True)
            await image.close()

        async with guest.halted(), self._calm():
            if machine.injected:
                return
            await self._sync_and_restart(apply)
            if not applied:
                return
            guest.size = guest.backend.length
            assert guest.size == size
            guest.model[:] = content.ljust(len(guest.model), b"\0")

    async def _do_amend(self) -> None:
        """Another version, another width of refcounts, lazy refcounts or not; offline."""
        rng, machine = self.random, self.machine
        wanted = rng.choice(
            (
                Amendment(version=2),
                Amendment(version=3),
                Amendment(version=3, refcount_bits=rng.choice((8, 16, 32, 64))),
                Amendment(lazy_refcounts=rng.random() < 0.5),
            )
        )
        self.story.append(f"  {wanted}")

        async def change() -> None:
            image = await self._alone(self.top)
            await self._forget_bitmap(image)
            try:
                await image.amend(wanted)
            except BlockError as error:
                if not any(text in str(error) for text in REFUSED):
                    raise
                self.story.append(f"  {error.message}")
            await image.close()

        async with self.guest.halted(), self._calm():
            if not machine.injected:
                await self._sync_and_restart(change)

    async def _do_check(self) -> None:
        """Leaks, which are on the disk, are given back while the guest goes on."""
        image, graph = self._node.driver, self.bench.graph
        assert isinstance(image, Qcow2)
        for _ in range(self.random.randrange(1, 4)):
            await image._metadata.allocate(self.random.randrange(1, 9))  # and forgotten
        await image.flush()

        @asynccontextmanager
        async def quiesced() -> AsyncIterator[None]:
            async with graph.lock, graph.drained(self._node):
                yield

        check = image.live_check(quiesced, fix_leaks=True)
        async with aclosing(check.scan()) as pieces:
            async for _ in pieces:
                await self._wait(0.01)
        result = check.result
        assert self.machine.injected or not result.corruptions, result.messages
        self.story.append(f"  leaks given back: {result.leaks_fixed}")
        if not self.machine.injected:
            assert result.leaks_fixed and not result.leaks
        await image.flush()

    async def _forget_bitmap(self, image: Qcow2) -> None:
        """Without a graph nobody keeps the bitmap true: it would be inconsistent from now on."""
        await image.remove_bitmap(SINCE)
        if self.bitmap_in == self.top:
            await image.remove_bitmap(BITMAP)
            self.bitmap_in = None

    @asynccontextmanager
    async def _calm(self) -> AsyncIterator[None]:
        """No faults for a while."""
        self.machine.calm += 1
        try:
            yield
        finally:
            self.machine.calm -= 1
