"""Does what the command line asks for, option by option, in the order they were given.

Runs on the event loop. An option that fails ends the start with ``ConfigError``, worded
``--option text: message``; what earlier options opened is closed by the daemon's usual end.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

from liveblockd.cli import Action, CommandLine
from liveblockd.cli.arguments import monitor_address
from liveblockd.daemon.process import inherited_fd
from liveblockd.errors import BlockError, ConfigError
from liveblockd.qapi import QapiModel, parse
from liveblockd.qmp.commands.chardev import chardev_registry, parse_chardev
from liveblockd.qmp.commands.objects import ObjectOptions, object_registry
from liveblockd.qmp.context import Context

if TYPE_CHECKING:
    from liveblockd.config import Configuration
    from liveblockd.daemon.journal import JobJournal
    from liveblockd.daemon.monitors import Monitors


class MonitorOptions(QapiModel):
    """``--monitor``."""

    id: str | None = None
    mode: Literal["control", "readline"] = "control"
    pretty: bool = False
    chardev: str


class JobsOptions(QapiModel):
    """``--jobs``."""

    max_concurrent: int = 0
    journal: str | None = None
    resume: bool = True


class Startup:
    """One start; ``act`` is called for each option."""

    def __init__(self, context: Context, monitors: Monitors) -> None:
        self._context = context
        self._monitors = monitors
        self._count = 0  # of monitors without a chardev of their own
        self._journal: JobJournal | None = None

    async def act(self, action: Action) -> None:
        """Do what one option asks for."""
        name = action.option.replace("-", "_")
        handler: Callable[[Action], Awaitable[None]] = getattr(self, f"_{name}")
        try:
            await handler(action)
        except BlockError as exc:
            failed = ConfigError(f"{action.where}: {exc.message}")
            for note in getattr(exc, "__notes__", []):
                failed.add_note(note)
            raise failed from exc
        except ConfigError as exc:
            raise ConfigError(f"{action.where}: {exc}") from exc
        except OSError as exc:
            raise ConfigError(f"{action.where}: {exc.strerror or exc}") from exc

    async def _jobs(self, action: Action) -> None:
        from liveblockd.qmp.commands.job_limits import set_max_concurrent

        options = parse(JobsOptions, action.value, keyval=not action.typed)
        set_max_concurrent(self._context, options.max_concurrent)
        path = options.journal
        if path is None and (directory := os.environ.get("STATE_DIRECTORY")):
            path = os.path.join(directory.partition(":")[0], "jobs.journal")
        if path is not None:
            from liveblockd.daemon.journal import JobJournal

            self._journal = JobJournal(self._context, path, resumes=options.resume)

    async def resume_jobs(self) -> None:
        """Every node is open: jobs that the last daemon was at go on."""
        if self._journal is not None:
            await self._journal.resume_jobs()

    async def _blockdev(self, action: Action) -> None:
        from liveblockd.storage.options import BlockdevOptions

        options = parse(BlockdevOptions, action.value, keyval=not action.typed)
        if options.node_name is None:
            raise BlockError("'node-name' must be specified for the root node")
        await self._context.graph.open(options)

    async def _drive(self, action: Action) -> None:
        from liveblockd.graph.drives import DriveOptions, open_drive

        options = DriveOptions.split(action.value, keyval=not action.typed)
        if self._journal is None:
            await open_drive(self._context.graph, options)
        else:
            await self._journal.open_drive(options)

    async def _object(self, action: Action) -> None:
        options = parse(ObjectOptions, action.value, keyval=not action.typed)
        object_registry(self._context).add(options)

    async def _nbd_server(self, action: Action) -> None:
        from liveblockd.qmp.commands.exports import NbdServerOptions, start_nbd_server

        value = action.value
        address = value.get("addr")
        if isinstance(address, dict) and isinstance(address.get("str"), str):
            value = value | {"addr": address | {"str": inherited_fd(address["str"])}}
        options = parse(NbdServerOptions, value, keyval=not action.typed)
        await start_nbd_server(self._context, options)

    async def _export(self, action: Action) -> None:
        from liveblockd.exports.options import BlockExportOptions

        options = parse(BlockExportOptions, action.value, keyval=not action.typed)
        await self._context.exports.add(options)

    async def _chardev(self, action: Action) -> None:
        self._add_chardev(action.where, action.value, keyval=not action.typed)

    def _add_chardev(self, where: str, value: dict[str, Any], *, keyval: bool) -> None:
        if isinstance(value.get("fd"), str):
            value = value | {"fd": inherited_fd(value["fd"])}
        options = parse_chardev(value, keyval=keyval)
        chardev_registry(self._context).add(options, where)

    async def _monitor(self, action: Action) -> None:
        options = parse(MonitorOptions, action.value, keyval=not action.typed)
        chardev = chardev_registry(self._context).take(options.chardev)
        self._monitors.add(chardev.where, chardev, mode=options.mode, pretty=options.pretty)

    async def _qmp(self, action: Action, mode: str = "control") -> None:
        name = f"compat_monitor{self._count}"
        self._count += 1
        value = {"id": name, **action.value}
        chosen = {"chardev": name, "mode": mode, "pretty": value.pop("pretty", "off")}
        self._add_chardev(action.where, value, keyval=True)
        await self._monitor(Action("monitor", action.where, chosen))

    async def _hmp(self, action: Action) -> None:
        await self._qmp(action, "readline")


def expand(line: CommandLine) -> tuple[list[Action], str | None]:
    """All options with those of configuration files in their place, and where the PID file is."""
    actions: list[Action] = []
    pidfile = line.pidfile
    for action in line.actions:
        if action.option != "config":
            actions.append(action)
            continue
        from liveblockd.config import load  # few want it: 2 MiB

        path = action.value["file"]
        try:
            configuration = load(path)
        except ConfigError as exc:
            raise ConfigError(f"{action.where}: {exc}") from exc
        actions.extend(configured(configuration, path))
        pidfile = pidfile or configuration.pidfile
    if os.environ.get("STATE_DIRECTORY") and all(a.option != "jobs" for a in actions):
        actions.append(Action("jobs", "STATE_DIRECTORY", {}, typed=True))
    # the journal tells where a drive was last, so it comes before the drives
    actions.sort(key=lambda action: action.option != "jobs")
    return actions, pidfile


def configured(configuration: Configuration, path: str) -> Iterable[Action]:
    """The options of a configuration file as actions."""
    table = functools.partial(_tables, path)
    if configuration.jobs is not None:
        yield Action("jobs", f"{path}: jobs", configuration.jobs, typed=True)
    yield from table("object", configuration.object_)
    yield from table("blockdev", configuration.blockdev)
    yield from table("drive", configuration.drive)
    if configuration.nbd_server is not None:
        yield Action("nbd-server", f"{path}: nbd-server", configuration.nbd_server, typed=True)
    yield from table("export", configuration.export)
    yield from table("chardev", configuration.chardev)
    yield from table("monitor", configuration.monitor)
    for option, texts in (("qmp", configuration.qmp), ("hmp", configuration.hmp)):
        for text in texts:
            yield Action(option, f"{path}: {option} {text}", dict(monitor_address(text)))


def _tables(path: str, option: str, tables: list[dict[str, Any]]) -> Iterable[Action]:
    for index, value in enumerate(tables):
        yield Action(option, f"{path}: {option}[{index}]", value, typed=True)
