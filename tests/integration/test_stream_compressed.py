"""Streams of compressed bases: workers unpack them; the bytes are those of every other way."""

import asyncio
import os
import random
from errno import EIO

import pytest

from liveblockd.formats.qcow2 import inflating, populate
from liveblockd.formats.qcow2.compression import HAS_ZSTD, deflate
from liveblockd.formats.qcow2.layout import Compression
from tests.integration.test_stream_copies import check, run
from tests.simulation.bench import Bench
from tests.support.qcow2_images import needs

pytestmark = needs("qemu-img")

KIB, MIB = 1024, 1024 * 1024
CLUSTER = 64 * KIB
SIZE = 12 * MIB + 5 * CLUSTER + 3 * 512
KINDS = ["zlib"] + ["zstd"] * HAS_ZSTD


def make_images(directory, kind, seed=3):
    """A base of compressed and of plain clusters, and of zeros; an empty top; what both read as."""
    rng = random.Random(seed)
    content = bytearray(rng.choices(b"etaoin shrdlu", k=SIZE))
    for first, count in ((3, 1), (20, 9), (100, 1)):
        content[first * CLUSTER : (first + count) * CLUSTER] = bytes(count * CLUSTER)
    content[40 * CLUSTER : 60 * CLUSTER] = rng.randbytes(20 * CLUSTER)  # cannot be packed
    raw, base, top = (directory / name for name in ("raw", "base.qcow2", "top.qcow2"))
    raw.write_bytes(content)
    run("qemu-img", "convert", "-c", "-O", "qcow2", "-o", f"compression_type={kind}", raw, base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    return content, base, top


async def stream(base, top, *, direct=False, guest=None, end="COMPLETED", error=""):
    """Stream, with a guest's writes meanwhile; clusters that workers unpacked."""
    bench = Bench()
    cache = {"direct": direct}
    try:
        node = await bench.open(
            driver="qcow2",
            node_name="top",
            file={"driver": "file", "filename": str(top), "cache": cache},
            backing={
                "driver": "qcow2",
                "file": {"driver": "file", "filename": str(base), "cache": cache},
            },
        )
        job = await bench.stream("top")
        if guest is not None:
            await guest(node)
        await bench.end(job)
        assert bench.course()[-3:] == [end, "concluded", "null"], bench.course()
        assert error in bench.completion().get("error", "")
        return node.driver._populator.unpacked
    finally:
        await bench.close()


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("kind", KINDS)
async def test_workers_unpack(tmp_path, kind, direct):
    if direct:
        try:
            os.close(os.open(tmp_path, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT))
        except OSError:
            pytest.skip("no O_DIRECT on this file system")
    content, base, top = make_images(tmp_path, kind)
    unpacked = await stream(base, top, direct=direct)
    assert 12 * MIB // CLUSTER - 40 < unpacked < 12 * MIB // CLUSTER
    check(tmp_path, top, bytes(content))


@pytest.mark.parametrize("kind", KINDS)
async def test_without_workers_and_libraries(tmp_path, kind, monkeypatch):
    """The slow way gives the same; so does Python's own module."""
    content, base, top = make_images(tmp_path, kind)
    if kind == "zstd":
        with monkeypatch.context() as patch:
            patch.setattr(inflating, "_library", lambda: None)
            assert await stream(base, top) > 100
        check(tmp_path, top, bytes(content))
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)

    async def refuse(*args):
        raise OSError(EIO, os.strerror(EIO))

    monkeypatch.setattr(populate.Populator, "populate_packed", refuse)
    assert await stream(base, top) == 0
    check(tmp_path, top, bytes(content))


async def test_guests_writes_win(tmp_path, monkeypatch):
    content, base, top = make_images(tmp_path, "zlib")
    rng = random.Random(9)
    loop = asyncio.get_running_loop()
    unpacked, go_on = asyncio.Event(), asyncio.Event()
    plain = populate.unpack_clusters

    def slow(work):
        answer = plain(work)
        loop.call_soon_threadsafe(unpacked.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(30)
        return answer

    async def guest(node):
        async with asyncio.timeout(30):
            await unpacked.wait()
            for cluster in (0, 1, 17, 70, 192):
                data = rng.randbytes(CLUSTER + 77)
                content[cluster * CLUSTER + 9 : (cluster + 1) * CLUSTER + 86] = data
                await node.write(cluster * CLUSTER + 9, data)
        go_on.set()

    monkeypatch.setattr(populate, "unpack_clusters", slow)
    assert await stream(base, top, guest=guest) > 100
    check(tmp_path, top, bytes(content))


@pytest.mark.parametrize("kind", KINDS)
async def test_a_damaged_cluster_ends_the_job(tmp_path, kind):
    """The chain stays as it was."""
    content, base, top = make_images(tmp_path, kind)
    packed = deflate(bytes(content[:CLUSTER]), CLUSTER, Compression[kind.upper()])
    with base.open("r+b") as file:
        place = file.read().index(packed[:100]) if kind == "zstd" else 5 * CLUSTER + 16
        file.seek(place)
        file.write(b"\xff" * 3000)
    await stream(base, top, error="a compressed cluster is damaged")
    run("qemu-img", "check", top)
    assert top.read_bytes()[8:16] != bytes(8), "no backing file is named any more"


@pytest.mark.skipif("zstd" not in KINDS, reason="backports.zstd is not installed")
def test_frames_that_are_not_one_cluster():
    """What the library does not take whole is left to the module, and nothing gets out of place."""
    import numpy as np
    from backports import zstd

    if inflating._library() is None:
        pytest.skip("no libzstd.so.1")
    data = bytes(random.Random(4).choices(b"abcdefgh", k=CLUSTER))
    one = zstd.compress(data)
    two = zstd.compress(data[:1000]) + zstd.compress(data[1000:])
    bomb = zstd.compress(data + bytes(1 << 20))
    parts = [one + b"rest", two, bomb, one]
    place = np.full(6 * CLUSTER, 7, np.uint8)
    left = []
    for number, part in enumerate(parts):
        array = np.frombuffer(part, np.uint8)
        where = place[(number + 1) * CLUSTER : (number + 2) * CLUSTER]
        left.append(inflating._decompress_frames(where, array, [(0, len(part))], CLUSTER))
    assert left == [[], [0], [0], []]
    assert (place[:CLUSTER] == 7).all() and (place[5 * CLUSTER :] == 7).all()
    inflating.inflate_into(place[CLUSTER : 5 * CLUSTER], parts, CLUSTER, Compression.ZSTD)
    assert bytes(place[CLUSTER : 5 * CLUSTER]) == data * 4
    for wrong in (b"", b"garbage" * 100, one[: len(one) // 2], bytes(512)):
        with pytest.raises(OSError, match=r"compressed cluster"):
            inflating.inflate_into(np.zeros(CLUSTER, np.uint8), [wrong], CLUSTER, Compression.ZSTD)
