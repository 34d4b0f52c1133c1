"""The file driver on real files: the default file system and tmpfs, cached and O_DIRECT."""

import asyncio
import errno
import fcntl
import os
import random
import resource
import shutil
import subprocess
import tempfile
import threading

import pytest

from liveblockd.errors import BlockError
from liveblockd.qapi import parse
from liveblockd.runtime.workers import WorkerPool
from liveblockd.storage import file as file_module
from liveblockd.storage import file_at_once, hostcalls
from liveblockd.storage.driver import ExtentKind, Permission
from liveblockd.storage.file import FileDriver, HostDevice
from liveblockd.storage.gate import gate_of
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import Environment
from tests.support.descriptors import descriptors

SHM = "/dev/shm"


@pytest.fixture
async def environment():
    workers = WorkerPool()
    yield Environment(workers)
    await workers.idle()
    workers.close()


@pytest.fixture(params=["disk", "tmpfs"])
def directory(request, tmp_path):
    if request.param == "disk":
        yield str(tmp_path)
        return
    if not os.access(SHM, os.W_OK):
        pytest.skip("no /dev/shm")
    path = tempfile.mkdtemp(dir=SHM)
    yield path
    shutil.rmtree(path)


@pytest.fixture(params=[False, True], ids=["cached", "direct"])
def direct(request):
    return request.param


async def open_file(environment, path, **members):
    cls = FileDriver if members.get("driver", "file") == "file" else HostDevice
    value = {"driver": "file", "filename": str(path), **members}
    try:
        return await cls.open(parse(BlockdevOptions, value), {}, environment)
    except BlockError as error:
        if "does not support O_DIRECT" in error.message:
            pytest.skip("the file system has no O_DIRECT")
        raise


def make(directory, content=b""):
    path = os.path.join(directory, "image")
    with open(path, "wb") as file:
        file.write(content)
    return path


def content_of(path):
    with open(path, "rb") as file:
        return file.read()


@pytest.fixture
async def disk(environment, directory, direct):
    path = make(directory, b"A" * 10000)
    disk = await open_file(environment, path, discard="unmap", cache={"direct": direct})
    yield disk
    await disk.close()


# -- reading and writing


async def test_reads_past_the_end_are_zeros(disk):
    assert bytes(await disk.read(9990, 20)) == b"A" * 10 + bytes(10)
    assert bytes(await disk.read(10000, 5)) == bytes(5)
    assert bytes(await disk.read(1 << 30, 70000)) == bytes(70000)
    assert bytes(await disk.read(5000, 100000)) == b"A" * 5000 + bytes(95000)


async def test_writes_past_the_end_grow_the_file(disk):
    await disk.write(20000, b"B" * 100)
    assert disk.length >= 20100
    assert disk.length <= -(-20100 // disk.request_alignment) * disk.request_alignment
    assert bytes(await disk.read(9999, 10002)) == b"A" + bytes(10000) + b"B"


async def test_unaligned_writes_touch_nothing_else(disk):
    await disk.write(3, b"1")
    await disk.write(4095, b"22")
    await disk.write(0, b"")
    await disk.write(5000, bytearray(b"3" * 4000))
    want = bytearray(b"A" * 10000)
    want[3:4], want[4095:4097], want[5000:9000] = b"1", b"22", b"3" * 4000
    assert bytes(await disk.read(0, 10000)) == want


async def test_large_transfers_in_one_piece(disk):
    data = os.urandom(5 << 20)
    await disk.write(4096, data)
    assert bytes(await disk.read(4096, len(data))) == data
    await disk.write(4097, memoryview(data))
    assert bytes(await disk.read(4097, len(data))) == data


async def test_small_writes_into_one_block_at_once_all_survive(disk):
    """With O_DIRECT each is a read-modify-write of the same block."""
    pieces = [(i * 37, bytes([i]) * 37) for i in range(200)]
    random.Random(7).shuffle(pieces)
    await asyncio.gather(*(disk.write(offset, data) for offset, data in pieces))
    assert bytes(await disk.read(0, 7400)) == b"".join(bytes([i]) * 37 for i in range(200))


async def test_a_returned_buffer_is_never_changed(disk):
    first = await disk.read(0, 4096)
    await disk.write(0, b"Z" * 4096)
    again = await disk.read(0, 4096)
    assert bytes(first) == b"A" * 4096 and bytes(again) == b"Z" * 4096


async def test_nowait_answers_from_the_cache(environment, directory):
    path = make(directory, b"N" * 10000)
    disk = await open_file(environment, path)
    assert bytes(await disk.read(0, 10000)) == b"N" * 10000
    assert bytes(disk.read_nowait(9000, 2000)) == b"N" * 1000 + bytes(1000)
    assert bytes(disk.read_nowait(0, 1)) == b"N"
    if directory.startswith(SHM):
        assert disk.write_nowait(0, b"M")
        assert bytes(disk.read_nowait(0, 2)) == b"MN"
    else:
        disk.write_nowait(0, b"N")  # may decline; may not fail
    assert disk.read_nowait(0, file_at_once.NOWAIT_LIMIT + 1) is None
    await disk.close()


async def test_a_hole_in_the_cache_is_not_taken_for_the_end(environment, tmp_path, monkeypatch):
    """Half of the range is cached: preadv is short, and the rest is data all the same."""
    disk = await open_file(environment, make(tmp_path, b"D" * 20000))
    real = os.preadv

    def short(fd, buffers, offset, flags=0):
        if flags:
            return real(fd, [memoryview(buffers[0])[:4096]], offset, flags)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", short)
    disk._read_flags = os.RWF_NOWAIT
    assert disk.read_nowait(0, 8192) is None
    assert bytes(await disk.read(0, 8192)) == b"D" * 8192
    await disk.close()


async def test_on_tmpfs_there_is_nothing_to_bypass(environment):
    """The flag is taken off, also when the file is opened again, so that copies are spliced."""
    if not os.access(SHM, os.W_OK):
        pytest.skip("no /dev/shm")
    with tempfile.TemporaryDirectory(dir=SHM) as directory:
        path = make(directory, b"A" * 10000)
        disk = await open_file(environment, path, **{"read-only": True, "cache": {"direct": True}})
        for read_only in (True, False):
            if not read_only:
                await disk.set_read_only(False)
            file = disk.host_file()
            assert not file.direct and disk.request_alignment == 1
            assert not fcntl.fcntl(file.fd, fcntl.F_GETFL) & os.O_DIRECT
        assert disk.write_nowait(3, b"xyz") and disk.read_nowait(2, 5) == b"AxyzA"
        await disk.close()


async def test_the_size_is_that_of_now(environment, directory):
    """A job grew the file behind this driver: what it wrote is there, not zeros."""
    path = make(directory, b"a" * 4096)
    disk = await open_file(environment, path)
    fd = disk.host_file().fd
    os.pwrite(fd, b"b" * 4096, 4096)
    assert disk.length == 8192
    assert bytes(await disk.read(4000, 4192)) == b"a" * 96 + b"b" * 4096
    await disk.close()


async def test_short_transfers_are_continued(environment, directory, monkeypatch):
    path = make(directory)
    disk = await open_file(environment, path)
    disk._read_flags = disk._write_flags = None
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:1000], at))
    monkeypatch.setattr(
        os, "preadv", lambda fd, into, at, flags=0: preadv(fd, [into[0][:777]], at, flags)
    )
    data = os.urandom(50000)
    await disk.write(10, data)
    assert bytes(await disk.read(10, 50000)) == data
    await disk.close()


async def test_short_direct_transfers_are_continued(environment, tmp_path, monkeypatch):
    disk = await open_file(environment, make(tmp_path), cache={"direct": True})
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:8192], at))
    monkeypatch.setattr(
        os, "preadv", lambda fd, into, at, flags=0: preadv(fd, [into[0][:4096]], at, flags)
    )
    data = os.urandom(100000)
    await disk.write(10, data)
    assert bytes(await disk.read(10, 100000)) == data
    await disk.close()


async def test_a_cancelled_write_has_ended_when_it_says_so(environment, tmp_path, monkeypatch):
    disk = await open_file(environment, make(tmp_path))
    disk._write_flags = None
    monkeypatch.setattr(file_at_once, "INLINE_WRITE", 0)
    gate, real, ended = threading.Event(), hostcalls.write, []

    def slow(*args):
        gate.wait(10)
        real(*args)
        ended.append(True)

    monkeypatch.setattr(hostcalls, "write", slow)
    task = asyncio.create_task(disk.write(0, b"late"))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.sleep(0.01)
    assert not task.done()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended
    await disk.close()


# -- zeros and holes


async def test_write_zeroes_inside_across_and_past_the_end(disk):
    await disk.write_zeroes(100, 5000)
    await disk.write_zeroes(9000, 5000)
    assert disk.length >= 14000
    await disk.write_zeroes(30000, 777)
    assert disk.length >= 30777
    want = b"A" * 100 + bytes(5000) + b"A" * 3900
    assert bytes(await disk.read(0, 31000)) == want + bytes(31000 - 9000)


async def test_unmapping_gives_space_back(disk):
    await disk.write(0, b"B" * (1 << 20))
    await disk.flush()
    before = disk.actual_size()
    await disk.write_zeroes(0, 1 << 19, may_unmap=True)
    middle = disk.actual_size()
    assert middle <= before - (1 << 18)
    await disk.discard(1 << 19, 1 << 18)
    assert disk.actual_size() < middle
    assert disk.length == 1 << 20
    assert bytes(await disk.read(0, 1 << 20)) == bytes(3 << 18) + b"B" * (1 << 18)


async def test_without_discard_unmap_space_is_kept(environment, directory, direct):
    path = make(directory, b"B" * (1 << 20))
    disk = await open_file(environment, path, cache={"direct": direct})
    before = disk.actual_size()
    await disk.discard(0, 1 << 20)
    assert bytes(await disk.read(0, 4)) == b"BBBB"
    await disk.write_zeroes(0, 1 << 20, may_unmap=True)
    assert bytes(await disk.read(0, 4)) == bytes(4)
    assert disk.actual_size() >= before
    await disk.close()


async def test_where_the_host_has_no_fallocate(environment, directory, direct, monkeypatch):
    path = make(directory, b"A" * 10000)
    disk = await open_file(environment, path, discard="unmap", cache={"direct": direct})

    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(hostcalls, "fallocate", unsupported)
    with pytest.raises(OSError) as caught:
        await disk.write_zeroes(100, 5000, fast_only=True)
    assert caught.value.errno == errno.ENOTSUP
    assert bytes(await disk.read(0, 10000)) == b"A" * 10000
    await disk.write_zeroes(100, 5000)
    await disk.write_zeroes(20000, 5 << 20)
    await disk.discard(0, 100)  # not possible is no error
    want = b"A" * 100 + bytes(5000) + b"A" * 4900
    assert bytes(await disk.read(0, 10000)) == want
    assert disk.length >= 20000 + (5 << 20)
    assert content_of(path)[10000:] == bytes(disk.length - 10000)
    await disk.close()


async def test_growing_never_cuts_off_what_others_wrote(tmp_path):
    path = make(tmp_path)
    fd = os.open(path, os.O_RDWR)
    os.pwrite(fd, b"x", 99999)
    hostcalls.grow(fd, 50000)
    assert os.fstat(fd).st_size == 100000
    os.close(fd)


async def test_map_tells_holes(disk):
    await disk.truncate(0)
    await disk.truncate(4 << 20)
    await disk.write(1 << 20, b"D" * (1 << 16))
    await disk.flush()
    extents = await disk.map(0, 5 << 20)
    assert sum(e.length for e in extents) == 5 << 20
    position, data = 0, []
    for extent in extents:
        if extent.kind is ExtentKind.DATA:
            assert extent.host_offset == position
            data.append((position, extent.length))
        else:
            assert extent.kind is ExtentKind.ZERO
        position += extent.length
    assert data == [(1 << 20, 1 << 16)]
    assert (await disk.map((1 << 20) + 5, 10))[0] == (10, ExtentKind.DATA, (1 << 20) + 5)


async def test_map_is_bounded(disk, monkeypatch):
    monkeypatch.setattr(file_module, "MAP_LIMIT", 4)
    await disk.truncate(0)
    for i in range(10):
        await disk.write(i << 17, b"D" * 4096)
    extents = await disk.map(0, 10 << 17)
    assert len(extents) == 4 and sum(e.length for e in extents) < 10 << 17


async def test_map_where_the_host_cannot_tell(disk, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EINVAL, "no")

    monkeypatch.setattr(os, "lseek", unsupported)
    assert await disk.map(0, 10000) == [(10000, ExtentKind.DATA, 0)]


async def test_truncate(disk):
    await disk.truncate(5000)
    assert disk.length == 5000
    await disk.truncate(12000)
    assert bytes(await disk.read(0, 12000)) == b"A" * 5000 + bytes(7000)


# -- flush


class SlowSync:
    def __init__(self, monkeypatch):
        self.calls, self.error, self.gate = 0, None, threading.Event()
        monkeypatch.setattr(os, "fdatasync", self)

    def __call__(self, fd):
        self.calls += 1
        self.gate.wait(10)
        if self.error:
            raise OSError(self.error, os.strerror(self.error))


async def test_flushes_that_come_meanwhile_share_the_next_one(environment, tmp_path, monkeypatch):
    disk = await open_file(environment, make(tmp_path))
    sync = SlowSync(monkeypatch)
    first = asyncio.create_task(disk.flush())
    await asyncio.sleep(0.01)
    later = [asyncio.create_task(disk.flush()) for _ in range(20)]
    await asyncio.sleep(0.01)
    later[3].cancel()  # must not take the others along
    sync.gate.set()
    await first
    results = await asyncio.gather(*later, return_exceptions=True)
    assert sync.calls == 2
    assert [type(r) for r in results].count(type(None)) >= 19
    await disk.close()


async def test_after_a_failed_flush_all_fail(environment, tmp_path, monkeypatch):
    disk = await open_file(environment, make(tmp_path))
    sync = SlowSync(monkeypatch)
    sync.error = errno.EIO
    first = asyncio.create_task(disk.flush())
    await asyncio.sleep(0.01)
    second = asyncio.create_task(disk.flush())
    await asyncio.sleep(0.01)
    first.cancel()  # nobody looks at the error, yet it counts
    sync.gate.set()
    results = await asyncio.gather(first, second, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1].errno == errno.EIO
    sync.error = None
    with pytest.raises(OSError) as caught:
        await disk.flush()
    assert caught.value.errno == errno.EIO and sync.calls == 1
    with pytest.raises(OSError):
        await disk.close()


async def test_no_flush(environment, tmp_path, monkeypatch):
    disk = await open_file(environment, make(tmp_path), cache={"no-flush": True})
    sync = SlowSync(monkeypatch)
    await disk.flush()
    assert sync.calls == 0
    await disk.close()


# -- errors of the host


async def test_no_space_surfaces(environment, directory, direct):
    """By RLIMIT_FSIZE: EFBIG where a full disk would say ENOSPC."""
    disk = await open_file(environment, make(directory, b"A" * 4096), cache={"direct": direct})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError) as caught:
            await disk.write((1 << 20) - 4096, b"B" * 8192)
        assert caught.value.errno in (errno.EFBIG, errno.ENOSPC)
        with pytest.raises(OSError):
            await disk.write_zeroes(1 << 20, 4096)
        with pytest.raises(OSError):
            await disk.truncate(2 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert bytes(await disk.read(0, 4096)) == b"A" * 4096
    await disk.write(1 << 20, b"B" * 4096)
    await disk.close()


async def test_read_only(environment, directory, direct):
    path = make(directory, b"A" * 4096)
    disk = await open_file(environment, path, **{"read-only": True, "cache": {"direct": direct}})
    assert not disk.write_nowait(0, b"x")
    for request in (
        disk.write(0, b"x"),
        disk.write_zeroes(0, 1),
        disk.discard(0, 1),
        disk.truncate(5),
    ):
        with pytest.raises(OSError) as caught:
            await request
        assert caught.value.errno == errno.EPERM
    await disk.flush()
    assert content_of(path) == b"A" * 4096
    await disk.close()


async def test_reopening_keeps_the_file_and_the_descriptor(environment, directory, direct):
    path = make(directory, b"A" * 4096)
    disk = await open_file(environment, path, **{"read-only": True, "cache": {"direct": direct}})
    fd = disk.host_file().fd
    os.rename(path, path + ".moved")
    make(directory, b"another file")
    await disk.set_read_only(False)
    await disk.write(0, b"B" * 4096)
    await disk.set_read_only(True)
    assert disk.read_only and disk.host_file().fd == fd
    assert not os.get_inheritable(fd)  # a child would keep the image locked
    assert content_of(path + ".moved") == b"B" * 4096
    assert content_of(path) == b"another file"
    with pytest.raises(OSError):
        await disk.write(0, b"C")
    await disk.close()


async def cancel_in_worker(environment, request):
    """Cancel ``request`` while its job waits behind others; the job runs to its end."""
    gate = threading.Event()
    blockers = [environment.workers.submit(gate.wait, 10) for _ in range(4)]
    task = asyncio.create_task(request)
    await asyncio.sleep(0.01)
    task.cancel()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.gather(*blockers)


async def test_a_cancelled_reopening_changes_nothing(environment, tmp_path):
    disk = await open_file(environment, make(tmp_path, b"A" * 4096), cache={"no-flush": True})
    await cancel_in_worker(environment, disk.set_read_only(True))
    assert not disk.read_only
    await disk.write(0, b"B")
    await disk.close()


async def test_cancelled_locking_changes_nothing(environment, tmp_path):
    path = make(tmp_path, b"A" * 4096)
    disk, other = await open_file(environment, path), await open_file(environment, path)
    read, write = Permission.CONSISTENT_READ, Permission.CONSISTENT_READ | Permission.WRITE
    await disk.set_permissions(read, Permission.ALL)
    await cancel_in_worker(environment, disk.set_permissions(write, read))
    assert disk._locks.held == {100}
    await other.set_permissions(write, read)
    with pytest.raises(BlockError):
        await disk.set_permissions(write, Permission.ALL)
    assert disk._locks.held == {100}
    await disk.close()
    await other.close()


async def test_locks_that_grow_and_shrink_in_one_call(environment, tmp_path):
    disk = await open_file(environment, make(tmp_path))
    await disk.set_permissions(Permission.WRITE, Permission.ALL & ~Permission.RESIZE)
    assert disk._locks.held == {101, 203}
    await disk.set_permissions(Permission.CONSISTENT_READ, Permission.ALL & ~Permission.WRITE)
    assert disk._locks.held == {100, 201}
    await disk.close()


async def test_going_read_only_flushes_or_stays(environment, tmp_path, monkeypatch):
    disk = await open_file(environment, make(tmp_path))
    sync = SlowSync(monkeypatch)
    sync.error = errno.EIO
    sync.gate.set()
    with pytest.raises(BlockError):
        await disk.set_read_only(True)
    assert not disk.read_only
    with pytest.raises(OSError):
        await disk.close()


async def test_close_waits_for_what_is_under_way(environment, tmp_path, monkeypatch):
    disk = await open_file(environment, make(tmp_path))
    sync = SlowSync(monkeypatch)
    fd = disk.host_file().fd
    flush = asyncio.create_task(disk.flush())
    await asyncio.sleep(0.01)
    closing = asyncio.create_task(disk.close())
    await asyncio.sleep(0.01)
    closing.cancel()
    os.fstat(fd)  # still open
    sync.gate.set()
    await flush
    await disk.close()
    with pytest.raises(OSError):
        os.fstat(fd)


# -- opening


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda p: None, "Could not open '{}': No such file or directory"),
        (os.mkdir, "Could not open '{}': Is a directory"),
        (os.mkfifo, "'file' driver requires '{}' to be a regular file"),
    ],
    ids=["missing", "directory", "fifo"],
)
@pytest.mark.parametrize("read_only", [False, True])
async def test_what_cannot_be_opened(environment, tmp_path, prepare, message, read_only):
    path = str(tmp_path / "thing")
    prepare(path)
    before = descriptors()
    with pytest.raises(BlockError) as caught:
        await asyncio.wait_for(open_file(environment, path, **{"read-only": read_only}), 30)
    assert caught.value.message == message.format(path)
    assert not descriptors() - before


async def test_host_device_wants_a_device(environment, tmp_path):
    with pytest.raises(BlockError, match="to be either a character or block device"):
        await open_file(environment, make(tmp_path), driver="host_device")


async def test_option_checks(environment, tmp_path):
    path = make(tmp_path)
    with pytest.raises(BlockError, match="aio=native was specified, but it requires"):
        await open_file(environment, path, aio="native")
    with pytest.raises(BlockError, match="force-share=on can only be used with read-only images"):
        await open_file(environment, path, **{"force-share": True})


async def test_auto_read_only(environment, tmp_path, monkeypatch):
    path = make(tmp_path, b"A")
    real = os.open

    def refusing(name, flags, *rest):
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied", name)
        return real(name, flags, *rest)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(BlockError, match="Permission denied"):
        await open_file(environment, path)
    disk = await open_file(environment, path, **{"auto-read-only": True})
    assert disk.read_only and bytes(await disk.read(0, 1)) == b"A"
    await disk.close()


async def test_a_cancelled_open_leaves_no_descriptor(environment, tmp_path, monkeypatch):
    path, gate, real = make(tmp_path), threading.Event(), hostcalls.probe_nowait
    before = descriptors()
    await environment.workers.run(int)

    def slow(fd):
        gate.wait(10)
        return real(fd)

    monkeypatch.setattr(hostcalls, "probe_nowait", slow)
    task = asyncio.create_task(open_file(environment, path))
    await asyncio.sleep(0.02)
    task.cancel()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not descriptors() - before


def host_command(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)


@pytest.fixture
def block_device(tmp_path):
    if os.geteuid() != 0 or not shutil.which("losetup"):
        pytest.skip("needs losetup and root")
    (tmp_path / "backing").write_bytes(bytes(1 << 20))
    made = host_command("losetup", "--find", "--show", str(tmp_path / "backing"))
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    yield made.stdout.strip()
    host_command("losetup", "--detach", made.stdout.strip())


@pytest.fixture
def full_directory(tmp_path):
    """A tmpfs of 1 MiB."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("needs root to mount a small tmpfs")
    if host_command("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)).returncode:
        pytest.skip("may not mount")
    yield tmp_path
    assert host_command("umount", str(tmp_path)).returncode == 0


async def test_block_device(environment, block_device, direct):
    disk = await open_file(
        environment,
        block_device,
        driver="host_device",
        discard="unmap",
        cache={"direct": direct},
    )
    assert disk.length == 1 << 20
    await disk.write(1000, b"x" * 5000)
    await disk.write_zeroes(2000, 100)
    await disk.discard(8192, 4096)
    await disk.flush()
    assert bytes(await disk.read(1999, 102)) == b"x" + bytes(100) + b"x"
    with pytest.raises(OSError) as caught:
        await disk.write((1 << 20) - 512, bytes(1024))
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(BlockError, match="Cannot grow device files"):
        await disk.truncate(2 << 20)
    assert sum(e.length for e in await disk.map(0, 1 << 20)) == 1 << 20
    await disk.close()


async def test_a_full_file_system(environment, full_directory):
    disk = await open_file(environment, make(full_directory, b"A" * 4096))
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            await disk.write(4096, b"B" * (2 << 20))
        assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError) as caught:
        await disk.write_zeroes(0, 4 << 20)
        await disk.write(0, b"B" * (2 << 20))
    assert caught.value.errno == errno.ENOSPC
    await disk.close()


async def test_a_full_file_system_keeps_what_there_was(environment, full_directory):
    disk = await open_file(environment, make(full_directory, b"A" * 4096))
    with pytest.raises(OSError):
        await disk.write(4096, b"B" * (2 << 20))
    assert bytes(await disk.read(0, 4096)) == b"A" * 4096
    await disk.truncate(4096)
    await disk.write(4096, b"C" * 4096)
    assert bytes(await disk.read(0, 8192)) == b"A" * 4096 + b"C" * 4096
    await disk.close()


async def test_who_comes_after_the_close_does_not_reach_another_file(environment, tmp_path):
    path = make(tmp_path, bytes(4096))
    driver = await open_file(environment, path)
    number = driver._fd
    await driver.close()
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    try:
        assert other == number, "the test needs the number to be used again"
        for late in (
            lambda: driver.write(0, b"x" * 512),
            lambda: driver.write_zeroes(0, 512),
            lambda: driver.read(0, 512),
            lambda: driver.truncate(512),
            driver.flush,
        ):
            with pytest.raises(OSError) as info:
                await late()
            assert info.value.errno == errno.EBADF
        assert os.fstat(other).st_size == 0
    finally:
        os.close(other)


async def test_a_failed_sync_of_a_resize_counts_as_a_failed_flush(
    environment, tmp_path, monkeypatch
):
    """The kernel tells of a lost page once; it must not be lost on the resize."""
    driver = await open_file(environment, make(tmp_path, bytes(4096)))
    await driver.write(0, b"x" * 4096)

    def lost(fd):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", lost)
    with pytest.raises(OSError):
        await driver.truncate(8192)
    monkeypatch.undo()
    with pytest.raises(OSError) as info:
        await driver.flush()
    assert info.value.errno == errno.EIO
    with pytest.raises(OSError):
        await driver.close()


# -- what is durable when it is closed


@pytest.fixture
def syncs(monkeypatch):
    """The threads that called fdatasync."""
    found, real = [], os.fdatasync

    def fdatasync(fd):
        real(fd)
        found.append(threading.get_ident())

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    return found


async def test_what_was_written_is_durable_once_it_is_closed(environment, tmp_path, syncs):
    path = make(tmp_path, bytes(4096))
    disk = await open_file(environment, path)
    await disk.write(0, b"x" * 512)
    await disk.close()
    assert len(syncs) == 1 and threading.get_ident() not in syncs
    await disk.close()
    assert len(syncs) == 1


@pytest.mark.parametrize("members", [{"read-only": True}, {"cache": {"no-flush": True}}])
async def test_nothing_to_make_durable_at_the_close(environment, tmp_path, syncs, members):
    disk = await open_file(environment, make(tmp_path, bytes(4096)), **members)
    if not disk.read_only:
        await disk.write(0, b"x" * 512)
    await disk.close()
    assert not syncs


async def test_a_file_that_nobody_could_write_to_is_not_flushed(environment, tmp_path, syncs):
    path = make(tmp_path, bytes(4096))
    disk = await open_file(environment, path, **{"auto-read-only": True})
    await disk.set_permissions(Permission.CONSISTENT_READ, Permission.ALL)
    await disk.close()
    assert not syncs
    disk = await open_file(environment, path, **{"auto-read-only": True})
    await disk.set_permissions(Permission.WRITE, Permission.ALL)
    await disk.write(0, b"x" * 512)
    await disk.set_permissions(Permission.NONE, Permission.ALL)
    await disk.close()
    assert len(syncs) == 1, "it is for reading only again, and what was written is not durable"


async def test_a_close_that_cannot_flush_lets_go_of_all_and_says_so(
    environment, tmp_path, monkeypatch
):
    path = make(tmp_path, bytes(4096))
    disk = await open_file(environment, path)
    await disk.set_permissions(Permission.WRITE, Permission.NONE)
    await disk.write(0, b"x" * 512)
    fd = disk.host_file().fd

    def failing(fd):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", failing)
    with pytest.raises(OSError) as info:
        await disk.close()
    assert info.value.errno == errno.EIO
    with pytest.raises(OSError):
        os.fstat(fd)
    monkeypatch.undo()
    again = await open_file(environment, path)
    await again.set_permissions(Permission.WRITE, Permission.NONE)
    await again.close()


async def test_a_disk_that_is_slow_at_the_close_does_not_hold_up_the_loop(
    environment, tmp_path, monkeypatch
):
    disk = await open_file(environment, make(tmp_path, bytes(4096)))
    begun, go_on = threading.Event(), threading.Event()

    def slow(fd):
        begun.set()
        assert go_on.wait(30)

    monkeypatch.setattr(os, "fdatasync", slow)
    closing = asyncio.create_task(disk.close())
    async with asyncio.timeout(20):
        await asyncio.to_thread(begun.wait, 20)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert disk._fd >= 0, "who gave up does not close what is being made durable"
    go_on.set()
    await disk.close()
    assert disk._fd < 0


# -- writes without a coroutine


async def test_small_writes_go_to_the_page_cache_from_the_loop(environment, tmp_path, monkeypatch):
    disk = await open_file(environment, make(tmp_path, bytes(1 << 20)))
    disk._write_flags = None  # as on ext4
    monkeypatch.setattr(disk._calm, "_much_is_dirty", lambda: False)
    assert disk.write_nowait(4096, b"x" * 4096) and disk.inline_writes == 1
    assert not disk.write_nowait(0, b"x" * (file_at_once.INLINE_WRITE + 1))
    job = disk._jobs.submit(hostcalls.read, disk._fd, 0, 1)
    assert not disk.write_nowait(4096, b"y" * 4096), "somebody is at the file"
    await job
    await asyncio.sleep(0)
    assert disk.write_nowait(8192, b"y" * 4096)
    disk._calm.took(0, 1 << 60)
    disk._calm._rest_until = 1 << 62
    assert not disk.write_nowait(8192, b"z" * 4096), "the last one was slow"
    await disk.close()
    assert content_of(tmp_path / "image")[4096:12288] == b"x" * 4096 + b"y" * 4096


async def test_copies_to_the_file_see_writes_by_workers(environment, tmp_path, monkeypatch):
    disk = await open_file(environment, make(tmp_path, bytes(1 << 20)))
    disk._write_flags = None
    monkeypatch.setattr(disk._calm, "_much_is_dirty", lambda: True)
    before, ended = disk._gate.writes, asyncio.get_running_loop().create_future()
    await disk.write(4096, b"x" * 4096)
    assert disk._gate.writes == before + 1
    assert disk.begin_write(8192, b"y" * 4096, ended.set_result)
    assert await asyncio.wait_for(ended, 20) is None
    assert disk._gate.writes == before + 2
    await disk.close()
    assert content_of(tmp_path / "image")[4096:12288] == b"x" * 4096 + b"y" * 4096


@pytest.mark.parametrize("flags", [0, None], ids=["memory", "calm"])
async def test_copies_to_the_file_see_writes_from_the_loop(
    environment, tmp_path, monkeypatch, flags
):
    disk = await open_file(environment, make(tmp_path, bytes(1 << 20)))
    disk._write_flags = flags  # 0: as on tmpfs; None: as on ext4
    monkeypatch.setattr(disk._calm, "_much_is_dirty", lambda: False)
    gate, before, seen = disk._gate, disk._gate.writes, []
    assert gate is gate_of(disk.host_file().fd)
    real = os.pwrite

    def noted(*arguments):
        seen.append(gate.enter())
        return real(*arguments)

    def failing(*arguments):
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(os, "pwrite", noted)
    assert disk.write_nowait(4096, b"x" * 4096)
    assert seen == [False], "its write is under way"
    monkeypatch.setattr(os, "pwrite", failing)
    assert not disk.write_nowait(4096, b"y" * 4096)
    assert gate.writes == before + 2
    assert gate.enter(), "both have left"
    gate.leave()
    monkeypatch.undo()
    await disk.close()


async def test_part_of_a_page_that_is_not_cached_is_left_to_a_worker(
    environment, tmp_path, monkeypatch
):
    disk = await open_file(environment, make(tmp_path, bytes(1 << 20)))
    monkeypatch.setattr(disk._calm, "_much_is_dirty", lambda: False)
    disk._write_flags, disk._read_flags = None, os.RWF_NOWAIT
    asked, cached = [], {1, 3}

    def preadv(fd, buffers, offset, flags):
        asked.append(offset // 4096)
        if offset // 4096 not in cached:
            raise BlockingIOError
        return 1

    monkeypatch.setattr(os, "preadv", preadv)
    assert not disk.write_nowait(8192 + 100, b"x"), "page 2"
    assert not disk.write_nowait(8192, b"x"), "its end is in page 2 as well"
    assert not disk.write_nowait(4096 + 100, b"x" * 4096), "ends in page 2"
    assert disk.write_nowait(4096 + 100, b"x" * (8192 - 100)), "page 1, and 2 as a whole"
    assert disk.write_nowait(4096 + 100, b"x" * 8192), "pages 1 and 3"
    asked.clear()
    assert disk.write_nowait(8192, b"x" * 4096) and not asked
    disk._read_flags = None
    assert not disk.write_nowait(4096 + 100, b"x"), "nobody can tell"
    await disk.close()


async def test_begun_writes_share_a_job(environment, directory):
    disk = await open_file(environment, make(directory))
    ended = []
    payload = bytearray(b"first")
    assert disk.begin_write(0, memoryview(payload), ended.append)
    payload[:] = b"wrong"  # it was only lent
    for number in range(1, 40):
        assert disk.begin_write(number * 5, b"%05d" % number, ended.append)
    await disk.close()  # waits for them
    assert ended == [None] * 40 and disk._batches.jobs == 1
    expected = b"first" + b"".join(b"%05d" % n for n in range(1, 40))
    assert content_of(os.path.join(directory, "image")) == expected
    assert not disk.begin_write(0, b"late", ended.append)


async def test_no_write_is_begun_with_direct_or_read_only(environment, tmp_path):
    path = make(tmp_path, bytes(8192))
    for members in ({"cache": {"direct": True}}, {"read-only": True}):
        disk = await open_file(environment, path, **members)
        assert not disk.begin_write(0, bytes(4096), lambda _: None)
        assert not disk.write_nowait(0, bytes(4096))
        await disk.close()
