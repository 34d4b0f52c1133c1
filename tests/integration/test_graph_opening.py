"""Opening real images that fails half-way: the right words, and nothing stays open or locked."""

import pytest

from liveblockd.daemon.drivers import load_all_drivers
from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.create import create_qcow2
from liveblockd.graph.graph import Graph
from liveblockd.qapi import parse
from liveblockd.runtime.workers import WorkerPool
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
