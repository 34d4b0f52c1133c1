"""The two who work on images of the differential matrix: QEMU's tools, and this engine.

Both take an ``Image`` in files and a list of operations, leave the image closed, and say of each
step that may be refused whether it was done.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from liveblockd.errors import BlockError
from liveblockd.formats.luks import new_luks
from liveblockd.formats.qcow2.amend import Amendment
from liveblockd.formats.qcow2.create import create_qcow2
from liveblockd.formats.qcow2.image import Qcow2
from liveblockd.formats.qcow2.options import Qcow2Options
from liveblockd.qapi import parse
from liveblockd.storage.driver import BlockIO, ExtentKind
from liveblockd.storage.registry import Environment
from tests.support.matrix_draw import Combination, Operation, merged
from tests.support.memory import MemoryDriver
from tests.support.workers import InlineWorkers

PASSWORD = "swordfish"
SECRET = ("--object", f"secret,id=s,data={PASSWORD}")
PATTERNS = [random.Random(n).randbytes(7919) for n in range(4)]
Extents = list[tuple[int, int, str]]


@dataclass
class Image:
    """One image in files; without a combination a raw one."""

    path: Path
    combination: Combination | None
    below: Image | None = None
    #: who made it and what was done, for who looks for a difference
    story: list[str] = field(default_factory=list)

    @property
    def luks(self) -> bool:
        return self.combination is not None and self.combination.luks

    @property
    def kind(self) -> str:
        return "raw" if self.combination is None else "qcow2"

    @property
    def data(self) -> Path | None:
        """The external data file."""
        combination = self.combination
        return self.path.with_suffix(".data") if combination and combination.data_file else None

    def node(self) -> dict[str, Any]:
        """As QEMU is told to open it; what the header says is left to the header."""
        node: dict[str, Any] = {
            "driver": self.kind,
            "file": {"driver": "file", "filename": str(self.path), "discard": "unmap"},
            "discard": "unmap",
            "cache": {"no-flush": True},  # nobody cuts the power here
        }
        if self.luks:
            node["encrypt"] = {"format": "luks", "key-secret": "s"}
        below, hidden = self.below, False
        while below is not None:
            hidden |= below.luks
            below = below.below
        if hidden and self.below is not None:
            node["backing"] = self.below.node()
        return node

    @property
    def name(self) -> str:
        return "json:" + json.dumps(self.node())


def pattern(operation: Operation) -> bytes:
    """What a write writes."""
    if operation.value < 256:
        return bytes([operation.value]) * operation.length
    data = PATTERNS[operation.value - 256]
    return (data * (operation.length // len(data) + 1))[: operation.length]


class DifferenceError(AssertionError):
    """QEMU and this engine do not agree."""


# -- QEMU


def qemu(*arguments: str | Path, status: int | None = 0) -> subprocess.CompletedProcess[str]:
    """Run one of its tools, bounded; ``status`` None: any."""
    done = subprocess.run(
        [str(a) for a in arguments], capture_output=True, text=True, timeout=60, check=False
    )
    if status is not None and done.returncode != status:
        raise DifferenceError(f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def qemu_creates(image: Image, size: int) -> None:
    """An empty image, by qemu-img."""
    wanted = image.combination
    assert wanted is not None
    options = [
        f"cluster_size={wanted.cluster_size}",
        f"compat={'0.10' if wanted.version == 2 else '1.1'}",
        f"refcount_bits={wanted.refcount_bits}",
        f"preallocation={wanted.preallocation}",
    ]
    if wanted.version == 3:
        options.append(f"extended_l2={'on' if wanted.extended_l2 else 'off'}")
        options.append(f"lazy_refcounts={'on' if wanted.lazy_refcounts else 'off'}")
        options.append(f"compression_type={wanted.compression}")
    if image.data is not None:
        options.append(f"data_file={image.data}")
        options.append(f"data_file_raw={'on' if wanted.data_file == 'raw' else 'off'}")
    if wanted.luks:
        options += ["encrypt.format=luks", "encrypt.key-secret=s", "encrypt.iter-time=10"]
    below: list[str | Path] = []
    if image.below is not None:
        # Where a secret is needed the backing file cannot be opened to look at it.
        below = ["-u", "-b", image.below.path, "-F", image.below.kind]
    command = ["qemu-img", "create", "-q", *SECRET, "-f", "qcow2", "-o", ",".join(options),
               *below, image.path, str(size)]  # fmt: skip
    for _ in range(20):
        done = qemu(*command, status=None)
        if "accurate CPU usage" not in done.stderr:  # of its clock, on a busy machine
            break
    if done.returncode:
        raise DifferenceError(f"{command}: {done.stderr}")


_IO = {
    "zero": "write -z {o} {n}", "unmap": "write -z -u {o} {n}", "discard": "discard {o} {n}",
    "flush": "flush", "reopen": "reopen", "resize": "truncate {n}", "kill": "sigraise 9",
    "write": "write {p} {o} {n}", "pack": "write {p} {o} {n}", "compress": "write -c {p} {o} {n}",
}  # fmt: skip


def qemu_does(image: Image, operations: Sequence[Operation]) -> list[bool]:
    """Do them; of those that may be refused: whether they were done."""
    outcomes = []
    commands: list[str] = []
    for operation in operations:
        if operation.name in _IO:
            commands.append(_qemu_io_command(image, operation))
            continue
        _qemu_io(image, commands)
        outcomes.append(_qemu_manages(image, operation))
    _qemu_io(image, commands)
    return outcomes


def _qemu_io_command(image: Image, operation: Operation) -> str:
    how = f"-P {operation.value}"
    if operation.value >= 256 and operation.name in ("write", "pack", "compress"):
        path = image.path.with_name(f"pattern{operation.value - 256}")
        path.write_bytes(PATTERNS[operation.value - 256])
        how = f"-s {path}"
    return _IO[operation.name].format(o=operation.offset, n=operation.length, p=how)


def _qemu_io(image: Image, commands: list[str]) -> None:
    if commands:
        arguments = [argument for command in commands for argument in ("-c", command)]
        status = -signal.SIGKILL if commands[-1] == _IO["kill"] else 0
        qemu("qemu-io", "-d", "unmap", *SECRET, *arguments, image.name, status=status)
    commands.clear()


def _qemu_manages(image: Image, operation: Operation) -> bool:
    flag = {"create": "-c", "apply": "-a", "delete": "-d"}.get(operation.name)
    if flag is not None:
        done = qemu("qemu-img", "snapshot", *SECRET, flag, operation.text, image.name, status=None)
    elif operation.name == "amend":
        done = qemu("qemu-img", "amend", *SECRET, "-o", operation.text, image.name, status=None)
    else:
        assert operation.name == "rebase", operation
        below = operation.text.split(":", 1)
        base = ["-b", below[1], "-F", below[0]] if operation.text else ["-b", ""]
        done = qemu("qemu-img", "rebase", *SECRET, *base, image.name, status=None)
    if done.returncode < 0:
        raise DifferenceError(f"{operation}: {done}")
    return done.returncode == 0


def qemu_reads(image: Image) -> bytes:
    """The disk."""
    raw = image.path.with_suffix(".read")
    qemu("qemu-img", "convert", *SECRET, "-t", "unsafe", "-O", "raw", image.name, raw)
    data = raw.read_bytes()
    raw.unlink()
    return data


def qemu_maps(image: Image) -> Extents:
    """What the image itself has; DATA with its host offset."""
    found = []
    output = qemu("qemu-img", "map", *SECRET, "--output=json", image.name).stdout
    for extent in json.loads(output):
        kind = "UNALLOCATED"
        if extent["depth"] == 0 and extent.get("present", True):
            kind = "DATA" if extent["data"] else "ZERO"
        found.append((extent["start"], extent["length"], kind))
    return list(merged(found))


def qemu_checks(image: Image) -> dict[str, int]:
    """Counts of its check."""
    done = qemu("qemu-img", "check", *SECRET, "--output=json", image.name, status=None)
    if not done.stdout:
        raise DifferenceError(f"qemu-img check: {done.stderr}")
    report = json.loads(done.stdout)
    keys = ("corruptions", "leaks", "check-errors", "allocated-clusters", "compressed-clusters")
    return {key: report.get(key, 0) for key in keys}


# -- this engine


async def open_here(image: Image, *, read_only: bool = False) -> Qcow2 | MemoryDriver:
    """The image and all below it, from files into memory."""
    below = await open_here(image.below, read_only=True) if image.below is not None else None
    file = MemoryDriver.of(image.path.read_bytes(), read_only=read_only)
    if image.combination is None:
        return file
    children: dict[str, BlockIO] = {"file": file}
    if image.data is not None:
        children["data-file"] = MemoryDriver.of(image.data.read_bytes(), read_only=read_only)
    return await _open_on(image, children, below, read_only=read_only)


async def _open_on(
    image: Image, children: dict[str, BlockIO], below: BlockIO | None, *, read_only: bool
) -> Qcow2:
    members: dict[str, Any] = {"driver": "qcow2", "file": "f", "discard": "unmap"}
    members["read-only"] = read_only
    if image.luks:
        members["encrypt"] = {"format": "luks", "key-secret": "s"}
    environment = Environment(InlineWorkers(), secret=lambda name: PASSWORD.encode())
    options = parse(Qcow2Options, members)
    opened = await Qcow2.open(options, children, environment, autosync=None)
    if below is not None:
        children["backing"] = below
    return opened


async def create_here(image: Image, size: int) -> None:
    """An empty image, by this engine."""
    wanted = image.combination
    assert wanted is not None
    file, data = MemoryDriver(), MemoryDriver() if wanted.data_file else None
    await create_qcow2(
        file,
        size=size,
        cluster_size=wanted.cluster_size,
        version=wanted.version,
        refcount_bits=wanted.refcount_bits,
        backing_file=str(image.below.path) if image.below else None,
        backing_format=image.below.kind if image.below else None,
        lazy_refcounts=wanted.lazy_refcounts,
        extended_l2=wanted.extended_l2,
        compression=wanted.compression,
        preallocation=wanted.preallocation,
        data_file=data,
        data_file_name=str(image.data or ""),
        data_file_raw=wanted.data_file == "raw",
        crypto_header=new_luks(PASSWORD.encode(), iter_time=1) if wanted.luks else b"",
    )
    image.path.write_bytes(file.content())
    if data is not None and image.data is not None:
        image.data.write_bytes(data.content())


class Here:
    """An image that is open for writing in this process."""

    def __init__(self, image: Image, opened: Qcow2) -> None:
        self.image, self.opened = image, opened

    @classmethod
    async def open(cls, image: Image) -> Here:
        """It and all below it."""
        opened = await open_here(image)
        assert isinstance(opened, Qcow2)
        return cls(image, opened)

    async def close(self) -> None:
        """And write the files."""
        await self.opened.close()
        for role, path in (("file", self.image.path), ("data-file", self.image.data)):
            disk = self.opened.children.get(role)
            if path is not None and isinstance(disk, MemoryDriver):
                path.write_bytes(disk.content())

    async def do(self, operations: Sequence[Operation]) -> list[bool]:
        """As ``qemu_does``."""
        outcomes = []
        for operation in operations:
            outcome = await self._step(operation)
            if outcome is not None:
                outcomes.append(outcome)
        return outcomes

    async def _step(self, operation: Operation) -> bool | None:
        image, offset, length = self.opened, operation.offset, operation.length
        match operation.name:
            case "write":
                data = pattern(operation)
                if not image.write_nowait(offset, data):
                    await image.write(offset, data)
            case "zero" | "unmap":
                await image.write_zeroes(offset, length, may_unmap=operation.name == "unmap")
            case "discard":
                await image.discard(offset, length)
            case "flush":
                await image.flush()
            case "reopen" | "kill":
                await self._reopen()
            case "compress" | "pack":
                await image.write_compressed(offset, pattern(operation))
            case "resize":
                await image.truncate(length)
                old = operation.value
                if length > old and any(bytes(await image.read(old, length - old))):
                    raise DifferenceError(f"{operation}: the new part is not zeros")
            case _:
                return await self._manage(operation)
        return None

    async def _reopen(self) -> None:
        image = self.opened
        await image.close()
        below = image.children.pop("backing", None)
        self.opened = await _open_on(self.image, image.children, below, read_only=False)

    async def _manage(self, operation: Operation) -> bool:
        image = self.opened
        ids = {s.name: s.id for s in image.list_snapshots()}
        try:
            match operation.name:
                case "create":
                    await image.create_snapshot(operation.text, date_nsec=10**18)
                case "apply":
                    await image.apply_snapshot(ids[operation.text])
                case "delete":
                    await image.delete_snapshot(ids[operation.text])
                case "amend":
                    await self._amend(operation.text)
                case _:
                    await self._rebase(operation.text)
        except BlockError as error:
            self.image.story.append(f"{operation} refused here: {error}")
            return False
        return True

    async def _amend(self, text: str) -> None:
        name, value = text.split("=")
        await self.opened.amend(
            Amendment(
                version=(2 if value == "0.10" else 3) if name == "compat" else None,
                lazy_refcounts=value == "on" if name == "lazy_refcounts" else None,
                refcount_bits=int(value) if name == "refcount_bits" else None,
            )
        )
        await self._reopen()

    async def _rebase(self, text: str) -> None:
        """Another backing file: what reads differently through it is copied before."""
        image = self.opened
        below = self.image.below
        while below is not None and f"{below.kind}:{below.path}" != text:
            below = below.below
        other = await open_here(below, read_only=True) if below is not None else None
        old = image.children["backing"]
        combination = self.image.combination
        assert combination is not None
        step = combination.cluster_size // (32 if combination.extended_l2 else 1)
        for offset in range(0, image.length, step):
            length = min(step, image.length - offset)
            wanted = bytes(await _read_of(old, offset, length))
            if wanted == bytes(await _read_of(other, offset, length)):
                continue
            if not combination.extended_l2:
                await image.populate(offset, wanted)
            elif (await image.map(offset, length))[0].kind is not ExtentKind.UNALLOCATED:
                continue
            elif any(wanted):
                await image.write(offset, wanted)
            else:
                await image.write_zeroes(offset, length)
        kind, _, path = text.partition(":")
        await image.change_backing_file(path or None, kind or None)
        image.children.pop("backing")
        if other is not None:
            image.children["backing"] = other


async def _read_of(disk: BlockIO | None, offset: int, length: int) -> bytes:
    """Zeros where there is nothing."""
    part = max(0, min(length, disk.length - offset)) if disk is not None else 0
    data = bytes(await disk.read(offset, part)) if disk is not None and part else b""
    return data.ljust(length, b"\0")


async def read_here(image: Qcow2) -> bytes:
    """The disk, some of it without a wait."""
    step, parts = 300 * 1024 + 7, []
    for offset in range(0, image.length, step):
        length = min(step, image.length - offset)
        data = image.read_nowait(offset, length)
        parts.append(bytes(data if data is not None else await image.read(offset, length)))
    return b"".join(parts)


async def map_here(image: Qcow2) -> Extents:
    """As ``qemu_maps``."""
    found, position = [], 0
    while position < image.length:
        for extent in await image.map(position, image.length - position):
            kind = "DATA" if extent.kind is ExtentKind.COMPRESSED else extent.kind.name
            found.append((position, extent.length, kind))
            position += extent.length
        await asyncio.sleep(0)
    return list(merged(found))
