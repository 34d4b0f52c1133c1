"""The commands of the human monitor by name, and how a line is run.

A module beside this one registers its commands::

    @hmp_command("block_job_pause", (DEVICE,), "device", "pause ... operation")
    async def block_job_pause(monitor: Monitor, arguments: Arguments) -> str | None: ...

A handler runs QMP commands (``monitor.qmp``), so that both monitors do the same thing, and returns
what is to be printed. What a line prints always ends in CR LF; an error is text like any other.

Runs on the event loop; a line has its turn among the commands of all clients
(``registry.in_turn``), but for what it leaves for ``Monitor.beside``: requests that may wait for
long, as a guest's do. Only cancellation escapes ``run_line``, and BlockError when the daemon is
shutting down; names taken twice are refused with ValueError at import.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from liveblockd.errors import BlockError, JobNotFoundError
from liveblockd.qapi import members, parse, to_qmp
from liveblockd.qmp import registry
from liveblockd.qmp.context import Context
from liveblockd.qmp.hmp.arguments import (
    Argument,
    ArgumentError,
    Kind,
    Spec,
    parse_arguments,
    take_word,
)

Arguments: TypeAlias = dict[str, Any]
Handler: TypeAlias = Callable[["Monitor", Arguments], Awaitable[str | None]]
_Text: TypeAlias = str | None

#: the argument that most commands begin with
DEVICE = Argument("device", Kind.DEVICE)

_log = logging.getLogger(__name__)


class _RefusedTooEarlyError(Exception):
    """A command was refused while ended jobs let go of what they used; it has changed nothing."""


class Monitor:
    """What a handler has to work with."""

    def __init__(self, context: Context) -> None:
        self.context = context
        #: a refused command may be tried again: nothing of its line is done yet
        self.may_wait = True
        #: of the handler: what is still to be done for the line, beside other commands
        self.beside: Callable[[], Awaitable[_Text]] | None = None

    async def qmp(self, name: str, /, **arguments: Any) -> Any:
        """Run QMP command ``name``; ``None`` arguments are left out, ``_`` means ``-`` but in
        commands whose members have it.

        The value comes back as a client would see it. Raises BlockError and OSError.
        """
        command = registry.find(name)
        known = {member.name for member in members(command.args)}
        given = {
            k if k in known else k.replace("_", "-"): v
            for k, v in arguments.items()
            if v is not None
        }
        parsed = parse(command.args, given)
        try:
            returned = await command.function(self.context, parsed)
        except JobNotFoundError:
            raise
        except BlockError as error:
            if self.may_wait and not command.query and self.context.scheduler.letting_go:
                raise _RefusedTooEarlyError from error
            raise
        self.may_wait &= command.query
        return to_qmp(returned)


@dataclass(frozen=True, slots=True)
class HmpCommand:
    """One command; ``names`` has its aliases behind its name."""

    names: tuple[str, ...]
    spec: Spec
    params: str
    help: str
    handler: Handler
    #: the QMP command whose ``ahead`` is done before it is the turn of this one
    ahead: str = ""

    @property
    def usage(self) -> str:
        """The line that ``help`` prints."""
        return f"{'|'.join(self.names)} {self.params} -- {self.help}"


commands: dict[str, HmpCommand] = {}
info_commands: dict[str, HmpCommand] = {}


def hmp_command(
    name: str,
    spec: Spec,
    params: str,
    help_text: str,
    *,
    aliases: tuple[str, ...] = (),
    ahead: str = "",
) -> Callable[[Handler], Handler]:
    """Register a command; ``info X`` goes into the table of ``info``."""
    prefix, _, topic = name.partition(" ")
    table = info_commands if topic else commands

    def register(handler: Handler) -> Handler:
        command = HmpCommand((topic or prefix, *aliases), spec, params, help_text, handler, ahead)
        for spelling in command.names:
            if spelling in table:
                raise ValueError(f"HMP command {spelling} is registered twice")
            table[spelling] = command
        return handler

    return register


def load() -> None:
    """Import the modules that register commands."""
    package = importlib.import_module("liveblockd.qmp.hmp")
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)


async def run_line(context: Context, line: str) -> str:
    """Run one line; everything it prints, with CR LF line ends ("" if it prints nothing)."""
    load()
    line = line.strip()
    if not line or line.startswith("#"):
        return ""
    monitor = Monitor(context)
    text: _Text
    try:
        command, arguments = _parse(line)
    except ArgumentError as exc:
        text = exc.message
    else:
        await registry.do_ahead(context, command.ahead)
        work = partial(_text, line, partial(command.handler, monitor, arguments))
        text = await _in_turn(monitor, work)
        if monitor.beside is not None:  # no await before it: nobody else has had a turn
            text = await _text(line, monitor.beside)
    if not text:
        return ""
    return text.rstrip("\n").replace("\r\n", "\n").replace("\n", "\r\n") + "\r\n"


async def _in_turn(monitor: Monitor, work: Callable[[], Awaitable[_Text]]) -> _Text:
    """Do the work of a line, once more where it came too early."""
    context = monitor.context
    try:
        return await registry.in_turn(context, work)
    except _RefusedTooEarlyError:
        # As with QMP: who was told of the end of a job may have its name and its nodes at once.
        monitor.may_wait = False
        await context.scheduler.let_go_of_ended()
        return await registry.in_turn(context, work)


async def _text(line: str, work: Callable[[], Awaitable[_Text]]) -> _Text:
    """What ``work`` prints, errors included."""
    try:
        return await work()
    except _RefusedTooEarlyError:
        raise
    except BlockError as exc:
        return f"Error: {exc.message}"
    except OSError as exc:
        return f"Error: {exc.strerror or exc}"
    except Exception as exc:
        _log.exception("human monitor command failed: %s", line)
        return f"Error: {exc}"


def _parse(line: str) -> tuple[HmpCommand, Arguments]:
    """The command that a line names, and what it is given; ArgumentError with what is printed."""
    word, rest = _command_word(line)
    prefix = ""
    table = commands
    if word == "info" and rest:
        prefix, table = "info ", info_commands
        word, rest = _command_word(rest)
    command = table.get(word)
    if command is None:
        raise ArgumentError(f"unknown command: '{prefix}{word}'")
    try:
        return command, parse_arguments("|".join(command.names), command.spec, rest)
    except ArgumentError as exc:
        hint = f'\nTry "help {prefix}{command.names[0]}" for more information'
        raise ArgumentError(exc.message + (hint if exc.show_help else "")) from None


def _command_word(text: str) -> tuple[str, str]:
    """The name of the command; never a quoted word."""
    if text.startswith('"'):
        return take_word(text)
    word = text.split(maxsplit=1)[0]
    return word, text[len(word) :].lstrip()


def usage(table: dict[str, HmpCommand], prefix: str = "") -> str:
    """The help of every command in a table, sorted by name."""
    distinct = {command.names[0]: command for command in table.values()}
    return "\n".join(prefix + distinct[name].usage for name in sorted(distinct))
