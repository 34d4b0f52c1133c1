"""A job whose work is many pieces of data to move: keeps a few in flight, at the speed asked for.

Runs on the event loop; what a piece costs is done by workers and by the drivers below.

Invariants:

* ``offset`` only grows: it is what was looked at less what is still to be done of it, so that
  ranges with nothing to copy count at once.
* Nothing is in flight when ``run`` returns or raises, when the job is paused, or when an error is
  judged: a failed piece is tried again, left out or reported by the on-error policy.
* Memory: at most ``parallel`` chunks, and the plans of two stretches.

Errors: OSError of a piece under the policy ``report``, or, in the end, the first one ignored.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from errno import EIO
from itertools import islice
from typing import ClassVar, Final, NamedTuple

from liveblockd.jobs.job import ErrorAction, Job
from liveblockd.jobs.pieces import Run
from liveblockd.runtime.halting import Effort, Halt, HaltedError
from liveblockd.storage.driver import ExtentKind

KIB: Final = 1024
MIB: Final = 1024 * KIB

#: what may start at once under a speed limit
LIMITED_CHUNK: Final = 512 * KIB
#: the same of slow jobs, which would stand still for long after each; also their first one
SLOW_CHUNK: Final = 64 * KIB
#: what is read through the chain at a time: it is held in memory
READ_CHUNK: Final = 2 * MIB
#: What a worker copies by itself grows and shrinks so that a chunk takes some milliseconds, waiting
#: for those before it included. Each costs the loop the time of a few requests of guests; but a
#: clone of many MiB is one system call, and on a slow disk a pause must not wait for long.
FIRST_CHUNK: Final = 2 * MIB
LEAST_CHUNK: Final = MIB
MOST_CHUNK: Final = 64 * MIB
#: bytes that one worker may be left with while others have nothing
FAIR_CHUNK: Final = 8 * MIB
SOON: Final = 0.012  # seconds
LATE: Final = 0.025
#: so many times longer may it take where many jobs copy
MOST_CROWDING: Final = 3.0
#: pieces that are moved together at most
MOST_TOGETHER: Final = 256
#: with fewer pieces than this the next stretch is planned
FEW_PIECES: Final = 256
#: seconds until what failed, and was ignored, is tried again
LATER: Final = 0.1
#: zeros are metadata only
ZERO_CHUNK: Final = 64 * MIB


def limited_chunk(speed: int) -> int:
    """Bytes that may start at once: a tenth of what moves in a second, within bounds."""
    return min(LIMITED_CHUNK, max(speed // 10 // SLOW_CHUNK, 1) * SLOW_CHUNK)


class PieceFailedError(Exception):
    """Moving a piece failed while it did ``operation`` (read or write)."""

    def __init__(self, operation: str, error: OSError) -> None:
        super().__init__(operation, error)
        self.operation = operation
        self.error = error


class _Failure(NamedTuple):
    piece: Run
    operation: str
    error: OSError
    defect: bool = False


class CopyJob(Job):
    """Subclasses say what there is to do (``plan``) and do a piece of it (``move``)."""

    parallel: ClassVar[int] = 3
    #: whether ``plan`` may look at what comes next while pieces are moved
    plans_ahead: ClassVar[bool] = False
    #: an ignored error is tried again later; otherwise the piece is left out, and the job fails
    tries_again: ClassVar[bool] = False
    #: bytes; pieces are cut at multiples of it
    granularity: int = 1

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self._planned = 0  # bytes looked at
        self._to_do = 0  # bytes of those in pieces that are not done
        self._moving = 0  # bytes of those that are in flight
        self._pieces: deque[Run] = deque()
        self._in_flight: set[asyncio.Task[None]] = set()
        self._planning: asyncio.Task[None] | None = None
        self._plan_error: Exception | None = None
        self._failures: list[_Failure] = []
        self._ignored: OSError | None = None
        self._later = 0.0  # by the clock: nothing begins before
        self._copy_chunk = FIRST_CHUNK

    @property
    def end(self) -> int:
        """Where the disk ends, in bytes."""
        return self.length

    async def plan(self, offset: int) -> tuple[list[Run], int]:
        """Pieces from ``offset`` on, and the offset up to which they are all; raises OSError."""
        raise NotImplementedError

    async def move(self, piece: Run) -> None:
        """Do one piece; raises PieceFailedError."""
        raise NotImplementedError

    def gathers(self, pieces: Sequence[Run]) -> int:
        """For how many of ``pieces``, from the first on, ``move_together`` is worth it."""
        del pieces
        return 0

    async def move_together(self, pieces: list[Run]) -> None:
        """Do several at once; raises OSError, and then each is moved by itself."""
        raise NotImplementedError

    async def run(self) -> None:
        """Move everything."""
        try:
            await self._move_all()
        finally:
            await self.settle()
        if self._ignored is not None:
            raise self._ignored

    async def settle(self) -> None:
        """Wait for the pieces in flight."""
        while self._in_flight or self._planning is not None:
            await asyncio.wait(self._in_flight | ({self._planning} if self._planning else set()))

    def in_flight(self) -> bool:
        """Whether pieces are moved or looked for."""
        return bool(self._in_flight) or self._planning is not None

    # -- inside

    async def _move_all(self) -> None:
        while True:
            await self.checkpoint()
            if self._failures:
                await self._judge()
            elif self._plan_error is not None:
                await self._judge_plan()
            elif len(self._in_flight) >= self.scheduler.share(self):
                await self.wait()
            elif (delay := self._delay()) > 0:
                await self.wait(delay)
            elif self._pieces:
                self._begin(self._next_chunks())
                if self.plans_ahead and len(self._pieces) < FEW_PIECES:
                    self._begin_look()
            elif self._planned < self.end:
                self._begin_look()
                await self.wait()
            elif self._in_flight:
                await self.wait()
            else:
                return

    def _delay(self) -> float:
        return max(self.rate_delay(), self._later - self.scheduler.clock.monotonic())

    def _try_again(self) -> None:
        self._later = self.scheduler.clock.monotonic() + LATER

    def _begin_look(self) -> None:
        """Find the next pieces in a task of its own, unless one is at it."""
        if self._planning is None and self._planned < self.end and self._plan_error is None:
            self._planning = asyncio.create_task(self._look_ahead())
            self._planning.add_done_callback(self._looked)

    def _looked(self, _task: asyncio.Task[None]) -> None:
        self._planning = None
        self.wake()

    async def _look_ahead(self) -> None:
        try:
            pieces, end = await self.plan(self._planned)
        except Exception as error:
            self._plan_error = error
            return
        assert self._planned < end <= self.end
        self._pieces.extend(pieces)
        self._to_do += sum(piece.length for piece in pieces)
        self._planned = end
        self._update_offset()

    def _next_chunk(self) -> Run:
        piece = self._pieces.popleft()
        if piece.kind is ExtentKind.ZERO:
            size = ZERO_CHUNK
        elif self.speed:
            size = limited_chunk(self.speed)
        else:
            size = self._share_of_rest() if _by_worker(piece) else READ_CHUNK
        size = max(size // self.granularity, 1) * self.granularity
        if piece.length <= size:
            return piece
        middle = piece.offset + size
        self._pieces.appendleft(piece.part(middle, piece.end))
        return piece.part(piece.offset, middle)

    def _share_of_rest(self) -> int:
        """Bytes of a chunk: such that nobody is left to copy a last one alone."""
        left = max(FAIR_CHUNK, (self._to_do - self._moving) // self.parallel)
        return min(self._copy_chunk, left)

    def _next_chunks(self) -> list[Run]:
        """The next chunk, with those that follow as long as they can be moved together with it."""
        chunks = [self._next_chunk()]
        if not self.gathers(chunks):
            return chunks
        room = limited_chunk(self.speed) if self.speed else self._share_of_rest()
        room -= chunks[0].length
        for piece in islice(self._pieces, MOST_TOGETHER - 1):
            room -= piece.length
            if room < 0:
                break
            chunks.append(piece)
        together = self.gathers(chunks)
        for _ in range(together - 1):
            self._pieces.popleft()
        return chunks[:together]

    def _begin(self, pieces: list[Run]) -> None:
        length = sum(piece.length for piece in pieces)
        self._moving += length
        if pieces[0].kind is not ExtentKind.ZERO:  # none of several is
            self.account(length)
        task = asyncio.create_task(self._carry(pieces, self.new_halt()))
        self._in_flight.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._in_flight.discard(task)
        self.wake()

    async def _carry(self, pieces: list[Run], halt: Halt) -> None:
        """Move them; those of which a ``halt`` leaves something undone are there again."""
        left = deque(pieces)
        try:
            with halt.over() as effort:
                await self._move_pieces(left, effort)
        except HaltedError:
            self._pieces.extendleft(reversed(left))
            if pieces[0].kind is not ExtentKind.ZERO:
                self.limit.give_back(sum(piece.length for piece in left))
        finally:
            self._moving -= sum(piece.length for piece in pieces)

    async def _move_pieces(self, left: deque[Run], effort: Effort) -> None:
        """Take from ``left`` what is moved, or has failed; raises HaltedError."""
        pieces = list(left)
        started, worked = self.scheduler.clock.monotonic(), effort.seconds
        if self.gathers(pieces[:1]):
            try:
                await self.move_together(pieces)
            except OSError:
                pass  # which of them, and what failed, comes out one by one
            except HaltedError:
                raise
            except Exception as error:
                self._defect(pieces, error)
                return
            else:
                self._carried(pieces, started, effort.seconds - worked)
                return
        for piece in pieces:
            started, worked = self.scheduler.clock.monotonic(), effort.seconds
            try:
                await self.move(piece)
            except PieceFailedError as failure:
                self._failures.append(_Failure(piece, failure.operation, failure.error))
            except HaltedError:
                raise
            except Exception as error:
                self._defect([piece], error)
            else:
                self._carried([piece], started, effort.seconds - worked)
            left.popleft()

    def _defect(self, pieces: list[Run], error: Exception) -> None:
        """The pieces were not moved, so the job must not succeed."""
        for piece in pieces:
            defect = OSError(EIO, f"Internal error: {error!r}")
            self._failures.append(_Failure(piece, "write", defect, defect=True))

    def _carried(self, pieces: list[Run], started: float, worked: float) -> None:
        length = sum(piece.length for piece in pieces)
        self._to_do -= length
        self._update_offset()
        if _by_worker(pieces[0]) and not self.speed:
            self._adapt(length, self.scheduler.clock.monotonic() - started, worked)

    def _adapt(self, length: int, seconds: float, worked: float) -> None:
        """It took so many seconds, of which a worker was at it for ``worked`` (0: none was)."""
        # With many jobs most of the time is that of the others: it must not make the pieces small,
        # or who has small ones would get ever less. What is queued when a pause comes is withdrawn.
        crowding = min(self.scheduler.crowding(self), MOST_CROWDING)
        late = LATE * crowding
        if worked and crowding > 1.0:
            seconds, crowding = worked, 1.0
        if seconds > late:
            self._copy_chunk = max(LEAST_CHUNK, self._copy_chunk // 2)
        elif seconds < SOON * crowding and length * 2 > self._copy_chunk:
            # What took a quarter of the time, or less, may well be four times as much.
            times = 2 if seconds > SOON * crowding / 4 else 4
            self._copy_chunk = min(MOST_CHUNK, self._copy_chunk * times)

    def _done(self, piece: Run) -> None:
        self._to_do -= piece.length
        self._update_offset()

    def _update_offset(self) -> None:
        self.offset = self._planned - self._to_do

    async def _judge(self) -> None:
        """Ask the policy about what failed, once everything else in flight has ended."""
        await self.settle()
        self.check_wanted()
        failures, self._failures = self._failures, []
        failures.sort(key=lambda failure: failure.piece.offset)
        stopped = False
        for piece, operation, error, defect in failures:
            action = ErrorAction.STOP if stopped else self.action_on(operation, error.errno or EIO)
            if action is ErrorAction.STOP:
                stopped = True
                self._pieces.append(piece)
            elif action is ErrorAction.REPORT:
                raise error
            elif self.tries_again and not defect:
                self._pieces.append(piece)
                self._try_again()
            else:
                self._ignored = self._ignored or error
                self._done(piece)
        if stopped and isinstance(self._plan_error, OSError):
            self._plan_error = None  # it is looked at again, and fails then or not

    async def _judge_plan(self) -> None:
        """What there is to do cannot be found out: try again, or fail; nothing can be left out."""
        await self.settle()
        self.check_wanted()
        if self._failures:
            return  # first: what stops the job for them takes this error with it
        error, self._plan_error = self._plan_error, None
        assert error is not None
        if not isinstance(error, OSError):
            raise error
        action = self.action_on("read", error.errno or EIO)
        if action is ErrorAction.IGNORE and self.tries_again:
            self._try_again()
        elif action is not ErrorAction.STOP:
            raise error


def _by_worker(piece: Run) -> bool:
    """Whether nothing of it need be held in memory: it is known which layer's file it is in."""
    return piece.kind is ExtentKind.DATA or piece.layer is not None
