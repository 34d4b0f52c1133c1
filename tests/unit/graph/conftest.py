import pytest

from liveblockd.events import Publisher
from liveblockd.graph import filenames
from liveblockd.graph.graph import Graph
from liveblockd.qapi import parse
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import Environment
from tests.support.workers import InlineWorkers
from tests.unit.graph import layer


class World:
    """A graph, with short words for what tests do to it."""

    def __init__(self):
        self.events = []
        publisher = Publisher()
        publisher.subscribe(self.events.append)
        self.graph = Graph(Environment(workers=InlineWorkers(), publisher=publisher))

    def image(self, name, length=1 << 16, backing=None, backing_format="layer", **clusters):
        image = layer.IMAGES[name] = layer.Image(length, backing, backing and backing_format)
        for index, byte in clusters.items():
            image.clusters[int(index[1:])] = bytes([byte]) * layer.CLUSTER
        return image

    async def add(self, **members):
        value = {k.replace("_", "-"): v for k, v in members.items()}
        return await self.graph.open(parse(BlockdevOptions, value))

    async def layer(self, name, filename, **members):
        file = {"driver": "named", "filename": filename}
        return await self.add(driver="layer", node_name=name, file=file, **members)

    def shape(self):
        return {
            n.name: {role: e.child.name for role, e in n.children.items()}
            for n in self.graph.nodes.values()
        }


@pytest.fixture
def world(monkeypatch):
    layer.IMAGES.clear()
    layer.OPEN.clear()
    plain = filenames.protocol_options

    def protocol_options(name):
        found = plain(name)
        return found | {"driver": "named"} if found["driver"] == "file" else found

    # Plain names lead to images in memory, and are shown plainly.
    monkeypatch.setattr(filenames, "protocol_options", protocol_options)
    monkeypatch.setitem(filenames._STRONG, "layer", frozenset())
    return World()
