"""The commands of the human monitor by name, and how a line is run.

A module beside this one registers its commands::

    @hmp_command("block_job_pause", (DEVICE,), "device", "pause ... operation")
    async def block_job_pause(monitor: Monitor, arguments: Arguments) -> str | None: ...

A handler runs QMP commands (``monitor.qmp``), so that both monitors do the same thing, and returns
what is to be printed. What a line prints always ends in CR LF; an error is text like any other.

Runs on the event loop; the caller holds ``context.command_lock``. Nothing escapes ``run_line``
but cancellation; names taken twice are refused with ValueError at import.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from liveblockd.errors import BlockError
from liveblockd.qapi import parse, to_qmp
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

#: the argument that most commands begin with
DEVICE = Argument("device", Kind.DEVICE)

_log = logging.getLogger(__name__)


class Monitor:
    """What a handler has to work with."""

    def __init__(self, context: Context) -> None:
        self.context = context

    async def qmp(self, name: str, /, **arguments: Any) -> Any:
        """Run QMP command ``name``; ``None`` arguments are left out, ``_`` means ``-``.

        The value comes back as a client would see it. Raises BlockError and OSError.
        """
        given = {k.replace("_", "-"): v for k, v in arguments.items() if v is not None}
        command = registry.find(name)
        return to_qmp(await command.function(self.context, parse(command.args, given)))


@dataclass(frozen=True, slots=True)
class HmpCommand:
    """One command; ``names`` has its aliases behind its name."""

    names: tuple[str, ...]
    spec: Spec
    params: str
    help: str
    handler: Handler

    @property
    def usage(self) -> str:
        """The line that ``help`` prints."""
        return f"{'|'.join(self.names)} {self.params} -- {self.help}"


commands: dict[str, HmpCommand] = {}
info_commands: dict[str, HmpCommand] = {}


def hmp_command(
    name: str, spec: Spec, params: str, help_text: str, *, aliases: tuple[str, ...] = ()
) -> Callable[[Handler], Handler]:
    """Register a command; ``info X`` goes into the table of ``info``."""
    prefix, _, topic = name.partition(" ")
    table = info_commands if topic else commands

    def register(handler: Handler) -> Handler:
        command = HmpCommand((topic or prefix, *aliases), spec, params, help_text, handler)
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
    try:
        text = await _run(Monitor(context), line)
    except BlockError as exc:
        text = f"Error: {exc.message}"
    except OSError as exc:
        text = f"Error: {exc.strerror or exc}"
    except Exception as exc:
        _log.exception("human monitor command failed: %s", line)
        text = f"Error: {exc}"
    if not text:
        return ""
    return text.rstrip("\n").replace("\r\n", "\n").replace("\n", "\r\n") + "\r\n"


async def _run(monitor: Monitor, line: str) -> str | None:
    try:
        word, rest = _command_word(line)
    except ArgumentError as exc:
        return exc.message
    prefix = ""
    table = commands
    if word == "info" and rest:
        prefix, table = "info ", info_commands
        word, rest = _command_word(rest)
    command = table.get(word)
    if command is None:
        return f"unknown command: '{prefix}{word}'"
    try:
        arguments = parse_arguments("|".join(command.names), command.spec, rest)
    except ArgumentError as exc:
        hint = f'\nTry "help {prefix}{command.names[0]}" for more information'
        return exc.message + (hint if exc.show_help else "")
    return await command.handler(monitor, arguments)


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
