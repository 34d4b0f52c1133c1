"""Commits of real files: copies by workers, errors of a full base, a guest over NBD."""

import asyncio
import shutil
import subprocess
from errno import ENOSPC

import pytest

from liveblockd.storage.driver import Permission
from tests.simulation.bench import Bench
from tests.support.daemon import DaemonProcess, nbd_write

pytestmark = pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is not installed")
MIB = 1 << 20


def run(directory, *command):
    return subprocess.run(
        command, cwd=directory, check=True, capture_output=True, text=True, timeout=60
    ).stdout


def make(directory, *layers, base="qcow2"):
    """Images of 8 MiB with qemu-io's writes, the lowest first; a raw base on request."""
    below = None
    for name, *writes in layers:
        kind = base if below is None else "qcow2"
        backing = ("-b", below[0], "-F", below[1]) if below else ()
        run(directory, "qemu-img", "create", "-q", "-f", kind, *backing, name, "8M")
        if writes:
            commands = [part for write in writes for part in ("-c", f"write -P {write}")]
            run(directory, "qemu-io", "-f", kind, *commands, name)
        below = name, kind


def content(directory, name):
    run(directory, "qemu-img", "convert", "-O", "raw", name, "content.raw")
    data = (directory / "content.raw").read_bytes()
    (directory / "content.raw").unlink()
    return data


@pytest.mark.parametrize("base", ["qcow2", "raw"])
async def test_data_goes_from_file_to_file(tmp_path, monkeypatch, base):
    make(
        tmp_path, ("base", "1 0 1M"), ("mid", "2 512k 4M"), ("top", "3 2M 64k"), ("act",), base=base
    )
    before = content(tmp_path, "act")
    monkeypatch.chdir(tmp_path)
    bench = Bench()
    await bench.open(driver="qcow2", node_name="act", file={"driver": "file", "filename": "act"})
    job = await bench.commit("act", top="top", base="base")
    driver = job.base.driver
    await bench.end(job)
    assert bench.completion("c").get("error") is None
    if base == "qcow2":
        populator = driver._populator
        assert populator.copied + populator.cloned >= 2 * MIB, "no worker copied"
    await bench.close()
    assert content(tmp_path, "act") == before
    info = run(tmp_path, "qemu-img", "info", "act")
    assert "backing file: base\n" in info and f"backing file format: {base}\n" in info
    run(tmp_path, "qemu-img", "check", "-q", "act")
    assert content(tmp_path, "base")[2 * MIB : 2 * MIB + 65536] == b"\3" * 65536


@pytest.mark.parametrize("active", [False, True])
async def test_a_full_base_stops_the_job_and_loses_nothing(tmp_path, monkeypatch, active):
    make(tmp_path, ("base", "1 0 1M"), ("mid", "2 512k 4M"), ("top", "3 2M 64k"))
    monkeypatch.chdir(tmp_path)
    bench = Bench()
    members = {"driver": "qcow2", "file": {"driver": "file", "filename": "base"}}
    full = {
        "driver": "blkdebug", "node-name": "faulty", "image": members["file"],
        "inject-error": [{"event": "write_aio", "iotype": "write", "errno": ENOSPC}],
    }  # fmt: skip
    await bench.open(driver="qcow2", node_name="base", file=full)
    await bench.open(
        driver="qcow2", node_name="mid", backing="base", file={"driver": "file", "filename": "mid"}
    )
    top = await bench.open(
        driver="qcow2", node_name="top", backing="mid", file={"driver": "file", "filename": "top"}
    )
    drive = await bench.graph.attach(top, Permission.CONSISTENT_READ | Permission.WRITE, name="vda")
    before = bytes(await drive.read(0, 8 * MIB))
    where = {} if active else {"top_node": "mid"}
    rules = bench.graph.find("faulty").driver._rules
    from_now_on, rules.inject = rules.inject, []
    job = await bench.commit("vda", on_error="enospc", **where)
    rules.inject = from_now_on
    await bench.end(job, "paused")
    assert job.io_status == "nospace"
    assert bytes(await drive.read(0, 8 * MIB)) == before
    rules.inject, rules.active = [], []
    async with asyncio.timeout(30):
        while job.status not in ("ready", "null"):
            if job.status == "paused":  # again, for a copy that was under way when it was full
                bench.scheduler.resume(job)
            await asyncio.sleep(0.001)
    if active:
        bench.scheduler.complete(job)
    await bench.end(job)
    assert bench.completion("c").get("error") is None
    assert bytes(await drive.read(0, 8 * MIB)) == before
    await bench.close()
    run(tmp_path, "qemu-img", "check", "-q", "base")
    assert content(tmp_path, "base" if active else "top") == before


def test_a_guest_goes_on_with_the_base(tmp_path):
    make(tmp_path, ("base", "1 0 4M"), ("mid", "2 1M 1M"), ("top", "3 2M 1M"))
    expected = bytearray(content(tmp_path, "top"))
    with DaemonProcess(
        tmp_path,
        *("--blockdev", "driver=qcow2,node-name=top,file.driver=file,file.filename=top"),
        *("--nbd-server", "addr.type=unix,addr.path=nbd.sock"),
        *("--export", "nbd,id=e,node-name=top,name=disk,writable=on"),
    ) as daemon:
        qmp = daemon.qmp()
        socket = str(tmp_path / "nbd.sock")

        def write(offset, byte):
            data = bytes([byte]) * 4096
            nbd_write(socket, "disk", offset, data)
            expected[offset : offset + 4096] = data

        qmp("block-commit", device="top", job_id="c")
        write(5 * MIB, 7)
        qmp.wait("BLOCK_JOB_READY", device="c")
        write(6 * MIB, 8)
        write(0, 9)
        qmp("block-job-complete", device="c")
        end = qmp.wait("BLOCK_JOB_COMPLETED", device="c")
        assert "error" not in end["data"]
        write(7 * MIB, 10)
        with pytest.raises(subprocess.CalledProcessError):
            run(tmp_path, "qemu-io", "-f", "qcow2", "-c", "write 0 512", "base")  # it is ours
    run(tmp_path, "qemu-img", "check", "-q", "base")
    assert content(tmp_path, "base") == expected
