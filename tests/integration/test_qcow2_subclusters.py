"""The same random operations by QEMU and by this engine on twins of one image, then compared.

Images with extended L2 entries, with zlib and zstd, above 0 to 3 backing images of any kind. QEMU
prepares an image; its copy goes on in our hands, the original in QEMU's. At the end both read the
same, map the same, and qemu-img finds nothing wrong with ours.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from liveblockd.formats.qcow2.image import Qcow2
from liveblockd.storage.driver import ExtentKind
from tests.support.memory import MemoryDriver
from tests.support.qcow2_images import check, needs, open_qcow2, run
from tests.support.qcow2_oracle import Oracle

K = 1024
Operation = tuple[str, int, int, int]  # name, offset, length, pattern

pytestmark = needs("qemu-img", "qemu-io")


def operations(rng: random.Random, size: int, cluster: int, count: int) -> list[Operation]:
    """Random ones whose effect on the allocation is the same for everybody."""
    unit = cluster // 32
    found: list[Operation] = []
    for _ in range(count):
        name = rng.choices(("write", "zero", "unmap", "discard"), (10, 3, 2, 2))[0]
        step = {"write": 512, "zero": unit, "unmap": unit}.get(name, cluster)
        most = rng.choice((unit, 3 * unit, cluster, 3 * cluster))
        offset = rng.randrange(0, size, step)
        length = min(max(step, rng.randrange(most + 1) // step * step), size - offset)
        found.append((name, offset, length, rng.randrange(1, 256)))
    return found


def compressed(rng: random.Random, size: int, cluster: int) -> list[Operation]:
    """Some clusters; QEMU compresses only into what is not allocated."""
    starts = rng.sample(range(0, size, cluster), min(3, size // cluster))
    return [("compressed", o, min(cluster, size - o), rng.randrange(1, 256)) for o in starts]


def by_qemu(path: Path, wanted: list[Operation]) -> None:
    words = {
        "write": "write -P {p} {o} {n}", "zero": "write -z {o} {n}", "unmap": "write -z -u {o} {n}",
        "discard": "discard {o} {n}", "compressed": "write -c -P {p} {o} {n}",
    }  # fmt: skip
    commands = [words[name].format(o=o, n=n, p=p) for name, o, n, p in wanted]
    arguments = [argument for command in commands for argument in ("-c", command)]
    if arguments:
        run("qemu-io", "-d", "unmap", "-f", "qcow2", *arguments, path)


async def by_us(image: Qcow2, wanted: list[Operation]) -> None:
    for name, offset, length, value in wanted:
        if name == "compressed":
            await image.write_compressed(offset, bytes([value]) * length)
        elif name == "write":
            data = bytes([value]) * length
            if not image.write_nowait(offset, data):
                await image.write(offset, data)
        elif name == "discard":
            await image.discard(offset, length)
        else:
            await image.write_zeroes(offset, length, may_unmap=name == "unmap")


def create(path: Path, rng: random.Random, size: int, below: Path | None, *, extended: bool) -> int:
    """By qemu-img, with some compressed clusters; the cluster size."""
    cluster = rng.choice((16, 16, 32, 64, 64, 2048) if extended else (4, 64)) * K
    options = [f"cluster_size={cluster}", f"extended_l2={'on' if extended else 'off'}"]
    options.append(f"compression_type={rng.choice(('zlib', 'zstd'))}")
    preallocated = extended and rng.random() < 0.3 and below is None
    if preallocated:
        options.append("preallocation=metadata")
    backing = ["-b", below, "-F", "qcow2"] if below is not None else []
    run("qemu-img", "create", "-f", "qcow2", "-o", ",".join(options), *backing, path, str(size))
    if not preallocated:
        by_qemu(path, compressed(rng, size, cluster))
    return cluster


async def open_chain(paths: list[Path]) -> Qcow2:
    """Files read into memory; the last one is the top, read-write."""
    image: Qcow2 | None = None
    for path in paths:
        disk = MemoryDriver.of(path.read_bytes())
        image = await open_qcow2(disk, image, discard="unmap", read_only=path is not paths[-1])
    assert image is not None
    return image


def qemu_map(path: Path) -> list[tuple[int, int, str]]:
    """(start, length, kind) as far as the top image alone is concerned."""
    found: list[tuple[int, int, str]] = []
    for extent in json.loads(run("qemu-img", "map", "-f", "qcow2", "--output=json", path)):
        kind = "UNALLOCATED"
        if extent["depth"] == 0 and extent.get("present", True):
            kind = "DATA" if extent["data"] else "ZERO"
        start, length = extent["start"], extent["length"]
        if found and found[-1][2] == kind:
            start, length = found[-1][0], found[-1][1] + length
            found.pop()
        found.append((start, length, kind))
    return found


async def our_map(image: Qcow2) -> list[tuple[int, int, str]]:
    found: list[tuple[int, int, str]] = []
    position = 0
    while position < image.length:
        for extent in await image.map(position, image.length - position):
            kind = "DATA" if extent.kind is ExtentKind.COMPRESSED else extent.kind.name
            start, length = position, extent.length
            if found and found[-1][2] == kind:
                start, length = found[-1][0], found[-1][1] + length
                found.pop()
            found.append((start, length, kind))
            position += extent.length
    return found


async def read_all(image: Qcow2) -> bytes:
    step = 300 * K
    parts = []
    for offset in range(0, image.length, step):
        length = min(step, image.length - offset)
        data = image.read_nowait(offset, length)
        parts.append(bytes(data if data is not None else await image.read(offset, length)))
    return b"".join(parts)


def content(path: Path) -> bytes:
    raw = path.with_suffix(".raw")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
    data = raw.read_bytes()
    raw.unlink()
    return data


@pytest.mark.parametrize("seed", range(24))
async def test_twins(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    depth = seed % 4
    paths: list[Path] = []
    size = 0
    for number in range(depth + 1):
        path = tmp_path / f"{number}.qcow2"
        size = rng.randrange(100, 700) * K + rng.choice((0, 512))
        top = number == depth
        extended = top or rng.random() < 0.5
        cluster = create(path, rng, size, paths[-1] if paths else None, extended=extended)
        by_qemu(path, operations(rng, size, cluster, rng.randrange(12)))
        paths.append(path)
    theirs, ours = paths[-1], tmp_path / "ours.qcow2"
    shutil.copy(theirs, ours)

    image = await open_chain(paths)
    assert image.format_specific()["data"]["extended-l2"] is True
    assert image.limits()["write-zeroes-alignment"] == cluster // 32
    assert await read_all(image) == content(theirs), "what QEMU wrote reads differently"
    assert await our_map(image) == qemu_map(theirs)

    wanted = operations(rng, size, cluster, 30)
    by_qemu(theirs, wanted)
    await by_us(image, wanted)
    # Over what is there: QEMU compresses only into clusters that are not allocated.
    packed = compressed(rng, size, cluster)
    by_qemu(theirs, [("write", *rest) for _, *rest in packed])
    await by_us(image, packed)
    expected = content(theirs)
    assert await read_all(image) == expected
    await image.close()
    disk = image.children["file"]
    assert isinstance(disk, MemoryDriver)
    ours.write_bytes(disk.content())
    oracle = Oracle(disk.content())
    assert not oracle.errors and not oracle.leaks
    assert check(ours) == {}
    assert content(ours) == expected
    assert sectors(qemu_map(ours), expected, depth) == sectors(qemu_map(theirs), expected, depth)


def sectors(extents: list[tuple[int, int, str]], data: bytes, depth: int) -> list[str]:
    """The kind of each sector, where it cannot be one thing to QEMU and another one to us.

    Without a backing file QEMU stores zeros where nothing is, we store nothing. QEMU writes all of
    a request to zero as data when a part of it is compressed, we write that part.
    """
    kinds = [kind for _, length, kind in extents for _ in range(length // 512)]
    for number, kind in enumerate(kinds):
        if (kind == "UNALLOCATED" and not depth) or (
            kind == "DATA" and not any(data[number * 512 : number * 512 + 512])
        ):
            kinds[number] = "ZERO"
    return kinds
