"""The file driver against a bytearray, by hypothesis: cached and direct, default fs and tmpfs."""

import asyncio
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from liveblockd.qapi import parse
from liveblockd.runtime.workers import WorkerPool
from liveblockd.storage.driver import ExtentKind
from liveblockd.storage.file import FileDriver
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import Environment

SPACE = 40000
offsets = st.one_of(
    st.integers(0, SPACE), st.integers(0, SPACE // 512).map(lambda n: n * 512),
    st.integers(0, SPACE // 4096).map(lambda n: n * 4096),
)  # fmt: skip
lengths = st.one_of(
    st.integers(1, 9000), st.integers(1, 16).map(lambda n: n * 512), st.sampled_from([4096, 8192])
)
operations = st.one_of(
    st.tuples(st.just("write"), offsets, lengths, st.integers(1, 255)),
    st.tuples(st.just("zero"), offsets, lengths, st.booleans()),
    st.tuples(st.just("discard"), offsets, lengths),
    st.tuples(st.just("truncate"), offsets),
    st.tuples(st.just("read"), offsets, lengths),
    st.tuples(st.just("burst"), offsets, st.integers(1, 700), st.integers(2, 12)),
    st.tuples(st.just("reopen")),
    st.tuples(st.just("map")),
)


class Model:
    def __init__(self, alignment):
        self.data, self.alignment = bytearray(), alignment

    def store(self, offset, data):
        if len(self.data) < offset:
            self.data += bytes(offset - len(self.data))
        self.data[offset : offset + len(data)] = data

    def take_length(self, real):
        """The size may be rounded up to a block by O_DIRECT, with zeros."""
        least = len(self.data)
        assert least <= real <= -(-least // self.alignment) * self.alignment
        self.data += bytes(real - least)

    def load(self, offset, length):
        found = bytes(self.data[offset : offset + length])
        return found + bytes(length - len(found))


async def apply(disk, model, operation):
    match operation:
        case ("write", offset, length, value):
            await disk.write(offset, bytes([value]) * length)
            model.store(offset, bytes([value]) * length)
        case ("zero", offset, length, unmap):
            await disk.write_zeroes(offset, length, may_unmap=unmap)
            model.store(offset, bytes(length))
        case ("discard", offset, length):
            await disk.discard(offset, length)
            end = min(offset + length, len(model.data))
            if end > offset:
                model.data[offset:end] = bytes(end - offset)
        case ("truncate", length):
            await disk.truncate(length)
            del model.data[length:]
            model.data += bytes(length - len(model.data))
        case ("read", offset, length):
            assert bytes(await disk.read(offset, length)) == model.load(offset, length)
            now = disk.read_nowait(offset, length)
            assert now is None or bytes(now) == model.load(offset, length)
        case ("burst", offset, length, count):
            parts = [(offset + i * length, bytes([i + 1]) * length) for i in range(count)]
            await asyncio.gather(*(disk.write(*part) for part in parts))
            for part in parts:
                model.store(*part)
        case ("reopen",):
            await disk.set_read_only(True)
            await disk.set_read_only(False)
        case ("map",):
            extents = await disk.map(0, SPACE)
            assert sum(e.length for e in extents) == SPACE
            position = 0
            for extent in extents:
                if extent.kind is ExtentKind.ZERO:
                    assert not any(model.load(position, extent.length))
                position += extent.length
    if operation[0] not in ("discard", "read", "map", "reopen", "truncate"):
        model.take_length(disk.length)
    assert disk.length == len(model.data)


async def scenario(directory, direct, steps):
    workers = WorkerPool(2)
    path = tempfile.mktemp(dir=directory)
    Path(path).touch()
    options = {"driver": "file", "filename": path, "discard": "unmap", "cache": {"direct": direct}}
    disk = await FileDriver.open(parse(BlockdevOptions, options), {}, Environment(workers))
    try:
        model = Model(disk.request_alignment)
        for step in steps:
            await apply(disk, model, step)
        length = len(model.data)
        assert bytes(await disk.read(0, length + 100)) == model.load(0, length + 100)
        await disk.flush()
        assert Path(path).read_bytes() == model.data
    finally:
        await disk.close()
        await workers.idle()
        workers.close()
        os.unlink(path)


@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
@pytest.mark.parametrize("place", ["disk", "tmpfs"])
@settings(
    max_examples=40, deadline=None, print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(steps=st.lists(operations, min_size=1, max_size=15))
def test_as_a_bytearray(tmp_path, place, direct, steps):
    directory = str(tmp_path)
    if place == "tmpfs":
        directory = "/dev/shm"
        if not os.access(directory, os.W_OK):
            pytest.skip("no /dev/shm")
    asyncio.run(scenario(directory, direct, steps))
