"""Exports of memory disks: what the tests of the NBD server stand on instead of a graph.

As a program it serves them on a socket until its stdin ends, for peers that are processes::

    python -m tests.unit.exports.memory_export SOCKET [--size N] [--delay SECONDS] [--asyncio]
"""

import argparse
import asyncio
import contextlib
import sys

from liveblockd.errors import BlockError
from liveblockd.events import Publisher
from liveblockd.exports import export
from liveblockd.exports.options import BlockExportOptions
from liveblockd.exports.registry import ExportRegistry
from liveblockd.qapi import parse
from liveblockd.qapi.sockets import UnixSocketAddress
from liveblockd.storage.driver import ExtentKind
from tests.support.memory import MemoryDriver

export.load()


class Node:
    def __init__(self, name):
        self.name = name


class MemoryBackend:
    """``ExportBackend`` over a driver; ``bitmaps`` maps names to functions."""

    active = True

    def __init__(self, name, driver):
        self.node = Node(name)
        self.driver = driver
        self.released = 0
        self.depth = 1
        self.bitmaps = {}

    def __getattr__(self, name):
        return getattr(self.driver, name)

    async def block_status(self, offset, length):
        runs = []
        for extent in await self.driver.map(offset, length):
            zero = extent.kind is not ExtentKind.DATA
            runs.append((extent.length, zero, zero, 0 if zero else self.depth))
        return runs


class RamBackend(MemoryBackend):
    """As fast as it can be: what is measured over it is the server."""

    def __init__(self, name, size):
        super().__init__(name, None)
        self.data = bytearray(size)
        self.view = memoryview(self.data)
        self.length = size
        self.read_only = False

    def read_nowait(self, offset, length):
        return bytes(self.view[offset : offset + length])

    def write_nowait(self, offset, data):
        self.view[offset : offset + len(data)] = data
        return True

    async def read(self, offset, length):
        return bytes(self.view[offset : offset + length])

    async def write(self, offset, data):
        self.view[offset : offset + len(data)] = data

    async def write_zeroes(self, offset, length, *, may_unmap=False, fast_only=False):
        self.view[offset : offset + length] = bytes(length)

    async def discard(self, offset, length):
        pass

    async def flush(self):
        pass

    async def block_status(self, offset, length):
        return [(length, False, False, 1)]


class MemorySource:
    """``BackendSource`` over some backends."""

    def __init__(self, *backends):
        self.backends = {b.node.name: b for b in backends}
        self.attached = []

    async def attach(self, node_name, *, writable, allow_inactive=False):
        try:
            backend = self.backends[node_name]
        except KeyError:
            raise BlockError(f"Cannot find device='' nor node-name='{node_name}'") from None
        if writable and backend.read_only:
            raise BlockError("Cannot export read-only node as writable")
        self.attached.append(backend)
        return backend

    def unhindered(self, backend):
        return contextlib.nullcontext()

    async def release(self, backend):
        self.attached.remove(backend)
        backend.released += 1

    def dirty_bitmap(self, backend, node, name):
        try:
            return backend.bitmaps[name]
        except KeyError:
            raise BlockError(f"Bitmap '{name}' is not found") from None


def options(export_id, node_name, **members):
    """Options of an NBD export as QMP gives them."""
    value = {"type": "nbd", "id": export_id, "node-name": node_name}
    value.update({k.replace("_", "-"): v for k, v in members.items()})
    return parse(BlockExportOptions, value)


def new_registry(*backends, publisher=None):
    return ExportRegistry(publisher or Publisher(), MemorySource(*backends))


@contextlib.asynccontextmanager
async def served(path, *backends, exports, publisher=None, **server):
    """A registry whose NBD server listens on ``path`` and offers ``exports``."""
    registry = new_registry(*backends, publisher=publisher)
    await registry.nbd_server.start(UnixSocketAddress(path=str(path)), **server)
    try:
        for one in exports:
            await registry.add(one)
        yield registry
    finally:
        await asyncio.wait_for(registry.close(), 20)


async def _serve(arguments):
    disk = MemoryBackend("disk", MemoryDriver(arguments.size))
    if arguments.delay:
        disk.driver.nowait = False
        disk.driver.hook = lambda *_: asyncio.sleep(arguments.delay)
    ram = RamBackend("ram", arguments.size)
    read_only = MemoryBackend("ro", disk.driver)
    exports = [
        options("disk", "disk", writable=True, allocation_depth=True),
        options("ram", "ram", writable=True),
        options("ro", "ro", name="ro", description="hello"),
    ]
    async with served(arguments.socket, disk, ram, read_only, exports=exports):
        print("ready", flush=True)  # noqa: T201
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("socket")
    parser.add_argument("--size", type=int, default=64 << 20)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--asyncio", action="store_true")
    parser.add_argument("--profile")
    arguments = parser.parse_args()
    if arguments.asyncio:
        run = asyncio.run
    else:
        import uvloop

        run = uvloop.run
    if arguments.profile:
        import cProfile

        with cProfile.Profile() as profile:
            run(_serve(arguments))
        profile.dump_stats(arguments.profile)
    else:
        run(_serve(arguments))


if __name__ == "__main__":
    main()
