"""The driver ``memory``: a sparse disk in this process, with faults on request.

It keeps the rules of ``storage/driver.py`` strictly, so that tests notice who breaks them: requests
outside the disk are asserts (writes past the end grow it, as a host file does), what a read returns
is never changed later, ``read_nowait`` may be told to refuse.

Faults are hooks: ``disk.hook = f`` has ``f(operation, offset, length)`` called before each
request (operation: read, write, write_zeroes, discard, flush, truncate, map); it may raise OSError
or return an awaitable to wait for (then a nowait call is refused). ``fail_once`` and ``Gate`` cover
the usual.
``disk.synced`` is what the last flush made durable: what a power cut is sure to leave.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from errno import EPERM
from typing import Any, Self

from liveblockd.qapi import Size
from liveblockd.storage.driver import BlockDriver, BlockIO, Buffer, Done, Extent, ExtentKind
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import Environment, register_driver

PAGE = 4096
_ZERO_PAGE = bytes(PAGE)

Hook = Callable[[str, int, int], Awaitable[None] | None]


@dataclass(frozen=True)
class Request:
    """One call, as ``MemoryDriver.log`` keeps it."""

    operation: str
    offset: int
    length: int


@register_driver
class MemoryDriver(BlockDriver):
    """Pages of 4 KiB in a dict; a page that is not there reads as zeros."""

    driver_name = "memory"

    class Options(BlockdevOptions):
        """Members of ``blockdev-add``."""

        size: Size = 0

    def __init__(self, length: int = 0, *, nowait: bool = True, read_only: bool = False) -> None:
        self.children: dict[str, BlockIO] = {}
        self.read_only = read_only
        self.nowait = nowait  # False: every nowait call is refused
        #: whether ``begin_write`` takes writes, and how many it took
        self.begins = False
        self.begun = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.hook: Hook | None = None
        self.log: list[Request] = []
        self.closed = False
        self.flushes = 0
        self.pages: dict[int, bytes] = {}
        self.synced: tuple[int, dict[int, bytes]] = (length, {})
        self._length = length

    @classmethod
    async def open(
        cls, options: Options, children: dict[str, BlockIO], environment: Environment
    ) -> Self:
        """As a driver is opened by the graph."""
        return cls(options.size, read_only=bool(options.read_only))

    @classmethod
    def of(cls, content: bytes, **arguments: Any) -> Self:
        """A disk that holds ``content``, durable."""
        disk = cls(len(content), **arguments)
        disk._store(0, content)
        disk._sync()
        return disk

    @property
    def length(self) -> int:
        """Bytes."""
        return self._length

    def content(self) -> bytes:
        """All of it."""
        return self._load(0, self._length)

    def synced_content(self) -> bytes:
        """What was durable after the last flush."""
        length, pages = self.synced
        data = b"".join(pages.get(p, _ZERO_PAGE) for p in range(-(-length // PAGE)))
        return data[:length]

    # -- guest I/O

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """The bytes, unless the hook wants to wait."""
        if not self.nowait or not self._enter_nowait("read", offset, length):
            return None
        return self._load(offset, length)

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        """Write, unless the hook wants to wait."""
        if not self.nowait or not self._enter_nowait("write", offset, len(data)):
            return False
        self._store(offset, bytes(data))
        return True

    def begin_write(self, offset: int, data: Buffer, done: Done) -> bool:
        """Later on the loop, once the hook lets it; only with ``begins``."""
        if not self.begins or self.read_only:
            return False
        content = bytes(data)
        self.begun += 1

        async def write() -> None:
            error = None
            try:
                await asyncio.sleep(0)
                await self.write(offset, content)
            except OSError as failed:
                error = failed
            done(error)

        task = asyncio.get_running_loop().create_task(write())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    async def read(self, offset: int, length: int) -> Buffer:
        """The bytes; zeros past the end."""
        await self._enter("read", offset, length)
        return self._load(offset, length)

    async def write(self, offset: int, data: Buffer) -> None:
        """Store; grows the disk."""
        await self._enter("write", offset, len(data))
        self._store(offset, bytes(data))

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, fast_only: bool = False
    ) -> None:
        """Always fast."""
        await self._enter("write_zeroes", offset, length)
        self._store_zeroes(offset, length)

    async def discard(self, offset: int, length: int) -> None:
        """Reads as zeros afterwards."""
        await self._enter("discard", offset, length)
        self._store_zeroes(offset, length)

    async def flush(self) -> None:
        """Copies the pages to ``synced``."""
        await self._enter("flush", 0, 0)
        self.flushes += 1
        self._sync()

    async def map(self, offset: int, length: int) -> list[Extent]:
        """DATA where a page is, ZERO elsewhere."""
        await self._enter("map", offset, length)
        extents: list[Extent] = []
        while length:
            part = min(length, PAGE - offset % PAGE)
            kind = ExtentKind.DATA if offset // PAGE in self.pages else ExtentKind.ZERO
            if extents and extents[-1].kind is kind:
                last = extents.pop()
                extents.append(Extent(last.length + part, kind, last.host_offset))
            else:
                extents.append(Extent(part, kind, offset if kind is ExtentKind.DATA else -1))
            offset, length = offset + part, length - part
        return extents

    async def truncate(self, length: int) -> None:
        """Cut off or grow by zeros."""
        await self._enter("truncate", 0, length)
        if length < self._length:
            self._store_zeroes(length, self._length - length)
        self._length = length

    async def close(self) -> None:
        """Twice is an error of the caller."""
        assert not self.closed, "closed twice"
        self.closed = True

    def actual_size(self) -> int:
        """Bytes of the pages."""
        return len(self.pages) * PAGE

    # -- inside

    def _enter_nowait(self, operation: str, offset: int, length: int) -> bool:
        self._check(operation, offset, length)
        if self.hook is not None:
            wait = self.hook(operation, offset, length)
            if wait is not None:
                if inspect.iscoroutine(wait):
                    wait.close()
                return False
        self.log.append(Request(operation, offset, length))
        return True

    async def _enter(self, operation: str, offset: int, length: int) -> None:
        self._check(operation, offset, length)
        if self.hook is not None:
            wait = self.hook(operation, offset, length)
            if wait is not None:
                await wait
        self.log.append(Request(operation, offset, length))

    def _check(self, operation: str, offset: int, length: int) -> None:
        assert not self.closed, f"{operation} after close"
        assert offset >= 0 and length >= 0, (operation, offset, length)
        if self.read_only and operation in ("write", "write_zeroes", "discard", "truncate"):
            raise OSError(EPERM, "Operation not permitted")

    def _load(self, offset: int, length: int) -> bytes:
        if not length:
            return b""
        first, last = offset // PAGE, (offset + length - 1) // PAGE
        data = b"".join(self.pages.get(p, _ZERO_PAGE) for p in range(first, last + 1))
        start = offset - first * PAGE
        return data[start : start + length]

    def _store(self, offset: int, data: bytes) -> None:
        self._length = max(self._length, offset + len(data))
        position = 0
        while position < len(data):
            page, start = divmod(offset + position, PAGE)
            part = data[position : position + PAGE - start]
            if len(part) == PAGE:
                self.pages[page] = bytes(part)
            else:
                old = self.pages.get(page, _ZERO_PAGE)
                self.pages[page] = old[:start] + part + old[start + len(part) :]
            position += len(part)

    def _store_zeroes(self, offset: int, length: int) -> None:
        end = offset + length
        self._length = max(self._length, end)
        for page in range(offset // PAGE, -(-end // PAGE)):
            start, stop = max(offset, page * PAGE), min(end, (page + 1) * PAGE)
            if stop - start == PAGE:
                self.pages.pop(page, None)
            elif page in self.pages:
                self._store(start, bytes(stop - start))

    def _sync(self) -> None:
        self.synced = (self._length, dict(self.pages))


def fail_once(operation: str, errno: int, *, offset: int | None = None, after: int = 0) -> Hook:
    """A hook: one ``operation`` (at ``offset`` if given) fails, after ``after`` good ones."""
    left = after
    done = False

    def hook(op: str, at: int, length: int) -> None:
        nonlocal left, done
        if done or op != operation:
            return
        if offset is not None and op != "flush" and not at <= offset < at + length:
            return
        if left:
            left -= 1
            return
        done = True
        raise OSError(errno, "injected")

    return hook


class Gate:
    """A hook that holds requests of some operations until ``open``; ``waiting`` counts them."""

    def __init__(self, *operations: str) -> None:
        self.operations = operations
        self.waiting = 0
        self._event = asyncio.Event()

    def __call__(self, operation: str, offset: int, length: int) -> Awaitable[None] | None:
        if self._event.is_set() or (self.operations and operation not in self.operations):
            return None
        return self._wait()

    def open(self) -> None:
        """Let all through, now and later."""
        self._event.set()

    async def _wait(self) -> None:
        self.waiting += 1
        try:
            await self._event.wait()
        finally:
            self.waiting -= 1
