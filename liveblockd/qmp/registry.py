"""Every QMP command by name, and how one is run (qmp-spec, section 2.3).

A module in ``qmp/commands`` registers its commands::

    @command("block-stream", args=BlockStream, aliases=("block_stream",))
    async def block_stream(context: Context, arguments: BlockStream) -> None: ...

``load()`` imports all those modules once; a name taken twice is refused then. ``execute`` checks
the arguments and runs the command, one at a time over all clients unless it is a ``query`` or
``nested``; ``in_turn`` is how anything else takes such a turn.

Runs on the event loop. Errors: BlockError, OSError and whatever a command lets out.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from liveblockd.errors import BlockError, ErrorClass, JobNotFoundError
from liveblockd.qapi import QapiModel, parse
from liveblockd.qmp.context import Context


class NoArguments(QapiModel):
    """What a command without arguments is given."""


@dataclass(frozen=True, slots=True)
class Command:
    """A QMP command.

    ``returns`` is an annotation (a QapiModel, ``list[X]``, ``str``), a function that gives one (so
    that its models are imported when the schema is asked for), or None.
    """

    name: str
    function: Callable[[Context, Any], Awaitable[Any]]
    args: type[QapiModel]
    returns: Any
    query: bool
    features: tuple[str, ...]
    ahead: Callable[[Context, Any], Awaitable[None]] | None = None
    nested: bool = False


_commands: dict[str, Command] = {}
_Returned = TypeVar("_Returned")
_Function = TypeVar("_Function", bound=Callable[[Any, Any], Awaitable[Any]])


def command(
    name: str,
    *,
    args: type[QapiModel] | None = None,
    returns: Any = None,
    aliases: tuple[str, ...] = (),
    query: bool = False,
    features: tuple[str, ...] = (),
    ahead: Callable[[Context, Any], Awaitable[None]] | None = None,
    nested: bool = False,
) -> Callable[[_Function], _Function]:
    """Register ``async def f(context, arguments)`` as QMP command ``name`` and ``aliases``.

    ``query`` lets it run beside other commands: it may change nothing and await nothing slow.
    ``ahead`` is what takes long and can be done before it is the turn of this command, beside those
    of other clients: it changes nothing, and says nothing of what is wrong. ``nested``: it takes
    its turn itself. ``features`` are QAPI features (``deprecated``, ``unstable``). Raises
    ValueError for a name that is taken.
    """

    def register(function: _Function) -> _Function:
        for spelling in (name, *aliases):
            if spelling in _commands:
                raise ValueError(f"QMP command {spelling} is registered twice")
            _commands[spelling] = Command(
                spelling, function, args or NoArguments, returns, query, features, ahead, nested
            )
        return function

    return register


def load() -> None:
    """Import every module of ``qmp/commands``, so that all commands are known."""
    package = importlib.import_module("liveblockd.qmp.commands")
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)


def commands() -> dict[str, Command]:
    """All registered commands by name, in the order of registration."""
    return _commands


def find(name: str) -> Command:
    """The command ``name``; BlockError of class CommandNotFound without one."""
    try:
        return _commands[name]
    except KeyError:
        raise BlockError(
            f"The command {name} has not been found", error_class=ErrorClass.COMMAND_NOT_FOUND
        ) from None


async def execute(context: Context, name: str, arguments: dict[str, Any]) -> Any:
    """Check ``arguments`` and run command ``name``; what it returns, or {}."""
    found = find(name)
    parsed = parse(found.args, arguments)
    if found.query or found.nested:
        returned = await found.function(context, parsed)
    else:
        if found.ahead is not None:
            await found.ahead(context, parsed)
        work = partial(found.function, context, parsed)
        try:
            returned = await in_turn(context, work)
        except JobNotFoundError:
            raise
        except BlockError:
            # A client that was told of the end of a job may have its name and its nodes at once.
            if not await context.scheduler.let_go_of_ended():
                raise
            returned = await in_turn(context, work)
    return {} if returned is None else returned


async def do_ahead(context: Context, name: str) -> None:
    """What command ``name``, which takes no arguments, has to do before its turn, if anything."""
    found = _commands.get(name)
    if found is not None and found.ahead is not None:
        await found.ahead(context, NoArguments())


async def in_turn(context: Context, work: Callable[[], Awaitable[_Returned]]) -> _Returned:
    """Do ``work`` while no command runs; BlockError when the daemon is shutting down."""
    async with context.command_lock:
        if context.quitting:
            raise BlockError("The daemon is shutting down")
        return await work()
