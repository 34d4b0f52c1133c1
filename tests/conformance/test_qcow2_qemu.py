"""Images that qemu-img makes are used here and judged by qemu-img and qemu-io, and vice versa."""

from __future__ import annotations

import random
import re
import subprocess
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.create import create_qcow2, peek_header
from liveblockd.formats.qcow2.image import Qcow2
from liveblockd.qapi import parse
from liveblockd.runtime.workers import WorkerPool
from liveblockd.storage.file import FileDriver
from liveblockd.storage.registry import Environment
from tests.support.memory import MemoryDriver
from tests.support.qcow2_images import check, needs, new_qcow2, open_qcow2, run
from tests.support.qcow2_oracle import Oracle
from tests.unit.formats.test_qcow2_concurrency import (
    BLOCK,
    Guest,
    History,
    LateDisk,
    Operation,
    World,
    check_cuts,
    judge,
    pattern,
    watch,
    work,
)

pytestmark = needs("qemu-img", "qemu-io")

K = 1024


class Host:
    """Files of the host, opened by the file driver."""

    def __init__(self) -> None:
        self.workers = WorkerPool()
        self.open_drivers: list[FileDriver | Qcow2] = []

    async def file(self, path: Path, **options: object) -> FileDriver:
        members = {"driver": "file", "filename": str(path), "discard": "unmap", **options}
        file = await FileDriver.open(
            parse(FileDriver.Options, members), {}, Environment(self.workers)
        )
        self.open_drivers.append(file)
        return file

    async def qcow2(
        self, path: Path, backing: Qcow2 | MemoryDriver | None = None, **options: object
    ) -> Qcow2:
        members = {"read-only": True} if options.get("read_only") else {}
        file = await self.file(path, **members)
        image = await open_qcow2(file, backing, workers=self.workers, **options)
        self.open_drivers.append(image)
        return image

    async def close(self) -> None:
        while self.open_drivers:
            await self.open_drivers.pop().close()


@pytest.fixture
async def host() -> AsyncIterator[Host]:
    host = Host()
    yield host
    await host.close()
    host.workers.close()


def content(path: Path) -> bytes:
    """The guest's view, as qemu-img reads it."""
    raw = path.with_suffix(".out")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
    data = raw.read_bytes()
    raw.unlink()
    return data


async def churn(image: Qcow2, model: bytearray, rng: random.Random, steps: int) -> None:
    """Random requests, each also done to the model."""
    size = len(model)
    for _ in range(steps):
        offset = rng.randrange(size)
        length = min(rng.choice((1, 512, 4096, 70000, 300000)), size - offset)
        match rng.choice(("write", "write", "write", "zero", "discard", "read", "flush")):
            case "write":
                data = rng.randbytes(min(length, 512)) * (length // 512 + 1)
                await image.write(offset, data[:length])
                model[offset : offset + length] = data[:length]
            case "zero":
                await image.write_zeroes(offset, length, may_unmap=rng.random() < 0.5)
                model[offset : offset + length] = bytes(length)
            case "discard":
                await image.discard(offset, length)
                model[offset : offset + length] = bytes(await image.read(offset, length))
            case "read":
                assert await image.read(offset, length) == model[offset : offset + length]
            case "flush":
                await image.flush()


MADE = [
    "compat=0.10",
    "compat=1.1",
    "cluster_size=512",
    "cluster_size=4k",
    "cluster_size=2M",
    "refcount_bits=1",
    "refcount_bits=2,cluster_size=1k",
    "refcount_bits=4,cluster_size=512",
    "refcount_bits=8",
    "refcount_bits=32,cluster_size=512",
    "refcount_bits=64,cluster_size=512",
    "lazy_refcounts=on",
    "preallocation=metadata",
    "preallocation=falloc,cluster_size=8k",
    "compat=0.10,preallocation=metadata",
]


@pytest.mark.parametrize("options", MADE)
async def test_images_of_qemu_img_written_here(tmp_path: Path, host: Host, options: str) -> None:
    path = tmp_path / "a.qcow2"
    seed = zlib.crc32(options.encode())
    size = 3 * 1024 * K + 512 * 3
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, str(size))
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 100k 300k", path)
    model = bytearray(size)
    model[100 * K : 400 * K] = b"\x07" * (300 * K)
    image = await host.qcow2(path)
    assert await image.read(0, size) == model
    await churn(image, model, random.Random(seed), 60)
    await host.close()
    assert check(path) == {}, f"seed {seed}"
    assert content(path) == model


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("version", ["0.10", "1.1"])
async def test_backing_chains(tmp_path: Path, host: Host, depth: int, version: str) -> None:
    rng = random.Random(depth)
    size = 2 * 1024 * K
    model = bytearray()
    below: Path | None = None
    for layer in range(depth + 1):
        path = tmp_path / f"{layer}.qcow2"
        layer_size = size - (depth - layer) * 70000 // 512 * 512
        more = ["-b", str(below), "-F", "qcow2"] if below else []
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"compat={version}", *more, path,
            str(layer_size))  # fmt: skip
        model = bytearray(bytes(model).ljust(layer_size, b"\0"))
        for _ in range(3):
            at = rng.randrange(layer_size - 200 * K)
            run("qemu-io", "-f", "qcow2", "-c", f"write -P {layer + 1} {at} 150k", path)
            model[at : at + 150 * K] = bytes([layer + 1]) * (150 * K)
        below = path
    image: Qcow2 | None = None
    for layer in range(depth + 1):
        path = tmp_path / f"{layer}.qcow2"
        image = await host.qcow2(path, image, read_only=layer < depth)
    assert image is not None
    assert image.backing_file == str(tmp_path / f"{depth - 1}.qcow2")
    assert await image.read(0, size) == model
    await churn(image, model, random.Random(depth + 10), 60)
    await host.close()
    assert check(path) == {}
    assert content(path) == model


async def test_compressed_images(tmp_path: Path, host: Host) -> None:
    rng = random.Random(5)
    raw, path = tmp_path / "a.raw", tmp_path / "a.qcow2"
    model = bytearray(b"".join(bytes([rng.randrange(256)]) * 5000 for _ in range(400)))
    model.extend(rng.randbytes(300 * K))  # does not compress
    model.extend(bytes(-len(model) % 512))
    raw.write_bytes(model)
    run("qemu-img", "convert", "-c", "-O", "qcow2", raw, path)
    image = await host.qcow2(path)
    assert await image.read(0, len(model)) == model
    assert await image.read(70000, 1000) == model[70000:71000]
    await churn(image, model, random.Random(6), 80)
    await host.close()
    assert check(path) == {}
    assert content(path) == model


async def test_compressed_clusters_that_are_damaged(tmp_path: Path, host: Host) -> None:
    raw, path = tmp_path / "a.raw", tmp_path / "a.qcow2"
    raw.write_bytes(b"compress me " * 20000)
    run("qemu-img", "convert", "-c", "-O", "qcow2", raw, path)
    data = bytearray(path.read_bytes())
    place = Oracle(bytes(data)).entry(0) & ((1 << 54) - 1)
    data[place : place + 50] = b"\xff" * 50
    path.write_bytes(data)
    image = await host.qcow2(path, read_only=True)
    with pytest.raises(OSError, match="compressed cluster"):
        await image.read(0, 240000)


async def test_internal_snapshots_keep_their_data(tmp_path: Path, host: Host) -> None:
    path = tmp_path / "a.qcow2"
    size = 4 * 1024 * K
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, str(size))
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 2M", "-c", "write -z 3M 64k", path)
    before = content(path)
    run("qemu-img", "snapshot", "-c", "one", path)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 2 1M 64k", path)
    between = content(path)
    run("qemu-img", "snapshot", "-c", "two", path)
    image = await host.qcow2(path)
    assert [s.name for s in image.list_snapshots()] == ["one", "two"]
    model = bytearray(between)
    await churn(image, model, random.Random(8), 120)
    await image.truncate(size + 512 * K)
    await image.change_backing_file(None, None)
    await host.close()
    assert check(path) == {}
    assert content(path) == bytes(model).ljust(size + 512 * K, b"\0")
    for name, expected in (("two", between), ("one", before)):
        run("qemu-img", "snapshot", "-a", name, path)
        assert content(path) == expected
        assert check(path) == {}


async def test_an_image_with_a_full_file_grows_its_refcounts(tmp_path: Path, host: Host) -> None:
    path = tmp_path / "a.qcow2"
    size = 12 * 1024 * K
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512,refcount_bits=64",
        path, str(size))  # fmt: skip
    image = await host.qcow2(path)
    data = random.Random(1).randbytes(size)
    for offset in range(0, size, 1024 * K):
        await image.write(offset, data[offset : offset + 1024 * K])
    await host.close()
    assert check(path) == {}
    assert content(path) == data
    assert peek_header(path.read_bytes()[:512]).refcount_table_clusters > 1


@pytest.mark.parametrize("old", [0, 64 * K, 100 * K + 512])
async def test_resized_images(tmp_path: Path, host: Host, old: int) -> None:
    path = tmp_path / "a.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, str(old))
    image = await host.qcow2(path)
    if old:
        await image.write(0, b"x" * old)
    await image.truncate(40 * 1024 * K)
    await image.write(39 * 1024 * K, b"y" * 512)
    await image.truncate(10 * 1024 * K)
    await host.close()
    assert check(path) == {}
    assert content(path) == (b"x" * old).ljust(10 * 1024 * K, b"\0")


async def test_an_l1_table_of_many_clusters(tmp_path: Path, host: Host) -> None:
    path = tmp_path / "a.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512,refcount_bits=64",
        path, "1M")  # fmt: skip
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 1M", path)
    image = await host.qcow2(path)
    await image.truncate(4 << 30)
    await image.write((4 << 30) - 512, b"z" * 512)
    await host.close()
    assert check(path) == {}
    run("qemu-io", "-f", "qcow2", "-c", "read -P 7 0 1M", "-c", "read -P 122 4294966784 512", path)


async def test_streamed_by_descriptors(tmp_path: Path, host: Host) -> None:
    """populate_from: a raw base of the host copied into the image by workers."""
    base, path = tmp_path / "base.raw", tmp_path / "a.qcow2"
    rng = random.Random(9)
    model = bytearray(b"".join(rng.choice((bytes(K), rng.randbytes(K))) for _ in range(3000)))
    model[500 * K : 900 * K] = bytes(400 * K)
    base.write_bytes(model)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", path)
    below = await host.file(base, **{"read-only": True})
    image = await host.qcow2(path, below)
    await image.write(5, b"guest")
    model[5:10] = b"guest"
    for offset in range(0, len(model), 1024 * K):
        length = min(1024 * K, len(model) - offset)
        await image.populate_from(offset, length, below.host_file(), offset)
    await image.change_backing_file(None, None)
    image.children.pop("backing")
    assert await image.read(0, len(model)) == model
    await host.close()
    base.unlink()
    assert check(path) == {}
    assert content(path) == model


# -- what we create


CREATED = [
    {"size": 0},
    {"size": 512},
    {"size": 10 << 20},
    {"size": 100 << 20, "cluster_size": 512},
    {"size": 1 << 40},
    {"size": 1 << 40, "cluster_size": 2 << 20, "refcount_bits": 64},
    {"size": 5 << 30, "cluster_size": 4096, "refcount_bits": 1},
    {"size": 10 << 20, "version": 2},
    {"size": 10 << 20, "lazy_refcounts": True},
    {"size": 10 << 30, "cluster_size": 512, "refcount_bits": 64},
]


@pytest.mark.parametrize("options", CREATED, ids=str)
async def test_new_images_are_those_of_qemu_img(
    tmp_path: Path, host: Host, options: dict[str, int]
) -> None:
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    ours.touch()
    await create_qcow2(await host.file(ours), **options)  # type: ignore[arg-type]
    await host.close()
    assert check(ours) == {}
    words = {
        "cluster_size": options.get("cluster_size", 65536),
        "compat": "0.10" if options.get("version") == 2 else "1.1",
        "lazy_refcounts": "on" if options.get("lazy_refcounts") else "off",
        "refcount_bits": options.get("refcount_bits", 16),
    }
    made = ",".join(f"{k}={v}" for k, v in words.items())
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", made, theirs, str(options["size"]))
    skip = re.compile(r"actual-size|disk size|filename|image:")
    infos = [
        [line for line in run("qemu-img", "info", "-f", "qcow2", p).splitlines()
         if not skip.search(line)]
        for p in (ours, theirs)
    ]  # fmt: skip
    assert infos[0] == infos[1]
    if options["size"]:
        run("qemu-io", "-f", "qcow2", "-c", f"write -P 3 {options['size'] - 512} 512", ours)
        assert check(ours) == {}


async def test_a_new_overlay(tmp_path: Path, host: Host) -> None:
    base, path = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", base, "1M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 5 0 1M", base)
    path.touch()
    await create_qcow2(
        await host.file(path), size=1 << 20, backing_file=str(base), backing_format="qcow2"
    )
    await host.close()
    info = run("qemu-img", "info", path)
    assert f"backing file: {base}" in info
    assert "backing file format: qcow2" in info
    assert content(path) == b"\x05" * (1 << 20)


@pytest.mark.parametrize(
    "options",
    [
        {"size": 100},
        {"size": 1 << 20, "cluster_size": 1000},
        {"size": 1 << 20, "refcount_bits": 7},
        {"size": 1 << 20, "refcount_bits": 8, "version": 2},
        {"size": 1 << 20, "lazy_refcounts": True, "version": 2},
        {"size": 1 << 50, "cluster_size": 512},
    ],
    ids=str,
)
async def test_images_that_are_not_made(tmp_path: Path, options: dict[str, int]) -> None:
    """The same words, where qemu-img does not round the size."""
    with pytest.raises(BlockError) as caught:
        await new_qcow2(**options)
    if options["size"] == 100:
        assert caught.value.message == "Image size must be a multiple of 512 bytes"
        return
    words = [f"{k}={v}" for k, v in options.items() if k in ("cluster_size", "refcount_bits")]
    if options.get("version") == 2:
        words.append("compat=0.10")
    if options.get("lazy_refcounts"):
        words.append("lazy_refcounts=on")
    done = subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", ",".join(words),
         str(tmp_path / "x"), str(options["size"])],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode
    assert caught.value.message in done.stderr


# -- what is refused, in the same words

DOCTORED = [
    (4, b"\0\0\0\x07"),
    (20, b"\0\0\0\x07"),
    (20, b"\0\0\0\x1e"),
    (100, b"\0\0\0\x08"),
    (100, b"\0\x02\0\x08"),
    (8, b"\0\0\0\0\0\x02\0\0"),
    (8, b"\0\0\0\0\0\0\x02\0\0\0\x40\0"),
    (96, b"\0\0\0\x07"),
    (56, b"\0\0\0\0"),
    (56, b"\x01\0\0\0"),
    (48, b"\0\0\0\0\0\0\x02\0"),
    (36, b"\0\0\0\0"),
    (36, b"\x01\0\0\0"),
    (40, b"\0\0\0\0\0\0\x02\0"),
    (24, b"\x7f\0\0\0\0\0\0\0"),
    (60, b"\0\xff\0\x01"),
    (60, b"\0\0\0\x01\0\0\0\0\0\0\x02\0"),
    (104, b"\x01"),
    (104, b"\x02"),
    (79, b"\x08"),
    (79, b"\x60"),
    (78, b"\x80"),
    (79, b"\x02"),
    (32, b"\0\0\0\x03"),
    (112, b"\xe2\x79\x2a\xca\0\x01\0\0"),
]


@pytest.mark.parametrize(("offset", "data"), DOCTORED, ids=lambda v: v if type(v) is int else None)
async def test_refusals_are_worded_as_theirs(tmp_path: Path, offset: int, data: bytes) -> None:
    path = tmp_path / "a.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    image = bytearray(path.read_bytes())
    image[offset : offset + len(data)] = data
    path.write_bytes(image)
    done = subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write 0 512", str(path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode
    theirs = done.stderr.strip().split(f"can't open device {path}: ")[1]
    with pytest.raises(BlockError) as caught:
        await open_qcow2(MemoryDriver.of(bytes(image)))
    assert caught.value.message == theirs


async def test_no_qcow2_at_all() -> None:
    for data in (b"", b"QFI\xfb", bytes(65536), b"MZ" * 1000):
        with pytest.raises(BlockError, match="Image is not in qcow2 format"):
            await open_qcow2(MemoryDriver.of(data))


@pytest.mark.parametrize("seed", range(4))
async def test_power_cuts_of_an_image_with_snapshots(tmp_path: Path, seed: int) -> None:
    """Shared L2 tables and clusters, and compressed ones, are copied before they change."""
    rng = random.Random(seed)
    path, raw = tmp_path / "a.qcow2", tmp_path / "a.raw"
    size = 100 * 1024
    numbers = [rng.choice((0, n + 1)) for n in range(size // BLOCK)]
    raw.write_bytes(b"".join(pattern(n, BLOCK) for n in numbers))
    run("qemu-img", "convert", "-c", "-O", "qcow2", "-o", "cluster_size=512", raw, path)
    for offset in range(0, size, 8192):  # some of it uncompressed
        value = numbers[offset // BLOCK] = numbers[offset // BLOCK + 1] = 0x01010101
        run("qemu-io", "-f", "qcow2", "-c", f"write -P {value & 255} {offset} 512", path)
    run("qemu-img", "snapshot", "-c", "kept", path)
    initial = path.read_bytes()
    disk = LateDisk(seed)
    disk.slow = False
    await disk.write(0, initial)
    disk.events.clear()
    disk.slow = True
    image = await open_qcow2(disk, l2_cache_size=2048)
    history = History([[Operation(n, 0, 0)] for n in numbers])
    guest = Guest(image, history, rng, b"")
    world = World(disk, image, history, guest, b"", initial)
    watch(world)
    await work(world, steps=60, at_once=4)
    check_cuts(world, rng, 40)
    await image.close()
    assert not judge(world).leaks
    path.write_bytes(disk.content())
    assert check(path) == {}
    run("qemu-img", "snapshot", "-a", "kept", path)
    assert check(path) == {}
    assert content(path) == b"".join(pattern(n, BLOCK) for n in numbers)


async def test_copied_without_a_host_cluster_says_nothing(tmp_path: Path) -> None:
    """QEMU reads such an entry as one without the flag, and so do we; nothing goes to offset 0."""
    path = tmp_path / "a.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 64k 64k", path)
    image = bytearray(path.read_bytes())
    l1 = int.from_bytes(image[40:48], "big")
    l2 = int.from_bytes(image[l1 : l1 + 8], "big") & ((1 << 56) - 512)
    image[l2 : l2 + 8] = (1 << 63).to_bytes(8, "big")
    image[l2 + 16 : l2 + 24] = (1 << 63 | 1).to_bytes(8, "big")
    disk = MemoryDriver.of(bytes(image))
    opened = await open_qcow2(disk)
    assert bytes(await opened.read(0, 64 * K)) == bytes(64 * K)
    await opened.create_snapshot("s", date_nsec=0)
    await opened.write(0, b"\5" * 512)
    await opened.write(128 * K, b"\6" * 512)
    await opened.close()
    path.write_bytes(disk.content())
    assert check(path) == {}
    run("qemu-io", "-f", "qcow2", "-c", "read -P 5 0 512", "-c", "read -P 6 128k 512",
        "-c", "read -P 1 64k 64k", "-c", "read -P 0 512 60k", path)  # fmt: skip
