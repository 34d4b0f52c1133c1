"""Everything a guest and a client can do with an image, done to one that may be hostile.

``exercise`` opens the bytes through a ``Graph`` and permits three outcomes: it works, BlockError,
OSError. It also looks at what was done to the file: nothing where the image was opened read-only,
and never guest bytes where the header and the tables that it names are.
"""

from __future__ import annotations

import asyncio
import random
import struct
from typing import Any, NamedTuple

from liveblockd.daemon.drivers import load_all_drivers
from liveblockd.errors import BlockError
from liveblockd.events import BlockImageCorrupted, Publisher
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Node
from liveblockd.qapi import parse
from liveblockd.runtime.workers import WorkerPool
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import Environment
from tests.support.memory import MemoryDriver
from tests.support.workers import InlineWorkers

#: seconds that one image may take; a healthy one takes milliseconds
TIME_LIMIT = 20.0
#: the guest's bytes: no metadata looks like it
MARK = b"\xa5GUEST\x5a\xff"


class Outcome(NamedTuple):
    """What became of it; ``refused`` is the message of the open."""

    refused: str | None
    read_errors: int = 0
    write_errors: int = 0
    corrupted: tuple[str, ...] = ()
    #: the file afterwards, if it was written to and is of a size that can be looked at
    content: bytes | None = None


def exercise(content: bytes, *, read_only: bool, seed: int = 0) -> Outcome:
    """Open, look at everything, write some, flush, close."""

    async def bounded() -> Outcome:
        return await asyncio.wait_for(
            _exercise(content, read_only, random.Random(seed)), TIME_LIMIT
        )

    return asyncio.run(bounded())


async def _exercise(content: bytes, read_only: bool, chance: random.Random) -> Outcome:
    load_all_drivers()
    publisher = Publisher()
    events: list[Any] = []
    publisher.subscribe(events.append)
    workers: WorkerPool = InlineWorkers()
    graph = Graph(Environment(workers, publisher=publisher))
    memory = {"driver": "memory", "node-name": "disk", "read-only": read_only}
    disk = (await graph.open(parse(BlockdevOptions, memory))).driver
    assert isinstance(disk, MemoryDriver)
    disk.read_only = False
    disk._store(0, content)
    disk._sync()
    disk.read_only = read_only
    disk.log.clear()
    members = {"driver": "qcow2", "node-name": "image", "file": "disk", "read-only": read_only}
    if chance.random() < 0.5:
        members["backing"] = None
    try:
        node = await graph.open(parse(BlockdevOptions, members))
    except BlockError as error:
        await graph.close()
        _check_untouched(disk, content)
        return Outcome(error.message)
    read_errors = await _read(node, chance)
    write_errors = 0
    if not read_only:
        write_errors = await _write(node, chance)
        read_errors += await _read(node, chance)
    node.driver.format_specific()
    node.driver.limits()
    await graph.close()
    corrupted = tuple(e.msg for e in events if isinstance(e, BlockImageCorrupted))
    if read_only:
        _check_untouched(disk, content)
    else:
        _check_tables(disk, content)
    after = disk.content() if not read_only and disk.length < 1 << 22 else None
    return Outcome(None, read_errors, write_errors, corrupted, after)


async def _read(node: Node, chance: random.Random) -> int:
    """Block status of the disk and reads of all that is small; errors met."""
    size, errors = node.length, 0
    places = {0, max(0, size - 512), size // 2, chance.randrange(size + 1)}
    for start in sorted(places):
        position = start
        for _ in range(40):
            if position >= size:
                break
            try:
                extents = await node.map(position, size - position)
            except OSError:
                errors += 1
                break
            assert extents and all(e.length > 0 for e in extents)
            assert sum(e.length for e in extents) <= size - position
            for extent in extents[:40]:
                length = min(extent.length, 1 << 16)
                errors += await _read_once(node, position, length)
                position += extent.length
            if len(extents) > 40:
                break
        errors += await _read_once(node, start, min(size - start, 1 << 18))
    return errors


async def _read_once(node: Node, offset: int, length: int) -> int:
    offset, length = max(0, min(offset, node.length)), max(0, min(length, node.length - offset))
    if not length:
        return 0
    try:
        data = node.read_nowait(offset, length)
        if data is None:
            data = await node.read(offset, length)
    except OSError:
        return 1
    assert len(data) == length
    return 0


async def _write(node: Node, chance: random.Random) -> int:
    size, errors = node.length, 0
    for _ in range(24):
        offset = chance.choice(
            (0, chance.randrange(size + 1), chance.randrange(size // 512 + 1) * 512)
        )
        length = min(chance.choice((8, 512, 4096, 20000)), size - offset)
        if length <= 0:
            continue
        try:
            match chance.randrange(8):
                case 0:
                    await node.write_zeroes(offset, length, may_unmap=chance.random() < 0.5)
                case 1:
                    await node.discard(offset, length)
                case 2:
                    await node.flush()
                case _:
                    await node.write(offset, (MARK * (length // 8 + 1))[:length])
        except OSError:
            errors += 1
    try:
        await node.flush()
    except OSError:
        errors += 1
    try:
        await node.truncate(min(size + 70000, 1 << 62) // 512 * 512)
    except (OSError, BlockError):
        errors += 1
    return errors


def _check_untouched(disk: MemoryDriver, content: bytes) -> None:
    writes = [
        r for r in disk.log if r.operation in ("write", "write_zeroes", "discard", "truncate")
    ]
    assert not writes, writes
    assert disk.length == len(content)


def _check_tables(disk: MemoryDriver, content: bytes) -> None:
    """The header is still one, and no guest bytes are in the tables that it names."""
    header = disk._load(0, 104)
    assert header[:4] == b"QFI\xfb"
    (bits,) = struct.unpack_from(">I", header, 20)
    l1_entries, l1_offset, table_offset, table_clusters = struct.unpack_from(">IQQI", header, 36)
    for offset, length in (
        (0, 1 << bits),
        (l1_offset, l1_entries * 8),
        (table_offset, table_clusters << bits),
    ):
        now = disk._load(offset, min(length, 1 << 16))
        was = content[offset : offset + len(now)]
        assert MARK not in now or MARK in was, f"guest bytes in metadata at {offset:#x}"
