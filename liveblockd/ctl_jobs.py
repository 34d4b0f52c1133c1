"""Jobs of liveblockctl: start one, show its progress, and say what became of it.

QMP of qapi/block-core.json, as any client speaks it. Runs on the event loop of ``ctl``. A job that
is waited for ends by itself, or is in step with its source and then goes over to the copy
(``--pivot``), leaves a copy (``--copy``) or goes on. Errors: ControlError; those of qemu.qmp.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeAlias

from qemu.qmp import EventListener, QMPClient

REFUSED, USAGE, NO_CONNECTION, CANCELLED, INTERRUPTED = 1, 2, 3, 4, 130

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_JOB_EVENTS: Final = (
    "BLOCK_JOB_COMPLETED",
    "BLOCK_JOB_CANCELLED",
    "BLOCK_JOB_READY",
    "JOB_STATUS_CHANGE",
)

Handler: TypeAlias = "Callable[[QMPClient, argparse.Namespace], Awaitable[int]]"
Verb: TypeAlias = "Callable[[str, Handler, str], argparse.ArgumentParser]"


class ControlError(Exception):
    """Something to say on stderr, and the exit status."""

    def __init__(self, message: str, status: int = REFUSED) -> None:
        super().__init__(message)
        self.status = status


# -- words for people


def human(size: float) -> str:
    """Bytes as people read them."""
    unit = 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size /= 1024
        unit += 1
    return f"{size:.0f} {_UNITS[unit]}" if unit == 0 else f"{size:.1f} {_UNITS[unit]}"


def show(args: argparse.Namespace, value: Any, text: str) -> None:
    """``value`` as JSON with ``--json``, else ``text``."""
    print(json.dumps(value, indent=2) if args.json else text)


class Progress:
    """One line on a terminal: bar, rate of the last seconds, time to go."""

    def __init__(self, job: str) -> None:
        self._job = job
        self._samples: list[tuple[float, int]] = []
        self._shown = False
        self._live = sys.stderr.isatty()

    def update(self, offset: int, length: int, state: str = "") -> None:
        """Show that ``offset`` of ``length`` bytes are done."""
        now = time.monotonic()
        self._samples = [s for s in self._samples if now - s[0] < 5][-50:]
        self._samples.append((now, offset))
        if self._live:
            sys.stderr.write(f"\r{self.line(offset, length, state)}\x1b[K")
            sys.stderr.flush()
            self._shown = True

    def line(self, offset: int, length: int, state: str = "") -> str:
        """The text of the line."""
        done = offset / length if length else 1.0
        bar = "#" * int(done * 24)
        (start, first), (end, last) = self._samples[0], self._samples[-1]
        rate = (last - first) / (end - start) if end > start else 0.0
        text = f"{self._job}  [{bar:<24}] {done:4.0%}  {human(offset)} of {human(length)}"
        if state == "paused":
            return f"{text}  paused"
        if rate > 0:
            seconds = int((length - offset) / rate)
            text += f"  {human(rate)}/s  ETA {seconds // 60}:{seconds % 60:02}"
        return text

    def end(self) -> None:
        """Leave the line."""
        if self._shown:
            sys.stderr.write("\n")
            self._shown = False


async def ask(qmp: QMPClient, name: str, arguments: dict[str, Any] | None = None) -> Any:
    """What the daemon returns for a command."""
    return await qmp.execute(name, arguments)


# -- starting


async def stream(qmp: QMPClient, args: argparse.Namespace) -> int:
    """``stream``: start, and wait if asked."""
    given = {"base": args.base, "base-node": args.base_node, "on-error": args.on_error}
    return await _start(qmp, args, "block-stream", given)


async def commit(qmp: QMPClient, args: argparse.Namespace) -> int:
    """``commit``."""
    given = {"base": args.base, "top": args.top, "on-error": args.on_error}
    return await _start(qmp, args, "block-commit", given)


async def mirror(qmp: QMPClient, args: argparse.Namespace) -> int:
    """``mirror``."""
    return await _start(qmp, args, "drive-mirror", _copy_members(args, args.sync))


async def backup(qmp: QMPClient, args: argparse.Namespace) -> int:
    """``backup``; with a bitmap only what it says has changed, and it is clean then."""
    given = _copy_members(args, "incremental" if args.bitmap else args.sync)
    given |= {"bitmap": args.bitmap, "compress": args.compress or None}
    return await _start(qmp, args, "drive-backup", given)


def _copy_members(args: argparse.Namespace, sync: str) -> dict[str, Any]:
    target = args.target if "://" in args.target else os.path.abspath(args.target)
    mode = "existing" if args.existing else "absolute-paths"
    return {"target": target, "format": args.format, "sync": sync, "mode": mode}


async def _start(
    qmp: QMPClient, args: argparse.Namespace, command: str, given: dict[str, Any]
) -> int:
    job = args.job_id or _job_id(args.verb, args.device)
    given = {"job-id": job, "device": args.device, "speed": args.speed} | given
    ending = getattr(args, "ending", None)
    with qmp.listener(_JOB_EVENTS) as listener:
        await ask(qmp, command, {k: v for k, v in given.items() if v is not None})
        if args.wait or ending is not None:
            return await _follow(qmp, args, listener, job, ending or "return")
    show(args, {"job": job}, f"job {job} started")
    return 0


def _job_id(verb: str, device: str) -> str:
    """The name of the device; generated node names are no job ids."""
    return device if device[:1].isalpha() else f"{verb}-{device.lstrip('#')}"


# -- creating


async def create(qmp: QMPClient, args: argparse.Namespace) -> int:
    """``create``: a file, and the format in it; by the daemon, where it runs."""
    filename, node = args.file, f"liveblockctl-{os.getpid()}"
    size = args.size if args.format == "raw" else 0
    await _create(qmp, f"{node}-file", {"driver": "file", "filename": filename, "size": size})
    if args.format == "qcow2":
        options = {"driver": "qcow2", "file": node, "size": args.size}
        if args.backing:
            options |= {"backing-file": args.backing, "backing-fmt": args.backing_format}
        await ask(qmp, "blockdev-add", {"driver": "file", "node-name": node, "filename": filename})
        try:
            await _create(qmp, node, options)
        finally:
            await ask(qmp, "blockdev-del", {"node-name": node})
    show(args, {"filename": filename}, f"{filename} created: {human(args.size)}")
    return 0


async def _create(qmp: QMPClient, job: str, options: dict[str, Any]) -> None:
    progress = Progress(job)
    with qmp.listener("JOB_STATUS_CHANGE") as listener:
        await ask(qmp, "blockdev-create", {"job-id": job, "options": options})
        try:
            concluded = asyncio.create_task(_concluded(listener, job))
            while not concluded.done():
                (state,) = [one for one in await ask(qmp, "query-jobs") if one["id"] == job]
                progress.update(state["current-progress"], state["total-progress"])
                await asyncio.wait((concluded,), timeout=0.2)
                if not concluded.done() and qmp.runstate.name != "RUNNING":
                    raise ControlError("the connection broke", NO_CONNECTION)
        finally:
            concluded.cancel()
            progress.end()
    (state,) = [one for one in await ask(qmp, "query-jobs") if one["id"] == job]
    await ask(qmp, "job-dismiss", {"id": job})
    if "error" in state:
        raise ControlError(state["error"])


async def _concluded(listener: EventListener, job: str) -> None:
    async for event in listener:
        data: Any = event["data"]
        if data["id"] == job and data["status"] == "concluded":
            return


# -- waiting


async def wait(qmp: QMPClient, args: argparse.Namespace) -> int:
    """``wait``: until a job is over."""
    with qmp.listener(_JOB_EVENTS) as listener:
        if await _job(qmp, args.job) is None:
            raise ControlError(f"Job '{args.job}' not found")
        return await _follow(qmp, args, listener, args.job, "stay")


async def _job(qmp: QMPClient, name: str) -> dict[str, Any] | None:
    found: list[dict[str, Any]] = await ask(qmp, "query-block-jobs")
    return next((job for job in found if job["device"] == name), None)


async def _follow(
    qmp: QMPClient, args: argparse.Namespace, listener: EventListener, job: str, ready: str
) -> int:
    """Show the progress of ``job`` until its last event; what became of it is the status.

    ``ready`` is what is done when it is in step: ``stay``, ``return``, or a command's last word.
    """
    progress = Progress(job)
    try:
        event = await _next(qmp, listener, job, progress)
        while event["event"] == "BLOCK_JOB_READY":
            if ready == "return":
                progress.end()
                show(args, event["data"], f"job {job} is ready: complete or cancel it")
                return 0
            if ready != "stay":
                await ask(qmp, f"block-job-{ready}", {"device": job})
            event = await _next(qmp, listener, job, progress)
        data = event["data"]
        if event["event"] == "BLOCK_JOB_COMPLETED" and "error" not in data:
            progress.update(data["offset"], data["len"])
    finally:
        progress.end()
    if event["event"] == "BLOCK_JOB_CANCELLED":
        raise ControlError(f"job {job} was cancelled", CANCELLED)
    if "error" in data:
        raise ControlError(f"job {job} failed: {data['error']}")
    show(args, data, f"job {job} completed: {human(data['len'])}")
    return 0


async def _next(
    qmp: QMPClient, listener: EventListener, job: str, progress: Progress
) -> dict[str, Any]:
    ended = asyncio.create_task(_event(listener, job))
    broken = asyncio.create_task(connection_broken(qmp))
    try:
        while not ended.done():
            if (state := await _job(qmp, job)) is not None:
                progress.update(state["offset"], state["len"], state["status"])
            await asyncio.wait((ended, broken), timeout=0.2, return_when=asyncio.FIRST_COMPLETED)
            if broken.done() and not ended.done():
                raise ControlError("the connection broke; the job may still run", NO_CONNECTION)
        return ended.result()
    finally:
        ended.cancel()
        broken.cancel()


async def _event(listener: EventListener, job: str) -> dict[str, Any]:
    async for event in listener:
        data: Any = event["data"]
        if event["event"] == "JOB_STATUS_CHANGE":
            if data["id"] == job and data["status"] == "null":
                return {"event": "gone", "data": {"error": "it went away", "len": 0}}
        elif data["device"] == job:
            return {"event": event["event"], "data": data}
    raise AssertionError("a listener never ends")


async def connection_broken(qmp: QMPClient) -> None:
    """Return when there is no connection any more."""
    while qmp.runstate.name == "RUNNING":
        await qmp.runstate_changed()


# -- command line


def job_verbs(verb: Verb, size: Callable[[str], int]) -> None:
    """Those that start a job; ``size`` reads bytes."""
    one = verb("stream", stream, "copy the backing chain (above a base) into the active image")
    _job_words(one, size)
    one.add_argument("--base", help="file name of the image to keep as backing file")
    one.add_argument("--base-node", help="the same, as a node name")

    one = verb("commit", commit, "merge images of the backing chain into a base below them")
    _job_words(one, size)
    _ending(one, "the base, when everything is in it")
    one.add_argument("--base", help="file name of the image to merge into (the lowest)")
    one.add_argument("--top", help="file name of the highest image to merge (the active one)")

    one = verb("mirror", mirror, "copy a disk to a new image and keep both in step")
    _copy_words(one, size, ("full", "top", "none"))
    ending = _ending(one, "the new image, when it is in step")
    ending.add_argument("--copy", dest="ending", action="store_const", const="cancel",
                        help="end when it is in step, and leave a copy")  # fmt: skip

    one = verb("backup", backup, "copy what a disk holds at this moment to a new image")
    _copy_words(one, size, ("full", "top"))
    one.add_argument("--bitmap", help="only what this dirty bitmap says has changed")
    one.add_argument("--compress", action="store_true", help="write compressed clusters")

    one = verb("create", create, "create an image, by the daemon")
    one.add_argument("file", type=os.path.abspath, help="the new image")
    one.add_argument("size", type=size, help="of its disk in bytes, such as 20G")
    one.add_argument("--format", choices=("raw", "qcow2"), default="qcow2", help="default: qcow2")
    one.add_argument("--backing", help="file name of the backing file, as it is to be stored")
    one.add_argument("--backing-format", default="qcow2", help="default: qcow2")


def _job_words(one: argparse.ArgumentParser, size: Callable[[str], int]) -> None:
    one.add_argument("device", help="drive or node")
    one.add_argument("--speed", type=size, help="limit in bytes per second, such as 10M")
    one.add_argument("--job-id", help="default: the name of the device")
    one.add_argument("--on-error", choices=("report", "ignore", "enospc", "stop"),
                     help="after a failed read or write (report: the job fails)")  # fmt: skip
    one.add_argument("--wait", action="store_true", help="show progress until it is done or ready")


def _ending(one: argparse.ArgumentParser, where: str) -> argparse._MutuallyExclusiveGroup:
    group = one.add_mutually_exclusive_group()
    group.add_argument("--pivot", dest="ending", action="store_const", const="complete",
                       help=f"wait, and go over to {where}")  # fmt: skip
    return group


def _copy_words(
    one: argparse.ArgumentParser, size: Callable[[str], int], syncs: Sequence[str]
) -> None:
    one.add_argument("device", help="drive or node")
    one.add_argument("target", help="the new image")
    one.add_argument("--format", help="default: that of the disk")
    one.add_argument("--sync", choices=syncs, default="full",
                     help="all that is read (full, the default), or the top image")  # fmt: skip
    one.add_argument("--existing", action="store_true", help="the image is there already")
    one.add_argument("--speed", type=size, help="limit in bytes per second, such as 10M")
    one.add_argument("--job-id", help="default: the name of the device")
    one.add_argument("--wait", action="store_true", help="show progress until it is done or ready")
