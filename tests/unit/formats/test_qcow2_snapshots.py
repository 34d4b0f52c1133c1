"""Internal snapshots: against a model, by a second reading of the format, and cut off anywhere."""

from __future__ import annotations

import random
from errno import EIO, ENOSPC

import pytest

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.layout import Geometry
from liveblockd.formats.qcow2.snapshots import (
    Snapshot,
    next_id,
    parse_snapshots,
    serialise_snapshots,
)
from liveblockd.graph.bitmaps import DirtyBitmap
from liveblockd.storage.driver import Buffer, StoredBitmap
from tests.support.memory import MemoryDriver
from tests.support.qcow2_images import check, needs, new_qcow2, open_qcow2, run
from tests.support.qcow2_oracle import Oracle

SIZE = 300 * 1024 + 512


class Recorder(MemoryDriver):
    """Keeps all writes and flushes in their order; can be told to fail after some requests."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, bytes] | None] = []  # None: a flush
        self.fail_after: int | None = None
        self.errno = EIO

    def _count(self) -> None:
        if self.fail_after is not None:
            self.fail_after -= 1
            if self.fail_after < 0:
                raise OSError(self.errno, "injected")

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        self._count()
        self.events.append((offset, bytes(data)))
        return super().write_nowait(offset, data)

    async def write(self, offset: int, data: Buffer) -> None:
        self._count()
        self.events.append((offset, bytes(data)))
        await super().write(offset, data)

    async def discard(self, offset: int, length: int) -> None:
        await self.write(offset, b"\xdd" * length)

    async def flush(self) -> None:
        self._count()
        await super().flush()
        self.events.append(None)


def cut(initial: bytes, events: list[tuple[int, bytes] | None], rng: random.Random) -> bytes:
    """The disk after a power cut: all up to the last flush, and any sectors of what came later."""
    disk = bytearray(initial)
    flushed = max((n for n, event in enumerate(events) if event is None), default=-1)
    keep = rng.choice((0.0, 0.1, 0.5, 0.9, 1.0))
    for number, event in enumerate(events):
        if event is None:
            continue
        offset, data = event
        disk.extend(bytes(max(0, offset + len(data) - len(disk))))
        for start in range(0, len(data), 512):
            if number < flushed or rng.random() < keep:
                part = data[start : start + 512]
                disk[offset + start : offset + start + len(part)] = part
    return bytes(disk)


async def scribble(image, rng: random.Random, model: bytearray, times: int) -> None:
    """Guest requests of all kinds; ``model`` follows."""
    for _ in range(times):
        offset = rng.randrange(len(model) // 512) * 512
        length = min(rng.randrange(1, rng.choice((3, 40, 200))) * 512, len(model) - offset)
        how = rng.random()
        if how < 0.75:
            data = rng.randbytes(length)
            await image.write(offset, data)
            model[offset : offset + length] = data
        else:
            await image.write_zeroes(offset, length, may_unmap=how < 0.9)
            model[offset : offset + length] = bytes(length)


async def a_disk(rng: random.Random, **options):
    """(file, image, model) of a disk that something was written to."""
    disk = Recorder()
    options = {
        "size": SIZE,
        "cluster_size": rng.choice((512, 1024, 4096, 65536)),
        "version": rng.choice((2, 3, 3)),
        **options,
    }
    if options["version"] == 3:
        options.setdefault("refcount_bits", rng.choice((4, 8, 16, 16, 32, 64)))
    await new_qcow2(disk, **options)
    image = await open_qcow2(disk, discard="unmap")
    model = bytearray(options["size"])
    await scribble(image, rng, model, 12)
    return disk, image, model


async def do(image, rng, model, states: dict[str, bytes]) -> None:
    """One operation on the snapshots; ``states`` and ``model`` follow."""
    known = image.list_snapshots()
    how = rng.choice(("create", "create", "delete", "apply"))
    if how == "create" and len(known) < 3:
        name = f"s{rng.randrange(10**9)}"
        await image.create_snapshot(name, date_nsec=1_700_000_000_123_456_789)
        states[image.list_snapshots()[-1].id] = bytes(model)
    elif known and how == "delete":
        victim = rng.choice(known).id
        await image.delete_snapshot(victim)
        del states[victim]
    elif known:
        back = rng.choice(known).id
        await image.apply_snapshot(back)
        model[:] = states[back]


@pytest.mark.parametrize("seed", range(30))
async def test_every_snapshot_keeps_its_disk(seed):
    rng = random.Random(seed)
    disk, image, model = await a_disk(rng)
    states: dict[str, bytes] = {}
    for _ in range(10):
        await do(image, rng, model, states)
        await scribble(image, rng, model, rng.randrange(6))
        if rng.random() < 0.3:
            await image.close()
            image = await open_qcow2(disk, discard="unmap")
        assert bytes(await image.read(0, len(model))) == bytes(model), seed
        assert image.length == len(model)
    await image.close()
    oracle = Oracle(disk.content())
    assert oracle.errors == [], seed
    assert oracle.leaks == [], seed
    assert oracle.read() == bytes(model), seed
    for number, (snapshot_id, *_) in enumerate(oracle.snapshots):
        assert oracle.read_snapshot(number) == states[snapshot_id], seed


@pytest.mark.parametrize("seed", range(16))
async def test_a_power_cut_at_any_write(seed):
    rng = random.Random(seed)
    disk, image, model = await a_disk(rng)
    states: dict[str, bytes] = {}
    for _ in range(rng.randrange(4)):
        await do(image, rng, model, states)
        await scribble(image, rng, model, 3)
    await image.flush()
    await image.close()
    image = await open_qcow2(disk, discard="unmap")
    initial = disk.content()
    before, before_states = bytes(model), dict(states)
    disk.events.clear()
    while image.list_snapshots() == [] or len(disk.events) < 3:
        await do(image, rng, model, states)
    # One operation more, which is what is cut; what came before it counts as done.
    done = len(disk.events)
    before, before_states = bytes(model), dict(states)
    while len(disk.events) == done:
        await do(image, rng, model, states)
    for end in range(done, len(disk.events) + 1):
        for _ in range(3):
            oracle = Oracle(cut(initial, disk.events[:end], rng))
            assert oracle.errors == [], (seed, end)
            found = {s[0]: oracle.read_snapshot(n) for n, s in enumerate(oracle.snapshots)}
            assert (oracle.read(), found) in (
                (before, before_states),
                (bytes(model), states),
            ), (seed, end)
    assert oracle.read() == bytes(model)


@pytest.mark.parametrize("seed", range(12))
async def test_an_error_anywhere_changes_nothing(seed):
    rng = random.Random(seed)
    disk, image, model = await a_disk(rng)
    states: dict[str, bytes] = {}
    for _ in range(2):
        await do(image, rng, model, states)
        await scribble(image, rng, model, 3)
    for number in range(25):
        await image.flush()
        disk.fail_after, disk.errno = number, rng.choice((EIO, ENOSPC))
        saved, saved_states = bytearray(model), dict(states)
        try:
            await do(image, rng, model, states)
        except OSError:
            model[:], states = saved, saved_states
        disk.fail_after = None
        if image._damaged:  # the header could be written neither way: nothing is, any more
            break
        assert bytes(await image.read(0, len(model))) == bytes(model), (seed, number)
        assert {s.id for s in image.list_snapshots()} == set(states)
        await scribble(image, rng, model, 2)
    await image.close()
    oracle = Oracle(disk.content())
    assert oracle.errors == [], seed
    if not image._damaged:
        assert oracle.read() == bytes(model), seed
        for number, (snapshot_id, *_) in enumerate(oracle.snapshots):
            assert oracle.read_snapshot(number) == states[snapshot_id], seed


async def test_a_switch_that_nobody_can_settle_stops_the_writes_and_marks_nothing():
    """Neither header could be made durable: both are sound, and a repair would be for nothing."""
    disk, image, model = await a_disk(random.Random(1))
    await image.flush()
    switched = False

    real_flush = disk.flush

    async def flush() -> None:
        if switched:
            raise OSError(EIO, "injected")
        await real_flush()

    real_write = disk.write

    async def write(offset: int, data: Buffer) -> None:
        nonlocal switched
        await real_write(offset, data)
        switched = switched or offset == 0

    disk.flush, disk.write = flush, write  # type: ignore[method-assign]
    with pytest.raises(OSError, match="injected"):
        await image.create_snapshot("one", date_nsec=1)
    assert switched
    for request in (image.write(0, b"x" * 512), image.flush(), image.discard(0, 65536)):
        with pytest.raises(OSError):
            await request
    assert bytes(await image.read(0, len(model))) == bytes(model)
    disk.flush, disk.write = real_flush, real_write  # type: ignore[method-assign]
    await image.close()
    oracle = Oracle(disk.content())
    assert oracle.errors == []
    assert oracle.read() == bytes(model)
    again = await open_qcow2(MemoryDriver.of(disk.content()))  # for writing: it is not marked
    await again.write(0, b"x" * 512)
    await again.close()


async def test_a_refcount_of_one_bit_cannot_take_a_snapshot():
    _, image, model = await a_disk(random.Random(1), version=3, refcount_bits=1)
    with pytest.raises(BlockError, match="more than 1 references"):
        await image.create_snapshot("x", date_nsec=0)
    assert image.list_snapshots() == []
    assert bytes(await image.read(0, len(model))) == bytes(model)


async def test_a_damaged_snapshot_does_not_harm_the_disk():
    disk, image, model = await a_disk(random.Random(1), cluster_size=4096)
    await image.create_snapshot("x", date_nsec=0)
    await image.close()
    oracle = Oracle(disk.content())
    l2_offset = oracle.snapshots[0][2][0] & 0x00FFFFFFFFFFFE00
    await disk.write(l2_offset, b"\x80\0\0\0\0\0\x02\x10" * 4)
    image = await open_qcow2(disk)
    with pytest.raises(BlockError, match="Could not delete snapshot"):
        await image.delete_snapshot("1")
    assert [s.name for s in image.list_snapshots()] == ["x"]
    await scribble(image, random.Random(2), model, 5)
    assert bytes(await image.read(0, len(model))) == bytes(model)


def test_the_table_survives_parse_and_serialise():
    table = [
        Snapshot(b"7", "sné".encode(), 0x10000, 3, 5, 6, 7, 1 << 33, 1 << 20, 42, b"extra"),
        Snapshot(b"name", b"\xff", 0x20000, 0, 5, 6, 7, 8, None),
    ]
    data = serialise_snapshots(table)
    assert parse_snapshots(data, 2, Geometry(3, 16, 4)) == (table, len(data))
    assert next_id(table) == b"8"


@pytest.mark.parametrize("seed", range(8))
async def test_bitmaps_are_stored_or_marked_wherever_it_is_cut(seed):
    rng = random.Random(seed)
    disk, image, model = await a_disk(rng, version=3)
    bits = DirtyBitmap(len(model), 512, name="b")
    bits.set(rng.randrange(SIZE), rng.randrange(1, SIZE))
    source = [StoredBitmap("b", 512, True, False, ((0, bits.dump()),))]
    image.bitmap_source = lambda source=source: source
    await image.close()
    for _ in range(2):
        initial = disk.content()
        disk.events.clear()
        image = await open_qcow2(disk)
        assert [s.name for s in image.stored_bitmaps()] == ["b"]
        stored = DirtyBitmap(len(model), 512)
        stored.load(image.stored_bitmaps()[0].pieces)
        assert stored.dump() == bits.dump()
        opened = len(disk.events)
        await scribble(image, rng, model, 4)
        old, new = bits.dump(), DirtyBitmap(len(model), 512)
        new.set(rng.randrange(SIZE), 5000)
        source = [StoredBitmap("b", 512, True, False, ((0, new.dump()),))]
        image.bitmap_source = lambda source=source: source
        await image.close()
        bits = new
        for end in range(len(disk.events) + 1):
            oracle = Oracle(cut(initial, disk.events[:end], rng))
            assert oracle.errors == [], (seed, end)
            flags, granularity, data = oracle.bitmaps["b"]
            assert granularity == 512
            data = data[: len(old)]
            if not flags & 1:
                # Believed: then nothing was written yet, or all of it was.
                assert data == new.dump() if end > opened else data == old, (seed, end)
        assert Oracle(disk.content()).leaks == []


@needs("qemu-img", "qemu-io")
@pytest.mark.parametrize("version", [2, 3])
async def test_qemu_and_we_work_on_the_same_snapshots(tmp_path, version):
    path = tmp_path / "disk.qcow2"
    rng = random.Random(version)
    disk, image, model = await a_disk(rng, version=version, refcount_bits=16)
    await image.create_snapshot("ours", date_nsec=1_700_000_000_000_000_000)
    ours = bytes(model)
    await scribble(image, rng, model, 5)
    await image.close()
    path.write_bytes(disk.content())
    assert check(path) == {}
    run("qemu-img", "snapshot", "-c", "theirs", path)
    theirs = bytes(model)
    assert check(path) == {}
    run("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 64k", path)
    model[:65536] = b"\x09" * 65536
    disk = Recorder()
    await disk.write(0, path.read_bytes())
    image = await open_qcow2(disk)
    listed = [(s.id, s.name, s.disk_size) for s in image.list_snapshots()]
    assert listed == [("1", "ours", SIZE), ("2", "theirs", SIZE)]
    await image.create_snapshot("third", date_nsec=0)
    await image.apply_snapshot("2")
    assert bytes(await image.read(0, SIZE)) == theirs
    await image.delete_snapshot("2")
    assert bytes(await image.read(0, SIZE)) == theirs
    await image.apply_snapshot("3")
    assert bytes(await image.read(0, SIZE)) == bytes(model)
    await image.close()
    path.write_bytes(disk.content())
    assert check(path) == {}
    run("qemu-img", "snapshot", "-a", "ours", path)
    assert check(path) == {}
    raw = tmp_path / "raw"
    run("qemu-img", "convert", "-O", "raw", path, raw)
    assert raw.read_bytes() == ours
    for name in ("ours", "third"):
        run("qemu-img", "snapshot", "-d", name, path)
        assert check(path) == {}
    run("qemu-img", "convert", "-O", "raw", path, raw)
    assert raw.read_bytes() == ours
