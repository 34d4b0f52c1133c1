"""Jobs on chains with filters between their images: the disk reads as before, the filters stay."""

import shutil
import subprocess
import time
from dataclasses import replace

import pytest

from liveblockd.errors import BlockError
from liveblockd.jobs.backup import BackupParameters
from liveblockd.jobs.backup_start import start_backup
from liveblockd.jobs.mirror_job import MirrorParameters, MirrorSyncMode
from liveblockd.jobs.mirror_start import start_mirror
from liveblockd.storage.filters.buckets import Limits, Rate
from liveblockd.storage.filters.throttle_group import ThrottleGroup
from tests.simulation.bench import Bench
from tests.support.daemon import DaemonProcess

SIZE = 4 << 20
CLUSTER = 1 << 16


def run(directory, *command):
    return subprocess.run(
        command, cwd=directory, check=True, capture_output=True, text=True, timeout=60
    ).stdout


@pytest.fixture
def images(tmp_path):
    """base <- mid <- top, with bytes of its own in each; ``all.raw`` is what a guest reads."""
    for name in ("qemu-img", "qemu-io"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")
    below = []
    for number, name in enumerate(("base", "mid", "top"), 1):
        run(tmp_path, "qemu-img", "create", "-q", "-f", "qcow2", *below, f"{name}.qcow2", str(SIZE))
        write = f"write -P {number} {(number - 1) * 5 * CLUSTER} {10 * CLUSTER}"
        run(tmp_path, "qemu-io", "-f", "qcow2", "-c", write, f"{name}.qcow2")
        below = ["-b", f"{name}.qcow2", "-F", "qcow2"]
    run(tmp_path, "qemu-img", "convert", "-O", "raw", "top.qcow2", "all.raw")
    return tmp_path


def image(name, backing):
    return {
        "driver": "qcow2", "node-name": name, "backing": backing,
        "file": {"driver": "file", "filename": f"{name}.qcow2"},
    }  # fmt: skip


def throttle(name, file):
    return {"driver": "throttle", "node-name": name, "throttle-group": "g", "file": file}


def chain():
    """top on a throttle on mid on a throttle on base, and a copy-on-read above all."""
    below = throttle("t-base", image("base", None))
    middle = throttle("t-mid", image("mid", below))
    return {"driver": "copy-on-read", "node-name": "cor", "file": image("top", middle)}


def start(directory):
    return DaemonProcess(directory, "--object", "throttle-group,id=g,x-iops-total=500")


@pytest.mark.parametrize("base", [None, "base", "t-base"])
def test_stream(images, base):
    with start(images) as daemon:
        qmp = daemon.qmp()
        qmp("blockdev-add", **chain())
        below = {} if base is None else {"base_node": base}
        qmp("block-stream", job_id="s", device="cor", **below)
        assert "error" not in qmp.wait("BLOCK_JOB_COMPLETED")["data"]
        nodes = {n["node-name"]: n for n in qmp("query-named-block-nodes", flat=True)}
        children = {c["child"]: c["node-name"] for c in nodes["top"]["children"]}
        assert children.get("backing") == base  # filters above the base that was named are gone
        assert nodes["cor"]["children"][0]["node-name"] == "top"
    run(images, "qemu-img", "check", "-q", "top.qcow2")
    assert "identical" in run(images, "qemu-img", "compare", "top.qcow2", "all.raw")


def test_commit(images):
    with start(images) as daemon:
        qmp = daemon.qmp()
        qmp("blockdev-add", **chain())
        qmp("block-commit", job_id="c", device="cor", top_node="mid", base_node="base")
        assert "error" not in qmp.wait("BLOCK_JOB_COMPLETED")["data"]
    for name in ("base", "top"):
        run(images, "qemu-img", "check", "-q", f"{name}.qcow2")
    assert "base.qcow2" in run(images, "qemu-img", "info", "top.qcow2")
    assert "identical" in run(images, "qemu-img", "compare", "top.qcow2", "all.raw")


@pytest.mark.parametrize("kind", ["stream", "commit", "mirror", "backup"])
@pytest.mark.parametrize("where", ["between", "above"])
async def test_no_job_reads_past_a_throttle(kind, where, images, monkeypatch):
    """A worker could copy from file to file; the limits are there for the disk that it reads."""
    if where == "above" and kind in ("stream", "commit"):
        pytest.skip("they read below the top")
    read = 0

    def account(self, is_write, length):
        nonlocal read
        read += 0 if is_write else length

    monkeypatch.setattr(ThrottleGroup, "account", account)
    monkeypatch.chdir(images)
    size = 16 * SIZE
    for name, below in (("lowest", []), ("lower", ["-b", "lowest"]), ("upper", ["-b", "lower"])):
        backing = [*below, "-F", "qcow2"] if below else []
        run(images, "qemu-img", "create", "-q", "-f", "qcow2", *backing, name, str(size))
    run(images, "qemu-io", "-f", "qcow2", "-c", f"write -P 7 0 {size}", "lower")
    run(images, "qemu-img", "create", "-q", "-f", "qcow2", "target", str(size))
    bench = Bench()
    group = ThrottleGroup(Limits({"bps-total": Rate(10**15)}))
    bench.graph.environment = replace(bench.graph.environment, throttle_group=lambda _: group)
    lowest, lower, upper, target = (
        {"driver": "qcow2", "file": {"driver": "file", "filename": name}}
        for name in ("lowest", "lower", "upper", "target")
    )
    device = "upper"
    lower |= {"node-name": "lower", "backing": lowest}
    if where == "between":
        lower = throttle("slow", lower)
    upper |= {"node-name": "upper", "backing": lower}
    if where == "above":
        upper, device = throttle("slow", upper), "slow"
    await bench.open(**upper)
    await bench.open(node_name="target", **target)
    if kind == "stream":
        job = await bench.stream(device, "j")
    elif kind == "commit":
        job = await bench.commit(device, "j")
    elif kind == "mirror":
        job = await start_mirror(
            bench.graph, bench.scheduler,
            MirrorParameters("j", device, "target", MirrorSyncMode.FULL),
        )  # fmt: skip
    else:
        parameters = BackupParameters("j", device, "target", MirrorSyncMode.FULL)
        job = await start_backup(bench.graph, bench.scheduler, parameters)
    await bench.end(job, "ready" if kind in ("mirror", "commit") else "null")
    assert job.error is None
    assert read >= size
    await bench.close()


async def test_a_backup_is_not_kept_on_its_source(images, monkeypatch):
    """A filter above the source: old data would be kept where they are, behind the own filter."""
    monkeypatch.chdir(images)
    bench = Bench()
    group = ThrottleGroup(Limits())
    bench.graph.environment = replace(bench.graph.environment, throttle_group=lambda _: group)
    await bench.open(**image("base", None))
    await bench.open(**throttle("slow", "base"))
    with pytest.raises(BlockError, match="Source and target cannot be the same"):
        await start_backup(
            bench.graph, bench.scheduler,
            BackupParameters("j", "base", "slow", MirrorSyncMode.FULL),
        )  # fmt: skip
    await bench.close()


@pytest.mark.parametrize("how", ["block-export-del", "nbd-server-stop", "quit", "SIGTERM"])
def test_a_low_limit_does_not_hold_up_the_end_of_an_export(tmp_path, how):
    """What a guest had asked for would take a quarter of an hour: it is over, the bytes stay."""
    if shutil.which("qemu-io") is None:
        pytest.skip("qemu-io is not installed")
    (tmp_path / "disk.raw").write_bytes(bytes(SIZE))
    options = (
        "--object", "throttle-group,id=slow,limits.bps-total=1000",
        "--blockdev", "driver=file,node-name=disk,filename=disk.raw",
        "--blockdev", "driver=throttle,node-name=t,throttle-group=slow,file=disk",
        "--nbd-server", "addr.type=unix,addr.path=nbd.sock",
        "--export", "type=nbd,id=e,node-name=t,name=t,writable=on",
    )  # fmt: skip
    requests = ("-c", "aio_write -P 1 0 1M", "-c", "aio_write -P 2 1M 1M", "-c", "aio_flush")
    with DaemonProcess(tmp_path, *options) as daemon:
        client = daemon.qmp()
        guest = subprocess.Popen(
            ["qemu-io", "-f", "raw", *requests, "nbd+unix:///t?socket=nbd.sock"],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        while not (tmp_path / "disk.raw").read_bytes().startswith(b"\1" * (1 << 20)):
            assert guest.poll() is None
            time.sleep(0.02)
        begun = time.monotonic()  # the first has gone through, the second waits
        if how == "SIGTERM":
            daemon.process.terminate()
        else:
            client(how, **({"id": "e", "mode": "hard"} if how == "block-export-del" else {}))
        if how in ("quit", "SIGTERM"):
            daemon.wait()
        else:
            client.wait("BLOCK_EXPORT_DELETED", id="e")
            client("blockdev-del", node_name="t")
        assert time.monotonic() - begun < 20
        guest.communicate(timeout=60)
    assert (tmp_path / "disk.raw").read_bytes()[: 1 << 20] == b"\1" * (1 << 20)
