"""A graph with workers of its own, and images in a directory: a daemon's inside without its jobs.

``simulation.bench.Bench`` has the jobs, too.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from liveblockd.events import Publisher
from liveblockd.formats.qcow2.create import create_qcow2
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Node
from liveblockd.qapi import parse
from liveblockd.runtime.workers import WorkerPool
from liveblockd.storage.file import FileDriver
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import Environment


class World:
    """See the module; ``end`` closes all of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.workers = WorkerPool()
        self.environment = Environment(self.workers, publisher=Publisher())
        self.graph = Graph(self.environment)

    def path(self, name: str) -> Path:
        """Of an image."""
        return self.directory / name

    async def create(self, name: str, **options: object) -> None:
        """An empty qcow2 image (arguments of ``create_qcow2``)."""
        self.path(name).touch()
        members = {"driver": "file", "filename": str(self.path(name))}
        file = await FileDriver.open(parse(FileDriver.Options, members), {}, self.environment)
        await create_qcow2(file, **options)  # type: ignore[arg-type]
        await file.close()

    async def open(self, members: dict[str, object]) -> Node:
        """blockdev-add."""
        return await self.graph.open(parse(BlockdevOptions, members))

    async def end(self) -> None:
        """As at quit."""
        await self.graph.close()
        await self.workers.idle()
        self.workers.close()


@asynccontextmanager
async def graph_in(directory: Path) -> AsyncIterator[Graph]:
    """One that is closed behind the block."""
    world = World(directory)
    yield world.graph
    await world.end()
