"""Opening real images that fails half-way: the right words, and nothing stays open or locked."""

import os
from errno import EACCES

import pytest

from liveblockd.daemon.drivers import load_all_drivers
from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.create import create_qcow2
from liveblockd.graph.graph import Graph
from liveblockd.qapi import parse
from liveblockd.runtime.workers import WorkerPool
from liveblockd.storage import file as file_driver
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
    plain = file_driver._open_fd

    def open_fd(filename, read_only, direct):
        if not read_only and os.path.basename(os.path.realpath(filename)) in names:
            raise OSError(EACCES, os.strerror(EACCES))
        return plain(filename, read_only, direct)

    monkeypatch.setattr(file_driver, "_open_fd", open_fd)
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
