"""drive-mirror: images that are created or only opened, and the chain they stand on at the end."""

import asyncio
import itertools
import json
import os

import pytest

from liveblockd.errors import BlockError
from liveblockd.graph.snapshot import NewImageMode
from liveblockd.jobs.drive_mirror import DriveMirrorParameters, start_drive_mirror
from liveblockd.jobs.mirror_job import MirrorParameters, MirrorSyncMode
from liveblockd.jobs.mirror_options import MirrorCopyMode, MirrorOptions
from liveblockd.jobs.transitions import JobStatus
from liveblockd.storage.driver import Permission
from tests.integration.test_mirror import MIB, SIZE, Lanes, make_source
from tests.simulation.bench import Bench
from tests.support.qcow2_images import needs, run

pytestmark = needs("qemu-img", "qemu-nbd", "qemu-io")


async def begin(directory):
    base = make_source(directory, 1)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 1M", "-c", "write -z 2M 1M",
        directory / "top.qcow2")  # fmt: skip
    model = bytearray(base)
    model[MIB : 2 * MIB] = b"\7" * MIB
    model[2 * MIB : 3 * MIB] = bytes(MIB)
    bench = Bench()
    file = {"driver": "file", "filename": str(directory / "top.qcow2")}
    node = await bench.open(driver="qcow2", node_name="top", file=file, discard="unmap")
    used = Permission.CONSISTENT_READ | Permission.WRITE
    drive = await bench.graph.attach(node, used, name="virtio0")
    node.monitor_owned = False
    assert bytes(await drive.read(0, SIZE)) == model
    return bench, drive, model


def parameters(target, sync, *, copy_mode=MirrorCopyMode.BACKGROUND, **others):
    mirror = MirrorParameters(
        "m",
        "virtio0",
        str(target),
        MirrorSyncMode(sync),
        options=MirrorOptions(copy_mode=copy_mode),
    )
    return DriveMirrorParameters(mirror, **others)


@pytest.mark.parametrize(
    ("sync", "image_format", "mode"),
    [("full", "qcow2", "background"), ("top", "qcow2", "write-blocking"),
     ("none", "qcow2", "background"), ("full", "raw", "write-blocking"),
     ("top", "raw", "background"), ("none", "raw", "background"),
     ("full", "existing-qcow2", "background"), ("full", "existing-json", "background"),
     *itertools.product(("full", "top", "none"), ("existing",), MirrorCopyMode)],
)  # fmt: skip
async def test_pivot(sync, image_format, mode, tmp_path):
    mode = MirrorCopyMode(mode)
    bench, drive, model = await begin(tmp_path)
    target = tmp_path / "target.img"
    others = {"image_format": image_format}
    if image_format == "existing":
        # Its clusters are larger than what is copied, and it holds something else already.
        on = {"full": "base.raw", "top": "base.raw", "none": "top.qcow2"}[sync]
        kind = "qcow2" if sync == "none" else "raw"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=1M",
            "-b", tmp_path / on, "-F", kind, target, SIZE)  # fmt: skip
        others = {"mode": NewImageMode.EXISTING}
    if image_format == "existing-qcow2":  # an image on its own, which holds all
        run("qemu-img", "create", "-q", "-f", "qcow2", target, SIZE)
        run("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 12M", target)
        others = {"mode": NewImageMode.EXISTING, "image_format": "qcow2"}
    if image_format == "existing-json":
        on = f'json:{{"file.filename":"{tmp_path / "base.raw"}"}}'
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", on, "-F", "raw", target, SIZE)
        others = {"mode": NewImageMode.EXISTING}
    if image_format == "raw" and sync != "full":
        with pytest.raises(BlockError, match="Backing file not supported for file format 'raw'"):
            await start_drive_mirror(
                bench.graph, bench.scheduler, parameters(target, sync, **others), print
            )
        assert not os.path.exists(target)
        await bench.close()
        return
    lines = []
    async with Lanes(drive, model, 1):
        asked = parameters(target, sync, copy_mode=mode, **others)
        job = await start_drive_mirror(bench.graph, bench.scheduler, asked, lines.append)
        await bench.end(job, JobStatus.READY)
        await asyncio.sleep(0.05)
        bench.scheduler.complete(job)
        await bench.end(job)
        assert job.error is None
        await asyncio.sleep(0.05)
    assert bool(lines) is (image_format in ("qcow2", "raw"))
    if image_format != "existing-json":
        assert drive.node.filename == str(target)
    assert bytes(await drive.read(0, SIZE)) == model
    layers = {"full": 1, "top": 2, "none": 3}[sync]
    if image_format in ("existing", "existing-json") and sync == "full":
        layers = 2
    chain = len({n.name for n in bench.graph.nodes.values() if n.driver_class.is_format})
    assert chain == layers, sorted(bench.graph.nodes)
    await bench.graph.detach(drive)
    await bench.close()
    (tmp_path / "model").write_bytes(model)
    kind = "raw" if image_format == "raw" else "qcow2"
    run("qemu-img", "compare", "-f", "raw", "-F", kind, tmp_path / "model", target)
    if kind == "qcow2":
        run("qemu-img", "check", target)
        shown = json.loads(run("qemu-img", "info", "--output=json", target))
        assert ("backing-filename" in shown) is (layers > 1)


async def test_refusals_leave_no_file(tmp_path):
    bench, _, _ = await begin(tmp_path)
    before = sorted(os.listdir(tmp_path))
    target = tmp_path / "target.img"
    for name, others, message in (
        (target, {"image_format": "bogus"}, "Unknown file format 'bogus'"),
        (target, {"image_format": "vmdk"}, "'vmdk' does not support image creation"),
        (tmp_path / "no" / "x", {}, "Could not create '.*': No such file or directory"),
        (tmp_path / "base.raw", {}, "same filename as the backing file"),
        (tmp_path / "top.qcow2", {}, "in use|lock"),
        ("nbd://localhost:1/x", {}, "Protocol driver 'nbd' does not support image creation"),
        ("json:{}", {}, "Protocol driver 'json' does not support image creation"),
        ("json:{}", {"image_format": "raw", "mode": NewImageMode.EXISTING}, "driver or file"),
        (target, {"mode": NewImageMode.EXISTING}, "Could not open '.*': No such file"),
        (target, {"node_name": "top"}, "Duplicate nodes with node-name='top'"),
        (target, {"node_name": "9x"}, "Invalid node-name: '9x'"),
    ):
        with pytest.raises(BlockError, match=message):
            await start_drive_mirror(
                bench.graph, bench.scheduler, parameters(name, "top", **others), lambda _: None
            )
        assert sorted(os.listdir(tmp_path)) == before, message
        assert not any(node.op_blockers for node in bench.graph.nodes.values())
    await bench.close()
