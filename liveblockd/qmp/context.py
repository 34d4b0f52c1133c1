"""What a QMP command is given of the daemon.

The composition root makes one ``Context`` and hands it to every monitor. Runs on the event loop;
errors are those of ``stop_work``, which lets out none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from liveblockd.events import Publisher
from liveblockd.runtime.demand import Demand

if TYPE_CHECKING:
    from liveblockd.exports.registry import ExportRegistry
    from liveblockd.graph.graph import Graph
    from liveblockd.jobs.scheduler import Scheduler
    from liveblockd.qmp.session import Session
    from liveblockd.runtime.workers import WorkerPool


@dataclass(slots=True, eq=False)
class Context:
    """The parts of the daemon that commands work on."""

    graph: Graph
    scheduler: Scheduler
    exports: ExportRegistry
    workers: WorkerPool
    publisher: Publisher
    #: ends the daemon; returns at once (``daemon.py``)
    on_quit: Callable[[str], None]
    #: removes exports and cancels jobs, with their events: done before ``quit`` is answered
    stop_work: Callable[[], Awaitable[None]] | None = None
    #: lets go what waits for limits and at breakpoints: done when ``quit`` is asked for
    hurry: Callable[[], None] | None = None
    #: prints what QEMU prints on stdout ("Formatting ..."), flushed on return
    console: Callable[[str], None] = print
    #: what a package keeps for the daemon's life (object registry, job defaults), by its name
    parts: dict[str, Any] = field(default_factory=dict)
    #: what monitors ask for is counted here
    demand: Demand = field(default_factory=Demand)
    #: live QMP sessions
    sessions: set[Session] = field(default_factory=set)
    #: held by the one command that runs; queries do not take it
    command_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    #: the end has begun: no further command is run
    quitting: bool = False
    _quit_called: bool = False

    def quit(self, reason: str = "host-qmp-quit") -> None:
        """End the daemon. Once only: a second call does nothing."""
        self.quitting = True
        if not self._quit_called:
            self._quit_called = True
            self.on_quit(reason)


#: the session whose command runs, for the few commands that ask (``x-liveblock-*``)
asking_session: ContextVar[Session | None] = ContextVar("asking_session", default=None)
