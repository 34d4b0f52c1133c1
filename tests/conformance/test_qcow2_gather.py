"""Many pieces copied at once (``populate_many``) against the same pieces copied one by one."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import AsyncIterator
from errno import ENOSPC
from pathlib import Path

import pytest

from liveblockd.formats.qcow2 import descriptors as duplicates
from liveblockd.formats.qcow2 import gather
from liveblockd.formats.qcow2.image import Qcow2
from liveblockd.storage import copy_engine
from liveblockd.storage.driver import Source
from tests.conformance.test_qcow2_qemu import Host, content
from tests.support.descriptors import descriptors
from tests.support.patience import until
from tests.support.qcow2_images import check, needs, run

pytestmark = needs("qemu-img")

K = 1024
CLUSTER = 64 * K
CLUSTERS = 400


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    host = Host()
    yield host
    await host.close()
    host.workers.close()


class Pair:
    """An image over a raw base, of which each cluster is data or zeros."""

    def __init__(self, host: Host, directory: Path, seed: int) -> None:
        self.host = host
        self.directory = directory
        rng = self.rng = random.Random(seed)
        self.model = bytearray()
        for _ in range(CLUSTERS):
            self.model += bytes(CLUSTER) if rng.random() < 0.2 else rng.randbytes(CLUSTER)
        self.base = directory / "base.raw"
        self.base.write_bytes(self.model)

    async def image(self, name: str, **options: object) -> Qcow2:
        self.path = self.directory / name
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", self.base, "-F", "raw",
            *(f"-o{name}={value}" for name, value in options.items()), self.path)  # fmt: skip
        below = await self.host.file(self.base, **{"read-only": True})
        self.file = below.host_file()
        return await self.host.qcow2(self.path, below)

    def sources(self) -> list[Source]:
        """Pieces of one to 40 clusters that together are the whole disk, in no order."""
        found, position = [], 0
        while position < len(self.model):
            length = min(self.rng.choice((1, 1, 2, 7, 40)) * CLUSTER, len(self.model) - position)
            found.append(Source(position, length, self.file, position))
            position += length
        self.rng.shuffle(found)
        return found

    async def judge(self, image: Qcow2) -> None:
        """The image has it all and needs its base no more."""
        await image.change_backing_file(None, None)
        image.children.pop("backing")
        assert await image.read(0, len(self.model)) == self.model
        await self.host.close()
        assert check(self.path) == {}
        assert content(self.path) == self.model


def space(path: Path) -> int:
    """Clusters that the image's data take."""
    extents = json.loads(run("qemu-img", "map", "--output=json", path))
    return sum(extent["length"] for extent in extents if extent["data"]) // CLUSTER


@pytest.mark.parametrize("seed", range(3))
async def test_many_are_as_one_by_one(tmp_path: Path, host: Host, seed: int) -> None:
    pair = Pair(host, tmp_path, seed)
    image = await pair.image("one.qcow2")
    for source in pair.sources():
        await image.populate_from(*source)
    assert image._gatherer.gathered == 0
    await pair.judge(image)
    slow = space(pair.path)
    image = await pair.image("many.qcow2")
    sources = pair.sources()
    await image.populate_many(sources)
    assert image._gatherer.gathered == len(sources)
    await pair.judge(image)
    assert space(pair.path) == slow


@pytest.mark.parametrize(
    "options", [{"compat": "0.10"}, {"cluster_size": 4096}, {"extended_l2": "on"}], ids=str
)
async def test_other_images(tmp_path: Path, host: Host, options: dict[str, object]) -> None:
    """Version 2 needs real zeros and has the slow way; tables of 4 KiB clusters are many."""
    pair = Pair(host, tmp_path, 4)
    image = await pair.image("many.qcow2", **options)
    await image.populate_many(pair.sources())
    assert (image._gatherer.gathered > 0) is ("compat" not in options)
    await pair.judge(image)


async def test_a_batch_keeps_few_tables(
    tmp_path: Path, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an image with large tables not more than a part of its cache, however large a piece."""
    pair = Pair(host, tmp_path, 9)
    image = await pair.image("many.qcow2", cluster_size=512)
    image._metadata.max_tables = 80
    used = []
    plain = gather._match

    def match(pieces: list[gather._Piece], *rest: object) -> object:
        used.append(len({piece.table.l1_index for piece in pieces}))
        return plain(pieces, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(gather, "_match", match)
    await image.populate_many(pair.sources())
    assert max(used) == 10
    await pair.judge(image)


@pytest.mark.parametrize("options", [{}, {"extended_l2": "on"}], ids=str)
async def test_between_what_the_guest_wrote_copies_go_together(
    tmp_path: Path, host: Host, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    pair = Pair(host, tmp_path, 6)
    image = await pair.image("many.qcow2", **options)
    calls = []
    plain = gather.copy_segments
    monkeypatch.setattr(gather, "copy_segments", lambda *args: calls.append(1) or plain(*args))
    for cluster in sorted(pair.rng.sample(range(CLUSTERS), 60)):
        data, offset = pair.rng.randbytes(4096), cluster * CLUSTER + 8192
        pair.model[offset : offset + 4096] = data
        await image.write(offset, data)
    one_by_one = image._populator.copied
    await image.populate_many([Source(0, CLUSTERS * CLUSTER, pair.file, 0)])
    assert calls == [1], "one job of a worker has it all"
    assert image._gatherer.gathered > 30
    assert image._populator.copied - one_by_one == (CLUSTERS - 60) * CLUSTER
    await pair.judge(image)


async def test_what_the_guest_wrote_stays(
    tmp_path: Path, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the copy, while a worker copies, and while the guest's own write is under way."""
    pair = Pair(host, tmp_path, 5)
    image = await pair.image("many.qcow2")
    loop = asyncio.get_running_loop()
    copied, go_on = asyncio.Event(), asyncio.Event()
    plain = gather.copy_segments

    def slow(*args: object) -> copy_engine.Copied:
        answer = plain(*args)  # type: ignore[arg-type]
        loop.call_soon_threadsafe(copied.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(30)
        return answer

    async def guest(offset: int, length: int) -> None:
        data = pair.rng.randbytes(length)
        pair.model[offset : offset + length] = data
        await image.write(offset, data)

    monkeypatch.setattr(gather, "copy_segments", slow)
    await guest(3 * CLUSTER + 5, 100)
    job = asyncio.create_task(image.populate_many(pair.sources()))
    async with asyncio.timeout(30):
        await copied.wait()
    for cluster in (0, 17, 18, 399):
        await guest(cluster * CLUSTER + 7, CLUSTER if cluster != 399 else 9)
    # A write that has decided where it goes and then fails: nobody but the job has that cluster.
    claim = image._claims.take(100, 2)
    go_on.set()
    async with asyncio.timeout(30):
        while not image._gatherer.gathered:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)
        table = image._metadata.tables[0]
        assert not table.entries[100:102].any() and table.entries[102] and not job.done()
        image._claims.release(claim)
        await job
    assert table.entries[100:102].all()
    await pair.judge(image)


async def test_a_guest_under_way_holds_up_its_own_piece_only(
    tmp_path: Path, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies side by side is looked at, and published, together; but not with a claim in it."""
    pair = Pair(host, tmp_path, 8)
    image = await pair.image("many.qcow2", cluster_size=CLUSTER)
    published = []
    plain = image._populator.publish_copy

    def publish(*args: object, **options: object) -> bool:
        published.append(args[3])
        return plain(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(image._populator, "publish_copy", publish)
    sources = [
        Source(n * CLUSTER, CLUSTER, pair.file, n * CLUSTER)
        for n in range(len(pair.model) // CLUSTER)
    ]
    claim = image._claims.take(50, 1)
    job = asyncio.create_task(image.populate_many(sources))
    async with asyncio.timeout(30):
        while not image._gatherer.gathered:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)
    assert image._gatherer.gathered == len(sources) - 1 and not job.done()
    assert published == [50, len(sources) - 51]
    image._claims.release(claim)
    await job
    await pair.judge(image)


@pytest.mark.parametrize("fails", ["read", "write", "dup"])
async def test_a_failed_copy_leaves_nothing(
    tmp_path: Path, host: Host, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    pair = Pair(host, tmp_path, 6)
    image = await pair.image("many.qcow2")

    def broken(*args: object) -> None:
        raise OSError(ENOSPC, os.strerror(ENOSPC))

    before = descriptors()
    with monkeypatch.context() as patch:
        if fails == "dup":
            patch.setattr(duplicates, "duplicate", broken)
        else:
            name = "read_into" if fails == "read" else "write"
            patch.setattr(copy_engine.hostcalls, name, broken)
        with pytest.raises(OSError, match="No space left"):
            await image.populate_many(pair.sources())
    await until(lambda: not descriptors() - before)  # others of its workers may still be at it
    assert await image.read(0, len(pair.model)) == pair.model
    await image.populate_many(pair.sources())
    await pair.judge(image)


@pytest.mark.parametrize("extended", [False, True])
async def test_a_fresh_table_is_written_by_its_pages(
    tmp_path: Path, host: Host, extended: bool
) -> None:
    """A disk with a cluster here and there: the file has no bytes for what the tables lack."""
    path = tmp_path / "a.qcow2"
    options = ["-oextended_l2=on"] if extended else []
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, path, "64G")
    image = await host.qcow2(path)
    rng = random.Random(7)
    span = image._metadata.geometry.span
    written = {}
    for table in range(40):
        offset = table * span + rng.randrange(span // CLUSTER) * CLUSTER
        written[offset] = rng.randbytes(CLUSTER)
        await image.write(offset, written[offset])
    await image.flush()
    # One of the fewest bytes a file system gives for a cluster of data, a page or two for a table.
    assert path.stat().st_blocks * 512 < 40 * (CLUSTER + 2 * 4096) + 8 * CLUSTER
    assert check(path) == {}
    for offset in list(written):  # more of the same tables: they are changed in place now
        other = offset // span * span + rng.randrange(span // CLUSTER) * CLUSTER
        written[other] = rng.randbytes(CLUSTER)
        await image.write(other, written[other])
    await host.close()
    assert check(path) == {}
    image = await host.qcow2(path, read_only=True)
    for offset, data in written.items():
        assert await image.read(offset, CLUSTER) == data
    assert path.stat().st_size % CLUSTER == 0


async def test_no_table_lies_beyond_the_end_of_the_file(tmp_path: Path, host: Host) -> None:
    pair = Pair(host, tmp_path, 8)
    image = await pair.image("a.qcow2")
    await image.write_zeroes(0, 3 * CLUSTER)
    pair.model[: 3 * CLUSTER] = bytes(3 * CLUSTER)
    await image.flush()
    assert pair.path.stat().st_size % CLUSTER == 0
    assert image._metadata.tables[0].host_offset == pair.path.stat().st_size - CLUSTER
    await image.populate_many(pair.sources())
    await pair.judge(image)


async def test_a_table_that_failed_once_is_written_whole(
    tmp_path: Path, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first attempt left on the disk may be an entry that is gone by the second."""
    path = tmp_path / "a.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "1G")
    image = await host.qcow2(path)
    await image.write(0, b"a" * CLUSTER)
    file = image.children["file"]
    real = file.flush

    async def broken() -> None:
        raise OSError(ENOSPC, os.strerror(ENOSPC))

    monkeypatch.setattr(file, "flush", broken)
    with pytest.raises(OSError, match="No space left"):
        await image.flush()
    table = image._metadata.tables[0]
    assert table.is_new and not table.fresh
    # The first entry goes, on another page there is one.
    await image.discard(0, CLUSTER)
    await image.write(8000 * CLUSTER, b"b" * CLUSTER)
    monkeypatch.setattr(file, "flush", real)
    await host.close()
    assert check(path) == {}
    image = await host.qcow2(path, read_only=True)
    assert await image.read(0, CLUSTER) == bytes(CLUSTER)
    assert await image.read(8000 * CLUSTER, CLUSTER) == b"b" * CLUSTER
