"""Run the daemon's main coroutine on uvloop, or on plain asyncio where that is wanted.

uvloop is the default; ``LIVEBLOCKD_LOOP=asyncio`` or the argument ``kind`` choose the standard
loop (for debugging, or where uvloop is not to be had: it is then used without being asked for).

Runs on: the main thread, before there is a loop. Errors: ``ConfigError`` for an unknown kind;
whatever the coroutine raises.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from liveblockd.errors import ConfigError
from liveblockd.runtime.memory import keep_freed_buffers
from liveblockd.runtime.slices import SLICE, ask_for_slices

T = TypeVar("T")

log = logging.getLogger(__name__)

LOOP_KINDS = ("auto", "uvloop", "asyncio")
LOOP_VARIABLE = "LIVEBLOCKD_LOOP"

#: Who wants the GIL is given it after this long at the latest. Python's 5 ms would be the time of
#: forty requests. It also bounds what the loop waits where the GIL is free and nobody told it,
#: since the thread that was told has no processor: most of its long waits beside a stream.
SWITCH_INTERVAL = 0.0002


def loop_factory(kind: str | None = None) -> Callable[[], asyncio.AbstractEventLoop]:
    """What makes the loop: ``kind``, else the environment, else uvloop if it is installed."""
    kind = kind or os.environ.get(LOOP_VARIABLE) or "auto"
    if kind not in LOOP_KINDS:
        raise ConfigError(f"unknown event loop '{kind}' (one of {', '.join(LOOP_KINDS)})")
    if kind == "asyncio":
        return asyncio.new_event_loop
    try:
        import uvloop
    except ImportError:
        if kind == "uvloop":
            raise ConfigError("the event loop 'uvloop' is not installed") from None
        log.info("uvloop is not installed; using asyncio's own event loop")
        return asyncio.new_event_loop
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def run(main: Coroutine[Any, Any, T], *, kind: str | None = None, debug: bool = False) -> T:
    """Run ``main`` on a new loop until it returns; its result."""
    try:
        factory = loop_factory(kind)
    except ConfigError:
        main.close()
        raise
    sys.setswitchinterval(SWITCH_INTERVAL)
    keep_freed_buffers()
    ask_for_slices(SLICE)
    with asyncio.Runner(debug=debug, loop_factory=factory) as runner:
        return runner.run(main)
