"""The image locks against QEMU's own tools, both ways round."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from liveblockd.errors import BlockError
from liveblockd.qapi import parse
from liveblockd.runtime.workers import WorkerPool
from liveblockd.storage.driver import Permission
from liveblockd.storage.file import FileDriver
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import Environment

pytestmark = pytest.mark.skipif(
    not (shutil.which("qemu-img") and shutil.which("qemu-io")), reason="no qemu-img and qemu-io"
)

READ = Permission.CONSISTENT_READ
WRITER = READ | Permission.WRITE | Permission.RESIZE
FORMAT_SHARES = READ | Permission.WRITE_UNCHANGED


def tool(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def writes(path):
    return tool("qemu-io", "-f", "qcow2", "-c", "write 0 512", path)


def reads(path, *options):
    return tool("qemu-io", "-r", *options, "-f", "qcow2", "-c", "read 0 512", path)


@pytest.fixture
def image(tmp_path):
    path = str(tmp_path / "image.qcow2")
    assert tool("qemu-img", "create", "-q", "-f", "qcow2", path, "1M").returncode == 0
    return path


@pytest.fixture
async def open_node():
    workers, nodes = WorkerPool(), []

    async def one(path, **members):
        value = {"driver": "file", "filename": path, **members}
        nodes.append(await FileDriver.open(parse(BlockdevOptions, value), {}, Environment(workers)))
        return nodes[-1]

    yield one
    for node in nodes:
        await node.close()
    workers.close()


async def in_thread(function, *args):
    return await asyncio.get_running_loop().run_in_executor(None, function, *args)


async def test_qemu_keeps_away_from_our_writer(image, open_node):
    node = await open_node(image)
    assert (await in_thread(writes, image)).returncode == 0  # opened alone nothing is locked
    await node.set_permissions(WRITER, FORMAT_SHARES)
    refused = await in_thread(writes, image)
    assert refused.returncode == 1 and 'Failed to get "write" lock' in refused.stderr
    refused = await in_thread(reads, image)
    assert refused.returncode == 1 and 'Failed to get shared "write" lock' in refused.stderr
    assert (await in_thread(reads, image, "-U")).returncode == 0
    await node.set_permissions(READ, FORMAT_SHARES)
    assert (await in_thread(reads, image)).returncode == 0
    assert (await in_thread(writes, image)).returncode == 1
    await node.set_read_only(True)
    assert (await in_thread(writes, image)).returncode == 1
    await node.set_permissions(Permission.NONE, Permission.ALL)
    assert (await in_thread(writes, image)).returncode == 0


async def test_locks_are_gone_with_the_node(image, open_node):
    node = await open_node(image)
    await node.set_permissions(WRITER, FORMAT_SHARES)
    await node.close()
    assert (await in_thread(writes, image)).returncode == 0


async def test_reopening_never_lets_go(image, open_node):
    node = await open_node(image)
    await node.set_permissions(WRITER, FORMAT_SHARES)
    await node.set_read_only(True)
    assert (await in_thread(reads, image)).returncode == 1
    await node.set_read_only(False)
    assert (await in_thread(reads, image)).returncode == 1


@pytest.fixture
def storage_daemon(image, tmp_path):
    if not shutil.which("qemu-storage-daemon"):
        pytest.skip("no qemu-storage-daemon")
    running = []

    def start(read_only):
        pid_file = tmp_path / "pid"
        running.append(
            subprocess.Popen(
                [
                    "qemu-storage-daemon",
                    "--blockdev",
                    f"driver=qcow2,node-name=n,read-only={read_only},"
                    f"file.driver=file,file.filename={image}",
                    "--pidfile",
                    str(pid_file),
                ]
            )
        )
        limit = time.monotonic() + 10
        while not pid_file.exists():
            assert time.monotonic() < limit and running[-1].poll() is None
            time.sleep(0.02)

    yield start
    for process in running:
        process.terminate()
        process.wait(10)


@pytest.mark.parametrize(
    ("theirs", "used", "message"),
    [
        ("off", WRITER, 'Failed to get "write" lock'),
        ("off", READ, 'Failed to get shared "write" lock'),
        ("on", WRITER, 'Failed to get "write" lock'),
        ("on", READ, None),
    ],
)
async def test_we_keep_away_from_qemu(image, open_node, storage_daemon, theirs, used, message):
    await in_thread(storage_daemon, theirs)
    node = await open_node(image)
    if message is None:
        await node.set_permissions(used, FORMAT_SHARES)
        return
    with pytest.raises(BlockError) as caught:
        await node.set_permissions(used, FORMAT_SHARES)
    assert caught.value.message == message
    sharer = await open_node(image, **{"read-only": True, "force-share": True})
    await sharer.set_permissions(READ, FORMAT_SHARES)
    unlocked = await open_node(image, locking="off")
    await unlocked.set_permissions(WRITER, FORMAT_SHARES)


async def test_two_nodes_of_one_process_conflict_too(image, open_node):
    first, second = await open_node(image), await open_node(image)
    await first.set_permissions(WRITER, FORMAT_SHARES)
    with pytest.raises(BlockError, match='Failed to get "write" lock'):
        await second.set_permissions(WRITER, FORMAT_SHARES)
    await first.close()
    await second.set_permissions(WRITER, FORMAT_SHARES)


HOLDER = """
import os, sys, time
from liveblockd.storage.driver import Permission
from liveblockd.storage.locks import ImageLocks
held = ImageLocks(os.open(sys.argv[1], os.O_RDWR), sys.argv[1])
held.acquire(Permission(11), Permission(5))
print("held", flush=True)
time.sleep(60)
"""


def test_sigkill_frees_them(image):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, image], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        assert writes(image).returncode == 1
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait(10)
        assert writes(image).returncode == 0
    finally:
        holder.kill()
        holder.wait(10)
        assert holder.stdout is not None
        holder.stdout.close()
