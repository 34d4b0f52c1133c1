"""Directories of real file systems in which there is room for little: a full disk, a quota.

``full`` is a tmpfs, where a write fails with ENOSPC and one to what is there never does; ``quota``
a subvolume of a btrfs with a limit, where any write may fail, with EDQUOT: its blocks are written
anew.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Self

import pytest

from tests.support.daemon import TIMEOUT

MIB = 1 << 20
#: of the file below the btrfs, which has holes
DISK = 512 * MIB

MESSAGES = {"full": "No space left on device", "quota": "Disk quota exceeded"}
KINDS = list(MESSAGES)


def _done(*command: str) -> bool:
    try:
        return not subprocess.run(command, capture_output=True, timeout=60).returncode
    except FileNotFoundError:
        return False


class Room:
    """``with Room(directory, kind) as room``: there are 24 MiB in ``room.path``, until ``more``."""

    def __init__(self, directory: Path, kind: str, mib: int = 24) -> None:
        self.directory = directory
        self.kind = kind
        self.mib = mib
        self.path = directory
        #: what an error says
        self.message = MESSAGES[kind]
        #: whether files can be made shorter when it is full; on btrfs that takes room itself
        self.shrinks = kind == "full"

    def __enter__(self) -> Self:
        if os.geteuid():
            pytest.skip("needs root, to mount a file system")
        self.directory.mkdir()
        if self.kind == "full":
            if not _done("mount", "-t", "tmpfs", "-o", f"size={self.mib}m", "none", self._top):
                pytest.skip("cannot mount a tmpfs")
            return self
        disk = self.directory.with_suffix(".disk")
        disk.touch()
        os.truncate(disk, DISK)
        if not (_done("mkfs.btrfs", "-q", str(disk)) and _done("mount", str(disk), self._top)):
            pytest.skip("cannot make and mount a btrfs")
        self.path = self.directory / "images"
        if not (
            _done("btrfs", "quota", "enable", self._top)
            and _done("btrfs", "subvolume", "create", str(self.path))
        ):
            self.__exit__()
            pytest.skip("this btrfs has no quotas")
        self.more(self.mib)
        return self

    def __exit__(self, *exc: object) -> None:
        assert _done("umount", "-l", self._top)

    @property
    def _top(self) -> str:
        return str(self.directory)

    def more(self, mib: int) -> None:
        """Give it so much room from now on."""
        if self.kind == "full":
            assert _done("mount", "-o", f"remount,size={mib}m", self._top)
        else:
            # While others write, a commit of the file system may be in its way.
            deadline = time.monotonic() + TIMEOUT
            while not _done("btrfs", "qgroup", "limit", f"{mib}M", str(self.path)):
                assert time.monotonic() < deadline, "the limit cannot be set"
                time.sleep(0.05)

    def fill(self) -> None:
        """Leave no room at all."""
        with open(self.path / "filler", "ab", buffering=0) as filler:
            for size in (MIB, 64 << 10, 4 << 10):
                try:
                    while True:
                        filler.write(os.urandom(size))
                        os.fdatasync(filler)  # room for what comes with it, too
                except OSError as error:
                    assert error.strerror == self.message

    def free(self) -> int:
        """Bytes that can still be written."""
        if self.kind == "full":
            status = os.statvfs(self.path)
            return status.f_bavail * status.f_frsize
        assert _done("btrfs", "filesystem", "sync", self._top)
        command = ["btrfs", "qgroup", "show", "-re", "--raw", str(self.path)]
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        (line,) = (line for line in shown.stdout.splitlines() if line.endswith(self.path.name))
        _, used, _, limit, *_ = line.split()
        return int(limit) - int(used)
