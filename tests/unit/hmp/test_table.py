"""Lines of the human monitor, over QMP commands that only record what they are asked."""

import dataclasses
import types

import pytest

from liveblockd.errors import BlockError
from liveblockd.events import Publisher
from liveblockd.jobs.scheduler import Scheduler
from liveblockd.qmp import registry
from liveblockd.qmp.context import Context
from liveblockd.qmp.hmp import run_line, table
from liveblockd.qmp.hmp.table import Monitor

JOB = {"type": "stream", "device": "drive0", "offset": 524288, "len": 8388608, "speed": 65536}
CACHE = {"writeback": True, "direct": False, "no-flush": False}
IMAGE = {
    "filename": "top.qcow2", "format": "qcow2", "virtual-size": 16777216, "actual-size": 1310720,
    "cluster-size": 65536, "backing-filename": "base.qcow2", "full-backing-filename": "base.qcow2",
    "backing-filename-format": "qcow2",
    "format-specific": {"type": "qcow2", "data": {"compat": "1.1", "lazy-refcounts": False}},
    "backing-image": {"filename": "base.qcow2", "format": "qcow2", "virtual-size": 8388608,
                      "actual-size": 8650752},
}  # fmt: skip
TOP = {"node-name": "#block1", "file": "top.qcow2", "drv": "qcow2", "ro": False, "encrypted": False,
       "cache": CACHE, "backing_file": "base.qcow2", "backing_file_depth": 1, "image": IMAGE,
       "detect_zeroes": "off", "bps": 0}  # fmt: skip


class Recorder(Monitor):
    """Answers from ``answers``; ``asked`` has every command."""

    asked: list
    answers: dict

    async def qmp(self, name, /, **arguments):
        self.asked.append((name, {k: v for k, v in arguments.items() if v is not None}))
        answer = self.answers.get(name, {})
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def monitor(monkeypatch):
    monkeypatch.setattr(Recorder, "asked", [], raising=False)
    monkeypatch.setattr(Recorder, "answers", {}, raising=False)
    monkeypatch.setattr(table, "Monitor", Recorder)
    return Recorder


@pytest.fixture
def context():
    fields = {f.name: None for f in dataclasses.fields(Context) if f.default is dataclasses.MISSING
              and f.default_factory is dataclasses.MISSING}  # fmt: skip
    return Context(**(fields | {
        "graph": types.SimpleNamespace(drives={}, nodes={}), "publisher": Publisher(),
        "scheduler": Scheduler(Publisher()),
        "on_quit": lambda reason: None}))  # fmt: skip


@pytest.mark.parametrize(
    ("line", "name", "arguments"),
    [
        (
            "block_stream virtio0 A",
            "block-stream",
            {"job_id": "virtio0", "device": "virtio0", "base": "A"},
        ),
        (
            "block_stream d 64k b.img",
            "block-stream",
            {"job_id": "d", "device": "d", "speed": 65536, "base": "b.img"},
        ),
        ("block_job_cancel -f d", "block-job-cancel", {"device": "d", "force": True}),
        ("block_job_set_speed d 1m", "block-job-set-speed", {"device": "d", "speed": 1 << 20}),
        ("block_resize d 16", "block_resize", {"device": "d", "size": 16 << 20}),
        (
            "snapshot_blkdev ide0-hd0 /new-path/disk.img qcow2",
            "blockdev-snapshot-sync",
            {
                "device": "ide0-hd0",
                "snapshot_file": "/new-path/disk.img",
                "format": "qcow2",
                "mode": "absolute-paths",
            },
        ),
        (
            "snapshot_blkdev -n d x",
            "blockdev-snapshot-sync",
            {"device": "d", "snapshot_file": "x", "format": "qcow2", "mode": "existing"},
        ),
        (
            "nbd_server_start unix:/run/n",
            "nbd-server-start",
            {"addr": {"type": "unix", "data": {"path": "/run/n"}}},
        ),
        (
            "nbd_server_start ::1:10809",
            "nbd-server-start",
            {"addr": {"type": "inet", "data": {"host": "::1", "port": "10809"}}},
        ),
        ("drive_del d", "x-liveblock-drive-del", {"id": "d"}),
        ("nbd_server_remove -f e", "nbd-server-remove", {"name": "e", "mode": "hard"}),
    ],
)
async def test_commands_become_qmp(monitor, context, line, name, arguments):
    assert await run_line(context, line) == ""
    assert monitor.asked == [(name, arguments)]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("nosuchcmd", "unknown command: 'nosuchcmd'\r\n"),
        ("info nosuch x", "unknown command: 'info nosuch'\r\n"),
        ("block_stream",
         "block_stream: block device name expected\r\n"
         'Try "help block_stream" for more information\r\n'),
        ("block_resize d", 'invalid size\r\nTry "help block_resize" for more information\r\n'),
        ("block_stream a 1 2 3", "block_stream: extraneous characters at the end of line\r\n"
         'Try "help block_stream" for more information\r\n'),
        ("quit now", "quit|q: extraneous characters at the end of line\r\n"
         'Try "help quit" for more information\r\n'),
        ("info block -x",
         'block: unsupported option -x\r\nTry "help info block" for more information\r\n'),
        ("snapshot_blkdev d", "Error: Parameter 'snapshot-file' is missing\r\n"),
        ("commit nosuch", "Device 'nosuch' not found\r\n"),
        ("nbd_server_start foo", "Error: error parsing address 'foo'\r\n"),
        ("info block-jobs", "No active jobs\r\n"),
        ("info status", "VM status: running\r\n"),
        ("", ""),
        ("   ", ""),
        ("help nosuch", "unknown command: 'nosuch'\r\n"),
        ("help block_stream", "block_stream device [speed [base]] -- "
         "copy data from a backing file into a block device\r\n"),
        ("? info block-jobs",
         "info block-jobs  -- show progress of ongoing block device operations\r\n"),
    ],
)  # fmt: skip
async def test_texts(monitor, context, line, text):
    monitor.answers = {"query-block": [], "query-block-jobs": []}
    assert await run_line(context, line) == text


async def test_drive_add(monitor, context):
    assert await run_line(context, "drive_add 0 if=none,file=a.img,id=e") == "OK\r\n"
    options = {"if": "none", "file": "a.img", "id": "e"}
    assert monitor.asked == [("x-liveblock-drive-add", {"options": options})]
    monitor.answers = {"x-liveblock-drive-add": BlockError("Could not open 'a.img': x")}
    assert await run_line(context, "drive_add 0 a.img") == "Could not open 'a.img': x\r\n"


async def test_errors_are_text(monitor, context):
    monitor.answers = {"block-stream": BlockError("Device 'x' is odd")}
    assert await run_line(context, "block_stream x") == "Error: Device 'x' is odd\r\n"
    monitor.answers = {"block-stream": OSError(28, "No space left on device")}
    assert await run_line(context, "block_stream x") == "Error: No space left on device\r\n"
    monitor.answers = {"block-stream": ZeroDivisionError("oops")}
    assert await run_line(context, "block_stream x") == "Error: oops\r\n"


async def test_info_block_jobs(monitor, context):
    mirror = {"type": "mirror", "device": "d1", "offset": 5, "len": 5, "speed": 0}
    monitor.answers = {"query-block-jobs": [JOB, mirror]}
    assert await run_line(context, "info block-jobs") == (
        "Streaming device drive0: Completed 524288 of 8388608 bytes, speed limit 65536 bytes/s\r\n"
        "Type mirror, device d1: Completed 5 of 5 bytes, speed limit 0 bytes/s\r\n"
    )


async def test_info_block(monitor, context):
    throttled = TOP | {
        "node-name": "#b2", "file": "cd.iso", "drv": "raw", "ro": True, "backing_file": None,
        "bps": 1048576, "iops": 100, "group": "cd0",
        "cache": {"writeback": True, "direct": True, "no-flush": True}}  # fmt: skip
    monitor.answers = {"query-block": [
        {"device": "drive0", "qdev": "/m/vd0", "removable": False, "inserted": TOP},
        {"device": "cd0", "removable": True, "locked": False, "inserted": throttled},
        {"device": "empty0", "removable": True, "locked": True, "tray_open": True},
    ], "query-named-block-nodes": [TOP | {"node-name": "n1"}, TOP]}  # fmt: skip
    first = (
        "drive0 (#block1): top.qcow2 (qcow2)\r\n"
        "    Attached to:      /m/vd0\r\n"
        "    Cache mode:       writeback\r\n"
        "    Backing file:     base.qcow2 (chain depth: 1)\r\n"
    )
    second = (
        "\r\ncd0 (#b2): cd.iso (raw, read-only)\r\n"
        "    Removable device: not locked, tray closed\r\n"
        "    Cache mode:       writeback, direct, ignore flushes\r\n"
        "    I/O throttling:   bps=1048576 bps_rd=0 bps_wr=0 bps_max=0 bps_rd_max=0 bps_wr_max=0 "
        "iops=100 iops_rd=0 iops_wr=0 iops_max=0 iops_rd_max=0 iops_wr_max=0 iops_size=0 "
        "group=cd0\r\n"
    )
    third = "\r\nempty0: [not inserted]\r\n    Removable device: locked, tray open\r\n"
    assert await run_line(context, "info block") == first + second + third
    assert await run_line(context, "info block cd0") == second
    assert await run_line(context, "info block nosuch") == ""
    node = (
        "#block1: top.qcow2 (qcow2)\r\n    Cache mode:       writeback\r\n"
        "    Backing file:     base.qcow2 (chain depth: 1)\r\n"
    )
    assert await run_line(context, "info block -n #block1") == "\r\n" + node
    assert await run_line(context, "info block n1") == node.replace("#block1", "n1")
    assert await run_line(context, "info block -v drive0") == first + (
        "\r\nImages:\r\nimage: top.qcow2\r\nfile format: qcow2\r\n"
        "virtual size: 16 MiB (16777216 bytes)\r\ndisk size: 1.25 MiB\r\ncluster_size: 65536\r\n"
        "backing file: base.qcow2\r\nbacking file format: qcow2\r\n"
        "Format specific information:\r\n    compat: 1.1\r\n    lazy refcounts: false\r\n"
        "image: base.qcow2\r\nfile format: qcow2\r\nvirtual size: 8 MiB (8388608 bytes)\r\n"
        "disk size: 8.25 MiB\r\n"
    )


async def test_a_real_qmp_command_is_checked_and_run(context, monkeypatch):
    monkeypatch.setattr(registry, "_commands", {})

    @registry.command("block-job-pause", args=_Device)
    async def pause(context, arguments):
        raise BlockError(f"seen {arguments.device}")

    assert await run_line(context, "block_job_pause d7") == "Error: seen d7\r\n"


class Ending:
    """A scheduler with a job that has told of its end."""

    waits = 0

    @property
    def letting_go(self):
        return [] if self.waits else ["job"]

    async def let_go_of_ended(self):
        self.waits += 1
        return True


async def test_a_command_that_is_refused_too_early_is_tried_again(context, monkeypatch):
    """Also by a handler that makes a text of each error."""
    monkeypatch.setattr(registry, "_commands", {})
    context.scheduler = ending = Ending()

    @registry.command("x-liveblock-drive-del", args=_Id)
    async def drive_del(context, arguments):
        if not ending.waits or arguments.id != "d7":
            raise BlockError(f"{arguments.id} is in use")

    assert await run_line(context, "drive_del d7") == "" and ending.waits == 1
    assert await run_line(context, "drive_del d8") == "d8 is in use\r\n"
    assert ending.waits == 1, "nothing to wait for"
    ending.waits = 0
    assert await run_line(context, "drive_del d8") == "d8 is in use\r\n"


async def test_a_line_waits_once_and_queries_do_not(context, monkeypatch):
    """What ended jobs used may take minutes to be durable."""
    monkeypatch.setattr(registry, "_commands", {})
    monkeypatch.setattr(Ending, "letting_go", ["job"])
    context.scheduler = ending = Ending()

    @registry.command("x-liveblock-drive-del", args=_Id)
    async def drive_del(context, arguments):
        raise BlockError("it is in use")

    @registry.command("query-block-jobs", query=True)
    async def query(context, arguments):
        raise BlockError("no jobs today")

    assert await run_line(context, "drive_del d7") == "it is in use\r\n" and ending.waits == 1
    assert await run_line(context, "info block-jobs") == "Error: no jobs today\r\n"
    assert ending.waits == 1


async def test_what_is_done_in_part_is_not_done_again(context, monkeypatch):
    monkeypatch.setattr(registry, "_commands", {})
    context.scheduler = ending = Ending()
    context.graph.drives["d"] = types.SimpleNamespace(node=types.SimpleNamespace(read_only=True))
    started = []

    @registry.command("nbd-server-start", args=_Anything)
    async def start(context, arguments):
        started.append(True)

    @registry.command("nbd-server-add", args=_Anything)
    async def add(context, arguments):
        raise BlockError("not yet")

    @registry.command("nbd-server-stop")
    async def stop(context, arguments):
        started.append(False)

    assert await run_line(context, "nbd_server_start -a unix:x") == "Error: not yet\r\n"
    assert started == [True, False] and not ending.waits


class _Device(registry.NoArguments):
    device: str


class _Id(registry.NoArguments):
    id: str


class _Anything(registry.NoArguments):
    addr: dict | None = None
    device: str | None = None
    writable: bool | None = None


def test_a_command_is_registered_once():
    table.load()
    with pytest.raises(ValueError, match="twice"):
        table.hmp_command("quit", (), "", "x")(lambda m, a: None)
