"""The command ``qemu-io``: requests of a disk, as the program of that name makes them.

What a request says goes to the standard output of the daemon, where scripts look for it; what
stands against it (an unknown disk, permissions) is the answer of the monitor.

Runs on the event loop. A line stands on the disk as the drive that it names, or as a user of its
own, and lets go when the last request that it began has ended: ``aio_read`` and ``aio_write``
return at once. Requests wait beside the commands of other clients, who may so lift a limit, resume
at a breakpoint, or quit. Errors: BlockError for what stands against a line; none of a request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from liveblockd.errors import BlockError
from liveblockd.graph.backend import Backend
from liveblockd.graph.node import Node
from liveblockd.qmp.context import Context
from liveblockd.qmp.hmp.arguments import Argument, Flag, Kind
from liveblockd.qmp.hmp.io_text import IoRefusedError, Usage, Words, parse_words
from liveblockd.qmp.hmp.table import Arguments, Monitor, hmp_command
from liveblockd.storage.driver import Permission

_WRITES: Final = Permission.WRITE | Permission.WRITE_UNCHANGED


@dataclass(eq=False)
class Disk:
    """What a handler has to work with: the disk that the line names."""

    monitor: Monitor
    backend: Backend
    #: whether the backend is of this line alone
    own: bool
    #: what was printed
    text: list[str] = field(default_factory=list)

    @property
    def node(self) -> Node:
        """What the line looks at: filters that jobs have put in are not meant."""
        return self.backend.node.asked_for

    def begin(self, request: Awaitable[None]) -> None:
        """Let a request go on after the line has returned; it prints when it has ended."""
        task = asyncio.ensure_future(request)
        requests = _requests(self.monitor.context)
        requests.add(task)
        self._pending += 1
        task.add_done_callback(lambda ended: self._ended(ended, requests))

    _pending: int = 0

    def _ended(self, task: asyncio.Future[None], requests: set[asyncio.Future[None]]) -> None:
        requests.discard(task)
        self._pending -= 1
        if not task.cancelled() and (error := task.exception()) is not None:
            self.text.append(f"{error}\n")
        self.show()
        if not self._pending and self.own:
            closing = asyncio.ensure_future(self.monitor.context.graph.detach(self.backend))
            requests.add(closing)
            closing.add_done_callback(requests.discard)

    def show(self) -> None:
        """Print what there is."""
        if self.text:
            self.monitor.context.console("".join(self.text).removesuffix("\n"))
            self.text.clear()

    async def let_go(self) -> None:
        """The line has ended."""
        if self.own and not self._pending:
            await self.monitor.context.graph.detach(self.backend)


def _requests(context: Context) -> set[asyncio.Future[None]]:
    """Those that lines have begun and that go on; kept from being forgotten while they run."""
    found: set[asyncio.Future[None]] = context.parts.setdefault("qemu-io", set())
    return found


async def settle(context: Context) -> None:
    """Return when everything that lines have begun has ended (``aio_flush``)."""
    while pending := _requests(context):
        await asyncio.wait(set(pending))


@dataclass(frozen=True, slots=True)
class IoCommand:
    """One of the commands; ``permissions`` are those it needs, and it may wait if ``beside``."""

    usage: Usage
    permissions: Permission
    beside: bool
    handler: Callable[[Disk, Words], Awaitable[None]]


commands: dict[str, IoCommand] = {}
_aliases: dict[str, str] = {}


def io_command(
    name: str,
    usage: Usage,
    permissions: Permission = Permission.NONE,
    *,
    alias: str = "",
    beside: bool = False,
) -> Callable[[Callable[[Disk, Words], Awaitable[None]]], Callable[[Disk, Words], Awaitable[None]]]:
    """Register a command of ``qemu-io``; ``beside``: it makes requests as guests do, or waits.

    Such a line waits for limits and at breakpoints while other monitors have their turns.
    """

    def register(
        handler: Callable[[Disk, Words], Awaitable[None]],
    ) -> Callable[[Disk, Words], Awaitable[None]]:
        assert name not in commands
        commands[name] = IoCommand(usage, permissions, beside, handler)
        if alias:
            _aliases[alias] = name
        return handler

    return register


@hmp_command(
    "qemu-io",
    (
        Flag("d", "by_id"),
        Argument("device", Kind.DEVICE),
        Argument("command", Kind.STRING),
    ),
    '[-d] [device] "[command]"',
    "make a request of a drive or node, in the words of the program qemu-io; what it\n"
    "\t\t\t says goes to the daemon's standard output (-d: only a drive is meant)",
)
async def qemu_io(monitor: Monitor, arguments: Arguments) -> str | None:
    """Run one line (``io_requests`` has its commands); wrong words are told on the output."""
    device, line = arguments["device"], arguments["command"].split()
    graph = monitor.context.graph
    drive = graph.drives.get(device)
    if drive is None and arguments.get("by_id"):
        raise BlockError(f"Device '{device}' not found")
    node = drive.node if drive is not None else graph.lookup(None, device)
    if not line:
        return None
    name = _aliases.get(line[0], line[0])
    command = commands.get(name)
    if command is None:
        monitor.context.console(f'command "{line[0]}" not found')
        return None
    try:
        words = parse_words(name, command.usage, line[1:])
    except IoRefusedError as error:
        monitor.context.console(str(error))
        return None
    try:
        disk = await _stand_on(monitor, node, drive, command.permissions)
    except BlockError as error:
        return error.message
    work = partial(_carry_out, command, disk, words)
    if command.beside:
        monitor.beside = work
    else:
        await work()
    return None


async def _carry_out(command: IoCommand, disk: Disk, words: Words) -> None:
    try:
        await command.handler(disk, words)
    except IoRefusedError as error:
        disk.text.append(f"{error}\n")
    finally:
        disk.show()
        await disk.let_go()


async def _stand_on(
    monitor: Monitor, node: Node, drive: Backend | None, needed: Permission
) -> Disk:
    """As the drive, where that may do what is needed, else as somebody else. BlockError."""
    if drive is not None and not needed & ~drive.edge.used:
        return Disk(monitor, drive, own=False)
    if node.read_only and needed & _WRITES:
        raise BlockError("Block node is read-only", errno=1)
    backend = await monitor.context.graph.attach(node, needed)
    return Disk(monitor, backend, own=True)
