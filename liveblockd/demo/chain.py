"""The images of the demo: made, described and compared with the engine itself.

Runs on the event loop of the demo, before the daemon starts and after it has ended; the locks of
the images would not let it otherwise. Errors: BlockError, OSError, ``MismatchError``.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from liveblockd.daemon.drivers import load_all_drivers
from liveblockd.demo.guest import SEGMENT, MismatchError
from liveblockd.events import Publisher
from liveblockd.formats.qcow2.create import create_qcow2, peek_header
from liveblockd.graph.graph import Graph
from liveblockd.qapi import parse
from liveblockd.runtime.workers import WorkerPool
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import Environment

#: part of the disk that each image has data for; D is new
SHARES = {"A": 0.45, "B": 0.25, "C": 0.2, "D": 0.0}


@asynccontextmanager
async def _graph() -> AsyncIterator[Graph]:
    load_all_drivers()
    workers = WorkerPool()
    graph = Graph(Environment(workers=workers, publisher=Publisher()))
    try:
        yield graph
    finally:
        await graph.close()
        workers.close()


def _image(path: Path, *, read_only: bool = False) -> BlockdevOptions:
    file = {"driver": "file", "filename": str(path)}
    members = {"driver": "qcow2", "node-name": "image", "file": file, "read-only": read_only}
    return parse(BlockdevOptions, members)


async def _create(path: Path, size: int, backing: str | None) -> None:
    path.touch()
    async with _graph() as graph:
        members = {"driver": "file", "node-name": "new", "filename": str(path)}
        file = await graph.open(parse(BlockdevOptions, members))
        await create_qcow2(
            file, size=size, backing_file=backing, backing_format="qcow2" if backing else None
        )


async def _fill(path: Path, model: bytearray, share: float, rng: random.Random) -> None:
    async with _graph() as graph:
        node = await graph.open(_image(path))
        segments = rng.sample(range(len(model) // SEGMENT), int(share * len(model) / SEGMENT))
        for segment in segments:
            length = rng.randrange(SEGMENT // 4, SEGMENT)
            offset = segment * SEGMENT + rng.randrange(0, SEGMENT - length)
            data = rng.randbytes(length)
            await node.write(offset, data)
            model[offset : offset + length] = data


async def build(directory: Path, size: int, rng: random.Random) -> bytearray:
    """Make A <- B <- C <- D, ``size`` bytes each; returns what the disk holds."""
    model = bytearray(size)
    backing = None
    for name, share in SHARES.items():
        path = directory / f"{name}.qcow2"
        await _create(path, size, backing)
        await _fill(path, model, share, rng)
        backing = path.name
    return model


def describe(path: Path) -> list[str]:
    """Names of the images of a chain, base first, as the headers tell them."""
    names: list[str] = []
    while True:
        names.insert(0, path.stem)
        with path.open("rb") as file:
            backing = peek_header(file.read(4096)).backing_file
        if backing is None:
            return names
        path = path.parent / os.fsdecode(backing)


async def compare(path: Path, model: bytearray) -> int:
    """Compare an image with ``model`` byte by byte; returns the number of bytes."""
    async with _graph() as graph:
        node = await graph.open(_image(path, read_only=True))
        for offset in range(0, len(model), SEGMENT):
            if bytes(await node.read(offset, SEGMENT)) != model[offset : offset + SEGMENT]:
                raise MismatchError(f"{path.name} differs between {offset} and {offset + SEGMENT}")
        return node.length


async def check_with_qemu_img(paths: list[Path]) -> str | None:
    """The verdict of ``qemu-img check`` on the images; None where it is not installed."""
    if shutil.which("qemu-img") is None:
        return None
    for path in paths:
        process = await asyncio.create_subprocess_exec(
            "qemu-img", "check", "-f", "qcow2", str(path),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        output = (await process.communicate())[0].decode(errors="replace")
        if process.returncode:
            raise MismatchError(f"qemu-img check {path.name}: {output.strip()}")
    return "qemu-img check finds no error and no leak in " + ", ".join(p.name for p in paths)
