"""A daemon of monitors only, for tests of the QMP wire: ``python -m tests.support.qmp_daemon``.

Takes ``--chardev`` and ``--monitor`` of the simplest form; other options are ignored. Commands of
the rooms above are stood in for by ones that answer with nothing.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import signal
import sys
from typing import Any, Literal

from liveblockd.events import JobStatusChange, Publisher
from liveblockd.jobs.scheduler import Scheduler
from liveblockd.qapi import QapiModel, parse
from liveblockd.qmp import registry
from liveblockd.qmp.context import Context
from liveblockd.qmp.server import Chardev, Monitor


class BlockStream(QapiModel):
    job_id: str | None = None
    device: str
    speed: int = 0
    on_error: Literal["report", "stop"] = "report"
    auto_dismiss: bool = True


class BlockJobSetSpeed(QapiModel):
    device: str
    speed: int


class Flat(QapiModel):
    flat: bool = False


async def nothing(context: Context, arguments: Any) -> list[Any]:
    return []


async def announce(context: Context, arguments: Any) -> None:
    for _ in range(arguments.times):
        context.publisher.publish(JobStatusChange("j" * arguments.size, "created"))


class Announce(QapiModel):
    times: int
    size: int = 1


async def wait(context: Context, arguments: Any) -> None:
    await asyncio.sleep(arguments.ms / 1000)
    if arguments.announce:
        context.publisher.publish(JobStatusChange("waited", "concluded"))


class Wait(QapiModel):
    ms: int
    announce: bool = False


async def fail(context: Context, arguments: Any) -> None:
    raise {"OSError": OSError(28, "No space left on device"), "KeyError": KeyError("x")}[
        arguments.how
    ]


class Fail(QapiModel):
    how: str


def register_stand_ins() -> None:
    importlib.import_module("liveblockd.qmp.commands.protocol")  # and none of the rooms above
    stand_ins: list[tuple[str, Any, Any]] = [
        ("block-stream", BlockStream, nothing),
        ("block-job-set-speed", BlockJobSetSpeed, nothing),
        ("query-named-block-nodes", Flat, nothing),
        ("query-block-jobs", None, nothing),
        ("query-jobs", None, nothing),
        ("x-test-announce", Announce, announce),
        ("x-test-wait", Wait, wait),
        ("x-test-fail", Fail, fail),
    ]
    for name, args, function in stand_ins:
        if name not in registry.commands():
            registry.command(name, args=args, returns=list[str])(function)


def options(text: str) -> dict[str, str]:
    first, *rest = text.split(",")
    found = {"": first}
    for part in rest if "=" not in first else [first, *rest]:
        key, value = part.split("=", 1)
        found[key] = value
    return found


async def serve(arguments: list[str]) -> None:
    register_stand_ins()
    ended = asyncio.Event()
    nobody: Any = None
    jobs = Scheduler(Publisher())
    context = Context(nobody, jobs, nobody, nobody, Publisher(), on_quit=lambda _: ended.set())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    chardevs: dict[str, Chardev] = {}
    monitors: list[Monitor] = []
    for option, value in itertools.pairwise(arguments):
        if option == "--chardev":
            found = options(value)
            found["backend"] = found.pop("")
            chardevs[found["id"]] = parse(Chardev, found, keyval=True)
        elif option == "--monitor":
            found = options(value)
            chardev = chardevs[found.get("chardev", found[""])]
            monitors.append(Monitor(context, chardev, pretty="pretty" in found))
            await monitors[-1].start()
    await ended.wait()
    for monitor in monitors:
        await monitor.close()


def main() -> int:
    if "--uvloop" in sys.argv:
        import uvloop

        uvloop.run(serve(sys.argv[1:]))
    else:
        asyncio.run(serve(sys.argv[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
