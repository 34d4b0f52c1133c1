"""The protocol itself: negotiation, introspection, version, the end (qapi/control.json).

Runs on the event loop; raises BlockError for bad arguments only.
"""

# ruff: noqa: ARG001  (every command has the same two parameters)
from __future__ import annotations

import enum
from typing import Any

from liveblockd.qapi import QapiModel
from liveblockd.qmp import registry
from liveblockd.qmp.context import Context, asking_session
from liveblockd.qmp.registry import NoArguments, command
from liveblockd.qmp.session import VERSION


class QMPCapability(enum.StrEnum):
    """What a client can ask for in the negotiation."""

    OOB = "oob"


class QmpCapabilities(QapiModel):
    """Arguments of qmp_capabilities."""

    enable: list[QMPCapability] | None = None


class VersionTriple(QapiModel):
    """The level of QEMU's QMP that is spoken."""

    major: int
    minor: int
    micro: int


class VersionInfo(QapiModel):
    """Return of query-version."""

    qemu: VersionTriple
    package: str


class CommandInfo(QapiModel):
    """A command of query-commands."""

    name: str


class EventInfo(QapiModel):
    """An event of query-events."""

    name: str


class NameInfo(QapiModel):
    """Return of query-name."""

    name: str | None = None


class RunState(enum.StrEnum):
    """State of the machine, of which there is none: always running."""

    RUNNING = "running"


class StatusInfo(QapiModel):
    """Return of query-status."""

    running: bool
    status: RunState


class OwnEvents(QapiModel):
    """Arguments of x-liveblock-events."""

    enable: bool = True


@command("qmp_capabilities", args=QmpCapabilities)
async def qmp_capabilities(context: Context, arguments: QmpCapabilities) -> None:
    """Never runs: the session answers it in the negotiation and refuses it afterwards."""
    raise AssertionError("qmp_capabilities is the session's")


@command("query-version", returns=VersionInfo, query=True)
async def query_version(context: Context, arguments: NoArguments) -> dict[str, Any]:
    """The same as in the greeting."""
    return VERSION


@command("query-commands", returns=list[CommandInfo], query=True)
async def query_commands(context: Context, arguments: NoArguments) -> list[dict[str, str]]:
    """All commands, both spellings of those that have two."""
    return [{"name": name} for name in registry.commands()]


@command("query-events", returns=list[EventInfo], query=True)
async def query_events(context: Context, arguments: NoArguments) -> list[dict[str, str]]:
    """All events (QEMU had this command up to 6.2)."""
    from liveblockd.qmp import introspection

    return [{"name": event.name} for event in introspection.events()]


def _schema_info() -> Any:
    from liveblockd.qmp import introspection  # not before somebody asks

    return list[introspection.SchemaInfo]


@command("query-qmp-schema", returns=_schema_info, query=True)
async def query_qmp_schema(context: Context, arguments: NoArguments) -> list[dict[str, Any]]:
    """Commands, events and their types."""
    from liveblockd.qmp import introspection

    return introspection.schema()


@command("query-name", returns=NameInfo, query=True)
async def query_name(context: Context, arguments: NoArguments) -> NameInfo:
    """There is no guest name."""
    return NameInfo()


@command("query-status", returns=StatusInfo, query=True)
async def query_status(context: Context, arguments: NoArguments) -> StatusInfo:
    """What tools that wait for a running guest want to hear."""
    return StatusInfo(running=True, status=RunState.RUNNING)


@command("x-liveblock-events", args=OwnEvents, features=("unstable",))
async def liveblock_events(context: Context, arguments: OwnEvents) -> None:
    """Send the asking client also the events that QEMU has not (``X_LIVEBLOCK_*``), or no more."""
    session = asking_session.get()
    if session is not None:
        session.own_events = arguments.enable


async def _let_go(context: Context, arguments: NoArguments) -> None:
    if context.hurry is not None:
        context.hurry()  # the command under way may wait for a limit (``qemu-io``)


@command("quit", ahead=_let_go)
async def quit_daemon(context: Context, arguments: NoArguments) -> None:
    """Remove exports and cancel jobs, with their events; answer; end the daemon."""
    context.quitting = True
    try:
        if context.stop_work is not None:
            await context.stop_work()
    finally:
        context.quit()
