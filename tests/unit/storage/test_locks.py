import fcntl
import os

import pytest

from liveblockd.errors import BlockError
from liveblockd.storage import locks
from liveblockd.storage.driver import Permission
from liveblockd.storage.locks import ImageLocks

READ = Permission.CONSISTENT_READ
WRITER = READ | Permission.WRITE | Permission.RESIZE
FORMAT_SHARES = READ | Permission.WRITE_UNCHANGED
RAW_EXPORT_SHARES = Permission.ALL & ~Permission.RESIZE


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"x")
    return str(path)


@pytest.fixture
def opened(path):
    fds = []

    def one(**arguments):
        fds.append(os.open(path, os.O_RDWR))
        return ImageLocks(fds[-1], path, **arguments)

    yield one
    for fd in fds:
        os.close(fd)


def in_kernel(path):
    """The bytes that are locked, as /proc/locks tells."""
    inode = os.stat(path).st_ino
    found = set()
    with open("/proc/locks") as table:
        for line in table:
            fields = line.split()
            if fields[1] == "OFDLCK" and fields[5].endswith(f":{inode}"):
                found.update(range(int(fields[6]), int(fields[7]) + 1))
    return found


@pytest.mark.parametrize(
    ("used", "shared", "want"),
    [  # recorded of QSD 7.2: a qcow2 file, a backing file, a raw file under a writable export
        (WRITER, FORMAT_SHARES, {100, 101, 103, 201, 203}),
        (READ, FORMAT_SHARES, {100, 201, 203}),
        (READ | Permission.WRITE, RAW_EXPORT_SHARES, {100, 101, 203}),
        (Permission.NONE, Permission.ALL, set()),
    ],
)
def test_the_bytes_that_qemu_holds(opened, path, used, shared, want):
    held = opened()
    held.acquire(used, shared)
    assert held.held == want == in_kernel(path)
    held.release()
    assert in_kernel(path) == set()


def test_one_writer(opened, path):
    first, second = opened(), opened()
    first.acquire(WRITER, FORMAT_SHARES)
    with pytest.raises(BlockError) as caught:
        second.acquire(WRITER, FORMAT_SHARES)
    assert caught.value.message == 'Failed to get "write" lock'
    assert caught.value.__notes__ == [f"Is another process using the image [{path}]?"]
    with pytest.raises(BlockError) as caught:
        second.acquire(READ, FORMAT_SHARES)
    assert caught.value.message == 'Failed to get shared "write" lock'
    assert second.held == frozenset() and second.used == Permission.NONE
    assert in_kernel(path) == {100, 101, 103, 201, 203}


def test_many_readers_then_a_writer(opened):
    readers = [opened() for _ in range(3)]
    for reader in readers:
        reader.acquire(READ, FORMAT_SHARES)
    writer = opened()
    with pytest.raises(BlockError, match='Failed to get "write" lock'):
        writer.acquire(WRITER, FORMAT_SHARES)
    for reader in readers:
        reader.release()
    writer.acquire(WRITER, FORMAT_SHARES)


def test_a_refused_change_keeps_what_was(opened, path):
    first, second = opened(), opened()
    first.acquire(READ, FORMAT_SHARES)
    second.acquire(READ, FORMAT_SHARES)
    before = in_kernel(path)
    with pytest.raises(BlockError):
        first.acquire(WRITER, FORMAT_SHARES)
    assert first.held == {100, 201, 203} and in_kernel(path) == before
    second.release()
    first.acquire(WRITER, FORMAT_SHARES)
    first.acquire(READ, FORMAT_SHARES)
    assert in_kernel(path) == {100, 201, 203}


def test_force_share_neither_locks_nor_asks(opened, path):
    opened().acquire(WRITER, FORMAT_SHARES)
    before = in_kernel(path)
    sharer = opened(enabled=False)
    sharer.acquire(READ, FORMAT_SHARES)
    assert in_kernel(path) == before and sharer.used == READ


def test_locks_move_to_another_description(opened, path):
    held, other = opened(), opened()
    held.acquire(WRITER, FORMAT_SHARES)
    fd = os.open(path, os.O_RDONLY)
    child = os.dup(held._fd)  # what a child has between fork and exec
    held.replace(fd)
    os.close(fd)
    assert in_kernel(path) == {100, 101, 103, 201, 203}
    with pytest.raises(BlockError):
        other.acquire(READ, FORMAT_SHARES)
    held.acquire(READ, FORMAT_SHARES)
    other.acquire(READ, FORMAT_SHARES)
    other.release()
    held.acquire(WRITER, FORMAT_SHARES)  # the child is not "another process"
    os.close(child)


def test_a_file_system_without_locks(opened, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(fcntl, "fcntl", unsupported)
    auto = opened()
    auto.acquire(WRITER, FORMAT_SHARES)
    assert auto.held == frozenset() and auto.used == WRITER
    assert "no image locks" in caplog.text
    with pytest.raises(BlockError, match="Failed to lock byte 100"):
        opened(required=True).acquire(WRITER, FORMAT_SHARES)


def test_the_numbers_are_qemus():
    assert [(int(p), n) for n, p, _ in locks._PERMISSIONS] == [(1, 0), (2, 1), (4, 2), (8, 3)]
