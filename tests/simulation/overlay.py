"""A copy-on-write format in memory, for jobs under a seed and without an engine below.

It does what ``storage/driver.py`` asks of a format with a backing node, in the simplest way that
can be true: clusters in a dict, a claim a cluster, publication by compare-and-set. Every request
waits a few turns of the loop, drawn from a seed, so that requests overlap in all orders.

``faults`` holds operations that fail once: {"populate": errno}. ``careless = True`` publishes a
copy without looking, which is the defect that the stress test must find.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from errno import EPERM
from typing import Any, Self

from liveblockd.qapi import Size
from liveblockd.storage.driver import BlockDriver, BlockIO, Buffer, Extent, ExtentKind
from liveblockd.storage.options import BlockdevOptions, BlockdevRefOrNull
from liveblockd.storage.registry import Environment, register_driver

ZERO = b""  # a cluster that reads as zeros


@register_driver
class OverlayDriver(BlockDriver):
    """A disk of clusters; a cluster that is not there is the backing node's affair."""

    driver_name = "overlay"
    is_format = True
    child_roles = ("backing",)

    class Options(BlockdevOptions):
        """Members of ``blockdev-add``."""

        size: Size = 0
        cluster_size: int = 4096
        seed: int = 0
        backing: BlockdevRefOrNull = None

    def __init__(self, length: int, cluster_size: int, seed: int, *, read_only: bool) -> None:
        self.children: dict[str, BlockIO] = {}
        self.cluster_size = cluster_size
        self.read_only = read_only
        self.clusters: dict[int, bytes] = {}
        self.claims: dict[int, asyncio.Future[None]] = {}
        self.random = random.Random(seed)
        self.faults: dict[str, int] = {}
        self.careless = False
        self.populated = 0
        self.header: tuple[str | None, str | None] = (None, None)
        self.durable_header = self.header
        #: clusters that the last flush made durable
        self.durable: dict[int, bytes] = {}
        self._length = length

    @classmethod
    async def open(
        cls, options: Options, children: dict[str, BlockIO], environment: Environment
    ) -> Self:
        """As a driver is opened by the graph."""
        return cls(
            options.size, options.cluster_size, options.seed, read_only=bool(options.read_only)
        )

    @property
    def length(self) -> int:
        """Bytes."""
        return self._length

    @property
    def backing_file(self) -> str | None:
        """Of the header."""
        return self.header[0]

    @property
    def backing_format(self) -> str | None:
        """Of the header."""
        return self.header[1]

    # -- guest I/O

    async def read(self, offset: int, length: int) -> Buffer:
        await self._wait("read")
        pieces = []
        for cluster, start, part in self._parts(offset, length):
            data = self.clusters.get(cluster)
            if data is None or data is ZERO:
                data, start = await self._read_part(cluster, start, part), 0
            pieces.append(data[start : start + part])
        return b"".join(pieces)

    async def write(self, offset: int, data: Buffer) -> None:
        self._check_writable()
        view = bytes(data)
        for cluster, start, length in self._parts(offset, len(view)):
            at = cluster * self.cluster_size + start - offset
            await self._change(cluster, start, view[at : at + length])

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, fast_only: bool = False
    ) -> None:
        self._check_writable()
        for cluster, start, part in self._parts(offset, length):
            await self._change(
                cluster, start, None if self._is_whole(cluster, part) else bytes(part)
            )

    async def discard(self, offset: int, length: int) -> None:
        self._check_writable()
        for cluster, _, part in self._parts(offset, length):
            if self._is_whole(cluster, part):
                await self._change(cluster, 0, None)

    async def flush(self) -> None:
        await self._wait("flush")
        self.durable = dict(self.clusters)

    async def map(self, offset: int, length: int) -> list[Extent]:
        await self._wait("map")
        extents: list[Extent] = []
        for cluster, _, part in self._parts(offset, length):
            data = self.clusters.get(cluster)
            kind = ExtentKind.COMPRESSED
            if data is None:
                kind = ExtentKind.UNALLOCATED
            elif data is ZERO:
                kind = ExtentKind.ZERO
            if extents and extents[-1].kind is kind:
                extents[-1] = extents[-1]._replace(length=extents[-1].length + part)
            elif len(extents) == 16:
                break
            else:
                extents.append(Extent(part, kind))
        return extents

    async def truncate(self, length: int) -> None:
        """Grow; like an engine that lets nothing of a longer backing node show in what is new."""
        assert length >= self._length
        await self._wait("truncate")
        old, self._length = self._length, length
        size = self.cluster_size
        first, inside = divmod(old, size)
        if inside:
            # What a cluster holds behind the end is not to come to light.
            kept = await self._read_part(first, 0, inside)
            self.clusters[first] = kept + bytes(size - inside)
        for cluster in range(-(-old // size), -(-length // size)):
            self.clusters[cluster] = ZERO
        self.restructured()

    # -- below the guest

    async def populate(self, offset: int, data: Buffer) -> None:
        await self._wait("populate")
        view = bytes(data)
        await self._publish(offset, len(view), lambda a, b: view[a - offset : b - offset])

    async def populate_zeroes(self, offset: int, length: int) -> None:
        await self._wait("populate")
        await self._publish(offset, length, lambda a, b: ZERO)

    async def _publish(self, offset: int, length: int, content: Any) -> None:
        assert offset % self.cluster_size == 0
        assert length % self.cluster_size == 0 or offset + length == self._length
        for cluster, _, part in self._parts(offset, length):
            start = cluster * self.cluster_size
            data = content(start, start + part)
            assert data is ZERO or len(data) == part
            await self._wait("store")
            while not self.careless and (claim := self.claims.get(cluster)) is not None:
                await asyncio.shield(claim)
            if self.careless or cluster not in self.clusters:
                self.populated += part
                padding = bytes(self.cluster_size - part)
                self.clusters[cluster] = ZERO if not any(data) else data + padding

    async def change_backing_file(
        self, backing_file: str | None, backing_format: str | None
    ) -> None:
        await self.flush()
        await self._wait("header")
        self.header = self.durable_header = (backing_file, backing_format)

    # -- inside

    def _check_writable(self) -> None:
        if self.read_only:
            raise OSError(EPERM, "Operation not permitted")

    def _parts(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(cluster, offset in it, length) for the range; most of ``map`` ends early."""
        assert 0 <= offset <= offset + length <= self._length
        size = self.cluster_size
        cluster, start = divmod(offset, size)
        while length > size - start:
            yield cluster, start, size - start
            cluster, start, length = cluster + 1, 0, length - (size - start)
        if length:
            yield cluster, start, length

    def _is_whole(self, cluster: int, part: int) -> bool:
        start = cluster * self.cluster_size
        return part == min(self.cluster_size, self._length - start)

    async def _read_part(self, cluster: int, start: int, length: int) -> bytes:
        data = self.clusters.get(cluster)
        if data is ZERO:
            return bytes(length)
        if data is not None:
            return data[start : start + length]
        return await self._read_backing(cluster * self.cluster_size + start, length)

    async def _read_backing(self, offset: int, length: int) -> bytes:
        backing = self.children.get("backing")
        there = max(0, min(length, backing.length - offset)) if backing is not None else 0
        data = bytes(await backing.read(offset, there)) if backing is not None and there else b""
        return data + bytes(length - there)

    async def _change(self, cluster: int, start: int, data: bytes | None) -> None:
        """Replace part of a cluster; None for all of it as zeros. Holds a claim meanwhile."""
        while (claim := self.claims.get(cluster)) is not None:
            await asyncio.shield(claim)
        claim = self.claims[cluster] = asyncio.get_running_loop().create_future()
        try:
            await self._wait("write")
            old = self.clusters.get(cluster)
            if data is None:
                self.clusters[cluster] = ZERO
                return
            if old is None:
                begin = cluster * self.cluster_size
                there = min(self.cluster_size, self._length - begin)
                old = await self._read_backing(begin, there)
                old += bytes(self.cluster_size - there)
            elif old is ZERO:
                old = bytes(self.cluster_size)
            await self._wait("store")
            self.clusters[cluster] = old[:start] + data + old[start + len(data) :]
        finally:
            del self.claims[cluster]
            claim.set_result(None)

    async def _wait(self, operation: str) -> None:
        for _ in range(self.random.choice((0, 0, 1, 2, 5))):
            await asyncio.sleep(0)
        if (code := self.faults.pop(operation, None)) is not None:
            raise OSError(code, "injected")
