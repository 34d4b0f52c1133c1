"""The core of mirrors and active commits: copy a node to another one while guests write to it.

Specification: qapi/block-core.json (blockdev-mirror, drive-mirror, BlockJobInfoMirror,
block-job-change). Runs on the event loop; reads and writes are the drivers'.

A ``MirrorBitmap`` on the source records what is written. A first pass finds what is to be copied;
then chunks that are dirty are copied until there are none (READY), and again when guests write. In
copy mode ``write-blocking`` a guest's write is answered when it is in both images.

Why nothing is lost:

* A chunk is called clean before it is read, and every write that ends later makes it dirty again.
* Requests to the target do not overlap (``chunks``).
* ``prepare`` stops the guests, copies the rest, flushes the target, and only then switches. A
  crash, an error or a cancel before that leaves the guests on the source, which has everything.

Errors: OSError of the source or target under the policy ``report``; BlockError from ``prepare``.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager, suppress
from errno import EIO
from typing import ClassVar, Final

from liveblockd.errors import BlockError
from liveblockd.graph import chain
from liveblockd.graph.graph import Graph
from liveblockd.graph.mirror_top import Apply, MirrorTop
from liveblockd.graph.node import Node
from liveblockd.jobs.chunk_size import ChunkSize
from liveblockd.jobs.chunks import Chunks, Claim, MirrorBitmap, most_copies
from liveblockd.jobs.copying import (
    KIB,
    MIB,
    READ_CHUNK,
    PieceFailedError,
    limited_chunk,
)
from liveblockd.jobs.first_pass import look_at, parts_of
from liveblockd.jobs.host_copy import copy_runs, guest_is_served
from liveblockd.jobs.job import ErrorAction, Job
from liveblockd.jobs.mirror_options import DEFAULT_BUFFER, MirrorCopyMode, MirrorOptions
from liveblockd.jobs.mirrored import MirroredWrites
from liveblockd.jobs.planning import LEAST_COPY
from liveblockd.jobs.user import JobUser
from liveblockd.runtime.halting import Halt, HaltedError
from liveblockd.storage.driver import Buffer

MOST_CHUNK: Final = 2 * MIB
#: what is asked of the layers in one step of the first pass
STRETCH: Final = 1024 * MIB
#: seconds after which a job in step looks for new writes, or tries again what failed
SLICE: Final = 0.1
#: seconds for which guests may have to wait for the last rest
LAST_REST: Final = 0.05
#: seconds for which what was flushed need not be flushed again before guests are stopped
JUST_NOW: Final = 0.1
#: bytes that may always be left for that
LEAST_REST: Final = 256 * KIB
#: bytes that may be dirty in a mirror that is called ready although guests go on writing
READY_REST: Final = 4 * MIB
#: so often it goes through what is dirty once it is to end; who writes faster then has to wait
LAST_PASSES: Final = 3


class MirrorCore(Job):
    """Keeps ``target`` in step with ``source``; a subclass knows what there is to do at the end.

    Before ``Scheduler.start``, under the graph lock, its starter puts a ``MirrorTop`` above the
    source as ``filter``, gives it ``source_user`` and ``target_user`` (``JobUser`` on filter and
    target) and calls ``track``; ``untrack`` undoes that. ``base`` is the layer of the source's
    chain whose data the target need not get (None: all is copied, and holes are made zeros unless
    ``target_is_zero``); with ``nothing_yet`` only what is written from now on is copied.
    ``unit`` makes all copies whole multiples of it, guests' writes too: the cluster size of a
    target that is not on its backing node yet, and would fill up a part of a cluster with zeros.

    Subclasses define ``pivot`` (the switch: guests stand still, all is durable in the target; may
    fail and then has changed nothing), ``check_completion`` and the rest of the hooks of ``Job``.
    """

    parallel: ClassVar[int] = 4

    def __init__(
        self,
        job_id: str,
        options: MirrorOptions,
        graph: Graph,
        source: Node,
        target: Node,
        *,
        base: Node | None = None,
        nothing_yet: bool = False,
        target_is_zero: bool = False,
        unit: int | None = None,
    ) -> None:
        super().__init__(
            job_id,
            speed=options.speed,
            auto_finalize=options.auto_finalize,
            auto_dismiss=options.auto_dismiss,
        )
        self.options = options
        self.graph = graph
        self.source = source
        self.target = target
        self.base = base
        self.nothing_yet = nothing_yet
        self.takes_turns = not nothing_yet
        self.target_is_zero = target_is_zero
        self.copy_mode = options.copy_mode
        self.bitmap = MirrorBitmap(source.length, options.granularity, whole=unit is not None)
        self.chunks = Chunks(self.bitmap, max(unit or 0, self.bitmap.granularity))
        self.whole_units = unit is not None
        self.source_user: JobUser = None  # type: ignore[assignment]
        self.target_user: JobUser = None  # type: ignore[assignment]
        self.filter: Node | None = None
        #: the target is put on a backing node later, which must not show where zeros belong
        self.backing_to_come = False
        #: guests may be on the target by now, or soon
        self.needed = False
        #: asked to end, with or without a switch
        self.ending = False
        self._last_pass = 0
        self.switching = False
        self._looked_through = False  # the first pass is over
        self._over = False
        self._guests = MirroredWrites()
        self._done = 0  # bytes
        self._under_way = 0  # bytes
        self._copies: set[asyncio.Task[None]] = set()
        self._failures: list[PieceFailedError] = []
        self._retry_at = 0.0
        self._flushed_at = float("-inf")
        self._chunk_size = ChunkSize()
        self._throughput = 0.0  # bytes per second of one copy

    # -- for subclasses and starters

    async def pivot(self) -> None:
        """Switch over; guests stand still and the target has everything, durably."""
        raise NotImplementedError

    def check_completion(self) -> None:
        """BlockError if there could be no switch."""

    def check_sizes(self) -> None:
        """BlockError if the target cannot take the source; the work begins with it."""
        if self.target.length != self.source.length:
            raise BlockError("Source and target image have different sizes")

    async def track(self) -> None:
        """Record writes from now on; ``filter`` is in its place. Holds the graph lock.

        What began before has ended then: it would not be recorded, and perhaps not be seen.
        """
        async with self.graph.drained(self.source):
            self.source.add_bitmap(self.bitmap)
            self.graph.rebind_above(self.source)
            if self.filter is not None:
                assert isinstance(self.filter.driver, MirrorTop)
                self.filter.driver.mirror = self

    def untrack(self) -> None:
        """No longer; twice is harmless."""
        self._over = True
        if self.filter is not None and isinstance(self.filter.driver, MirrorTop):
            self.filter.driver.mirror = None
        if self.bitmap in self.source.bitmaps:
            self.source.remove_bitmap(self.bitmap)
            self.graph.rebind_above(self.source)

    def nothing_held(self) -> AbstractContextManager[None]:
        """Of both sides."""
        return self.graph.nothing_held(self.source, self.target)

    def images(self) -> tuple[list[Node], Node | None]:
        """Source and target; of a commit the layers down to the base."""
        layers = chain.chain(self.source)
        target = chain.skip_filters(self.target)
        if target in layers:
            return chain.layers_between(self.source, target), target
        return layers[:1], target

    # -- what clients ask for

    def complete(self) -> None:
        """Switch over as soon as the target has everything."""
        if self.ending and not self.switching:
            raise BlockError(f"The active block job '{self.id}' cannot be completed")
        self.check_completion()
        self._end(switching=True)

    def let_go(self) -> None:
        """It was cancelled: guests do not wait for the target any more."""
        self._over = True
        self.chunks.let_in()
        self._guests.release()

    def cancel_is_forced(self, force: bool) -> bool:
        """A mirror in step ends as completed, without a switch."""
        return force or not self.ready

    def end_gently(self) -> None:
        """End with a target that is what the source was at one moment."""
        self._end(switching=False)

    def _end(self, *, switching: bool) -> None:
        if not self.ending:
            self._last_pass = self.chunks.passes + LAST_PASSES
        self.ending, self.switching = True, switching

    def change_copy_mode(self, mode: MirrorCopyMode) -> None:
        """block-job-change; only from background to write-blocking."""
        if mode is self.copy_mode:
            return
        if mode is MirrorCopyMode.BACKGROUND:
            raise BlockError(f"Change to copy mode '{mode}' is not implemented")
        self.copy_mode = mode

    @property
    def actively_synced(self) -> bool:
        """Whether every write that was answered is in the target."""
        return self.mirroring and self.ready and not (self.chunks.rest or self._under_way)

    # -- the work

    async def run(self) -> None:
        """Copy until asked to end, and nearly everything is in the target."""
        for user in (self.source_user, self.target_user):
            user.on_change.append(self.wake)
        try:
            self.check_sizes()
            if not self.nothing_yet:
                await self._look_through()
            self._looked_through = True
            await self._keep_up()
        except BaseException:
            self._over = True
            raise
        finally:
            await self.settle()

    async def settle(self) -> None:
        """Wait for the copies in flight, and guests' when no more of theirs follow."""
        while self._copies:
            await asyncio.wait(self._copies)
        if self._over:
            await self._guests.idle()

    def in_flight(self) -> bool:
        """Whether it copies; what guests write to both sides is theirs."""
        return bool(self._copies)

    async def _keep_up(self) -> None:
        while True:
            await self.checkpoint()
            await self._judge()
            self._progress()
            if self.pause_count:  # an error stopped it: what fails now would stop it once more
                continue
            if not self.ready and self._in_step():
                self.scheduler.set_ready(self)
            elif self.ending and self._may_end() and self._retry_at <= self._now():
                if not self.switching or await self._flush_early():
                    return
            elif len(self._copies) >= most_copies(self.scheduler.share(self), self._under_way):
                await self.wait()
            elif (delay := self._delay()) > 0:
                await self.wait(delay)
            elif self._quiesced():
                await self.wait(SLICE)  # or until it ends: that wakes the job
            elif (claim := self.chunks.take(self._chunk())) is not None:
                self._begin(claim)
            else:
                if self.chunks.rest and not self._copies:
                    # Guests write to all that is left, again and again: as good as a pass over it.
                    self.chunks.passes += 1
                # Woken by the end of a copy, by clients, or by time to look for new writes.
                await self.wait(None if self._copies else SLICE)

    def _in_step(self) -> bool:
        rest = self.chunks.rest + self._under_way
        return rest == 0 or (self.chunks.passes >= 2 and rest <= READY_REST)

    def _nearly_done(self) -> bool:
        rest = self.chunks.rest + self._under_way
        return rest <= max(LEAST_REST, self._throughput * LAST_REST)

    def _may_end(self) -> bool:
        rest = self.chunks.rest + self._under_way
        late = self.chunks.passes >= self._last_pass
        return self._nearly_done() or (late and rest <= READY_REST)

    async def _flush_early(self) -> bool:
        """What is in the target already is made durable while guests go on; whether it was."""
        await self.settle()
        try:
            await self.target_user.run(self.target_user.node.flush)
        except OSError as error:
            self._failures.append(PieceFailedError("write", error))
        self._flushed_at = self._now()
        return not self._failures

    def _now(self) -> float:
        return self.scheduler.clock.monotonic()

    def _delay(self) -> float:
        return max(self.rate_delay(), self._retry_at - self._now())

    def _chunk(self) -> int:
        if self.speed:
            return limited_chunk(self.speed)
        most = MOST_CHUNK if guest_is_served(self.graph) else self._chunk_size.size
        if self.options.buf_size < DEFAULT_BUFFER:  # a client asked for less to be under way
            most = min(most, self.options.buf_size // self.parallel)
        return max(self.options.granularity, most)

    def _progress(self) -> None:
        self.offset = self._done
        self.length = self._done + self._under_way + self.chunks.rest

    # -- the first pass

    async def _look_through(self) -> None:
        """Call dirty what is to be copied, and make zeros of what is not there."""
        position, end = 0, self.source.length
        base = chain.skip_filters(self.base)
        if base is not None and chain.skip_filters(self.source) is base:
            return
        while position < end:
            await self.checkpoint()
            stretch = min(STRETCH, end - position)
            try:
                await look_at(self, position, stretch, base)
            except PieceFailedError as failure:
                self._failures.append(failure)
                await self._judge()
                await self.wait(max(self._delay(), 0.0))
                continue
            position += stretch
            self._progress()

    # -- copies

    def _begin(self, claim: Claim) -> None:
        length = claim.end - claim.start
        self._under_way += length
        self.account(length)
        task = asyncio.create_task(self._carry(claim, self.new_halt()))
        self._copies.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._copies.discard(task)
        self.wake()

    def _quiesced(self) -> bool:
        return self.source_user.quiesced or self.target_user.quiesced

    async def _carry(self, claim: Claim, halt: Halt) -> None:
        """Copy a chunk, unless it would have to wait for the end of a drain.

        For the drain may wait for a guest's write, and that for this claim.
        """
        length = claim.end - claim.start
        if self._quiesced():
            self.bitmap.set(claim.start, length)
            self._under_way -= length
            self.chunks.leave(claim)
            return
        began = self._now()
        try:
            with halt.over() as effort:
                await JobUser.run_on_both(
                    self.source_user, self.target_user, lambda: self._transfer(claim.start, length)
                )
        except HaltedError:
            self.bitmap.set(claim.start, length)
            self.limit.give_back(length)
        except PieceFailedError as failure:
            self._failed(claim, failure)
        except Exception as error:
            # The chunk was not copied, so the job must not succeed.
            defect = OSError(EIO, f"Internal error: {error!r}")
            self._failed(claim, PieceFailedError("write", defect))
        else:
            self._done += length
            seconds = self._now() - began
            # Not what it waited for a worker: who has small chunks would wait as often for those
            # of others, and get less and less of the workers.
            self._chunk_size.took(length, effort.seconds or seconds)
            if seconds > 0:
                self._throughput += (length / seconds - self._throughput) / 4
        finally:
            self._under_way -= length
            self.chunks.leave(claim)

    def _failed(self, claim: Claim, failure: PieceFailedError) -> None:
        self.bitmap.set(claim.start, claim.end - claim.start)
        self._failures.append(failure)

    async def _transfer(self, offset: int, length: int) -> None:
        """``_copy`` when no guest waits: a worker may do it, which has other copies to make too.

        What guests change meanwhile is dirty again, so it does not matter what of it was copied.
        """
        left = [(offset, length)]
        if length >= LEAST_COPY and not self.backing_to_come:
            with suppress(OSError):  # of a map: reading tells
                left = await copy_runs(
                    self.graph, self.source, self.target, offset, length,
                    may_unmap=self.options.unmap,
                )  # fmt: skip
        for start, count in left:
            await self._copy(start, count)

    async def _copy(self, offset: int, length: int) -> None:
        """Let the target have what the source has now; raises PieceFailedError."""
        try:
            with self.reading():
                parts = await parts_of(self.source, offset, length)
        except OSError as error:
            raise PieceFailedError("read", error) from error
        for first, size, zero in parts:
            if zero:
                try:
                    await self.target_user.store_zeroes(first, size, may_unmap=self.options.unmap)
                except OSError as error:
                    raise PieceFailedError("write", error) from error
                continue
            for start in range(first, first + size, READ_CHUNK):
                await self._read_and_store(start, min(READ_CHUNK, first + size - start))

    async def _read_and_store(self, offset: int, length: int) -> None:
        try:
            with self.reading():
                data = await self.source.read(offset, length)
        except OSError as error:
            raise PieceFailedError("read", error) from error
        await self._store(offset, data)

    async def _judge(self) -> None:
        """Ask the policies about what failed, once everything else in flight has ended."""
        if not self._failures:
            return
        await self.settle()
        self.check_wanted()
        failures, self._failures = self._failures, []
        for failure in failures:
            code = failure.error.errno or EIO
            reading = failure.operation == "read"
            policy = self.options.on_source_error if reading else self.options.on_target_error
            action = self.action_on(failure.operation, code, policy)
            if action is ErrorAction.REPORT:
                raise failure.error
            if action is ErrorAction.STOP:
                return
            # Ignored means tried again: a target with a gap would be worth nothing.
            self._retry_at = self._now() + SLICE

    # -- guests' writes in copy mode write-blocking

    @property
    def mirroring(self) -> bool:
        """Whether guests' writes are given to ``mirror_write``."""
        return (
            self.copy_mode is MirrorCopyMode.WRITE_BLOCKING
            and self._looked_through
            and not self._over
        )

    async def mirror_write(
        self, offset: int, length: int, apply: Apply, data: Buffer | None
    ) -> None:
        """A guest's write: ``apply`` does it on the source. Raises the errors of that only.

        While the job is paused or its target quiesced the write is recorded instead.
        """
        await self._guests.do(apply, lambda noted: self._mirror_write(offset, length, noted, data))

    async def _mirror_write(
        self, offset: int, length: int, apply: Apply, data: Buffer | None
    ) -> None:
        claim = await self.chunks.enter(offset, offset + length)
        self._under_way += length
        try:
            if self.pause_count or self._over or self.target_user.quiesced:
                await apply()
                return
            # In flight on the target from here on: a drain of it alone waits for this as well.
            await self.target_user.run_now(self._write_both(offset, length, apply, data, claim))
        finally:
            self._under_way -= length
            self.chunks.leave(claim)
            self.wake()

    async def _write_both(
        self, offset: int, length: int, apply: Apply, data: Buffer | None, claim: Claim
    ) -> None:
        start, end = (claim.start, claim.end) if self.whole_units else (offset, offset + length)
        self.bitmap.look_away()
        self.bitmap.reset(offset, length)
        try:
            await apply()
            if self._over:  # a cancel: nobody wants the target
                self.bitmap.set(offset, length)
                return
            if data is not None and (start, end) == (offset, offset + length):
                write = self._store(offset, data)
            else:
                write = self._copy(start, end - start)
            try:
                await write
            except PieceFailedError as failure:
                self.bitmap.set(offset, length)
                self._failures.append(failure)
            else:
                self._done += length
        except BaseException:
            self.bitmap.set(offset, length)
            raise

    async def _store(self, offset: int, data: Buffer) -> None:
        try:
            await self.target_user.store(offset, data)
        except OSError as error:
            raise PieceFailedError("write", error) from error

    # -- the end

    async def prepare(self) -> None:
        """Stop the guests, copy the rest, make it durable, and switch if asked to."""
        await self._catch_up()
        async with (
            self.graph.lock,
            self.graph.drained(self.source, self.target),
        ):
            await self._copy_rest()
            self._progress()
            if self.switching:
                await self.target.flush()
                if self.nothing_yet:
                    # The target stands on it: flushes of the guest do not come here any more.
                    await self.source.flush()
                self.needed = True
                await self.pivot()
            self._over = True
        if not self.switching:
            await self.make_durable()

    async def make_durable(self) -> None:
        """The target, which is what the source was a moment ago; guests have gone on."""
        await self.target_user.run(self.target_user.node.flush)

    async def _catch_up(self) -> None:
        """A job that waited for its client for long may have much to do: the guests go on with it.

        A few passes at most; who writes faster than that is stopped for the rest.
        """
        self._failures.clear()
        last = self.chunks.passes + LAST_PASSES
        while not self._nearly_done() and self.chunks.passes < last and not self._failures:
            if (claim := self.chunks.take(self._chunk())) is not None:
                self._begin(claim)
            if claim is None or len(self._copies) >= self.parallel:
                if not self._copies:
                    break
                await asyncio.wait(self._copies, return_when=asyncio.FIRST_COMPLETED)
        await self.settle()
        if self._failures:
            raise self._failures[0].error
        if self.switching and self._now() - self._flushed_at > JUST_NOW:
            await self.target_user.run(self.target_user.node.flush)

    async def _copy_rest(self) -> None:
        """Nobody else is there: no user of the nodes has anything in flight."""
        while True:
            claims: list[Claim] = []
            while len(claims) < self.parallel and (claim := self.chunks.take(self._chunk())):
                claims.append(claim)
            if not claims:
                return
            results = await asyncio.gather(
                *(self._copy(claim.start, claim.end - claim.start) for claim in claims),
                return_exceptions=True,
            )
            for claim, result in zip(claims, results, strict=True):
                self.chunks.leave(claim)
                if result is None:
                    self._done += claim.end - claim.start
                else:
                    self.bitmap.set(claim.start, claim.end - claim.start)
            for failed in results:
                if isinstance(failed, PieceFailedError):
                    raise failed.error
                if failed is not None:
                    raise failed
