"""Amend and preallocation: the same disk afterwards, by our reading and by QEMU's; cut anywhere."""

from __future__ import annotations

import json
import random

import pytest

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.amend import Amendment
from liveblockd.formats.qcow2.header import parse
from liveblockd.formats.qcow2.preallocate import Preallocation
from tests.simulation import forms
from tests.support.memory import MemoryDriver
from tests.support.qcow2_images import check, needs, new_qcow2, open_qcow2, run
from tests.support.qcow2_oracle import Oracle
from tests.unit.formats.test_qcow2_snapshots import SIZE, Recorder, a_disk, cut, do, scribble

UNLOCKED = {"secret": forms.secret, **forms.unlocking(encrypted=True)}


async def prepared(rng, **options):
    disk, image, model = await a_disk(rng, **options)
    states: dict[str, bytes] = {}
    if rng.random() < 0.7:
        for _ in range(rng.randrange(4)):
            await do(image, rng, model, states)
            await scribble(image, rng, model, 4)
    await image.close()
    return disk, model, states


def an_amendment(rng, version, snapshots):
    to = rng.choice((2, 3, 3, None))
    bits = rng.choice((4, 8, 16, 32, 64, None)) if snapshots else rng.choice((1, 2, 16, 64, None))
    if (to or version) == 2:
        bits = 16 if version == 3 else None
    lazy = rng.choice((True, False, None)) if (to or version) == 3 else None
    size = None if snapshots else rng.choice((None, SIZE, SIZE * 2))
    return Amendment(to, lazy, bits, size)


@pytest.mark.parametrize("seed", range(40))
async def test_the_disk_is_the_same_afterwards(seed):
    rng = random.Random(seed)
    version = rng.choice((2, 3))
    disk, model, states = await prepared(rng, version=version)
    amendment = an_amendment(rng, version, states)
    initial = disk.content()
    disk.events.clear()
    image = await open_qcow2(disk)
    told = []
    await image.amend(amendment, lambda done, total: told.append(done / total))
    assert told[-1] == 1.0 and told == sorted(told)
    await image.close()
    oracle = Oracle(disk.content())
    assert (oracle.errors, oracle.leaks) == ([], []), (seed, amendment)
    size = amendment.size or len(model)
    assert oracle.read() == bytes(model).ljust(size, b"\0"), (seed, amendment)
    assert oracle.version == (amendment.version or version)
    if amendment.refcount_bits:
        assert 1 << oracle.refcount_order == amendment.refcount_bits
    for number, (snapshot_id, *_) in enumerate(oracle.snapshots):
        assert oracle.read_snapshot(number) == states[snapshot_id], seed
    for end in range(len(disk.events)):
        oracle = Oracle(cut(initial, disk.events[:end], rng))
        assert oracle.errors == [], (seed, end, amendment)
        assert oracle.read()[: len(model)] == bytes(model), (seed, end, amendment)
        for number, (snapshot_id, *_) in enumerate(oracle.snapshots):
            assert oracle.read_snapshot(number) == states[snapshot_id], (seed, end)


@needs("qemu-img")
@pytest.mark.parametrize("seed", range(6))
async def test_qemu_finds_nothing_wrong(seed, tmp_path):
    rng = random.Random(seed)
    disk, model, _ = await prepared(rng, version=3, refcount_bits=16)
    image = await open_qcow2(disk)
    path, raw = tmp_path / "disk.qcow2", tmp_path / "raw"
    for amendment in (
        Amendment(version=2),
        Amendment(version=3, lazy_refcounts=True, refcount_bits=64),
        Amendment(refcount_bits=8, lazy_refcounts=False),
    ):
        await image.amend(amendment)
        await image.close()
        path.write_bytes(disk.content())
        assert check(path) == {}
        run("qemu-img", "convert", "-O", "raw", path, raw)
        assert raw.read_bytes() == bytes(model), (seed, amendment)
        disk = Recorder()
        await disk.write(0, path.read_bytes())
        image = await open_qcow2(disk)
    info = json.loads(run("qemu-img", "info", "--output=json", path))
    data = info["format-specific"]["data"]
    assert (data["compat"], data["refcount-bits"], data["lazy-refcounts"]) == ("1.1", 8, False)


async def test_zero_clusters_above_a_backing_file_are_written_out():
    below = MemoryDriver.of(b"b" * 65536)
    disk = Recorder()
    await new_qcow2(disk, size=65536, cluster_size=4096, backing_file="below", backing_format="raw")
    image = await open_qcow2(disk, below)
    await image.write_zeroes(4096, 8192)
    await image.write(20000, b"x" * 100)
    await image.create_snapshot("s", date_nsec=0)
    await image.write_zeroes(0, 100)
    expected = bytes(await image.read(0, 65536))
    await image.amend(Amendment(version=2))
    await image.close()
    oracle = Oracle(disk.content())
    assert (oracle.errors, oracle.leaks) == ([], [])
    assert oracle.read(b"b" * 65536) == expected
    assert oracle.backing == "below"


async def encrypted_above(below):
    """An encrypted image with zero clusters, some of them in an internal snapshot too."""
    pytest.importorskip("cryptography")
    disk = Recorder()
    header = forms.crypto_header(random.Random(1))
    await new_qcow2(
        disk, size=len(below), cluster_size=4096, backing_file="below", backing_format="raw",
        crypto_header=header,
    )  # fmt: skip
    image = await open_qcow2(disk, MemoryDriver.of(below), **UNLOCKED)
    await image.write(8192, b"x" * 4096)
    await image.write_zeroes(4096, 12288)  # never written; with a cluster; never written
    await image.create_snapshot("s", date_nsec=0)
    await image.write_zeroes(28672, 4096)
    return disk, image


async def test_zero_clusters_of_an_encrypted_image_are_written_as_who_decrypts_will_read_them():
    below = b"b" * 65536
    disk, image = await encrypted_above(below)
    then = below[:4096] + bytes(12288) + below[16384:]
    now = then[:28672] + bytes(4096) + then[32768:]
    assert await image.read(0, 65536) == now
    await image.amend(Amendment(version=2))
    await image.close()
    for snapshot, expected in ((None, now), ("1", then)):
        read_only = snapshot is not None
        image = await open_qcow2(disk, MemoryDriver.of(below), read_only=read_only, **UNLOCKED)
        assert image.format_specific()["data"]["compat"] == "0.10"
        if snapshot is not None:
            await image.load_snapshot(snapshot)
        assert await image.read(0, 65536) == expected, snapshot
        await image.close()


@needs("qemu-img", "qemu-io")
async def test_qemu_reads_zeros_in_an_encrypted_image_of_version_2(tmp_path):
    disk, image = await encrypted_above(b"b" * 65536)
    await image.amend(Amendment(version=2))
    await image.close()
    path, below = tmp_path / "disk.qcow2", tmp_path / "below"
    path.write_bytes(disk.content())
    below.write_bytes(b"b" * 65536)
    secret = f"secret,id={forms.SECRET},data={forms.PASSPHRASE.decode()}"
    node = (
        f"driver=qcow2,encrypt.key-secret={forms.SECRET},file.filename={path},"
        f"backing.driver=raw,backing.file.driver=file,backing.file.filename={below}"
    )
    for offset in (4096, 8192, 12288, 28672):
        told = run("qemu-io", "--object", secret, "-r", "--image-opts", node,
                   "-c", f"read -P 0 {offset} 4096")  # fmt: skip
        assert "read 4096/4096" in told and "Pattern verification failed" not in told, offset
    assert not json.loads(
        run("qemu-img", "check", "--output=json", "--object", secret, "--image-opts", node)
    ).get("corruptions")


async def test_zeros_stay_above_what_was_opened_below_though_the_header_names_nothing():
    below = MemoryDriver.of(b"b" * 65536)
    disk = Recorder()
    await new_qcow2(disk, size=65536, cluster_size=4096)
    image = await open_qcow2(disk, below)
    await image.write_zeroes(4096, 8192)
    await image.amend(Amendment(version=2))
    await image.close()
    expected = b"b" * 4096 + bytes(8192) + b"b" * (65536 - 12288)
    image = await open_qcow2(disk, below)
    assert await image.read(0, 65536) == expected
    await image.close()


@pytest.mark.parametrize(
    ("options", "amendment", "message"),
    [
        ({"refcount_bits": 64}, Amendment(version=2), "compat=0.10 requires refcount_bits=16"),
        ({"version": 2}, Amendment(refcount_bits=64), "Refcount widths other than 16 bits require"),
        ({"version": 2}, Amendment(lazy_refcounts=True), "Lazy refcounts only supported with"),
        ({}, Amendment(refcount_bits=3), "must be a power of two"),
        ({}, Amendment(size=100), "multiple of 512"),
    ],
)
async def test_what_cannot_be(options, amendment, message):
    disk = Recorder()
    await new_qcow2(disk, size=SIZE, **options)
    before = disk.content()
    image = await open_qcow2(disk)
    with pytest.raises(BlockError, match=message):
        await image.amend(amendment)
    await image.close()
    assert disk.content() == before


async def test_a_width_that_the_refcounts_do_not_fit_in():
    _, image, model = await a_disk(random.Random(3), version=3, refcount_bits=16)
    await image.create_snapshot("s", date_nsec=0)
    with pytest.raises(BlockError, match=r"to 1 bits: Cluster at offset .* has a refcount of 2"):
        await image.amend(Amendment(refcount_bits=1))
    assert bytes(await image.read(0, SIZE)) == bytes(model)


# -- preallocation


@needs("qemu-img")
@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("cluster_size", [512, 65536])
@pytest.mark.parametrize("version", [2, 3])
async def test_a_preallocated_image(mode, cluster_size, version, tmp_path):
    size = 3 * 1024 * 1024 + 512
    disk = Recorder()
    await new_qcow2(disk, size=size, cluster_size=cluster_size, version=version, preallocation=mode)
    path = tmp_path / "disk.qcow2"
    path.write_bytes(disk.content())
    assert check(path) == {}
    runs = json.loads(run("qemu-img", "map", "--output=json", path))
    assert sum(r["length"] for r in runs if r["data"]) == size
    assert all("offset" in r for r in runs)
    image = await open_qcow2(disk)
    assert not any(bytes(await image.read(0, size)))
    assert image.write_nowait(100_000, b"x" * 100) or cluster_size == 512
    await image.close()


async def test_growth_is_preallocated_where_asked():
    rng = random.Random(1)
    disk, image, model = await a_disk(rng, cluster_size=4096)
    await image.truncate(4 * SIZE)
    await image.preallocate(Preallocation.METADATA, SIZE, 3 * SIZE)
    model.extend(bytes(3 * SIZE))
    await scribble(image, rng, model, 10)
    assert bytes(await image.read(0, 4 * SIZE)) == bytes(model)
    await image.close()
    oracle = Oracle(disk.content())
    assert (oracle.errors, oracle.leaks) == ([], [])
    assert oracle.read() == bytes(model)
    assert all(oracle.entry(o) for o in range(SIZE, 4 * SIZE, 4096))


async def test_preallocation_above_a_backing_file_is_refused():
    with pytest.raises(BlockError, match="Backing file and preallocation"):
        await new_qcow2(size=SIZE, backing_file="x", preallocation="full")


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2)])
@pytest.mark.parametrize("length", [5, 60, 300])
async def test_a_header_written_after_another_version_still_names_the_backing_file(
    before: int, after: int, length: int, cluster_size: int
) -> None:
    """The name had moved with the length of the header; the next write of it forgot that."""
    name = "b" * min(length, 20 if cluster_size == 512 else length)
    disk = await new_qcow2(
        size=1 << 20, cluster_size=cluster_size, version=before,
        backing_file=name, backing_format="raw",
    )  # fmt: skip
    image = await open_qcow2(disk)
    await image.amend(Amendment(version=after))
    assert parse(disk.content()[:cluster_size]).backing_name == name
    if after == 3:
        await image.amend(Amendment(refcount_bits=32))
    await image.create_snapshot("another header", date_nsec=0)
    header = parse(disk.content()[:cluster_size])
    assert (header.backing_name, header.backing_format) == (name, "raw")
    await image.close()
    assert parse(disk.content()[:cluster_size]).backing_name == name
