"""Block commands of the human monitor: jobs, snapshots, sizes, drives, the NBD server.

QEMU qapi/block-core.json says what the QMP commands below them do. A job of the human monitor has
the id of its device. Runs on the event loop; BlockError and OSError escape to ``run_line``.
"""

from __future__ import annotations

import os

from liveblockd.errors import BlockError, ConfigError
from liveblockd.graph.chain import layer_below
from liveblockd.jobs.commit_at_once import commit as commit_image
from liveblockd.keyval import parse_drive, parse_keyval
from liveblockd.qapi import parse
from liveblockd.qmp import registry
from liveblockd.qmp.hmp.arguments import Argument, Flag, Kind
from liveblockd.qmp.hmp.table import DEVICE, Arguments, Monitor, hmp_command
from liveblockd.storage.options import BlockdevOptions

_FORCE = Flag("f", "force")


@hmp_command(
    "block_stream",
    (
        DEVICE,
        Argument("speed", Kind.SIZE, optional=True, or_else="base"),
        Argument("base", Kind.STRING, optional=True),
    ),
    "device [speed [base]]",
    "copy data from a backing file into a block device",
)
async def block_stream(monitor: Monitor, arguments: Arguments) -> None:
    """Start a stream; ``block_stream DEVICE BASE`` of the oldest QEMU is understood as well."""
    await monitor.qmp("block-stream", job_id=arguments["device"], **arguments)


@hmp_command(
    "block_job_set_speed",
    (DEVICE, Argument("speed", Kind.SIZE)),
    "device speed",
    "set maximum speed for a background block operation",
)
async def block_job_set_speed(monitor: Monitor, arguments: Arguments) -> None:
    """Limit the speed of a job, in bytes per second; 0 lifts the limit."""
    await monitor.qmp("block-job-set-speed", **arguments)


@hmp_command(
    "block_job_cancel",
    (_FORCE, DEVICE),
    "[-f] device",
    "stop an active background block operation (-f: at once, also when paused;\n"
    "\t\t\t without it a job in step with its source ends in sync)",
)
async def block_job_cancel(monitor: Monitor, arguments: Arguments) -> None:
    """Cancel a job."""
    await monitor.qmp("block-job-cancel", **arguments)


@hmp_command("block_job_pause", (DEVICE,), "device", "pause an active background block operation")
async def block_job_pause(monitor: Monitor, arguments: Arguments) -> None:
    """Pause a job."""
    await monitor.qmp("block-job-pause", **arguments)


@hmp_command("block_job_resume", (DEVICE,), "device", "resume a paused background block operation")
async def block_job_resume(monitor: Monitor, arguments: Arguments) -> None:
    """Let a paused job go on."""
    await monitor.qmp("block-job-resume", **arguments)


@hmp_command(
    "block_job_complete", (DEVICE,), "device", "end a background block operation that is in sync"
)
async def block_job_complete(monitor: Monitor, arguments: Arguments) -> None:
    """Complete a job that is ready."""
    await monitor.qmp("block-job-complete", **arguments)


@hmp_command(
    "block_resize", (DEVICE, Argument("size", Kind.SIZE)), "device size", "resize a block image"
)
async def block_resize(monitor: Monitor, arguments: Arguments) -> None:
    """Change the virtual size."""
    await monitor.qmp("block_resize", **arguments)


@hmp_command(
    "snapshot_blkdev",
    (
        Flag("n", "reuse"),
        DEVICE,
        Argument("file", Kind.STRING, optional=True),
        Argument("format", Kind.STRING, optional=True),
    ),
    "[-n] device [new-image-file] [format]",
    "put a new overlay on top of a device; what it read until now stays as it is\n"
    "\t\t\t in the old image (-n: the new image exists already; default format qcow2)",
)
async def snapshot_blkdev(monitor: Monitor, arguments: Arguments) -> None:
    """Take an external snapshot."""
    if "file" not in arguments:
        raise BlockError("Parameter 'snapshot-file' is missing")
    await monitor.qmp(
        "blockdev-snapshot-sync",
        device=arguments["device"],
        snapshot_file=arguments["file"],
        format=arguments.get("format", "qcow2"),
        mode="existing" if arguments.get("reuse") else "absolute-paths",
    )


@hmp_command(
    "commit", (DEVICE,), "device|all", "commit the changes of a disk image into its backing file"
)
async def commit(monitor: Monitor, arguments: Arguments) -> str | None:
    """At once, with the guest waiting; the first disk that fails ends it."""
    device, graph = arguments["device"], monitor.context.graph
    if device != "all" and device not in graph.drives:
        return f"Device '{device}' not found"
    for name in tuple(graph.drives) if device == "all" else (device,):
        node = graph.drives[name].node.asked_for
        if device == "all" and layer_below(node) is None:
            continue
        try:
            await commit_image(graph, node)
        except (BlockError, OSError) as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            return f"'commit' error for '{name}': {reason}"
    return None


@hmp_command(
    "snapshot_blkdev_internal",
    (DEVICE, Argument("name", Kind.STRING)),
    "device name",
    "keep what a device holds as an internal snapshot of its image",
)
async def snapshot_blkdev_internal(monitor: Monitor, arguments: Arguments) -> None:
    """Take an internal snapshot."""
    await monitor.qmp("blockdev-snapshot-internal-sync", **arguments)


@hmp_command(
    "snapshot_delete_blkdev_internal",
    (DEVICE, Argument("name", Kind.STRING), Argument("id", Kind.STRING, optional=True)),
    "device name [id]",
    "forget an internal snapshot of a device",
)
async def snapshot_delete_blkdev_internal(monitor: Monitor, arguments: Arguments) -> None:
    """Forget an internal snapshot."""
    await monitor.qmp("blockdev-snapshot-delete-internal-sync", **arguments)


_COPY = (
    Flag("n", "reuse"),
    Flag("f", "full"),
    DEVICE,
    Argument("target", Kind.FILENAME),
    Argument("format", Kind.STRING, optional=True),
)


def _copy_members(arguments: Arguments) -> Arguments:
    """Of drive-mirror and drive-backup; the job is called by its device."""
    return {
        "job_id": arguments["device"],
        "device": arguments["device"],
        "target": arguments["target"],
        "format": arguments.get("format"),
        "sync": "full" if arguments.get("full") else "top",
        "mode": "existing" if arguments.get("reuse") else "absolute-paths",
    }


@hmp_command(
    "drive_mirror",
    _COPY,
    "[-n] [-f] device target [format]",
    "keep a new image in step with a device (-n: the image exists already;\n"
    "\t\t\t -f: with all that its backing files hold)",
)
async def drive_mirror(monitor: Monitor, arguments: Arguments) -> None:
    """Start a mirror; block_job_complete goes over to it, block_job_cancel leaves it as a copy."""
    await monitor.qmp("drive-mirror", **_copy_members(arguments))


@hmp_command(
    "drive_backup",
    (*_COPY[:2], Flag("c", "compress"), *_COPY[2:]),
    "[-n] [-f] [-c] device target [format]",
    "copy what a device holds now to a new image (-n: the image exists already;\n"
    "\t\t\t -f: with all that its backing files hold; -c: compressed)",
)
async def drive_backup(monitor: Monitor, arguments: Arguments) -> None:
    """Start a backup."""
    compress = arguments.get("compress", False)
    await monitor.qmp("drive-backup", compress=compress, **_copy_members(arguments))


@hmp_command(
    "nbd_server_start",
    (Flag("a", "all"), Flag("w", "writable"), Argument("address", Kind.STRING)),
    "[-a] [-w] host:port|unix:path",
    "serve block devices over NBD (-a: export every drive; -w: writable)",
)
async def nbd_server_start(monitor: Monitor, arguments: Arguments) -> None:
    """Start the NBD server; if an export of ``-a`` fails, it is stopped again."""
    writable = bool(arguments.get("writable"))
    if writable and not arguments.get("all"):
        raise BlockError("-w only valid together with -a")
    await monitor.qmp("nbd-server-start", addr=_nbd_address(arguments["address"]))
    if not arguments.get("all"):
        return
    try:
        for name, drive in monitor.context.graph.drives.items():
            if drive.node is not None:
                await monitor.qmp(
                    "nbd-server-add", device=name, writable=writable and not drive.node.read_only
                )
    except BlockError:
        await monitor.qmp("nbd-server-stop")
        raise


def _nbd_address(text: str) -> dict[str, object]:
    kind, _, path = text.partition(":")
    if kind == "unix" and path:
        return {"type": "unix", "data": {"path": path}}
    host, colon, port = text.rpartition(":")
    if not colon or not port:
        raise BlockError(f"error parsing address '{text}'")
    return {"type": "inet", "data": {"host": host.strip("[]"), "port": port}}


@hmp_command(
    "nbd_server_add",
    (Flag("w", "writable"), DEVICE, Argument("name", Kind.STRING, optional=True)),
    "[-w] device [name]",
    "export a block device over NBD (-w: writable; default name is the device's)",
)
async def nbd_server_add(monitor: Monitor, arguments: Arguments) -> None:
    """Add an export to the running server."""
    await monitor.qmp("nbd-server-add", **arguments)


@hmp_command(
    "nbd_server_remove",
    (_FORCE, Argument("name", Kind.STRING)),
    "[-f] name",
    "remove an NBD export (-f: also while clients are connected)",
)
async def nbd_server_remove(monitor: Monitor, arguments: Arguments) -> None:
    """Remove an export."""
    mode = "hard" if arguments.get("force") else "safe"
    await monitor.qmp("nbd-server-remove", name=arguments["name"], mode=mode)


@hmp_command("nbd_server_stop", (), "", "stop the NBD server and remove all its exports")
async def nbd_server_stop(monitor: Monitor, arguments: Arguments) -> None:  # noqa: ARG001
    """Stop the server."""
    await monitor.qmp("nbd-server-stop")


@hmp_command(
    "drive_add",
    (
        Flag("n", "node"),
        Argument("slot", Kind.STRING),
        Argument("options", Kind.STRING),
    ),
    "[-n] [[<domain>:]<bus>:]<slot>\n[file=file][,if=type][,id=name][,format=f][,read-only=on|off]",
    "open a disk image as --drive does; the slot means nothing here\n"
    "\t\t\t (-n: a node, as --blockdev does)",
)
async def drive_add(monitor: Monitor, arguments: Arguments) -> str | None:
    """Add a drive, or a node; QEMU prints errors of this one as they are."""
    try:
        if not arguments.get("node"):
            members = parse_drive(arguments["options"])
            await monitor.qmp("x-liveblock-drive-add", options=members)
            return "OK"
        nested = dict(parse_keyval(arguments["options"]))
        if "node-name" not in nested:
            return "'node-name' needs to be specified"
        await monitor.context.graph.open(parse(BlockdevOptions, nested, keyval=True))
    except (BlockError, ConfigError) as exc:
        return str(exc)
    return None


@hmp_command("drive_del", (DEVICE,), "device", "close a drive or node; exports of its image stay")
async def drive_del(monitor: Monitor, arguments: Arguments) -> str | None:
    """Remove a drive, or a node that was added."""
    name = arguments["device"]
    try:
        if name in monitor.context.graph.nodes:
            await monitor.qmp("blockdev-del", node_name=name)
        else:
            await monitor.qmp("x-liveblock-drive-del", id=name)
    except BlockError as exc:
        return exc.message
    return None


_LIMITS = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")


@hmp_command(
    "block_set_io_throttle",
    (DEVICE, *(Argument(name, Kind.NUMBER) for name in _LIMITS)),
    "device bps bps_rd bps_wr iops iops_rd iops_wr",
    "change I/O throttle limits for a block drive",
)
async def block_set_io_throttle(monitor: Monitor, arguments: Arguments) -> None:
    """Limit a drive, and the exports of its disk."""
    await monitor.qmp("block_set_io_throttle", **arguments)


@hmp_command("quit", (), "", "end liveblockd", aliases=("q",), ahead="quit")
async def quit_daemon(monitor: Monitor, arguments: Arguments) -> None:  # noqa: ARG001
    """End the daemon; running jobs are cancelled."""
    if "quit" in registry.commands():
        await monitor.qmp("quit")
    else:
        monitor.context.quit()
