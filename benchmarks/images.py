"""Images with bytes that can be told: every 4 KiB block says which one it is.

A block is a piece of a fixed tile of noise (or of compressible text) whose first eight bytes are
its number; what a guest writes is one repeated pattern. So any image can be checked from the
outside (as qemu-img reads it) without keeping a second copy.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.registry import WrongResult

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
BLOCK = 4 * KIB
CLUSTER = 64 * KIB
_WORDS = BLOCK // 8
_BLOCKS = MIB // BLOCK
#: what guests write, as fio's --buffer_pattern; no block of the tile begins or goes on with it
GUEST = 0x5A
TIMEOUT = 600

Words = npt.NDArray[np.uint64]


def run(*command: str | Path, **options: object) -> str:
    """Run a tool, bounded; its output. ``WrongResult`` with its words if it fails."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=TIMEOUT, **options,  # type: ignore[call-overload]
    )  # fmt: skip
    if done.returncode:
        said = (done.stdout + done.stderr).strip()[-1500:]
        raise WrongResult(f"{' '.join(map(str, command))}: status {done.returncode}: {said}")
    return str(done.stdout)


def tile(*, compressible: bool = False) -> Words:
    """1 MiB of noise; or of noise with few different bytes, which packs to about a half."""
    source = random.Random(7)
    if not compressible:
        return np.frombuffer(source.randbytes(MIB), dtype=np.uint64)
    letters = bytes(b"etaoin shrdlucmf"[byte & 15] for byte in range(256))
    return np.frombuffer(source.randbytes(MIB).translate(letters), dtype=np.uint64)


def chunk(base: Words, number: int) -> Words:
    """The 1 MiB with that number, as blocks of words."""
    words = base.copy().reshape(_BLOCKS, _WORDS)
    words[:, 0] = np.arange(number * _BLOCKS, (number + 1) * _BLOCKS, dtype=np.uint64)
    return words


def write_raw(path: Path, length: int, *, compressible: bool = False, zeros: int = 0) -> None:
    """A dense raw file; of every four MiB the last ``zeros`` are written zeros."""
    base = tile(compressible=compressible)
    nothing = bytes(MIB)
    with path.open("wb") as file:
        for number in range(length // MIB):
            file.write(nothing if number % 4 >= 4 - zeros else chunk(base, number).tobytes())


def dense(path: Path, length: int, *, zeros: int = 0, compression: str = "") -> None:
    """A qcow2 image of ``length`` bytes with every cluster allocated (or compressed)."""
    raw = path.with_suffix(".raw")
    write_raw(raw, length, compressible=bool(compression), zeros=zeros)
    how = ["-c", "-o", f"compression_type={compression}"] if compression else ["-S", "0"]
    try:
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *how, raw, path)
    finally:
        raw.unlink()


def overlay(path: Path, base: Path) -> Path:
    """A new empty overlay."""
    if path.exists():  # XFS frees what was unlinked later, what was cut off at once
        path.open("wb").close()
        path.unlink()
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, path)
    return path


def scattered(path: Path, base: Path, length: int, amount: int, extent: int, seed: int) -> None:
    """An overlay of ``base`` that has ``amount`` bytes in extents at random places."""
    raw = path.with_suffix(".raw")
    source = random.Random(seed)
    places = source.sample(range(length // extent), max(1, amount // extent))
    with raw.open("wb") as file:
        file.truncate(length)
        for place in places:
            file.seek(place * extent)
            file.write(source.randbytes(extent))
    try:
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path)
        run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", base, path)
    finally:
        raw.unlink()


def chain(directory: Path, length: int, depth: int, amount: int, extent: int) -> Path:
    """A dense base and ``depth - 1`` overlays with ``amount`` bytes each; the top one."""
    top = directory / "layer00.qcow2"
    dense(top, length)
    for number in range(1, depth):
        path = directory / f"layer{number:02}.qcow2"
        scattered(path, top, length, amount, extent, seed=number)
        top = path
    return top


def check(path: Path) -> None:
    """``qemu-img check`` finds nothing; a leak is found too."""
    run("qemu-img", "check", "-q", "-f", "qcow2", path)


def same(path: Path, reference: Path, *, independent: bool = True) -> None:
    """The image has the bytes of the reference, no backing file any more and no damage."""
    check(path)
    if independent and "backing file:" in run("qemu-img", "info", "-f", "qcow2", path):
        raise WrongResult(f"{path.name} still has a backing file")
    run("qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2", path, reference)


def same_live(uri: str, image: Path) -> None:
    """What a running daemon exports is what qemu-img reads in the image."""
    run("qemu-img", "compare", "-U", "-q", "-f", "raw", "-F", "qcow2", uri, image)


def blocks_of(path: Path, scratch: Path) -> Iterable[Words]:
    """The image as qemu-img reads it, a MiB at a time."""
    raw = scratch / "verify.raw"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
    try:
        with raw.open("rb") as file:
            while data := file.read(MIB):
                yield np.frombuffer(data, dtype=np.uint64).reshape(-1, _WORDS)
    finally:
        raw.unlink()


def guest_writes(path: Path, scratch: Path) -> int:
    """How many blocks a guest wrote; every other one has to be as ``dense`` made it."""
    check(path)
    base = tile()
    pattern = np.uint64(int.from_bytes(bytes([GUEST]) * 8, "little"))
    written = 0
    for number, found in enumerate(blocks_of(path, scratch)):
        by_guest = (found == pattern).all(axis=1)
        original = (found == chunk(base, number)[: len(found)]).all(axis=1)
        if not (by_guest | original).all():
            where = number * MIB + int(np.flatnonzero(~(by_guest | original))[0]) * BLOCK
            raise WrongResult(f"{path.name}: neither the base's nor the guest's bytes at {where}")
        written += int(by_guest.sum())
    return written
