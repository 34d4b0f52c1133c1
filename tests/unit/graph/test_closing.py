"""A node that is deleted while what it stands on stays: what was written through it is durable.

As in QEMU, where ``bdrv_close`` flushes every node, with or without a format.
"""

from __future__ import annotations

from typing import Any

import pytest

from liveblockd.daemon.drivers import load_all_drivers
from liveblockd.formats.luks import new_luks
from liveblockd.formats.qcow2.create import create_qcow2
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Node
from liveblockd.qapi import parse
from liveblockd.storage.filters.buckets import Limits
from liveblockd.storage.filters.throttle_group import ThrottleGroup
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import Environment, drivers
from tests.support.memory import MemoryDriver
from tests.support.workers import InlineWorkers

load_all_drivers()
SIZE = 256 * 1024
SECRET = b"secret"
#: members of blockdev-add, on the nodes file and other
WRITABLE: dict[str, dict[str, Any]] = {
    "raw": {"file": "file"},
    "qcow2": {"file": "file"},
    "luks": {"file": "file", "key-secret": "s"},
    "throttle": {"file": "file", "throttle-group": "group"},
    "preallocate": {"file": "file"},
    "compress": {"file": "image"},
    "copy-on-read": {"file": "file"},
    "copy-before-write": {"file": "file", "target": "other"},
    "blkdebug": {"image": "file"},
    "blklogwrites": {"file": "file", "log": "other"},
    "blkverify": {"raw": "file", "test": "other"},
    "quorum": {"children": ["file", "other"], "vote-threshold": 2},
}
#: nobody writes through them
READ_ONLY = {"qcow", "vmdk", "vhdx", "vdi", "vpc", "snapshot-access"}
#: they have tests of their own: test_storage_file, test_nbd_client
PROTOCOLS = {"file", "host_device", "nbd", "null-co", "null-aio"}


class Disks:
    """A graph with two disks in memory, ``file`` and ``other``."""

    def __init__(self) -> None:
        group = ThrottleGroup(Limits())
        environment = Environment(
            InlineWorkers(), secret=lambda _: SECRET, throttle_group=lambda _: group
        )
        self.graph = Graph(environment)

    async def add(self, driver: str, name: str, **members: Any) -> Node:
        value = {"driver": driver, "node-name": name, **members}
        return await self.graph.open(parse(BlockdevOptions, value))

    async def below(self, driver: str) -> list[MemoryDriver]:
        """The disks, with what ``driver`` wants to find there."""
        found = []
        for name in ("file", "other"):
            node = await self.add("memory", name, size=0 if driver == "blklogwrites" else SIZE)
            assert isinstance(node.driver, MemoryDriver)
            found.append(node.driver)
        if driver == "blklogwrites":
            await found[0].truncate(SIZE)
        if driver in ("qcow2", "compress"):
            await create_qcow2(found[0], size=SIZE)
        if driver == "luks":
            header = new_luks(SECRET, iter_time=1)
            await found[0].truncate(len(header) + SIZE)
            await found[0].write(0, header)
        if driver == "compress":
            await self.add("qcow2", "image", file="file")
        for disk in found:
            await disk.flush()
        return found


@pytest.mark.parametrize("driver", WRITABLE)
async def test_what_was_written_is_durable(driver: str) -> None:
    if driver == "luks":
        pytest.importorskip("cryptography")
    disks = Disks()
    below = await disks.below(driver)
    before = [disk.synced_content() for disk in below]
    node = await disks.add(driver, "top", **WRITABLE[driver])
    await node.write(0, b"x" * 65536)
    await disks.graph.delete("top")
    assert "file" in disks.graph.nodes
    stays = below[:1] if driver == "copy-before-write" else below
    for disk, old in zip(stays, before, strict=False):
        if disk is below[0] or driver in ("blklogwrites", "blkverify", "quorum"):
            assert disk.content() != old, "nothing was written"
        assert disk.synced_content() == disk.content()
    await disks.graph.close()


@pytest.mark.parametrize("driver", WRITABLE)
async def test_a_flush_that_fails_does_not_keep_it_open(
    driver: str, caplog: pytest.LogCaptureFixture
) -> None:
    if driver == "luks":
        pytest.importorskip("cryptography")
    disks = Disks()
    below = await disks.below(driver)
    node = await disks.add(driver, "top", **WRITABLE[driver])
    await node.write(0, b"x" * 65536)

    def fail(operation: str, offset: int, length: int) -> None:
        if operation == "flush":
            raise OSError(5, "lost")

    for disk in below:
        disk.hook = fail
    await disks.graph.delete("top")
    assert "top" not in disks.graph.nodes
    assert "closing node top" in caplog.text and "lost" in caplog.text
    for disk in below:
        disk.hook = None
    node = await disks.add(driver, "top", **WRITABLE[driver])
    await node.write(0, b"y" * 65536)
    for disk in below:
        disk.hook = fail
    assert await disks.graph.close() > 0
    assert await disks.graph.close() == 0  # of those that are there


@pytest.mark.parametrize("kind", ["data file", "encrypted"])
async def test_guests_data_of_qcow2(kind: str) -> None:
    """Written over what is allocated already: no metadata changes."""
    disks = Disks()
    file, other = await disks.below("raw")
    members: dict[str, Any] = {"file": "file"}
    if kind == "data file":
        await create_qcow2(file, size=SIZE, data_file=other)
        members["data-file"] = "other"
    else:
        pytest.importorskip("cryptography")
        await create_qcow2(file, size=SIZE, crypto_header=new_luks(SECRET, iter_time=1))
        members["encrypt"] = {"format": "luks", "key-secret": "s"}
    node = await disks.add("qcow2", "top", **members)
    await node.write(0, b"x" * 65536)
    await node.flush()
    await node.write(0, b"y" * 65536)
    data = other if kind == "data file" else file
    assert data.synced_content() != data.content()
    await disks.graph.delete("top")
    assert data.synced_content() == data.content()
    await disks.graph.close()


async def test_what_is_read_only_is_not_flushed() -> None:
    disks = Disks()
    below = await disks.below("throttle")
    for driver in ("raw", "throttle", "blkdebug", "quorum"):
        flushes = [disk.flushes for disk in below]
        await disks.add(driver, "top", **WRITABLE[driver], **{"read-only": True})
        await disks.graph.delete("top")
        assert [disk.flushes for disk in below] == flushes
    await disks.graph.close()


def test_no_driver_is_left_out() -> None:
    ours = {name for name, cls in drivers().items() if not cls.__module__.startswith("tests")}
    assert ours == set(WRITABLE) | READ_ONLY | PROTOCOLS
