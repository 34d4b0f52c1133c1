"""A real guest: QEMU with a Linux kernel and busybox, whose disk is an NBD export.

The kernel is Debian's, as it is installed or as ``tools/guest-kernel`` has unpacked it (no root
needed); ``init`` is all of the user space. Emulated where KVM does not work, which is fast enough.
"""

from __future__ import annotations

import json
import lzma
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import pytest

ROOT = Path(__file__).resolve().parents[2]
QEMU = "qemu-system-x86_64"
MODULES = ("virtio_pci", "virtio_blk", "ext4", "crc32c_generic")
#: seconds until a guest has booted, or ended; it is emulated, and this machine may be busy
PATIENCE = 240.0


def kernel() -> tuple[Path, Path] | None:
    """(vmlinuz, its directory of modules) of the newest kernel there is."""
    found = []
    for root in (ROOT / ".guest", Path("/")):
        for image in root.glob("boot/vmlinuz-*-amd64"):
            modules = root / "lib/modules" / image.name.removeprefix("vmlinuz-")
            if (modules / "kernel").is_dir() and os.access(image, os.R_OK):
                found.append((image, modules))
    return found[0] if found else None


def missing() -> str:
    """Why there can be no guest here; empty if there can."""
    programs = (QEMU, "qemu-img", "busybox", "mke2fs", "e2fsck")
    absent = [program for program in programs if shutil.which(program) is None]
    if kernel() is None:
        absent.append("a Debian kernel (make guest)")
    return f"{', '.join(absent)} not there" if absent else ""


def module_files(directory: Path) -> dict[str, bytes]:
    """``MODULES`` and what they depend on, in the order in which they can be loaded."""
    paths = {
        path.name.split(".")[0].replace("-", "_"): path
        for path in directory.rglob("kernel/**/*.ko*")
    }
    found: dict[str, bytes] = {}

    def add(name: str) -> None:
        path = paths.get(name)
        if path is None or name in found:
            return  # what has no file is in the kernel itself; if not, the guest says so
        data = path.read_bytes()
        if path.suffix == ".xz":
            data = lzma.decompress(data)
        depends = re.search(rb"\0depends=([^\0]*)\0", data)
        for needed in depends[1].decode().split(",") if depends else ():
            add(needed.replace("-", "_"))
        found[name] = data

    for module in MODULES:
        add(module)
    return found


def archive(files: dict[str, tuple[int, bytes]]) -> bytes:
    """A cpio archive of (mode, contents), the form in which Linux takes an initramfs."""
    out = bytearray()
    for inode, (name, (mode, data)) in enumerate([*files.items(), ("TRAILER!!!", (0, b""))], 1):
        fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        out += b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
        out += bytes(-len(out) % 4) + data
        out += bytes(-len(out) % 4)
    return bytes(out)


def initramfs(modules: Path) -> bytes:
    """``init``, busybox and the modules for the disk."""
    directory, program, file = 0o40755, 0o100755, 0o100644
    files = dict.fromkeys(("bin", "dev", "mnt", "modules", "proc"), (directory, b""))
    files["init"] = (program, Path(__file__).with_name("init").read_bytes())
    busybox = shutil.which("busybox")
    assert busybox
    files["bin/busybox"] = (program, Path(busybox).read_bytes())
    loaded = module_files(modules)
    files["modules/order"] = (file, "".join(f"{name}\n" for name in loaded).encode())
    for name, data in loaded.items():
        files[f"modules/{name}"] = (file, data)
    return archive(files)


class Guest:
    """``with Guest(directory, socket, export) as guest``: booted, its file system is in use."""

    def __init__(
        self,
        directory: Path,
        nbd: Path,
        export: str,
        *,
        only_check: bool = False,
        must: Sequence[str] = (),
    ):
        found = kernel()
        assert found
        self.only_check = only_check
        self._log = directory / f"guest-{export}.log"
        initrd = directory / "initramfs"
        if not initrd.exists():
            initrd.write_bytes(initramfs(found[1]))
        server = {"type": "unix", "path": str(nbd)}
        disk = {"driver": "nbd", "node-name": "disk", "discard": "unmap"}
        words = ["console=ttyS0", "quiet", "panic=-1", "mitigations=off"]
        words += ["only-check"] * only_check + [f"must={name}" for name in must]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [QEMU, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
                 "-accel", "tcg", "-m", "192", "-kernel", found[0], "-initrd", initrd,
                 "-append", " ".join(words), "-serial", "stdio",
                 "-blockdev", json.dumps({**disk, "server": server, "export": export}),
                 "-device", "virtio-blk-pci,drive=disk,discard=on,write-zeroes=on"],
                stdin=subprocess.PIPE, stdout=log, stderr=log,
            )  # fmt: skip

    def __enter__(self) -> Self:
        if not self.only_check:
            self.wait(4)
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.communicate()

    def said(self) -> str:
        """All that the guest has written so far; fails the test where that is a complaint."""
        text = self._log.read_text(errors="replace")
        if "GUEST FAIL" in text or "Kernel panic" in text:
            pytest.fail(text[-2000:])
        return text

    def done(self) -> int:
        """Rounds of work so far, each with writes that were made durable."""
        return self.said().count("GUEST DID ")

    def kept(self) -> list[str]:
        """Files that were said to be durable, and that the guest was not about to change."""
        lines = re.findall(r"GUEST DID (\w+) (\d+) (\w{64})", self._log.read_text(errors="replace"))
        newest = {worker: (int(number) + 1, name) for worker, number, name in lines}
        # In each third round it overwrites, in each eighth it removes some.
        return [f"{worker}/{n}" for worker, (i, n) in newest.items() if i % 3 and i % 8]

    def _until(self, what: str) -> Iterator[None]:
        deadline = time.monotonic() + PATIENCE
        while True:
            ended = self._process.poll() is not None
            yield
            if ended or time.monotonic() > deadline:
                pytest.fail(f"{what}: {self.said()[-2000:]}")
            time.sleep(0.05)

    def wait(self, rounds: int) -> None:
        """Until the guest has done ``rounds`` more rounds."""
        goal = self.done() + rounds
        for _ in self._until("the guest does not work"):
            if self.done() >= goal:
                return

    def finish(self) -> None:
        """The guest stops, has another look at all its files, and unmounts."""
        assert self._process.stdin
        self._process.stdin.write(b"stop\n")
        self._process.stdin.flush()
        self.ended()

    def ended(self) -> None:
        """The guest has come to its end, and found nothing wrong."""
        for _ in self._until("the guest does not end"):
            if "GUEST OK" in self.said() and self._process.poll() is not None:
                return
