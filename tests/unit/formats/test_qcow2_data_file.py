"""External data files in memory: where data go, in what order, and nobody writes over a guest."""

from __future__ import annotations

import asyncio
import random

import pytest

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.header import parse
from tests.support.memory import MemoryDriver
from tests.support.qcow2_images import new_qcow2, open_qcow2

K = 1024


async def pair(*, nowait: bool = True, **options):
    data = MemoryDriver(nowait=nowait)
    file = await new_qcow2(MemoryDriver(nowait=nowait), data_file=data, **options)
    return file, data


async def test_data_lie_at_their_guest_offset_and_metadata_only_has_refcounts():
    file, data = await pair(size=1024 * K, data_file_name="x.raw")
    image = await open_qcow2(file, data_file=data)
    await image.write(0, b"a" * 512)  # offset 0, which means "nothing" elsewhere
    await image.write(700 * K, b"b" * 100 * K)
    assert bytes(image.read_nowait(0, 1024)) == b"a" * 512 + bytes(512)
    await image.close()
    assert data.content()[:512] == b"a" * 512
    assert data.content()[700 * K : 800 * K] == b"b" * 100 * K
    assert file.length < 512 * K
    header = parse(file.content())
    assert header.data_file_name == "x.raw" and header.has_data_file and not header.raw_data_file
    again = await open_qcow2(file, data_file=data)
    assert bytes(await again.read(0, 1024)) == b"a" * 512 + bytes(512)
    assert bytes(await again.read(700 * K, 100 * K)) == b"b" * 100 * K
    assert again.write_nowait(0, b"c" * 512)  # in place, no metadata in the way
    await again.close()


async def test_open_refuses_what_does_not_fit():
    file, data = await pair(size=64 * K)
    with pytest.raises(BlockError, match="'data-file' is required for this image"):
        await open_qcow2(file)
    plain = await new_qcow2(size=64 * K)
    with pytest.raises(BlockError, match="'data-file' can only be set for images with an external"):
        await open_qcow2(plain, data_file=data)
    with pytest.raises(BlockError, match="Backing file and data-file-raw cannot be used"):
        await pair(size=64 * K, data_file_raw=True, backing_file="b", backing_format="raw")
    image = await open_qcow2(file, data_file=data)
    with pytest.raises(BlockError, match="not supported"):
        await image.create_snapshot("s", date_nsec=0)
    await image.close()


async def test_an_entry_that_names_another_offset_is_damage():
    file, data = await pair(size=1024 * K)
    image = await open_qcow2(file, data_file=data)
    await image.write(64 * K, b"x" * 64 * K)
    await image.close()
    raw = bytearray(file.content())
    good = (1 << 63 | 64 * K).to_bytes(8, "big")
    place = raw.index(good)
    raw[place : place + 8] = (1 << 63 | 128 * K).to_bytes(8, "big")
    image = await open_qcow2(MemoryDriver.of(bytes(raw)), data_file=data)
    with pytest.raises(OSError, match="offset"):
        await image.read(64 * K, 512)
    await image.close()


async def test_data_are_durable_before_what_refers_to_them():
    file, data = await pair(size=1024 * K)
    image = await open_qcow2(file, data_file=data)
    order: list[str] = []
    file.hook = lambda op, offset, length: order.append(f"file {op}")
    data.hook = lambda op, offset, length: order.append(f"data {op}")
    await image.write(0, b"x" * 512)
    await image.flush()
    last = max(i for i, step in enumerate(order) if step == "file write")  # the L1 entry
    assert "data flush" in order[:last]
    order.clear()
    assert image.write_nowait(0, b"y" * 512)
    await image.flush()  # nothing but data
    assert "data flush" in order
    await image.close()


@pytest.mark.parametrize("request_", ["discard", "write_zeroes"])
async def test_what_entries_on_the_disk_name_is_never_discarded(request_: str):
    """A crash then showed what a discard leaves, which is anything on a block device."""
    file, data = await pair(size=1024 * K)
    image = await open_qcow2(file, data_file=data, discard="unmap")
    await image.write(0, b"a" * 128 * K)
    await image.flush()
    data.log.clear()
    if request_ == "discard":
        await image.discard(0, 64 * K)
    else:
        await image.write_zeroes(0, 64 * K, may_unmap=True)
    assert "discard" not in [entry.operation for entry in data.log]
    assert data.content()[: 128 * K] == bytes(64 * K) + b"a" * 64 * K  # given back, as zeros
    crashed = MemoryDriver()
    await crashed.write(0, file.content())
    again = await open_qcow2(crashed, data_file=data, read_only=True)
    assert bytes(await again.read(0, 64 * K)) == bytes(64 * K)
    await image.close()


async def test_a_failed_flush_of_the_data_is_told_and_publishes_nothing():
    file, data = await pair(size=1024 * K)
    image = await open_qcow2(file, data_file=data)
    await image.write(0, b"x" * 512)
    before = file.content()

    def fail(op, offset, length):
        if op == "flush":
            raise OSError(5, "I/O error")

    data.hook = fail
    with pytest.raises(OSError):
        await image.flush()
    l1 = parse(before).l1_table_offset
    assert file.content()[l1 : l1 + 8] == bytes(8)
    data.hook = None
    await image.flush()
    await image.close()


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("seed", range(6))
async def test_random_requests(seed: int, extended: bool, raw: bool):
    rng = random.Random(seed)
    size = 900 * K + 512
    nowait = seed % 2 == 0
    disk = bytearray(size)
    backing = None
    if not raw and seed % 3:
        disk[: 500 * K] = rng.randbytes(500 * K)
        backing = MemoryDriver.of(bytes(disk[: 500 * K]), read_only=True)
    names = {} if backing is None else {"backing_file": "b", "backing_format": "raw"}
    file, data = await pair(
        nowait=nowait, size=size, cluster_size=16 * K, extended_l2=extended, data_file_raw=raw,
        **names,
    )  # fmt: skip
    image = await open_qcow2(file, backing, data_file=data, discard="unmap")
    held: list[tuple[int, int]] = []
    for _ in range(60):
        offset = rng.randrange(0, size, 512)
        length = min(size - offset, rng.choice((512, 4 * K, 16 * K, 100 * K)))
        what = rng.choice(("write", "write", "zero", "unmap", "discard", "populate"))
        if what == "write":
            new = rng.randbytes(length)
            if not image.write_nowait(offset, new):
                await image.write(offset, new)
            disk[offset : offset + length] = new
        elif what in ("zero", "unmap"):
            await image.write_zeroes(offset, length, may_unmap=what == "unmap")
            disk[offset : offset + length] = bytes(length)
        elif what == "discard":
            await image.discard(offset, length)
            now = bytes(await image.read(offset, length))
            for start in range(0, length, 512):
                sector = now[start : start + 512]
                assert sector in (bytes(512), disk[offset + start : offset + start + 512])
            disk[offset : offset + length] = now
        elif backing is not None:
            start = offset // (16 * K) * 16 * K
            end = min(size, start + 64 * K)
            below = bytes(await image._reader.read_backing(start, end - start))
            await image.populate(start, below)
            held.append((start, end))
    assert bytes(await image.read(0, size)) == disk
    await image.close()
    assert data.length == size
    if raw:
        assert data.content() == disk
    image = await open_qcow2(file, backing, data_file=data)
    assert bytes(await image.read(0, size)) == disk
    if backing is not None:
        image.children.pop("backing")
        for start, end in held:
            assert bytes(await image.read(start, end - start)) == disk[start:end]
    await image.close()


async def test_a_copy_never_overwrites_a_guest():
    """The copy of a job and a guest write go to the same place of the data file."""
    size = 64 * K
    below = b"b" * size
    file, data = await pair(size=size, cluster_size=16 * K)
    image = await open_qcow2(file, MemoryDriver.of(below, read_only=True), data_file=data)
    guests: list[asyncio.Task[None]] = []

    async def meanwhile() -> None:
        await asyncio.sleep(0.02)

    def hook(op, offset, length):
        if op != "write" or guests:
            return None
        guests.append(asyncio.create_task(image.write(20 * K, b"g" * 4 * K)))
        return meanwhile()

    data.hook = hook
    data.nowait = False
    await image.populate(0, below)
    await asyncio.gather(*guests)
    data.hook = None
    image.children.pop("backing")
    assert bytes(await image.read(0, size)) == below[: 20 * K] + b"g" * 4 * K + below[24 * K :]
    await image.close()


@pytest.mark.parametrize("raw", [False, True])
async def test_resize(raw: bool):
    file, data = await pair(size=256 * K, data_file_raw=raw)
    image = await open_qcow2(file, data_file=data, discard="unmap")
    await image.write(0, b"x" * 256 * K)
    await image.truncate(100 * K)
    assert data.length == 100 * K
    await image.truncate(300 * K)
    assert data.length == 300 * K
    assert bytes(await image.read(0, 300 * K)) == b"x" * 100 * K + bytes(200 * K)
    await image.close()
    if raw:
        assert data.content() == b"x" * 100 * K + bytes(200 * K)
