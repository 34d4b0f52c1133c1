"""The requests of ``qemu-io``: read, write, discard, map and the like.

Runs on the event loop. Errors of a request are what it prints, in the words of qemu-io; where it
lies past the end that is EIO.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from errno import EIO, ENOENT, ENOTSUP
from time import perf_counter
from typing import Any, Final, NamedTuple, Protocol, cast

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.preallocate import Preallocation
from liveblockd.graph.node import Node
from liveblockd.graph.resizing import resize
from liveblockd.qmp.hmp import io_help, io_text
from liveblockd.qmp.hmp.images import format_members
from liveblockd.qmp.hmp.io_text import IoRefusedError, Usage, Words
from liveblockd.qmp.hmp.qemu_io import Disk, commands, io_command, settle
from liveblockd.storage.driver import ExtentKind, Permission

READ: Final = Permission.CONSISTENT_READ
WRITE: Final = Permission.WRITE
#: what is written without a pattern
_FILL: Final = 0xCD
#: seconds that ``wait_break`` waits for somebody to come by
_WAIT_BREAK: Final = 60.0
_RANGE: Final = "off len"
_VECTOR: Final = "off len [len..]"


class Report(NamedTuple):
    """How a request is told of."""

    quiet: bool
    terse: bool

    @classmethod
    def of(cls, words: Words) -> Report:
        """-q and -C."""
        return cls(words.has("q"), words.has("C"))


class Breakpoints(Protocol):
    """What the driver blkdebug offers."""

    def suspend(self, event: str, tag: str) -> None:
        """Stop the next request that meets ``event``; OSError(ENOENT) for an unknown one."""

    def resume(self, tag: str) -> None:
        """Let a stopped request go on; OSError(ENOENT)."""

    def remove_break(self, tag: str) -> None:
        """Forget a breakpoint; OSError(ENOENT)."""

    def is_suspended(self, tag: str) -> bool:
        """Whether a request stands there."""


def _range(words: Words) -> tuple[int, int]:
    offset, length = words.words
    return io_text.number(offset), io_text.length_of(length)


def _write_range(words: Words) -> tuple[int, int]:
    """Zeros that are to be fast (-n) may be any number."""
    offset, length = words.words
    if words.has("n"):
        return io_text.number(offset), io_text.number(length)
    return io_text.number(offset), io_text.length_of(length, unless=" without -n")


def _vector(words: Words) -> tuple[int, int]:
    offset, *lengths = words.words
    return io_text.number(offset), sum(io_text.lengths_of(lengths))


def _inside(disk: Disk, offset: int, length: int) -> None:
    if offset + length > disk.backend.length:
        raise OSError(EIO, os.strerror(EIO))


@asynccontextmanager
async def _failing_as(what: str) -> AsyncGenerator[None, None]:
    try:
        yield
    except OSError as error:
        raise IoRefusedError(f"{what} failed: {os.strerror(error.errno or EIO)}") from None


def _refuse_vm_state(words: Words, what: str) -> None:
    if words.has("b"):
        raise IoRefusedError(f"{what} failed: {os.strerror(ENOTSUP)}")


def _count_invalid(disk: Disk, verb: str) -> None:
    """-i: nothing but the statistics see it."""
    disk.backend.count_invalid("rd" if verb == "read" else "wr")
    disk.text.append(f"injecting invalid {verb} request\n")


# -- reading


class _Reading(NamedTuple):
    offset: int
    length: int
    pattern: int | None
    #: part of the data that the pattern is for
    part_offset: int
    part_length: int
    dump: bool
    report: Report
    failing: str

    async def run(self, disk: Disk) -> None:
        started = perf_counter()
        async with _failing_as(self.failing):
            _inside(disk, self.offset, self.length)
            data = await disk.backend.read(self.offset, self.length)
        seconds = perf_counter() - started
        if self.pattern is not None:
            end = self.part_offset + self.part_length
            found = bytes(memoryview(data)[self.part_offset : end])
            if found != bytes((self.pattern,)) * len(found):
                disk.text.append(
                    f"Pattern verification failed at offset {self.offset + self.part_offset}, "
                    f"{self.part_length} bytes\n"
                )
        if self.report.quiet:
            return
        if self.dump:
            disk.text.extend(io_text.dump(self.offset, data))
        disk.text.append(
            io_text.report("read", self.offset, self.length, seconds, terse=self.report.terse)
        )


def _reading(words: Words, place: tuple[int, int], failing: str) -> _Reading:
    offset, length = place
    pattern = io_text.pattern_of(words.options["P"]) if words.has("P") else None
    part_offset = io_text.number(words.options.get("s", "0"))
    part_length = (
        io_text.number(words.options["l"]) if words.has("l") else max(length - part_offset, 0)
    )
    if part_offset + part_length > length:
        raise IoRefusedError("pattern verification range exceeds end of read data")
    report = Report.of(words)
    return _Reading(
        offset, length, pattern, part_offset, part_length, words.has("v"), report, failing
    )


_READ_USAGE: Final = Usage("bCl:pP:qs:v", _RANGE, 2, -1, "read, and compare or show it")


@io_command("read", _READ_USAGE, READ, alias="r", beside=True)
async def read(disk: Disk, words: Words) -> None:
    """One request."""
    if len(words.words) != 2 or (not words.has("P") and (words.has("s") or words.has("l"))):
        raise IoRefusedError(_READ_USAGE.line("read"))
    _refuse_vm_state(words, "read")
    await _reading(words, _range(words), "read").run(disk)


_READV_USAGE: Final = Usage("CP:qv", _VECTOR, 2, -1, "read into several pieces")


@io_command("readv", _READV_USAGE, READ, beside=True)
async def readv(disk: Disk, words: Words) -> None:
    """One request."""
    await _reading(words, _vector(words), "readv").run(disk)


@io_command("aio_read", Usage("CP:iqv", _VECTOR, 2, -1, "read, and do not wait for it"), READ)
async def aio_read(disk: Disk, words: Words) -> None:
    """One request that goes on."""
    if words.has("i"):
        _count_invalid(disk, "read")
        return
    disk.begin(_reading(words, _vector(words), "readv").run(disk))


# -- writing


class _Writing(NamedTuple):
    offset: int
    length: int
    data: bytes | None  # None: zeros
    unmap: bool
    fast_only: bool
    fua: bool
    compressed: bool
    report: Report
    failing: str

    async def run(self, disk: Disk) -> None:
        started = perf_counter()
        async with _failing_as(self.failing):
            await self._request(disk)
        seconds = perf_counter() - started
        if not self.report.quiet:
            disk.text.append(
                io_text.report("wrote", self.offset, self.length, seconds, terse=self.report.terse)
            )

    async def _request(self, disk: Disk) -> None:
        _inside(disk, self.offset, self.length)
        backend = disk.backend
        if self.compressed:
            await backend.write_compressed(self.offset, self.data or bytes(self.length))
        elif self.data is not None:
            await backend.write(self.offset, self.data, fua=self.fua)
        else:
            await backend.write_zeroes(
                self.offset,
                self.length,
                may_unmap=self.unmap,
                fast_only=self.fast_only,
                fua=self.fua,
            )


def _writing(words: Words, place: tuple[int, int], failing: str) -> _Writing:
    offset, length = place
    data: bytes | None = None
    if not words.has("z"):
        pattern = io_text.pattern_of(words.options["P"]) if words.has("P") else _FILL
        data = bytes((pattern,)) * length
    return _Writing(
        offset,
        length,
        data,
        unmap=words.has("u"),
        fast_only=words.has("n"),
        fua=words.has("f"),
        compressed=words.has("c"),
        report=Report.of(words),
        failing=failing,
    )


def _check_combination(words: Words) -> None:
    if words.has("b") and words.has("z"):
        raise IoRefusedError("-b and -z cannot be specified at the same time")
    if words.has("f") and (words.has("b") or words.has("c")):
        raise IoRefusedError("-f and -b or -c cannot be specified at the same time")
    for letter in "nu":
        if words.has(letter) and not words.has("z"):
            raise IoRefusedError(f"-{letter} requires -z to be specified")
    if sum(words.has(letter) for letter in "zPs") > 1:
        raise IoRefusedError("Only one of -z, -P, and -s can be specified at the same time")


_WRITE_USAGE: Final = Usage("bcCfnpP:qs:uz", _RANGE, 2, -1, "write a pattern, a file or zeros")


@io_command("write", _WRITE_USAGE, WRITE, alias="w", beside=True)
async def write(disk: Disk, words: Words) -> None:
    """One request."""
    if len(words.words) != 2:
        raise IoRefusedError(_WRITE_USAGE.line("write"))
    _check_combination(words)
    place = offset, length = _write_range(words)
    if words.has("b") or words.has("c"):
        for value, name in ((offset, "offset"), (length, "count")):
            if value % io_text.SECTOR:
                raise IoRefusedError(f"{value} is not a sector-aligned value for '{name}'")
    _refuse_vm_state(words, "write")
    writing = _writing(words, place, "write")
    if words.has("s"):
        name = words.options["s"]
        data = await disk.monitor.context.workers.run(_repeated, name, length)
        writing = writing._replace(data=data)
    await writing.run(disk)


def _repeated(name: str, length: int) -> bytes:
    """``length`` bytes of a file, from its start again and again; on a worker. IoRefusedError."""
    try:
        with open(name, "rb") as file:
            data = file.read(length)
    except OSError as error:
        raise IoRefusedError(f"{name}: {error.strerror}") from None
    if not data:
        raise IoRefusedError(f"{name}: file is empty")
    return (data * -(-length // len(data)))[:length]


@io_command("writev", Usage("CfP:q", _VECTOR, 2, -1, "write several pieces"), WRITE, beside=True)
async def writev(disk: Disk, words: Words) -> None:
    """One request."""
    await _writing(words, _vector(words), "writev").run(disk)


@io_command("aio_write", Usage("CfiP:quz", _VECTOR, 2, -1, "write, and do not wait for it"), WRITE)
async def aio_write(disk: Disk, words: Words) -> None:
    """One request that goes on."""
    if words.has("z") and len(words.words) != 2:
        raise IoRefusedError("-z supports only a single length parameter")
    if words.has("u") and not words.has("z"):
        raise IoRefusedError("-u requires -z to be specified")
    if words.has("z") and words.has("P"):
        raise IoRefusedError("-z and -P cannot be specified at the same time")
    if words.has("i"):
        _count_invalid(disk, "write")
        return
    disk.begin(_writing(words, _vector(words), "aio_write").run(disk))


@io_command(
    "aio_flush", Usage("", "", 0, 0, "wait for all that aio_read and aio_write began"), beside=True
)
async def aio_flush(disk: Disk, words: Words) -> None:  # noqa: ARG001
    """Of every disk."""
    await settle(disk.monitor.context)


@io_command("flush", Usage("", "", 0, 0, "make what was written durable"), alias="f", beside=True)
async def flush(disk: Disk, words: Words) -> None:  # noqa: ARG001
    """Nothing is printed when it is done."""
    async with _failing_as("flush"):
        await disk.backend.flush()


_DISCARD_USAGE: Final = Usage("Cq", _RANGE, 2, -1, "give space back")


@io_command("discard", _DISCARD_USAGE, WRITE, alias="d", beside=True)
async def discard(disk: Disk, words: Words) -> None:
    """One request."""
    if len(words.words) != 2:
        raise IoRefusedError(_DISCARD_USAGE.line("discard"))
    offset, length = _range(words)
    report = Report.of(words)
    started = perf_counter()
    async with _failing_as("discard"):
        _inside(disk, offset, length)
        await disk.backend.discard(offset, length)
    if not report.quiet:
        seconds = perf_counter() - started
        disk.text.append(io_text.report("discard", offset, length, seconds, terse=report.terse))


# -- the image


@io_command("length", Usage("", "", 0, 0, "the size of the disk"), alias="l")
async def length(disk: Disk, words: Words) -> None:  # noqa: ARG001
    """What can be read."""
    disk.text.append(f"{io_text.amount(disk.backend.length)}\n")


@io_command("truncate", Usage("m:", "off", 1, 3, "change the size of the disk"), alias="t")
async def truncate(disk: Disk, words: Words) -> None:
    """As block_resize; with -m what is new is allocated at once."""
    try:
        mode = Preallocation(words.options.get("m", "off"))
    except ValueError:
        text = words.options["m"]
        raise IoRefusedError(f"qemu-io: Invalid preallocation mode '{text}'") from None
    size = io_text.number(words.words[0])
    try:
        await resize(disk.monitor.context.graph, disk.node, size, mode)
    except BlockError as error:
        raise IoRefusedError(f"qemu-io: {error.message}") from None
    except OSError as error:
        raise IoRefusedError(f"qemu-io: {os.strerror(error.errno or EIO)}") from None


async def _allocated(node: Node, offset: int, length: int, add: Callable[[int, bool], Any]) -> None:
    """Hand over runs of what ``node`` itself holds, or not."""
    end = offset + length
    while offset < end:
        for extent in await node.map(offset, end - offset):
            add(extent.length, extent.kind not in (ExtentKind.UNALLOCATED, ExtentKind.MARKED))
            offset += extent.length


@io_command("map", Usage("", "", 0, 0, "what the image itself holds"))
async def map_disk(disk: Disk, words: Words) -> None:  # noqa: ARG001
    """Adjacent ranges of the same kind are one line."""
    runs: list[tuple[int, bool]] = []

    def add(size: int, held: bool) -> None:
        if runs and runs[-1][1] == held:
            runs[-1] = (runs[-1][0] + size, held)
        else:
            runs.append((size, held))

    async with _failing_as("Failed to get allocation status: map"):
        await _allocated(disk.node, 0, disk.backend.length, add)
    offset = 0
    for size, held in runs:
        disk.text.append(io_text.allocation(size, held, offset))
        offset += size


@io_command(
    "alloc", Usage("", "offset [count]", 1, 2, "how much the image itself holds"), alias="a"
)
async def alloc(disk: Disk, words: Words) -> None:
    """Without a count: of one sector."""
    start = io_text.number(words.words[0])
    count = io_text.number(words.words[1]) if len(words.words) > 1 else io_text.SECTOR
    total = max(0, min(count, disk.backend.length - start))
    held = 0

    def add(size: int, is_held: bool) -> None:
        nonlocal held
        held += size if is_held else 0

    async with _failing_as("is_allocated"):
        await _allocated(disk.node, start, total, add)
    disk.text.append(f"{held}/{total} bytes allocated at offset {io_text.amount(start)}\n")


@io_command("info", Usage("", "", 0, 0, "what the format says of the image"), alias="i")
async def info(disk: Disk, words: Words) -> None:  # noqa: ARG001
    """Driver, cluster size and what is special to the format."""
    driver = disk.node.driver
    disk.text.append(f"format name: {driver.driver_name}\n")
    if driver.cluster_size:
        disk.text.append(f"cluster size: {io_text.amount(driver.cluster_size)}\n")
    if driver.vm_state_offset:
        disk.text.append(f"vm state offset: {io_text.amount(driver.vm_state_offset)}\n")
    specific = driver.format_specific()
    if specific is not None:
        disk.text.append("Format specific information:\n" + format_members(specific["data"]))


# -- breakpoints


def _breakpoints(node: Node | None) -> Breakpoints:
    """Of the first driver on the way down that has them; OSError(ENOTSUP)."""
    while node is not None:
        if hasattr(node.driver, "is_suspended"):
            return cast(Breakpoints, node.driver)
        node = node.file
    raise OSError(ENOTSUP, os.strerror(ENOTSUP))


def _told(what: str, request: Callable[[], None]) -> None:
    try:
        request()
    except OSError as error:
        raise IoRefusedError(f"Could not {what}: {error.strerror}") from None


@io_command("break", Usage("", "event tag", 2, 2, "stop the next request that meets the event"))
async def set_break(disk: Disk, words: Words) -> None:
    """By the driver blkdebug."""
    event, tag = words.words
    _told("set breakpoint", lambda: _breakpoints(disk.node).suspend(event, tag))


@io_command("remove_break", Usage("", "tag", 1, 1, "forget a breakpoint"))
async def remove_break(disk: Disk, words: Words) -> None:
    """Who stands there goes on."""
    tag = words.words[0]
    _told(f"remove breakpoint {tag}", lambda: _breakpoints(disk.node).remove_break(tag))


@io_command("resume", Usage("", "tag", 1, 1, "let a stopped request go on"))
async def resume(disk: Disk, words: Words) -> None:
    """By its tag."""
    tag = words.words[0]
    _told("resume request", lambda: _breakpoints(disk.node).resume(tag))


@io_command(
    "wait_break",
    Usage("", "tag", 1, 1, "wait until a request stands at the breakpoint"),
    beside=True,
)
async def wait_break(disk: Disk, words: Words) -> None:
    """At most a minute, and not when the daemon ends."""
    tag = words.words[0]
    try:
        points = _breakpoints(disk.node)
    except OSError as error:
        raise IoRefusedError(f"Could not wait for breakpoint {tag}: {error.strerror}") from None
    deadline = asyncio.get_running_loop().time() + _WAIT_BREAK
    while not points.is_suspended(tag):
        if disk.monitor.context.quitting or asyncio.get_running_loop().time() > deadline:
            raise IoRefusedError(f"Could not wait for breakpoint {tag}: {os.strerror(ENOENT)}")
        await asyncio.sleep(0.002)


@io_command("sleep", Usage("", "milliseconds", 1, 1, "wait"), beside=True)
async def sleep(disk: Disk, words: Words) -> None:
    """At most a minute, and not when the daemon ends."""
    text = words.words[0]
    if not text.isdecimal():
        raise IoRefusedError(f"{text} is not a valid number")
    clock = asyncio.get_running_loop().time
    end = clock() + min(int(text) / 1000, _WAIT_BREAK)
    while not disk.monitor.context.quitting:
        if (left := end - clock()) <= 0:
            return
        await asyncio.sleep(min(left, 0.05))


@io_command("help", Usage("", "[command]", 0, 1, "what the commands take"), alias="?")
async def show_help(disk: Disk, words: Words) -> None:
    """Of one or of all."""
    if words.words:
        name = words.words[0]
        command = commands.get(name)
        if command is None:
            raise IoRefusedError(f"command {name} not found")
        disk.text.append(io_help.describe(name, command.usage))
        return
    for name in sorted(commands):
        disk.text.append(f"{commands[name].usage.line(name)}\n")
    disk.text.append("\nUse 'help commandname' for extended help.\n")
