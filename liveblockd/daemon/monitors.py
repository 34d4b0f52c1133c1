"""The monitors of the daemon: which chardev each stands on, and when clients are let in.

Runs on the event loop. Invariant: nobody is let in before ``start``, which comes when every other
option has been dealt with. Errors: ``ConfigError`` from ``start``, worded for its option.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Literal

from liveblockd.errors import BlockError, ConfigError
from liveblockd.qmp import server
from liveblockd.qmp.commands.chardev import Chardev, NullChardev, SocketChardev, StdioChardev
from liveblockd.qmp.context import Context


@dataclass(slots=True)
class _Waiting:
    where: str
    monitor: server.Monitor


class Monitors:
    """All monitors, in the order of their options."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._waiting: list[_Waiting] = []
        self._started: list[server.Monitor] = []

    def add(
        self, where: str, chardev: Chardev, *, mode: Literal["control", "readline"], pretty: bool
    ) -> None:
        """A monitor on ``chardev``; ``where`` names its option in messages."""
        options = chardev.options
        if isinstance(options, NullChardev):
            return  # nobody will ever come
        assert isinstance(options, SocketChardev | StdioChardev)
        monitor = server.Monitor(
            self._context,
            _server_chardev(options),
            mode=mode,
            pretty=pretty,
            make_readline=_make_readline,
        )
        chardev.is_open = lambda: monitor.is_open
        self._waiting.append(_Waiting(where, monitor))

    async def start(self, stop: asyncio.Event) -> bool:
        """Let clients in; False if ``stop`` came while a client was waited for (``wait=on``)."""
        stopped = asyncio.ensure_future(stop.wait())
        try:
            while self._waiting and not stop.is_set():
                waiting = self._waiting.pop(0)
                self._started.append(waiting.monitor)
                started = asyncio.ensure_future(waiting.monitor.start())
                await asyncio.wait((started, stopped), return_when=asyncio.FIRST_COMPLETED)
                if not started.done():
                    started.cancel()
                    await asyncio.wait((started,))
                    return False
                try:
                    started.result()
                except BlockError as exc:
                    raise ConfigError(f"{waiting.where}: {exc.message}") from exc
        finally:
            stopped.cancel()
        return not stop.is_set()

    def stop_listening(self) -> None:
        """Let nobody in any more; those who are there stay."""
        for monitor in self._started:
            monitor.stop_listening()

    async def close(self) -> None:
        """Send clients what waits for them, disconnect them."""
        await asyncio.gather(*(monitor.close() for monitor in self._started))


def _make_readline(context: Context) -> server.ReadlineSession:
    from liveblockd.qmp.hmp.readline import ReadlineSession  # not before somebody wants it

    return ReadlineSession(context)


def _server_chardev(options: SocketChardev | StdioChardev) -> server.Chardev:
    if isinstance(options, StdioChardev):
        return server.Chardev.model_construct(id=options.id, backend="stdio")
    reconnect = options.reconnect or -(-(options.reconnect_ms or 0) // 1000)
    return server.Chardev.model_construct(  # checked when it was parsed
        id=options.id,
        backend="socket",
        path=options.path,
        abstract=options.abstract,
        fd=options.fd,
        host=options.host or None,
        port=options.port,
        server=options.server,
        wait=options.waits,
        reconnect=reconnect,
    )
