"""``help`` and ``info ...`` of the human monitor.

Runs on the event loop; BlockError escapes to ``run_line``.
"""

from __future__ import annotations

from typing import Any, Final

from liveblockd import __version__
from liveblockd.graph import internal_snapshot
from liveblockd.qmp.hmp.arguments import Argument, Flag, Kind
from liveblockd.qmp.hmp.images import describe_image, describe_snapshots
from liveblockd.qmp.hmp.table import (
    Arguments,
    Monitor,
    commands,
    hmp_command,
    info_commands,
    usage,
)

_TOPIC: Final = (Argument("item", Kind.LINE, optional=True),)


@hmp_command("help", _TOPIC, "[cmd]", "show the help", aliases=("?",))
async def help_(monitor: Monitor, arguments: Arguments) -> str:  # noqa: ARG001
    """All commands, all of ``info``, or one."""
    prefix, _, topic = arguments.get("item", "").strip().partition(" ")
    if not prefix:
        return usage(commands)
    if prefix == "info":
        topic = topic.strip()
        if not topic:
            return usage(info_commands, "info ")
        if topic in info_commands:
            return f"info {info_commands[topic].usage}"
    elif prefix in commands and not topic:
        return commands[prefix].usage
    return f"unknown command: '{prefix} {topic}'" if topic else f"unknown command: '{prefix}'"


@hmp_command("info", _TOPIC, "[subcommand]", "show various information about the system state")
async def info(monitor: Monitor, arguments: Arguments) -> str:  # noqa: ARG001
    """``info`` alone lists what there is; its commands are found by ``run_line``."""
    return usage(info_commands, "info ")


@hmp_command("info version", (), "", "show the version of liveblockd")
async def info_version(monitor: Monitor, arguments: Arguments) -> str:  # noqa: ARG001
    """The version and the level of QMP."""
    version = await monitor.qmp("query-version")
    level = version["qemu"]
    return f"{level['major']}.{level['minor']}.{level['micro']} {version['package']}".rstrip()


@hmp_command("info name", (), "", "show the current name")
async def info_name(monitor: Monitor, arguments: Arguments) -> str:  # noqa: ARG001
    """The name, if there is one."""
    name = await monitor.qmp("query-name")
    return str(name.get("name", ""))


@hmp_command("info status", (), "", "show the current status")
async def info_status(monitor: Monitor, arguments: Arguments) -> str:  # noqa: ARG001
    """There is no machine: a daemon that answers is running."""
    status = await monitor.qmp("query-status")
    return f"VM status: {'running' if status.get('running', True) else 'paused'}"


@hmp_command("info block-jobs", (), "", "show progress of ongoing block device operations")
async def info_block_jobs(monitor: Monitor, arguments: Arguments) -> str:  # noqa: ARG001
    """One line a job, newest first."""
    jobs = await monitor.qmp("query-block-jobs")
    if not jobs:
        return "No active jobs"
    return "\n".join(_describe_job(job) for job in jobs)


def _describe_job(job: dict[str, Any]) -> str:
    streaming = job["type"] == "stream"
    what = "Streaming device" if streaming else f"Type {job['type']}, device"
    return (
        f"{what} {job['device']}: Completed {job['offset']} of {job['len']} bytes, "
        f"speed limit {job['speed']} bytes/s"
    )


@hmp_command(
    "info block",
    (
        Flag("n", "nodes"),
        Flag("v", "verbose"),
        Argument("device", Kind.DEVICE, optional=True),
    ),
    "[-n] [-v] [device]",
    "show info of one block device or all block devices (-n: show named nodes; -v: show details)",
)
async def info_block(monitor: Monitor, arguments: Arguments) -> str:
    """Drives, or nodes with ``-n`` and when the name is that of a node."""
    wanted, verbose = arguments.get("device"), bool(arguments.get("verbose"))
    by_node = bool(arguments.get("nodes"))
    drives: list[str] = []
    if not by_node:
        for index, drive in enumerate(await monitor.qmp("query-block")):
            name = drive["device"] or drive.get("qdev", "")
            if wanted is None or name == wanted:
                drives.append(_separate(index, _describe_drive(drive, verbose)))
    if drives or (wanted is None and not by_node):
        return "".join(drives)
    return "".join(
        _separate(index, _describe_inserted(node, f"{node['node-name']}", verbose))
        for index, node in enumerate(await monitor.qmp("query-named-block-nodes"))
        if wanted is None or node["node-name"] == wanted
    )


def _separate(index: int, text: str) -> str:
    """QEMU writes an empty line before all but the first of the list, shown or not."""
    return f"\n{text}" if index else text


def _describe_drive(drive: dict[str, Any], verbose: bool) -> str:
    name = drive["device"] or drive.get("qdev", "")
    inserted = drive.get("inserted")
    more = []
    if drive.get("qdev"):
        more.append(("Attached to:", drive["qdev"]))
    if drive.get("removable"):
        locked = "" if drive.get("locked") else "not "
        tray = "open" if drive.get("tray_open") else "closed"
        more.append(("Removable device:", f"{locked}locked, tray {tray}"))
    if drive.get("io-status", "ok") != "ok":
        more.append(("I/O status:", drive["io-status"]))
    if inserted is None:
        return f"{name}: [not inserted]\n" + _lines(more)
    return _describe_inserted(inserted, f"{name} ({inserted['node-name']})", verbose, more)


def _describe_inserted(
    node: dict[str, Any], title: str, verbose: bool, more: list[tuple[str, str]] | None = None
) -> str:
    read_only = ", read-only" if node["ro"] else ""
    encrypted = ", encrypted" if node.get("encrypted") else ""
    lines = list(more or ())
    cache = node["cache"]
    lines.append(
        (
            "Cache mode:",
            ("writeback" if cache["writeback"] else "writethrough")
            + (", direct" if cache["direct"] else "")
            + (", ignore flushes" if cache["no-flush"] else ""),
        )
    )
    if node.get("backing_file"):
        depth = node["backing_file_depth"]
        lines.append(("Backing file:", f"{node['backing_file']} (chain depth: {depth})"))
    if node.get("detect_zeroes", "off") != "off":
        lines.append(("Detect zeroes:", node["detect_zeroes"]))
    if throttling := _describe_throttling(node):
        lines.append(("I/O throttling:", throttling))
    text = f"{title}: {node['file']} ({node['drv']}{read_only}{encrypted})\n" + _lines(lines)
    if not verbose:
        return text
    image: dict[str, Any] | None = node["image"]
    text += "\nImages:\n"
    while image is not None:
        text += describe_image(image)
        image = image.get("backing-image")
    return text


def _lines(pairs: list[tuple[str, str]]) -> str:
    return "".join(f"    {label:<17} {value}\n" for label, value in pairs)


_WAYS: Final = ("", "_rd", "_wr")
_LIMITS: Final = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")


def _describe_throttling(node: dict[str, Any]) -> str:
    if not any(node.get(limit) for limit in _LIMITS):
        return ""
    names = [
        f"{k}{d}{m}" for k in ("bps", "iops") for m in ("", "_max") for d in ("", "_rd", "_wr")
    ]
    shown = [f"{name}={node.get(name, 0)}" for name in names]
    shown.append(f"iops_size={node.get('iops_size', 0)}")
    shown.append(f"group={node.get('group', '')}")
    return " ".join(shown)


_STATISTICS: Final = (
    "rd_bytes",
    "wr_bytes",
    "rd_operations",
    "wr_operations",
    "flush_operations",
    "wr_total_time_ns",
    "rd_total_time_ns",
    "flush_total_time_ns",
    "rd_merged",
    "wr_merged",
    "idle_time_ns",
)


@hmp_command("info blockstats", (), "", "show block device statistics")
async def info_blockstats(monitor: Monitor, arguments: Arguments) -> str:  # noqa: ARG001
    """One line a drive."""
    lines = []
    for drive in await monitor.qmp("query-blockstats"):
        if not drive.get("device"):
            continue
        stats = drive["stats"]
        shown = " ".join(f"{name}={stats.get(name, 0)}" for name in _STATISTICS)
        lines.append(f"{drive['device']}: {shown}")
    return "\n".join(lines)


@hmp_command("info snapshots", (), "", "show the internal snapshots of the disks in use")
async def info_snapshots(monitor: Monitor, arguments: Arguments) -> str:  # noqa: ARG001
    """Those that all writable disks have under one name, and what single disks have besides."""
    disks = internal_snapshot.disks(monitor.context.graph)
    able = [(name, found) for name, found in disks if found is not None]
    if not able:
        return "no block device can store vmstate for snapshot"
    if not any(found for _, found in able):
        return "There is no snapshot available."
    names = [{snapshot.name for snapshot in found or ()} for _, found in disks]
    of_all = set.intersection(*names)
    common = [s.to_qmp() for s in able[0][1] if s.name in of_all]
    text = "List of snapshots present on all disks:\n"
    text += describe_snapshots(common, of_all=True) if common else "None\n"
    for name, found in able:
        if partial := [s.to_qmp() for s in found if s.name not in of_all]:
            text += f"\nList of partial (non-loadable) snapshots on '{name}':\n"
            text += describe_snapshots(partial)
    return text


def banner() -> str:
    """The first line of an interactive monitor."""
    return f"liveblockd {__version__} monitor - type 'help' for more information"
