"""Streams on real file systems: clones, O_DIRECT, plain copies; every way gives the same bytes."""

import contextlib
import os
import random
import subprocess
import tempfile
import threading
import time

import pytest

from liveblockd.formats.qcow2 import gather
from liveblockd.runtime.demand import Demand
from liveblockd.runtime.workers import WorkerPool
from liveblockd.storage import copy_engine, hostcalls
from tests.simulation.bench import Bench
from tests.support.qcow2_images import needs

pytestmark = needs("qemu-img")

KIB, MIB = 1024, 1024 * 1024
CLUSTER = 64 * KIB
#: ends in the middle of a cluster, and of a block
SIZE = 16 * MIB + 5 * CLUSTER + 3 * 512


@pytest.fixture(autouse=True)
def forget():
    copy_engine.unsupported.clear()
    copy_engine.no_clones.clear()
    yield
    copy_engine.unsupported.clear()
    copy_engine.no_clones.clear()


@pytest.fixture
def mounted(request, tmp_path):
    """A directory on a file system of the kind asked for."""
    kind = request.param
    if kind == "here":
        yield tmp_path
        return
    if kind == "tmpfs":
        if not os.access("/dev/shm", os.W_OK):
            pytest.skip("no /dev/shm")
        with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
            yield type(tmp_path)(directory)
        return
    if os.geteuid() != 0:
        pytest.skip("a loop mount needs root")
    device, place = tmp_path / "device", tmp_path / "mount"
    place.mkdir()
    with open(device, "wb") as file:
        file.truncate(400 * MIB)
    make = {"xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"], "btrfs": ["mkfs.btrfs", "-q"]}[kind]
    for command in ([*make, str(device)], ["mount", "-o", "loop", str(device), str(place)]):
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"{command[0]}: {error}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True, timeout=60)


def make_images(directory, seed=7):
    """A base with data, zeros and holes, an empty top; the bytes that both read as."""
    rng = random.Random(seed)
    content = bytearray(rng.randbytes(SIZE))
    for first, count in ((3, 1), (20, 9), (40, 16), (100, 1)):
        content[first * CLUSTER : (first + count) * CLUSTER] = bytes(count * CLUSTER)
    # Begins with zeros, but is not.
    content[200 * CLUSTER : 201 * CLUSTER - 1] = bytes(CLUSTER - 1)
    raw, base, top = (directory / name for name in ("raw", "base.qcow2", "top.qcow2"))
    raw.write_bytes(content)
    # -S 0: zeros are data in the base
    run("qemu-img", "convert", "-S", "0", "-O", "qcow2", raw, base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    os.sync()
    return bytes(content), base, top


def run(*command):
    subprocess.run([str(part) for part in command], check=True, capture_output=True, timeout=60)


async def stream(base, top, *, source_direct=False, direct=False, workers=None):
    """Bytes cloned and copied by workers."""
    bench = Bench(workers)
    cache, base_cache = {"direct": direct}, {"direct": source_direct}
    try:
        node = await bench.open(
            driver="qcow2",
            node_name="top",
            file={"driver": "file", "filename": str(top), "cache": cache},
            backing={
                "driver": "qcow2",
                "file": {"driver": "file", "filename": str(base), "cache": base_cache},
            },
        )
        job = await bench.stream("top")
        await bench.end(job)
        assert bench.course()[-3:] == ["COMPLETED", "concluded", "null"], bench.course()
        assert "error" not in bench.completion()
        return node.driver._populator.cloned, node.driver._populator.copied
    finally:
        await bench.close()


def check(directory, top, content):
    out = directory / "out"
    run("qemu-img", "check", top)
    run("qemu-img", "convert", "-O", "raw", top, out)
    assert out.read_bytes() == content
    assert top.read_bytes()[8:16] == bytes(8), "a backing file is still named"
    out.unlink()


def check_space(top):
    """Zeros that are data in the base take no space in the top."""
    if "mount" in top.parts:
        return  # XFS keeps space in advance, btrfs does not say at once
    assert os.stat(top).st_blocks * 512 <= SIZE - 27 * CLUSTER + MIB


@pytest.mark.parametrize("mounted", ["xfs", "btrfs"], indirect=True)
@pytest.mark.parametrize("direct", [False, True])
async def test_clones_share_extents_and_take_no_space(mounted, direct):
    content, base, top = make_images(mounted)
    before = os.statvfs(mounted)
    cloned, copied = await stream(base, top, source_direct=direct, direct=direct)
    os.sync()
    after = os.statvfs(mounted)
    # The cluster that the end of the disk cuts is read and written, the rest shared.
    assert cloned == SIZE // CLUSTER * CLUSTER
    assert copied == 0
    used = (before.f_bfree - after.f_bfree) * before.f_frsize
    assert used < 2 * MIB, "shared clusters take no space; the tables and one cluster do"
    check(mounted, top, content)


@pytest.mark.parametrize("mounted", ["xfs", "btrfs", "here", "tmpfs"], indirect=True)
async def test_the_same_bytes_where_nothing_can_be_shared(mounted, monkeypatch):
    monkeypatch.setattr(copy_engine, "clone", lambda *_: False)
    content, base, top = make_images(mounted)
    cloned, copied = await stream(base, top)
    assert (cloned, copied) == (0, SIZE // CLUSTER * CLUSTER)
    check(mounted, top, content)
    check_space(top)


@pytest.mark.parametrize("mounted", ["here", "xfs"], indirect=True)
@pytest.mark.parametrize(("source_direct", "direct"), [(True, True), (True, False), (False, True)])
async def test_o_direct(mounted, source_direct, direct, monkeypatch):
    with contextlib.ExitStack() as stack:
        try:
            probe = os.open(mounted / "probe", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        except OSError:
            pytest.skip("no O_DIRECT here")
        stack.callback(os.close, probe)
    monkeypatch.setattr(copy_engine, "clone", lambda *_: False)
    content, base, top = make_images(mounted)
    _, copied = await stream(base, top, source_direct=source_direct, direct=direct)
    assert copied == SIZE // CLUSTER * CLUSTER, "the workers' copy was not used"
    check(mounted, top, content)
    check_space(top)


def in_memory(directory):
    fd = os.open(directory, os.O_RDONLY)
    try:
        return hostcalls.is_in_memory(fd)
    finally:
        os.close(fd)


class Served(Demand):
    """Somebody is always served, or nobody."""

    def __init__(self, served):
        super().__init__(2)
        self.served = served

    def width(self, wanted, now):
        self.guests.requests += self.served
        return super().width(wanted, now)


@pytest.mark.parametrize(("served", "direct", "most"), [(True, False, 1), (False, False, 3),
                                                        (True, True, 3)])  # fmt: skip
async def test_one_copy_at_a_time_while_guests_are_served(
    tmp_path, monkeypatch, served, direct, most
):
    if direct:
        try:
            os.close(os.open(tmp_path / "probe", os.O_RDWR | os.O_CREAT | os.O_DIRECT))
        except OSError:
            pytest.skip("no O_DIRECT here")
    lock, now, seen, real = threading.Lock(), [0], [], gather.copy_segments

    def counting(*arguments):
        with lock:
            now[0] += 1
            seen.append(now[0])
        time.sleep(0.02)
        try:
            return real(*arguments)
        finally:
            with lock:
                now[0] -= 1

    monkeypatch.setattr(gather, "copy_segments", counting)
    content, base, top = make_images(tmp_path)
    workers = WorkerPool(demand=Served(served))
    await stream(base, top, direct=direct, workers=workers)
    assert len(seen) > 4, "the workers' copy was not used"
    if not direct and in_memory(tmp_path):
        most = min(most, 2)  # as many as there are processors
    assert max(seen) == most
    check(tmp_path, top, content)
