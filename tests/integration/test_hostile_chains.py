"""Backing chains of strangers: loops, json: names that nest, names that lead nowhere."""

import asyncio
import json
import os
import time
from pathlib import Path

import pytest

from liveblockd.daemon.drivers import load_all_drivers
from liveblockd.errors import BlockError
from liveblockd.graph.graph import Graph
from liveblockd.graph.opening import MAX_DEPTH
from liveblockd.qapi import parse
from liveblockd.runtime.workers import WorkerPool
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import Environment
from tests.support.descriptors import descriptors
from tests.support.memory import MemoryDriver
from tests.support.qcow2_images import new_qcow2

load_all_drivers()


@pytest.fixture(autouse=True)
def in_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


async def image(name, backing, backing_format=None, size=1 << 20):
    disk = await new_qcow2(
        MemoryDriver(), size=size, backing_file=backing, backing_format=backing_format
    )
    Path(name).write_bytes(disk.content())


async def refusal(name):
    """Why it does not open; it leaves nothing behind and takes no time."""
    before = descriptors()
    workers = WorkerPool()
    graph = Graph(Environment(workers))
    file = {"driver": "file", "filename": name}
    options = {"driver": "qcow2", "node-name": "top", "read-only": True, "file": file}
    started = time.process_time()
    with pytest.raises(BlockError) as caught:
        await asyncio.wait_for(graph.open(parse(BlockdevOptions, options)), 20)
    assert time.process_time() - started < 10
    assert not graph.nodes
    await graph.close()
    workers.close()
    assert (descriptors() - before).total() <= 1
    return caught.value.message


def through_file(inner, **more):
    """A json: name that has ``inner`` opened as qcow2, with its chain, in a file child."""
    file = {"driver": "file", "filename": inner}
    return "json:" + json.dumps({"driver": "raw", "file": {"driver": "qcow2", "file": file}} | more)


@pytest.mark.parametrize("name", ["a.qcow2", "./a.qcow2", "link.qcow2", "../{}/a.qcow2"])
async def test_an_image_that_backs_itself(name, tmp_path):
    os.symlink("a.qcow2", "link.qcow2")
    await image("a.qcow2", name.format(tmp_path.name), "qcow2")
    assert "has a loop" in await refusal("a.qcow2")


async def test_a_loop_of_three():
    for name, backing in (("a", "b"), ("b", "c"), ("c", "a")):
        await image(name, backing, "qcow2")
    assert "has a loop" in await refusal("a")


async def test_a_loop_through_a_file_child():
    await image("a", through_file("a"))
    assert "nested more than" in await refusal("a")


async def test_a_loop_through_a_format_that_must_be_looked_at():
    """The driver is not said: each look opens the chain below, twice as many at each level."""
    below = {"driver": "qcow2", "file": {"driver": "file", "filename": "a"}}
    await image("a", "json:" + json.dumps({"driver": "blkdebug", "image": below}))
    assert "more than" in await refusal("a")


async def test_a_tree_that_doubles_at_each_level():
    below = {"driver": "qcow2", "file": {"driver": "file", "filename": "a"}}
    name = {"driver": "qcow2", "file": below, "backing": below}
    await image("a", "json:" + json.dumps(name))
    assert "more than" in await refusal("a")


async def test_a_chain_that_is_too_deep():
    for number in range(MAX_DEPTH + 1):
        await image(str(number), str(number + 1), "qcow2", size=512)
    assert "deeper than" in await refusal("0")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("http://127.0.0.1:1/x", "Unknown protocol 'http'"),
        ("ssh://host/x", "Unknown protocol 'ssh'"),
        ("json:{", "Could not parse the JSON"),
        ("json:[]", "Could not parse the JSON"),
        ("json:" + "[" * 900, "Could not parse the JSON"),
        ('json:{"driver":"nonsense"}', "nonsense"),
        ("missing.img", "No such file"),
        (".", "directory"),
        ("fifo", "regular file"),
        ("/dev/zero", "regular file"),
        ("", None),
    ],
)
async def test_names_that_lead_nowhere(name, message):
    os.mkfifo("fifo")
    await image("a", name or None, "raw" if name else None)
    if message is not None:
        assert message in await refusal("a")


@pytest.mark.parametrize(
    "name", ["nbd://127.0.0.1:1/x", "nbd:127.0.0.1:1", "nbd+unix:///x?socket=missing.sock"]
)
async def test_nobody_serves_the_backing_file(name):
    """With or without a driver for it: an error soon, that says what could not be opened."""
    await image("a", name, "raw")
    message = await refusal("a")
    assert message.startswith("Could not open backing file")
