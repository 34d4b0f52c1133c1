"""The driver ``layer``: a format with a backing file, in memory, for tests of the graph.

Header and data live in ``IMAGES`` by the name of the image, so that closing and opening again finds
them; ``file`` is a ``named`` protocol node that knows its file name and its locks.
"""

from typing import Annotated, Self

from liveblockd.errors import BlockError
from liveblockd.qapi import Alternate
from liveblockd.storage.driver import BlockDriver, Extent, ExtentKind, Permission
from liveblockd.storage.options import BlockdevOptions, BlockdevRef, BlockdevRefOrNull
from liveblockd.storage.registry import register_driver
from tests.support.memory import MemoryDriver

CLUSTER = 4096
assert Annotated and Alternate


class Image:
    """What is on disk."""

    def __init__(self, length, backing_file=None, backing_format=None):
        self.length = length
        self.backing_file = backing_file
        self.backing_format = backing_format
        self.clusters = {}


IMAGES: dict[str, Image] = {}
#: by file name: drivers that have it open
OPEN: dict[str, list["Named"]] = {}


@register_driver
class Named(MemoryDriver):
    """A protocol driver with a file name and QEMU's lock rules between its nodes."""

    driver_name = "named"

    class Options(BlockdevOptions):
        filename: str

    @classmethod
    async def open(cls, options, children, environment) -> Self:
        if options.filename not in IMAGES:
            raise BlockError(f"Could not open '{options.filename}': No such file or directory")
        driver = cls(512, read_only=bool(options.read_only))
        driver.filename = options.filename
        driver.held = (Permission.NONE, Permission.ALL)
        driver.force_share = bool(options.force_share)
        OPEN.setdefault(options.filename, []).append(driver)
        return driver

    async def set_permissions(self, used, shared):
        for other in OPEN[self.filename]:
            if other is self or self.force_share or other.force_share:
                continue
            if used & ~other.held[1]:
                raise BlockError('Failed to get "write" lock')
            if other.held[0] & ~shared:
                raise BlockError('Failed to get shared "write" lock')
        self.held = (used, shared)

    async def close(self):
        await super().close()
        OPEN[self.filename].remove(self)


@register_driver
class Layer(BlockDriver):
    driver_name = "layer"
    is_format = True
    child_roles = ("file", "backing")
    cluster_size = CLUSTER

    class Options(BlockdevOptions):
        file: BlockdevRef
        backing: BlockdevRefOrNull = None

    def __init__(self, image, children, read_only):
        self.image = image
        self.children = children
        self.read_only = read_only
        self.closed = False
        self.gate = None
        self.flushes = 0
        self.fail_flush = None

    @classmethod
    async def open(cls, options, children, environment) -> Self:
        name = children["file"].driver.filename
        if IMAGES[name] is None:
            raise BlockError("Image is not in layer format")
        if not options.read_only:
            assert children["file"].driver.held[0] & Permission.WRITE, "opened without its lock"
        return cls(IMAGES[name], dict(children), bool(options.read_only))

    @property
    def length(self):
        return self.image.length

    @property
    def backing_file(self):
        return self.image.backing_file

    @property
    def backing_format(self):
        return self.image.backing_format

    def read_nowait(self, offset, length):
        return self._read(offset, length)

    def _read(self, offset, length):
        assert not self.closed
        out = bytearray()
        while length:
            index, start = divmod(offset, CLUSTER)
            part = min(length, CLUSTER - start)
            if (cluster := self.image.clusters.get(index)) is not None:
                out += cluster[start : start + part]
            elif (below := self.children.get("backing")) is not None and offset < below.length:
                there = min(part, below.length - offset)
                data = below.read_nowait(offset, there)
                out += bytes(data) + bytes(part - there)
            else:
                out += bytes(part)
            offset, length = offset + part, length - part
        return bytes(out)

    async def read(self, offset, length):
        if self.gate is not None:
            await self.gate.wait()
        return self._read(offset, length)

    async def write(self, offset, data):
        assert not self.closed and not self.read_only, "write to a read-only layer"
        if self.gate is not None:
            await self.gate.wait()
        assert not self.read_only, "became read-only under a write"
        data = bytes(data)
        while data:
            index, start = divmod(offset, CLUSTER)
            part = min(len(data), CLUSTER - start)
            old = self._read(index * CLUSTER, CLUSTER)
            self.image.clusters[index] = old[:start] + data[:part] + old[start + part :]
            offset, data = offset + part, data[part:]

    async def write_zeroes(self, offset, length, *, may_unmap=False, fast_only=False):
        await self.write(offset, bytes(length))

    async def flush(self):
        self.flushes += 1
        if self.fail_flush is not None:
            raise self.fail_flush

    async def map(self, offset, length):
        extents = []
        while length:
            index = offset // CLUSTER
            part = min(length, CLUSTER - offset % CLUSTER)
            cluster = self.image.clusters.get(index)
            kind = (
                ExtentKind.UNALLOCATED
                if cluster is None
                else ExtentKind.DATA
                if any(cluster)
                else ExtentKind.ZERO
            )
            host = offset + (1 << 20) if kind is ExtentKind.DATA else -1
            if extents and extents[-1].kind is kind:
                extents[-1] = Extent(extents[-1].length + part, kind, extents[-1].host_offset)
            else:
                extents.append(Extent(part, kind, host))
            offset, length = offset + part, length - part
            if len(extents) == 3:
                break
        return extents

    async def truncate(self, length):
        self.image.length = length

    async def change_backing_file(self, backing_file, backing_format):
        self.image.backing_file = backing_file
        self.image.backing_format = backing_format

    async def close(self):
        assert not self.closed
        self.closed = True
