"""Compressed clusters: written, packed, replaced, and data that is none."""

from __future__ import annotations

import random
import time
import zlib
from errno import EINVAL, EIO, ENOSPC, ENOTSUP
from pathlib import Path
from typing import Any

import pytest

from liveblockd.formats.luks import new_luks
from liveblockd.formats.qcow2 import compression, reader
from liveblockd.formats.qcow2.compression import HAS_ZSTD, deflate, inflate
from liveblockd.formats.qcow2.layout import Compression
from liveblockd.storage.driver import ExtentKind
from tests.support.memory import MemoryDriver, fail_once
from tests.support.qcow2_images import check, needs, new_qcow2, open_qcow2, run
from tests.support.qcow2_oracle import Oracle

K = 1024
CLUSTER = 64 * K
KINDS = [
    Compression.ZLIB,
    pytest.param(
        Compression.ZSTD,
        marks=pytest.mark.skipif(not HAS_ZSTD, reason="backports.zstd is not installed"),
    ),
]


def text(seed: int, length: int) -> bytes:
    """Bytes that shrink to about a third."""
    rng = random.Random(seed)
    return bytes(rng.choices(b"abcdefgh", k=length))


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: Compression) -> None:
    data = text(1, CLUSTER)
    packed = deflate(data, CLUSTER, kind)
    assert packed is not None and len(packed) < CLUSTER // 2
    assert inflate(packed + b"the next one", CLUSTER, kind) == data
    short = deflate(b"abc", CLUSTER, kind)
    assert short is not None and inflate(short, CLUSTER, kind) == b"abc".ljust(CLUSTER, b"\0")
    assert deflate(random.Random(2).randbytes(CLUSTER), CLUSTER, kind) is None


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_cluster_is_an_error(kind: Compression) -> None:
    packed = deflate(text(3, CLUSTER), CLUSTER, kind)
    assert packed is not None
    for data in (b"", b"garbage" * 100, packed[: len(packed) // 2], bytes(512)):
        with pytest.raises(OSError) as caught:
            inflate(data, CLUSTER, kind)
        assert caught.value.errno == EIO


@pytest.mark.parametrize("kind", KINDS)
def test_a_bomb_gives_a_cluster(kind: Compression) -> None:
    bomb = deflate(bytes(64 << 20), 64 << 20, kind)
    assert bomb is not None
    assert inflate(bomb, CLUSTER, kind) == bytes(CLUSTER)


@pytest.mark.skipif(not HAS_ZSTD, reason="backports.zstd is not installed")
@pytest.mark.parametrize("inside", [b"", b"a"])
def test_many_tiny_frames_take_no_time(inside: bytes) -> None:
    """4 MiB of them, as much as an entry can name: that took minutes."""
    zstd = pytest.importorskip("backports.zstd")
    frame = zstd.compress(inside)
    started = time.thread_time()
    with pytest.raises(OSError, match="too many frames"):
        inflate(frame * ((4 << 20) // len(frame)), 2 << 20, Compression.ZSTD)
    assert time.thread_time() - started < 5
    few = zstd.compress(bytes(K)) * 64
    assert inflate(few, CLUSTER, Compression.ZSTD) == bytes(CLUSTER)


async def test_not_where_data_lie_plainly_or_under_a_cipher() -> None:
    """A data file has no compressed clusters; and encrypted images no data in clear."""
    data = MemoryDriver()
    file = await new_qcow2(size=CLUSTER, data_file=data)
    image = await open_qcow2(file, data_file=data)
    with pytest.raises(OSError) as caught:
        await image.write_compressed(0, text(1, CLUSTER))
    assert caught.value.errno == ENOTSUP
    await image.close()
    pytest.importorskip("cryptography")
    header = new_luks(b"x", key_bytes=32, iter_time=1)
    file = await new_qcow2(size=CLUSTER, crypto_header=header)
    encrypt = {"format": "luks", "key-secret": "s"}
    image = await open_qcow2(file, secret=lambda _: b"x", encrypt=encrypt)
    with pytest.raises(OSError) as caught:
        await image.write_compressed(0, text(1, CLUSTER))
    assert caught.value.errno == ENOTSUP
    await image.close()


def test_the_window_is_that_of_the_format() -> None:
    packed = deflate(text(4, 8 * CLUSTER), 8 * CLUSTER, Compression.ZLIB)
    assert packed is not None
    assert zlib.decompress(packed, wbits=-12) == text(4, 8 * CLUSTER)


@pytest.mark.parametrize("kind", KINDS)
async def test_clusters_share_host_clusters(kind: Compression) -> None:
    data = text(5, 32 * CLUSTER)
    disk = await new_qcow2(size=len(data), compression=kind.name.lower())
    empty = disk.length
    image = await open_qcow2(disk)
    await image.write_compressed(0, data)
    assert {extent.kind for extent in await image.map(0, len(data))} == {ExtentKind.COMPRESSED}
    assert bytes(await image.read(0, len(data))) == data
    assert disk.length - empty < len(data) // 2
    await image.close()
    oracle = Oracle(disk.content())
    assert not oracle.errors and not oracle.leaks
    assert oracle.read() == data
    assert max(oracle.references.values()) > 1


@pytest.mark.parametrize("refcount_bits", [1, 2, 16])
async def test_replacing_gives_everything_back(refcount_bits: int) -> None:
    disk = await new_qcow2(size=16 * CLUSTER, refcount_bits=refcount_bits)
    image = await open_qcow2(disk, discard="unmap")
    for seed in range(6):
        await image.write_compressed(0, text(seed, 16 * CLUSTER))
        await image.write(seed * CLUSTER, b"x" * 100)
        await image.flush()
    data = bytes(await image.read(0, image.length))
    assert data[: 5 * CLUSTER] == text(5, 16 * CLUSTER)[: 5 * CLUSTER]
    assert (
        data[5 * CLUSTER :][:200] == b"x" * 100 + text(5, 16 * CLUSTER)[5 * CLUSTER + 100 :][:100]
    )
    await image.discard(0, image.length)
    await image.close()
    oracle = Oracle(disk.content())
    assert not oracle.errors and not oracle.leaks
    assert len(oracle.references) == 5  # header, L1, refcount table and block, one L2 table


async def test_only_whole_clusters() -> None:
    disk = await new_qcow2(size=CLUSTER + 512)
    image = await open_qcow2(disk)
    for offset, length in ((512, CLUSTER), (0, 512)):
        with pytest.raises(OSError) as caught:
            await image.write_compressed(offset, bytes(length))
        assert caught.value.errno == EINVAL
    await image.write_compressed(CLUSTER, b"e" * 512)
    assert bytes(await image.read(CLUSTER, 512)) == b"e" * 512
    await image.close()


async def test_a_failed_write_leaves_what_was() -> None:
    disk = await new_qcow2(size=4 * CLUSTER)
    image = await open_qcow2(disk)
    await image.write_compressed(0, text(1, CLUSTER))
    disk.hook = fail_once("write", ENOSPC)
    with pytest.raises(OSError):
        await image.write_compressed(0, text(2, CLUSTER))
    disk.hook = None
    assert bytes(await image.read(0, CLUSTER)) == text(1, CLUSTER)
    await image.close()
    oracle = Oracle(disk.content())
    assert not oracle.errors and not oracle.leaks


@needs("qemu-img")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extended", [False, True])
async def test_qemu_reads_it(tmp_path: Path, kind: Compression, extended: bool) -> None:
    data = text(6, 20 * CLUSTER) + random.Random(7).randbytes(CLUSTER) + b"end".ljust(512)
    disk = await new_qcow2(
        size=len(data), compression=kind.name.lower(), extended_l2=extended, version=3
    )
    image = await open_qcow2(disk)
    await image.write_compressed(0, data)
    await image.close()
    assert isinstance(disk, MemoryDriver)
    path, raw = tmp_path / "a.qcow2", tmp_path / "a.raw"
    path.write_bytes(disk.content())
    assert check(path) == {}
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
    assert raw.read_bytes() == data


@pytest.mark.skipif(compression.fast_zlib is None, reason="isal is not installed")
@pytest.mark.parametrize("seed", range(8))
def test_the_fast_library_is_used_and_agrees_with_zlib(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    data = text(seed, CLUSTER - CLUSTER // 3).ljust(CLUSTER, bytes([seed]))
    packed = deflate(data, CLUSTER, Compression.ZLIB)
    assert packed is not None
    used = []
    fast = compression.fast_zlib.decompressobj

    def noted(*arguments: Any) -> Any:
        used.append(arguments)
        return fast(*arguments)

    monkeypatch.setattr(compression.fast_zlib, "decompressobj", noted)
    assert inflate(packed + b"x" * 100, CLUSTER, Compression.ZLIB) == data
    assert used == [(-12,)]
    monkeypatch.setattr(compression, "fast_zlib", None)
    assert inflate(packed + b"x" * 100, CLUSTER, Compression.ZLIB) == data


@pytest.mark.parametrize("batch", [CLUSTER, 3 * CLUSTER, 64 * CLUSTER])
@pytest.mark.parametrize("kind", KINDS)
async def test_reads_of_many_clusters(
    monkeypatch: pytest.MonkeyPatch, kind: Compression, batch: int
) -> None:
    """Neighbours on the disk that are none in the file, and the other way round."""
    monkeypatch.setattr(reader, "INFLATE_BATCH", batch)
    rng = random.Random(11)
    count, want = 24, bytearray(24 * CLUSTER)
    file = await new_qcow2(size=count * CLUSTER, compression=kind.name.lower())
    image = await open_qcow2(file)
    order = list(range(count))
    rng.shuffle(order)
    for number, cluster in enumerate(order):
        data = text(number, CLUSTER)
        want[cluster * CLUSTER : (cluster + 1) * CLUSTER] = data
        await image.write_compressed(cluster * CLUSTER, data)
    for _ in range(40):
        offset = rng.randrange(count * CLUSTER)
        length = rng.randrange(1, count * CLUSTER - offset + 1)
        assert bytes(await image.read(offset, length)) == want[offset : offset + length]
    await image.close()
