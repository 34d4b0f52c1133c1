"""Several nodes that are to hold the same bytes: read all, write all, compare.

What ``quorum`` and ``blkverify`` share. A difference that is seen while a write is under way means
nothing: one replica has it and another has not yet. So replicas that differ are read again when no
write touches the range, and judged by that.

Runs on: the event loop. Errors: none; those of the replicas are values.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

from liveblockd.storage.driver import BlockIO, Extent, ExtentKind
from liveblockd.storage.serialise import Serialiser

Answer: TypeAlias = bytes | OSError


async def ask_all(requests: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """The results or the OSErrors of requests that run side by side."""
    found = await asyncio.gather(*requests, return_exceptions=True)
    for answer in found:
        if isinstance(answer, BaseException) and not isinstance(answer, OSError):
            raise answer
    return list(found)


class Replicas:
    """Reads and writes of nodes that are changed only through this."""

    def __init__(self) -> None:
        self._serialiser = Serialiser()

    async def read(
        self, nodes: Sequence[BlockIO], offset: int, length: int
    ) -> tuple[list[Answer], bool]:
        """What each has, and whether all that could be read are the same."""
        found = await self._read(nodes, offset, length)
        if same(found):
            return found, True
        async with self.alone(offset, length):
            found = await self._read(nodes, offset, length)
        return found, same(found)

    @asynccontextmanager
    async def alone(self, offset: int, length: int) -> AsyncIterator[None]:
        """No write touches the range inside."""
        section = await self._serialiser.enter(offset, offset + length, exclusive=True)
        try:
            yield
        finally:
            self._serialiser.leave(section)

    async def change(
        self, offset: int, length: int, requests: Sequence[Coroutine[Any, Any, None]]
    ) -> list[OSError | None]:
        """Do these writes of the range."""
        try:
            section = await self._serialiser.enter(offset, offset + length, exclusive=False)
        except BaseException:
            for request in requests:
                request.close()
            raise
        try:
            return await ask_all(requests)
        finally:
            self._serialiser.leave(section)

    async def _read(self, nodes: Sequence[BlockIO], offset: int, length: int) -> list[Answer]:
        found = await ask_all([node.read(offset, length) for node in nodes])
        return [a if isinstance(a, OSError) else bytes(a) for a in found]


def same(answers: Sequence[Answer]) -> bool:
    """Whether all that are no errors are equal."""
    read = [answer for answer in answers if not isinstance(answer, OSError)]
    return all(answer == read[0] for answer in read[1:])


def first_difference(one: bytes, other: bytes) -> int:
    """Where two buffers of one length that are not the same differ first."""
    low, high = 0, len(one)
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low


async def map_all(nodes: Sequence[BlockIO], offset: int, length: int) -> list[Extent]:
    """Zeros where all nodes say zeros, else data that has to be read."""
    ends, zero = [], True
    for node in nodes:
        first = (await node.map(offset, length))[0]
        ends.append(first.length)
        zero = zero and first.kind is ExtentKind.ZERO
    kind = ExtentKind.ZERO if zero else ExtentKind.COMPRESSED
    return [Extent(min(length, *ends), kind)]
