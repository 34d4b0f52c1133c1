"""Where a measure works: scratch directories on tmpfs, a file system, XFS or btrfs of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Self

from benchmarks.images import GIB, MIB, run
from benchmarks.registry import CannotRun, WrongResult

SHARED_MEMORY = Path("/dev/shm")


class Lab:
    """``scale`` shrinks every size and every running time; ``duration`` is for timed guests."""

    def __init__(self, scale: float, directory: str | None = None) -> None:
        self.scale = scale
        self.duration = max(0.5, min(3.0, 4 * scale))
        self._directory = directory
        self._made: list[Path] = []
        self._mounts: list[Path] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.clean()

    def clean(self) -> None:
        """Unmount and remove all that was made; for the next measure."""
        for mount in reversed(self._mounts):
            subprocess.run(["umount", str(mount)], capture_output=True, timeout=120)
        for path in reversed(self._made):
            shutil.rmtree(path, ignore_errors=True)
        self._mounts.clear()
        self._made.clear()

    def size(self, full: int, unit: int = MIB) -> int:
        """``full`` bytes at scale 1, in whole units and at least 16 MiB."""
        return max(16 * MIB, int(full * self.scale)) // unit * unit

    def memory(self, needed: int) -> Path:
        """A directory on tmpfs."""
        if not os.access(SHARED_MEMORY, os.W_OK):
            raise CannotRun("no tmpfs to write to")
        return self._make(SHARED_MEMORY, needed)

    def disk(self, needed: int) -> Path:
        """A directory on the file system of ``--directory`` (or of temporary files)."""
        return self._make(Path(self._directory or tempfile.gettempdir()), needed)

    def place(self, name: str, needed: int) -> Path:
        """By name: tmpfs, disk, xfs or btrfs."""
        match name:
            case "tmpfs":
                return self.memory(needed)
            case "disk":
                return self.disk(needed)
            case _:
                return self.mounted(name, needed)

    def mounted(self, kind: str, needed: int) -> Path:
        """A new file system with reflinks on a loop device, its file on ``disk``."""
        maker = shutil.which(f"mkfs.{kind}", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if not maker:
            raise CannotRun(f"no mkfs.{kind}")
        if os.geteuid() != 0:
            raise CannotRun("loop mounts want root")
        size = needed + needed // 4 + GIB // 2
        home = self.disk(needed)
        file, mount = home / f"{kind}.img", home / "mount"
        mount.mkdir()
        with file.open("wb") as made:
            made.truncate(size)
        try:
            run(maker, "-q", *(("-m", "reflink=1") if kind == "xfs" else ()), file)
            run("mount", "-o", "loop", file, mount)
        except WrongResult as exc:
            raise CannotRun(f"no loop mount of {kind}: {exc}") from None
        self._mounts.append(mount)
        return mount

    def _make(self, parent: Path, needed: int) -> Path:
        free = shutil.disk_usage(parent).free
        if free < needed + GIB // 4:
            raise CannotRun(f"{needed / GIB:.1f} GiB wanted, {free / GIB:.1f} GiB free")
        path = Path(tempfile.mkdtemp(prefix="bench-", dir=parent))
        self._made.append(path)
        return path


def settle(directory: Path) -> None:
    """Write back what the last sample left, so that the next one does not pay for it."""
    run("sync", "-f", directory)


def to_disk(path: Path) -> None:
    """fsync(2) of one file, by whoever wrote it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def used(directory: Path) -> int:
    """Bytes taken on the file system, after everything delayed was allocated."""
    settle(directory)
    found = os.statvfs(directory)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def space_of(path: Path) -> int:
    """Bytes that a file takes."""
    settle(path.parent)
    return path.stat().st_blocks * 512
