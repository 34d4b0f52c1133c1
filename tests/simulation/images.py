"""Chains of qcow2 images, made by our own engine, and judged by qemu-img."""

from __future__ import annotations

import json
import os
import random
import subprocess

from liveblockd.formats.qcow2.create import create_qcow2
from liveblockd.storage.driver import Permission
from tests.simulation.bench import Bench

KIB = 1024
ALLOW_LEAKS = bool(os.environ.get("STRESS_ALLOW_LEAKS"))
WRITER = Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE


async def create(bench: Bench, path: str, **options: object) -> None:
    """An empty image."""
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o644))
    file = await bench.graph.open(bench.options(driver="file", filename=path), monitor_owned=False)
    user = await bench.graph.attach(file, WRITER)
    await create_qcow2(file, **options)  # type: ignore[arg-type]
    await bench.graph.detach(user)


def random_size(rng: random.Random, last: int | None) -> int:
    """Bytes, any multiple of 512; mostly as the image below."""
    if last is not None and rng.random() < 0.6:
        return last
    size = rng.randrange(64 * KIB, 1536 * KIB)
    return size // 512 * 512 if rng.random() < 0.5 else size // (64 * KIB) * 64 * KIB or 64 * KIB


async def fill(bench: Bench, rng: random.Random, path: str, model: bytearray) -> None:
    """Write pieces of all kinds into an image; ``model`` follows."""
    node = await bench.open(
        driver="qcow2", node_name="fill", discard="unmap", file={"driver": "file", "filename": path}
    )
    user = await bench.graph.attach(node, WRITER)
    for _ in range(rng.randrange(1, 14)):
        unit = rng.choice((1, 512, 4 * KIB, 64 * KIB))
        offset = rng.randrange(len(model)) // unit * unit
        length = max(1, rng.randrange(rng.choice((4 * KIB, 64 * KIB, 400 * KIB))) // unit) * unit
        length = min(length, len(model) - offset)
        kind = rng.random()
        if kind < 0.7:
            data = rng.randbytes(length)
            await user.write(offset, data)
            model[offset : offset + length] = data
        elif kind < 0.9:
            await user.write_zeroes(offset, length, may_unmap=rng.random() < 0.5)
            model[offset : offset + length] = bytes(length)
        else:
            await user.discard(offset, length)
            model[offset : offset + length] = await user.read(offset, length)
    await bench.graph.detach(user)
    await bench.graph.delete("fill")


async def make_chain(
    bench: Bench, rng: random.Random, directory: str, name: str
) -> tuple[list[str], list[bytes]]:
    """File names, the lowest first, and what each image reads as."""
    paths: list[str] = []
    contents: list[bytes] = []
    model = bytearray()
    size = None
    for number in range(rng.randrange(2, 6)):
        path = os.path.join(directory, f"{name}{number}.qcow2")
        size = random_size(rng, size)
        extended = rng.random() < 0.4
        await create(
            bench,
            path,
            size=size,
            cluster_size=rng.choice((16 * KIB, 64 * KIB) if extended else (4 * KIB, 64 * KIB)),
            version=3 if extended else rng.choice((2, 3, 3)),
            extended_l2=extended,
            backing_file=os.path.basename(paths[-1]) if paths else None,
            backing_format="qcow2" if paths else None,
        )
        model = bytearray(model[:size]).ljust(size, b"\0")
        await fill(bench, rng, path, model)
        paths.append(path)
        contents.append(bytes(model))
    return paths, contents


def check(path: str, *, leaks: bool = False) -> None:
    """qemu-img check finds no error; nor a leak, unless ``leaks`` are allowed (after a crash)."""
    result = subprocess.run(
        ["qemu-img", "check", "-q", path], capture_output=True, text=True, timeout=60, check=False
    )
    good = (0, 3) if leaks or ALLOW_LEAKS else (0,)
    assert result.returncode in good, f"{path}: {result.returncode} {result.stdout}{result.stderr}"


def content(path: str) -> bytes:
    """What QEMU reads from an image."""
    raw = f"{path}.raw"
    subprocess.run(
        ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw], timeout=60, check=True
    )
    with open(raw, "rb") as file:
        data = file.read()
    os.unlink(raw)
    return data


def backing_of(path: str) -> str | None:
    """The backing string of the header, as QEMU reads it."""
    result = subprocess.run(
        ["qemu-img", "info", "-U", "--output=json", path],
        capture_output=True,
        timeout=60,
        check=True,
    )
    return json.loads(result.stdout).get("backing-filename")
