"""Small valid qcow2 images, and what a hostile hand does to them.

``seeds()`` makes images of 512-byte and 4 KiB clusters, by our own engine and, where it is
installed, by qemu-img (compressed clusters, internal snapshots, bitmaps, zstd, lazy refcounts,
extended L2). ``mutate`` knows where the tables of an image are and writes there what hurts most.
Everything follows from the ``random.Random`` that is given.
"""

from __future__ import annotations

import asyncio
import functools
import random
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.support.memory import MemoryDriver
from tests.support.qcow2_images import new_qcow2, open_qcow2

OFFSET_MASK = 0x00FFFFFFFFFFFE00

#: (offset, bytes) of the header fields
FIELDS = (
    (4, 4), (8, 8), (16, 4), (20, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 8), (56, 4),
    (60, 4), (64, 8), (72, 8), (80, 8), (88, 8), (96, 4), (100, 4), (104, 1), (105, 7),
)  # fmt: skip
EXTENSIONS = (0, 0xE2792ACA, 0x6803F857, 0x23852875, 0x0537BE77, 0x44415441, 0xDEADBEEF)


@dataclass(frozen=True)
class Seed:
    """A valid image and where its structures are (host offsets in bytes)."""

    name: str
    content: bytes

    def field(self, offset: int, length: int) -> int:
        return int.from_bytes(self.content[offset : offset + length], "big")

    @functools.cached_property
    def cluster_size(self) -> int:
        return 1 << self.field(20, 4)

    @functools.cached_property
    def tables(self) -> dict[str, list[tuple[int, int]]]:
        """Places of entries of 8 bytes: name to (offset, entries)."""
        size, content = self.cluster_size, self.content
        l1 = (self.field(40, 8), self.field(36, 4))
        refcount_table = (self.field(48, 8), min(self.field(56, 4) * size // 8, 64))
        found = {"l1": [l1], "refcount table": [refcount_table]}

        def entries(place: tuple[int, int]) -> list[int]:
            return [
                struct.unpack_from(">Q", content, place[0] + 8 * i)[0] & OFFSET_MASK
                for i in range(place[1])
                if place[0] + 8 * i + 8 <= len(content)
            ]

        found["l2"] = [(o, size // 8) for o in entries(l1) if o]
        found["refcount block"] = [(o, size // 8) for o in entries(refcount_table) if o]
        if self.field(60, 4):
            found["snapshots"] = [(self.field(64, 8), 40)]
        if self.field(4, 4) == 3:
            position = self.field(100, 4)
            while position + 8 <= size:
                kind, length = struct.unpack_from(">II", content, position)
                if not kind:
                    break
                if kind == 0x23852875:
                    directory = struct.unpack_from(">Q", content, position + 24)[0]
                    found["bitmap directory"] = [(directory, 6)]
                    table = struct.unpack_from(">Q", content, directory)[0]
                    found["bitmap table"] = [(table, 2)]
                position += 8 + -(-length // 8) * 8
        return found


def _run(*arguments: str) -> None:
    subprocess.run(arguments, check=True, capture_output=True, timeout=30)


async def _own(cluster_size: int, **options: object) -> bytes:
    disk = MemoryDriver()
    size = cluster_size * 96
    await new_qcow2(disk, size=size, cluster_size=cluster_size, **options)
    image = await open_qcow2(disk)
    chance = random.Random(cluster_size)
    for cluster in range(0, 96, 7):
        await image.write(cluster * cluster_size, chance.randbytes(cluster_size))
    await image.write_zeroes(21 * cluster_size, 2 * cluster_size)
    await image.close()
    return disk.content()


def _qemu(directory: Path, name: str, options: str, *, compressed: bool = False) -> bytes:
    raw, image = directory / "raw", directory / name
    raw.write_bytes((b"liveblockd " * 500 + bytes(3000)) * 6)
    _run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *(["-c"] if compressed else []),
         "-o", options, str(raw), str(image))  # fmt: skip
    if "snapshot" in name:
        _run("qemu-img", "snapshot", "-c", "one", str(image))
        _run("qemu-io", "-f", "qcow2", "-c", "write -P 5 2k 4k", str(image))
        _run("qemu-img", "snapshot", "-c", "two", str(image))
    if "bitmap" in name:
        _run("qemu-img", "bitmap", "--add", "-g", "4096", str(image), "b0")
        _run("qemu-io", "-f", "qcow2", "-c", "write -P 6 1k 9k", str(image))
    return image.read_bytes()


@functools.cache
def seeds() -> tuple[Seed, ...]:
    """All that can be made here."""
    found = []
    for name, size, options in (
        ("own-512", 512, {}),
        ("own-4k", 4096, {}),
        ("own-v2", 512, {"version": 2}),
        ("own-bits1", 512, {"refcount_bits": 1}),
        ("own-bits64", 512, {"refcount_bits": 64}),
    ):
        found.append(Seed(name, asyncio.run(_own(size, **options))))
    if shutil.which("qemu-img") and shutil.which("qemu-io"):
        with tempfile.TemporaryDirectory() as path:
            for name, options, compressed in (
                ("qemu-512", "cluster_size=512", False),
                ("qemu-zlib", "cluster_size=512", True),
                ("qemu-zstd", "cluster_size=4096,compression_type=zstd", True),
                ("qemu-snapshot", "cluster_size=512", False),
                ("qemu-bitmap", "cluster_size=4096", False),
                ("qemu-lazy", "cluster_size=4096,lazy_refcounts=on", False),
                ("qemu-extended", "cluster_size=16384,extended_l2=on", False),
            ):
                content = _qemu(Path(path), name, options, compressed=compressed)
                found.append(Seed(name, content))
    return tuple(found)


def interesting(chance: random.Random, seed: Seed, bits: int) -> int:
    """A value that programs get wrong."""
    size = seed.cluster_size
    end = len(seed.content)
    place = chance.choice([p for group in seed.tables.values() for p in group])[0]
    offsets = (
        0, size, place, place + 512, end, end - size, end // size * size + size, 1 << 32,
        1 << 40, (1 << 56) - size, 1 << 56, chance.randrange(end // size + 2) * size,
    )  # fmt: skip
    offset = chance.choice(offsets)
    flags = chance.choice((0, 0, 1 << 63, 1 << 62, 3 << 62, 1, 1 << 63 | 1, 1 << 8))
    plain = (
        0, 1, 2, 3, 8, 9, 21, 22, 63, 64, 255, 0x7FFF, 0xFFFF, 1 << 31, (1 << 31) - 1,
        (1 << 32) - 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 63) - 512, end, size,
        chance.getrandbits(bits), chance.getrandbits(bits), 1 << chance.randrange(bits),
    )  # fmt: skip
    value = offset | flags if chance.random() < 0.6 else chance.choice(plain)
    return value & ((1 << bits) - 1)


def mutate(chance: random.Random, seed: Seed) -> bytes:
    """The image with one to four wounds."""
    data = bytearray(seed.content)
    for _ in range(chance.choice((1, 1, 1, 2, 2, 4))):
        _wound(chance, seed, data)
    return bytes(data)


def _wound(chance: random.Random, seed: Seed, data: bytearray) -> None:
    kind = chance.choice(("field", "field", "extension", "table", "table", "table", "flip", "cut"))
    if kind == "field":
        offset, length = chance.choice(FIELDS)
        if chance.random() < 0.25:  # a neighbour of what was there
            value = seed.field(offset, length) + chance.choice((-1, 1, 1 << 3, 1 << 4))
        else:
            value = interesting(chance, seed, length * 8)
        _put(data, offset, (value & ((1 << length * 8) - 1)).to_bytes(length, "big"))
    elif kind == "extension":
        length = chance.choice((0, 1, 8, 15, 16, 24, 48, 200, 4096, (1 << 32) - 1))
        place = seed.field(100, 4) if seed.field(4, 4) == 3 else 72
        place += chance.choice((0, 0, 8, 16, 24, 200))
        _put(data, place, struct.pack(">II", chance.choice(EXTENSIONS), length))
    elif kind == "table":
        offset, entries = chance.choice(seed.tables[chance.choice(sorted(seed.tables))] or [(0, 1)])
        index = chance.choice((0, 1, entries - 1, chance.randrange(max(1, entries))))
        value = interesting(chance, seed, 64)
        width = chance.choice((8, 8, 8, 4, 2))
        _put(data, offset + index * 8, (value >> (64 - 8 * width)).to_bytes(width, "big"))
    elif kind == "flip" and data:
        for _ in range(chance.choice((1, 8))):
            position = chance.randrange(min(len(data), chance.choice((112, 4096, 1 << 20))))
            data[position] ^= 1 << chance.randrange(8)
    elif kind == "cut" and chance.random() < 0.3:
        del data[chance.randrange(len(data) + 1) :]


def _put(data: bytearray, offset: int, value: bytes) -> None:
    if offset >= 0 and offset + len(value) <= len(data):
        data[offset : offset + len(value)] = value
