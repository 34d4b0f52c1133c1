"""The composition root: makes the parts of the daemon, starts them, and ends them in order.

Runs on the event loop. The end, whatever asked for it:

1. nobody is let in any more; the command under way ends, and none is begun;
2. exports are removed and jobs cancelled, with their events (``quit`` is answered after this);
3. every image is flushed and closed, top down, and its locks are gone;
4. the monitors' clients are sent what waits for them and are disconnected;
5. the PID file is removed.

A server that says nothing for ``_SILENCE`` holds none of this up: it is cut off.
Every step is taken whatever became of the one before; a step that fails makes the exit status 1.
A second signal changes nothing. Escaping: nothing; errors of the start are printed.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Awaitable

from liveblockd.cli import CommandLine
from liveblockd.daemon.backends import GraphBackends
from liveblockd.daemon.drivers import load_all_drivers
from liveblockd.daemon.monitors import Monitors
from liveblockd.daemon.process import Background, Notifier, PidFile
from liveblockd.daemon.startup import Startup, expand
from liveblockd.errors import BlockError, ConfigError
from liveblockd.events import Publisher, Shutdown
from liveblockd.exports.registry import ExportRegistry
from liveblockd.graph.graph import Graph
from liveblockd.jobs.scheduler import Scheduler
from liveblockd.qmp import registry
from liveblockd.qmp.commands.objects import object_registry
from liveblockd.qmp.context import Context
from liveblockd.runtime.demand import Demand
from liveblockd.runtime.streams import say
from liveblockd.runtime.workers import WorkerPool
from liveblockd.storage.registry import Environment

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PATIENCE = 5.0  # seconds a stop waits for the command under way before it says so
_SILENCE = 10.0  # seconds that servers (NBD) have to answer meanwhile


class Daemon:
    """One run of the daemon; ``run`` is all of it."""

    def __init__(self, prog: str, line: CommandLine, background: Background) -> None:
        self._prog = prog
        self._line = line
        self._background = background
        self._notifier = Notifier()
        self._pidfile: PidFile | None = None
        self._status = 0
        self._stop = asyncio.Event()
        self._reason = "host-signal"
        self._watchdog: asyncio.Task[None] | None = None
        self._cutting_off: asyncio.Task[None] | None = None

    async def run(self) -> int:
        """Start, serve until somebody asks for the end, end; the exit status."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._request_stop, "host-signal")
        self._make_parts()
        gc.freeze()
        gc.enable()
        try:
            await self._start()
            await self._stop.wait()
        except ConfigError as exc:
            say("\n".join([f"{self._prog}: {exc}", *getattr(exc, "__notes__", [])]), sys.stderr)
            self._status = 1
        finally:
            await self._end()
        return self._status

    def _make_parts(self) -> None:
        load_all_drivers()
        registry.load()
        self._publisher = Publisher()
        demand = Demand()
        self._workers = WorkerPool(demand=demand)
        environment = Environment(
            workers=self._workers,
            publisher=self._publisher,
            secret=lambda name: object_registry(self._context).secret(name),
            throttle_group=lambda name: object_registry(self._context).throttle_group(name),
            tls_client=lambda *which: object_registry(self._context).tls_client(*which),
        )
        self._graph = Graph(environment)
        self._scheduler = Scheduler(self._publisher)
        self._exports = ExportRegistry(self._publisher, GraphBackends(self._graph), demand)
        self._exports.nbd_server.busy = lambda: self._workers.outstanding > 0
        self._context = Context(
            graph=self._graph,
            scheduler=self._scheduler,
            exports=self._exports,
            workers=self._workers,
            publisher=self._publisher,
            on_quit=self._request_stop,
            stop_work=self._stop_work,
            hurry=self._graph.hold_up_nothing,
            console=console,
            demand=demand,
        )
        self._monitors = Monitors(self._context)

    def _request_stop(self, reason: str) -> None:
        if not self._stop.is_set():
            self._reason = reason
            self._stop.set()

    # -- start

    async def _start(self) -> None:
        actions, pidfile = expand(self._line)
        startup = Startup(self._context, self._monitors)
        for action in actions:
            await startup.act(action)
            if self._stop.is_set():
                return
        await startup.resume_jobs()
        # Clients are let in only now: they must not see a daemon that is half there.
        if not await self._monitors.start(self._stop):
            return
        if pidfile is not None:
            self._pidfile = PidFile(pidfile)
        # what the start made stays until the end: the collector need not look through it again
        gc.collect()
        gc.freeze()
        self._background.ready()
        nodes, exports = len(self._graph.nodes), len(self._exports.exports)
        self._notifier.send("READY=1", f"STATUS={nodes} block nodes, {exports} exports")
        if interval := self._notifier.watchdog_interval:
            self._watchdog = asyncio.create_task(self._watch(interval))

    async def _watch(self, interval: float) -> None:
        """Tell systemd that the event loop runs; that it does is what is being watched."""
        while True:
            self._notifier.send("WATCHDOG=1")
            await asyncio.sleep(interval)

    # -- end

    async def _stop_work(self) -> None:
        """Exports first, so that no guest writes while its jobs are undone."""
        self._begin_cutting_off()
        closed = asyncio.ensure_future(self._exports.close())
        await asyncio.wait((closed,), timeout=_PATIENCE)
        if not closed.done():
            self._scheduler.request_end()  # guests may wait for one of the jobs, which may hang
        await self._step("removing the exports", closed)
        await self._step("cancelling the jobs", self._scheduler.cancel_all())

    async def _end(self) -> None:
        self._notifier.send("STOPPING=1", "STATUS=closing the images")
        self._monitors.stop_listening()
        self._graph.stop_waiting(*self._graph.nodes.values())
        self._graph.hold_up_nothing()
        self._begin_cutting_off()
        await self._last_command()
        journal = self._context.parts.get("journal")
        if journal is not None:
            # Who quits says that the work is over; a signal only that this daemon is.
            journal.ending = self._reason == "host-signal"
        await self._stop_work()
        if self._graph.drives:
            # QEMU with drives says this; qemu-storage-daemon, which has none, does not
            self._publisher.publish(Shutdown(guest=False, reason=self._reason))
        await self._step("closing the images", self._close_images())
        if journal is not None:
            await self._step("closing the journal of jobs", journal.close())
        await self._step("disconnecting the monitors", self._monitors.close())
        await self._step("waiting for the workers", self._workers.idle())
        self._workers.close()
        for task in (self._watchdog, self._cutting_off):
            if task is not None:
                task.cancel()
        if self._pidfile is not None:
            self._pidfile.remove()

    def _begin_cutting_off(self) -> None:
        if self._cutting_off is None:
            self._cutting_off = asyncio.create_task(self._cut_off_silent())

    async def _cut_off_silent(self) -> None:
        """Neither a guest's request nor what is left of a job may hang for ever."""
        while True:
            for node in tuple(self._graph.nodes.values()):
                self._graph.cut_off(node, _SILENCE)
            await asyncio.sleep(1)

    async def _close_images(self) -> None:
        failed = await self._graph.close()
        if failed:  # what the guests did not flush may be lost; the log says where
            self._status = 1

    async def _last_command(self) -> None:
        """Let the command under way come to its end; those behind it are refused."""
        self._context.quitting = True
        lock = self._context.command_lock
        acquired = asyncio.ensure_future(lock.acquire())
        await asyncio.wait((acquired,), timeout=_PATIENCE)
        if not acquired.done():
            log.warning("waiting for a command to end before the images are closed")
            self._scheduler.request_end()  # it may wait for one of the jobs, which may hang
            await acquired
        lock.release()

    async def _step(self, what: str, work: Awaitable[object]) -> None:
        try:
            await work
        except (BlockError, OSError) as exc:
            log.error("%s: %s", what, exc)
            self._status = 1
        except Exception:
            log.exception("%s", what)
            self._status = 1


def console(text: str) -> None:
    """Print a line on stdout; a stdout that nobody reads is no reason to fail, or to wait."""
    say(text, sys.stdout)
