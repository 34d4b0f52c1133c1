"""liveblockctl: a friendly client of liveblockd, for people and for shell scripts.

``liveblockctl image`` works without a daemon (``imagetool``). All the rest
speaks QMP through qemu.qmp's ``QMPClient``; whatever it does, any other QMP client can do.

Exit status: 0 done, 1 the daemon refused or a job failed, 2 wrong usage, 3 no connection (or it
broke), 4 a job that was waited for was cancelled, 130 interrupted (the job goes on).

Runs on an event loop of its own. Nothing escapes ``main`` but ``SystemExit`` of argparse.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from qemu.qmp import ExecuteError, QMPClient, QMPError

from liveblockd import __version__
from liveblockd.ctl_jobs import (
    INTERRUPTED,
    NO_CONNECTION,
    REFUSED,
    USAGE,
    ControlError,
    Handler,
    ask,
    connection_broken,
    human,
    job_verbs,
    show,
    wait,
)
from liveblockd.runtime.streams import open_standard_streams

DEFAULT_SOCKET: Final = "/run/liveblockd/qmp.sock"


def parse_size(text: str) -> int:
    """Bytes in ``4096``, ``64k``, ``1.5G``; ValueError."""
    text = text.strip()
    factor = 1
    if text and text[-1].lower() in "bkmgtp":
        factor = 1 << (10 * "bkmgtp".index(text[-1].lower()))
        text = text[:-1]
    number = float(text) * factor
    if not 0 <= number < 2**63:  # false for nan as well
        raise ValueError(f"{text} is out of range")
    return int(number)


def table(rows: Sequence[Sequence[object]], heading: Sequence[str]) -> str:
    """Columns as wide as they need to be."""
    cells = [list(heading), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heading))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


# -- commands


async def status(qmp: QMPClient, args: argparse.Namespace) -> int:
    """``status``."""
    found = {
        "version": await ask(qmp, "query-version"),
        "drives": await ask(qmp, "query-block"),
        "nodes": [n["node-name"] for n in await _nodes(qmp)],
        "jobs": await ask(qmp, "query-block-jobs"),
        "exports": await ask(qmp, "query-block-exports"),
    }
    package = found["version"]["package"] or "qemu"
    level = "{major}.{minor}.{micro}".format(**found["version"]["qemu"])
    lines = [
        f"{package} (QMP of {level})",
        f"drives: {len(found['drives'])}, nodes: {len(found['nodes'])}, "
        f"jobs: {len(found['jobs'])}, exports: {len(found['exports'])}",
    ]
    if found["jobs"]:
        lines.append(_jobs_table(found["jobs"]))
    show(args, found, "\n".join(lines))
    return 0


async def drives(qmp: QMPClient, args: argparse.Namespace) -> int:
    """``drives``."""
    found = await ask(qmp, "query-block")
    rows = [(d["device"] or d.get("qdev", ""), *_node_row(d.get("inserted"))) for d in found]
    show(args, found, table(rows, ("DRIVE", "NODE", "FORMAT", "SIZE", "MODE", "BACKING", "FILE")))
    return 0


async def nodes(qmp: QMPClient, args: argparse.Namespace) -> int:
    """``nodes``."""
    found = await _nodes(qmp)
    rows = [_node_row(node) for node in found]
    show(args, found, table(rows, ("NODE", "FORMAT", "SIZE", "MODE", "BACKING", "FILE")))
    return 0


async def _nodes(qmp: QMPClient) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = await ask(qmp, "query-named-block-nodes", {"flat": True})
    return found


def _node_row(node: dict[str, Any] | None) -> tuple[object, ...]:
    if node is None:
        return ("-", "-", "-", "-", "-", "[not inserted]")
    size = human(node["image"]["virtual-size"])
    mode = "ro" if node["ro"] else "rw"
    return (
        node["node-name"], node["drv"], size, mode, node.get("backing_file") or "-", node["file"]
    )  # fmt: skip


async def jobs(qmp: QMPClient, args: argparse.Namespace) -> int:
    """``jobs``."""
    found = await ask(qmp, "query-block-jobs")
    waiting: list[str] = []
    with contextlib.suppress(ExecuteError):  # QEMU has no such limits
        waiting = (await ask(qmp, "x-liveblock-query-job-limits"))["waiting"]
    show(args, found, _jobs_table(found, waiting) if found else "No active jobs")
    return 0


async def history(qmp: QMPClient, args: argparse.Namespace) -> int:
    """``history``: what the journal of jobs remembers."""
    found = await ask(qmp, "x-liveblock-query-job-journal")
    rows = []
    for job in found:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job["began"]))
        images = " ".join(job["images"])
        rows.append((job["id"], job["type"], began, job["result"], job.get("base", "-"), images))
    text = table(rows, ("JOB", "TYPE", "BEGAN", "RESULT", "BASE/TARGET", "IMAGES"))
    show(args, found, text if rows else "No jobs yet")
    return 0


def _jobs_table(found: list[dict[str, Any]], waiting: Sequence[str] = ()) -> str:
    rows = []
    for job in found:
        done = job["offset"] / job["len"] if job["len"] else 1.0
        speed = f"{human(job['speed'])}/s" if job["speed"] else "-"
        state = job["status"] if job["io-status"] == "ok" else f"{job['status']} {job['io-status']}"
        if job["device"] in waiting:
            state += " (waits for its turn)"
        rows.append((job["device"], job["type"], state, f"{done:.0%}", human(job["len"]), speed))
    return table(rows, ("JOB", "TYPE", "STATUS", "DONE", "LENGTH", "LIMIT"))


async def snapshot(qmp: QMPClient, args: argparse.Namespace) -> int:
    """``snapshot``: a new overlay on a device."""
    arguments = await _device(qmp, args.device)
    arguments |= {"snapshot-file": args.file, "format": args.format}
    if args.node_name:
        arguments["snapshot-node-name"] = args.node_name
    elif "node-name" in arguments:
        # of a node that is no drive's the overlay needs a name, which QEMU does not make up
        raise ControlError(f"{args.device} is a node: --node-name for its overlay is needed", USAGE)
    if args.existing:
        arguments["mode"] = "existing"
    await ask(qmp, "blockdev-snapshot-sync", arguments)
    show(args, arguments, f"{args.device} now writes to {arguments['snapshot-file']}")
    return 0


async def _device(qmp: QMPClient, name: str) -> dict[str, Any]:
    """``device`` for the id of a drive, else ``node-name``."""
    found = await ask(qmp, "query-block")
    is_drive = any(drive["device"] == name for drive in found)
    return {"device": name} if is_drive else {"node-name": name}


async def resize(qmp: QMPClient, args: argparse.Namespace) -> int:
    """``resize``."""
    await ask(qmp, "block_resize", await _device(qmp, args.device) | {"size": args.size})
    show(args, {"size": args.size}, f"{args.device} has {human(args.size)}")
    return 0


def _job_verb(command: str, done: str) -> Handler:
    async def run(qmp: QMPClient, args: argparse.Namespace) -> int:
        arguments: dict[str, Any] = {"device": args.job}
        if getattr(args, "force", False):
            arguments["force"] = True
        if command == "block-job-set-speed":
            arguments["speed"] = args.speed
        await ask(qmp, command, arguments)
        show(args, {}, f"job {args.job} {done}")
        return 0

    return run


async def exports(qmp: QMPClient, args: argparse.Namespace) -> int:
    """``export list|add|del|start|stop``."""
    match args.action:
        case "list":
            found = await ask(qmp, "query-block-exports")
            rows = [(e["id"], e["type"], e["node-name"]) for e in found]
            show(args, found, table(rows, ("EXPORT", "TYPE", "NODE")))
        case "start":
            await ask(qmp, "nbd-server-start", {"addr": _address(args.address)})
            show(args, {}, f"NBD server listens on {args.address}")
        case "stop":
            await ask(qmp, "nbd-server-stop")
            show(args, {}, "NBD server stopped")
        case "add":
            node = await _device(qmp, args.node)
            if "device" in node:
                found = await ask(qmp, "query-block")
                drive = next(d for d in found if d["device"] == args.node)
                node = {"node-name": drive["inserted"]["node-name"]}
            arguments = {"type": "nbd", "id": args.id or args.node, **node}
            arguments |= {"name": args.name or args.node, "writable": args.writable}
            await ask(qmp, "block-export-add", arguments)
            show(args, arguments, f"{args.node} is exported as {arguments['name']}")
        case "del":
            mode = "hard" if args.force else "safe"
            await ask(qmp, "block-export-del", {"id": args.id, "mode": mode})
            show(args, {}, f"export {args.id} removed")
    return 0


def _address(text: str) -> dict[str, Any]:
    host, colon, port = text.rpartition(":")
    if "/" in text or not colon:
        path = text.removeprefix("unix:")
        return {"type": "unix", "data": {"path": os.path.abspath(path)}}
    return {"type": "inet", "data": {"host": host.strip("[]"), "port": port}}


async def raw_qmp(qmp: QMPClient, args: argparse.Namespace) -> int:
    """``qmp``: any command; the answer is always JSON."""
    print(json.dumps(await ask(qmp, args.name, _members(args.members)), indent=2))
    return 0


def _members(words: Sequence[str]) -> dict[str, Any]:
    """A JSON object, or ``key=value`` words where dots nest and values are JSON if they can be."""
    if len(words) == 1 and words[0].lstrip().startswith("{"):
        try:
            value = json.loads(words[0])
        except ValueError as exc:
            raise ControlError(f"bad JSON: {exc}", USAGE) from exc
        assert isinstance(value, dict)  # it begins with a brace
        return value
    result: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ControlError(f"{word}: key=value expected", USAGE)
        *path, last = key.split(".")
        here = result
        for part in path:
            here = here.setdefault(part, {})
            if not isinstance(here, dict):
                raise ControlError(f"{word}: {part} is a value already", USAGE)
        try:
            here[last] = json.loads(text)
        except ValueError:
            here[last] = text
    return result


async def hmp(qmp: QMPClient, args: argparse.Namespace) -> int:
    """``hmp``: a line of the human monitor."""
    line = {"command-line": " ".join(args.words)}
    text = await ask(qmp, "human-monitor-command", line)
    sys.stdout.write(text.replace("\r\n", "\n"))
    return REFUSED if text.startswith("Error: ") else 0


async def events(qmp: QMPClient, args: argparse.Namespace) -> int:
    """``events``: one JSON line each, until the daemon ends or ``--count`` are seen."""
    with qmp.listener(args.names or None) as listener:
        broken = asyncio.create_task(connection_broken(qmp))
        seen = 0
        while args.count is None or seen < args.count:
            event = asyncio.create_task(listener.get())
            await asyncio.wait((event, broken), return_when=asyncio.FIRST_COMPLETED)
            if not event.done():
                event.cancel()
                return NO_CONNECTION
            print(json.dumps(dict(event.result())), flush=True)
            seen += 1
        broken.cancel()
    return 0


async def quit_(qmp: QMPClient, args: argparse.Namespace) -> int:
    """``quit``."""
    await ask(qmp, "quit")
    show(args, {}, "liveblockd ends")
    return 0


# -- command line


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{text!r} is no size") from exc


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="liveblockctl", description="Control a running liveblockd.")
    default = os.environ.get("LIVEBLOCKD_SOCKET", DEFAULT_SOCKET)
    top.add_argument(
        "-s",
        "--socket",
        default=default,
        help="QMP socket: a path or HOST:PORT; default: $LIVEBLOCKD_SOCKET (%(default)s)",
    )
    top.add_argument("--json", action="store_true", help="print what the daemon says as JSON")
    top.add_argument("--version", action="version", version=f"liveblockctl {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="COMMAND")

    def verb(name: str, handler: Handler, text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        added.set_defaults(handler=handler)
        return added

    verb("status", status, "version, and how much there is")
    verb("drives", drives, "drives and what is in them")
    verb("nodes", nodes, "all block nodes")
    verb("jobs", jobs, "running jobs")
    verb("history", history, "jobs of this daemon and those before it, if it keeps a journal")

    job_verbs(verb, _size)

    one = verb("wait", wait, "show the progress of a job until it is over")
    one.add_argument("job", help="its id, as `jobs` shows it")

    one = verb("snapshot", snapshot, "put a new overlay on a device; the old image stays as it is")
    one.add_argument("device", help="drive or node")
    one.add_argument("file", type=os.path.abspath, help="the new image")
    one.add_argument("--format", default="qcow2", help="default: qcow2")
    one.add_argument("--node-name", help="name of the overlay's node")
    one.add_argument("--existing", action="store_true", help="the new image is there already")

    one = verb("resize", resize, "change the virtual size of a device")
    one.add_argument("device", help="drive or node")
    one.add_argument("size", type=_size, help="bytes, such as 20G")
    _job_verbs(verb)
    _export_verbs(verb)

    one = verb("qmp", raw_qmp, "run any QMP command")
    one.add_argument("name", help="of the command, such as query-block")
    one.add_argument("members", nargs="*", metavar="KEY=VALUE|JSON",
                     help="arguments (a.b=VALUE nests), or one JSON object")  # fmt: skip
    one = verb("hmp", hmp, "run a line of the human monitor")
    one.add_argument("words", nargs=argparse.REMAINDER, help="such as: info block-jobs")
    one = verb("events", events, "print events as they come, one JSON object a line")
    one.add_argument("names", nargs="*", help="only these")
    one.add_argument("--count", type=int, help="end after so many")
    verb("quit", quit_, "end the daemon; running jobs are cancelled")
    # Its words are for `imagetool`; none of them looks like an option here.
    one = verbs.add_parser(
        "image",
        help="work on images without a daemon: info, check, convert, ...",
        add_help=False,
        prefix_chars="\0",
    )
    one.add_argument("words", nargs=argparse.REMAINDER)
    return top


def _job_verbs(verb: Callable[[str, Handler, str], argparse.ArgumentParser]) -> None:
    for name, done, text in (
        ("pause", "is paused", "halt a job"),
        ("resume", "goes on", "let a paused job go on"),
        ("cancel", "is cancelled", "stop a job; the image stays valid"),
        ("complete", "completes", "end a job that is ready"),
        ("set-speed", "has its new limit", "limit the speed of a job"),
    ):
        one = verb(name, _job_verb(f"block-job-{name}", done), text)
        one.add_argument("job", help="its id, as `jobs` shows it")
        if name == "cancel":
            one.add_argument("--force", action="store_true", help="also when it is paused")
        if name == "set-speed":
            one.add_argument("speed", type=_size, help="bytes per second, such as 10M; 0: no limit")


def _export_verbs(verb: Callable[[str, Handler, str], argparse.ArgumentParser]) -> None:
    actions = verb("export", exports, "NBD exports").add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="what is exported")
    one = actions.add_parser("start", help="start the NBD server")
    one.add_argument("address", help="PATH or HOST:PORT")
    actions.add_parser("stop", help="stop it and remove its exports")
    one = actions.add_parser("add", help="export a drive or node")
    one.add_argument("node", help="drive or node")
    one.add_argument("--id", help="default: the name of the node")
    one.add_argument("--name", help="export name for clients; default: the name of the node")
    one.add_argument("--writable", action="store_true", help="clients may write")
    one = actions.add_parser("del", help="remove an export")
    one.add_argument("id")
    one.add_argument("--force", action="store_true", help="also while clients are connected")


async def _run(args: argparse.Namespace) -> int:
    client = QMPClient("liveblockctl")
    address: str | tuple[str, int] = args.socket
    host, colon, port = args.socket.rpartition(":")
    if "/" not in args.socket and colon and port.isdigit():
        address = (host.strip("[]"), int(port))
    try:
        await client.connect(address)
    except (QMPError, OSError) as exc:
        cause = getattr(exc, "exc", None) or exc
        reason = getattr(cause, "strerror", None) or cause
        text = f"{args.socket}: {reason} (is liveblockd running there? -s names its QMP socket)"
        raise ControlError(text, NO_CONNECTION) from exc
    try:
        handler: Handler = args.handler
        return await handler(client, args)
    except ExecuteError as exc:
        raise ControlError(str(exc)) from exc
    except (QMPError, ConnectionResetError) as exc:
        raise ControlError(f"the connection broke: {exc}", NO_CONNECTION) from exc
    finally:
        with contextlib.suppress(QMPError, OSError, EOFError):  # after `quit` the daemon has gone
            await client.disconnect()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit status."""
    open_standard_streams()
    args = parser().parse_args(argv)
    if args.verb == "image":
        from liveblockd.imagetool.command import main as image

        return image(args.words)
    try:
        status = asyncio.run(_run(args))
        sys.stdout.flush()
    except ControlError as exc:
        print(f"liveblockctl: {exc}", file=sys.stderr)
        return exc.status
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as exc:  # of what it prints: nobody reads it, or there is no room for it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(exc, BrokenPipeError):
            print(f"liveblockctl: cannot print: {exc.strerror or exc}", file=sys.stderr)
        return REFUSED
    return status


if __name__ == "__main__":
    sys.exit(main())
