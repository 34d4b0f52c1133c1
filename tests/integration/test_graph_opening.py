"""Opening real images that fails half-way: the right words, and nothing stays open or locked."""

import asyncio
import contextlib
import fcntl
import os
import random
from errno import EACCES

import pytest

from liveblockd.daemon.drivers import load_all_drivers
from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.create import create_qcow2
from liveblockd.graph.graph import Graph
from liveblockd.qapi import parse
from liveblockd.runtime.workers import WorkerPool
from liveblockd.storage import file as file_driver
from liveblockd.storage import file_opening
from liveblockd.storage.driver import Permission
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import Environment


@pytest.fixture
async def graph():
    load_all_drivers()
    workers = WorkerPool()
    graph = Graph(Environment(workers=workers))
    yield graph
    await graph.close()
    workers.close()


async def test_a_backing_node_that_is_not_there(graph, tmp_path):
    path = tmp_path / "disk.qcow2"
    path.touch()
    file = {"driver": "file", "filename": str(path)}
    new = await graph.open(parse(BlockdevOptions, {**file, "node-name": "new"}))
    await create_qcow2(new, size=1 << 20)
    await graph.delete("new")

    image = {"driver": "qcow2", "node-name": "disk", "file": file}
    with pytest.raises(
        BlockError, match="Could not open backing file: Cannot find device='nowhere'"
    ):
        await graph.open(parse(BlockdevOptions, {**image, "backing": "nowhere"}))
    assert not graph.nodes
    await graph.open(parse(BlockdevOptions, image))  # its locks are free


@pytest.fixture
def forbidden(monkeypatch):
    """A set: files in it cannot be opened for writing."""
    names = set()
    plain = file_opening.open_fd

    def open_fd(filename, read_only, direct):
        if not read_only and os.path.basename(os.path.realpath(filename)) in names:
            raise OSError(EACCES, os.strerror(EACCES))
        return plain(filename, read_only, direct)

    monkeypatch.setattr(file_driver, "open_fd", open_fd)
    monkeypatch.setattr(file_opening, "open_fd", open_fd)
    return names


async def image_on_a_file(graph, tmp_path, forbidden, **more):
    path = tmp_path / "disk.qcow2"
    path.touch()
    file = {"driver": "file", "node-name": "file", "filename": str(path)}
    new = await graph.open(parse(BlockdevOptions, file))
    await create_qcow2(new, size=1 << 20)
    await graph.delete("file")
    forbidden.add("disk.qcow2")
    auto = {"auto-read-only": True}
    await graph.open(parse(BlockdevOptions, file | auto))
    given = {"driver": "qcow2", "node-name": "disk", "file": "file", **auto, **more}
    return await graph.open(parse(BlockdevOptions, given))


async def test_a_writer_opens_for_writing_what_could_not_be(graph, tmp_path, forbidden):
    node = await image_on_a_file(graph, tmp_path, forbidden)
    assert node.read_only and graph.find("file").read_only
    reader = await graph.attach(node)
    with pytest.raises(BlockError, match=r"Could not reopen .*: Permission denied"):
        await graph.attach(node, Permission.CONSISTENT_READ | Permission.WRITE)
    assert node.read_only and graph.find("file").read_only
    forbidden.clear()
    writer = await graph.attach(node, Permission.CONSISTENT_READ | Permission.WRITE)
    assert not node.read_only and not graph.find("file").read_only
    await writer.write(0, b"x" * 4096)
    assert bytes(await reader.read(0, 4096)) == b"x" * 4096
    await graph.detach(writer)
    await graph.detach(reader)


async def test_what_was_asked_for_as_read_only_stays_so(graph, tmp_path, forbidden):
    node = await image_on_a_file(graph, tmp_path, forbidden, **{"read-only": True})
    forbidden.clear()
    with pytest.raises(BlockError, match="Block node is read-only"):
        await graph.attach(node, Permission.WRITE)
    assert node.read_only
    # A job that makes the image writable takes its file along.
    await graph.set_read_only(node, False)
    assert not node.read_only and not graph.find("file").read_only


def mode(node):
    return fcntl.fcntl(node.driver.host_file().fd, fcntl.F_GETFL) & os.O_ACCMODE


async def until_read_only(node):
    async with asyncio.timeout(10):
        while mode(node) != os.O_RDONLY:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("seed", range(3))
async def test_a_file_is_open_for_writing_while_somebody_writes(graph, tmp_path, seed):
    rng = random.Random(seed)
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1 << 20))
    auto = {"auto-read-only": True}
    file = {"driver": "file", "node-name": "file", "filename": str(path)} | auto
    node = await graph.open(parse(BlockdevOptions, file))
    raw = {"driver": "raw", "node-name": "raw", "file": "file"} | auto
    raw = await graph.open(parse(BlockdevOptions, raw))
    assert mode(node) == os.O_RDONLY and not node.read_only and not raw.read_only
    number = node.driver.host_file().fd
    writers, model = [], bytearray(1 << 20)
    for _ in range(60):
        match rng.randrange(4):
            case 0:
                writers.append(await graph.attach(raw, Permission.WRITE))
            case 1 if writers:
                await graph.detach(writers.pop(rng.randrange(len(writers))))
            case 2 if writers:
                offset, data = rng.randrange(1 << 19), rng.randbytes(rng.randrange(1, 70000))
                await writers[0].write(offset, data)
                model[offset : offset + len(data)] = data
            case 3:
                task = asyncio.create_task(graph.attach(raw, Permission.WRITE))
                for _ in range(rng.randrange(6)):
                    await asyncio.sleep(0)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    writers.append(await task)
        if writers:
            assert mode(node) == os.O_RDWR
        else:
            await until_read_only(node)
        assert bytes(await raw.read(0, 1 << 20)) == model
        assert node.driver.host_file().fd == number
    for writer in writers:
        await graph.detach(writer)
    await graph.delete("raw")
    await graph.delete("file")
    assert path.read_bytes() == model


async def test_a_writer_who_may_not_open_the_file_again(graph, tmp_path, forbidden):
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(4096))
    file = {"driver": "file", "node-name": "f", "filename": str(path), "auto-read-only": True}
    node = await graph.open(parse(BlockdevOptions, file))
    locks = node.driver._locks
    forbidden.add("disk.raw")
    with pytest.raises(BlockError, match=r"Could not reopen .*: Permission denied"):
        await graph.attach(node, Permission.WRITE)
    assert not locks.held and mode(node) == os.O_RDONLY
    forbidden.clear()
    writer = await graph.attach(node, Permission.WRITE)
    await writer.write(0, b"x" * 512)
    await graph.detach(writer)
    assert not locks.held
    assert path.read_bytes()[:512] == b"x" * 512
