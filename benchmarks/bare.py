"""What the machine itself allows: the bytes of a stream copied without any daemon.

Threads with two descriptors each and nothing to decide: no tables, no jobs, no guest. Whoever
copies the same bytes on this machine, in whatever language, does it by one of these calls, so the
fastest of these ways is what there is to reach.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.images import KIB, MIB, run
from benchmarks.registry import CannotRun
from liveblockd.storage import many_requests

#: bytes that a thread copies before it asks for more
UNIT = 8 * MIB
BUFFERED_PIECE = MIB
DIRECT_PIECE = 2 * MIB
PAGE = 4 * KIB
#: requests of a thread under way at once
DEPTH = 4

_libc = ctypes.CDLL(None)
_SYNC_FILE_RANGE_WRITE = 2


class Piece(NamedTuple):
    """Bytes of a file that go to ``to`` of another."""

    path: Path
    offset: int
    length: int
    to: int


class Work(NamedTuple):
    """A copy: what goes where, what else has to be read, pages that are written besides."""

    pieces: list[Piece]
    read: Sequence[Piece] = ()
    pages: int = 0

    @property
    def end(self) -> int:
        """Bytes of the target."""
        return max(piece.to + piece.length for piece in self.pieces)


def pieces_of(image: Path) -> list[Piece]:
    """Where qemu-img finds the data of an image and of those below it; one behind the other."""
    runs: list[dict[str, Any]] = json.loads(run("qemu-img", "map", "--output=json", image))
    chain = json.loads(run("qemu-img", "info", "--backing-chain", "--output=json", image))
    paths = [image.parent / layer["filename"] for layer in chain]
    pieces: list[Piece] = []
    to = 0
    for found in runs:
        if not found["data"]:
            continue
        if "offset" not in found:
            raise CannotRun("qemu-img does not say where data are")
        path = paths[found["depth"]]
        for done in range(0, found["length"], UNIT):
            length = min(UNIT, found["length"] - done)
            pieces.append(Piece(path, found["offset"] + done, length, to))
            to += length
    return pieces


def rest_of(image: Path, pieces: Sequence[Piece]) -> list[Piece]:
    """What else is in the file: its tables."""
    rest, position = [], 0
    for piece in sorted(pieces, key=lambda piece: piece.offset):
        if piece.offset > position:
            rest.append(Piece(image, position, piece.offset - position, 0))
        position = max(position, piece.offset + piece.length)
    return rest


#: what a thread does with a piece: descriptor to read, piece, descriptor to write
Way = Callable[[int, Piece, int], None]


def in_kernel(source: int, piece: Piece, target: int) -> None:
    """copy_file_range(2)."""
    done = 0
    while done < piece.length:
        count = os.copy_file_range(
            source, target, piece.length - done, piece.offset + done, piece.to + done
        )
        if not count:
            raise OSError("copied nothing")
        done += count


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.bytes = mmap.mmap(-1, DIRECT_PIECE)  # aligned for O_DIRECT
        self.deep = mmap.mmap(-1, DEPTH * BUFFERED_PIECE)


_buffers = _Buffers()


def _through_memory(source: int, piece: Piece, target: int, most: int) -> None:
    for done in range(0, piece.length, most):
        length = min(most, piece.length - done)
        with memoryview(_buffers.bytes) as whole, whole[:length] as buffer:
            if os.preadv(source, [buffer], piece.offset + done) != length:
                raise OSError("read less")
            # is it zeros? Of a full image the first words of the clusters tell.
            bool(np.frombuffer(buffer, np.uint64)[:: 64 * KIB // 8].all())
            if os.pwritev(target, [buffer], piece.to + done) != length:
                raise OSError("wrote less")


def through_memory(source: int, piece: Piece, target: int) -> None:
    """pread(2) and pwrite(2) by way of a buffer."""
    _through_memory(source, piece, target, BUFFERED_PIECE)


def direct(source: int, piece: Piece, target: int) -> None:
    """The same with O_DIRECT."""
    _through_memory(source, piece, target, DIRECT_PIECE)


def direct_halves(source: int, piece: Piece, target: int) -> None:
    """The same in smaller pieces."""
    _through_memory(source, piece, target, DIRECT_PIECE // 2)


def direct_at_once(source: int, piece: Piece, target: int) -> None:
    """Linux AIO: as many reads under way as are room for, then as many writes."""
    own = many_requests.context()
    if own is None:
        raise OSError("no AIO")
    for done in range(0, piece.length, DEPTH * BUFFERED_PIECE):
        starts = np.arange(done, min(piece.length, done + DEPTH * BUFFERED_PIECE), BUFFERED_PIECE)
        lengths = np.minimum(piece.length - starts, BUFFERED_PIECE)
        first = many_requests.address_of(np.frombuffer(_buffers.deep, np.uint8))
        places = (first + starts - done).astype(np.uint64)
        read = own.read(source, piece.offset + starts, places, lengths, 0)
        if read is None or (read != lengths).any():
            raise OSError("read less")
        wrote = own.write(target, piece.to + starts, places, lengths)
        if wrote is None or (wrote != lengths).any():
            raise OSError("wrote less")


def into_pages(source: int, piece: Piece, target: int) -> None:
    """Reads into mapped pages of the target, which is as large as it will be."""
    with mmap.mmap(target, piece.length, offset=piece.to) as pages, memoryview(pages) as view:
        if os.preadv(source, [view], piece.offset) != piece.length:
            raise OSError("read less")


def start_writeback(target: int, piece: Piece) -> None:
    """Let the disk begin."""
    _libc.sync_file_range(
        target, ctypes.c_int64(piece.to), ctypes.c_int64(piece.length), _SYNC_FILE_RANGE_WRITE
    )


ALONE = "copy_file_range, one thread"
#: two threads that do not wait for each other
BESIDE = "copy_file_range, and pread into mapped pages beside it"
#: what is tried, by the place: its name, and what each thread does
WAYS: dict[str, dict[str, tuple[Way, ...]]] = {
    "tmpfs": {
        ALONE: (in_kernel,),
        "copy_file_range, two threads": (in_kernel, in_kernel),
        "pread and pwrite, two threads": (through_memory, through_memory),
        BESIDE: (in_kernel, into_pages),
    },
    "disk": {
        ALONE: (in_kernel,),
        "copy_file_range, two threads": (in_kernel, in_kernel),
        "pread and pwrite, one thread": (through_memory,),
        "pread and pwrite, two threads": (through_memory, through_memory),
    },
    "direct": {
        "pread and pwrite with O_DIRECT, 2 threads": (direct,) * 2,
        "pread and pwrite with O_DIRECT, 4 threads": (direct,) * 4,
        "pread and pwrite with O_DIRECT, 4 threads, 1 MiB": (direct_halves,) * 4,
        "pread and pwrite with O_DIRECT, 8 threads, 1 MiB": (direct_halves,) * 8,
        "io_submit with O_DIRECT, four of 1 MiB": (direct_at_once,),
        "io_submit with O_DIRECT, four of 1 MiB, 2 threads": (direct_at_once,) * 2,
    },
}


class Copier:
    """Copies the same again and again, each time in the fastest way."""

    def __init__(self, place: str, *, durable: bool) -> None:
        self.place = place
        #: with an fdatasync(2) in the end, and the disk told to begin before that
        self.durable = durable
        self._taken: dict[str, list[float]] = {}

    @property
    def way(self) -> str:
        """The one that was the fastest most often."""
        return min(self._taken, key=lambda name: statistics.median(self._taken[name]))

    def seconds(self, work: Work, target: Path, *only: str) -> float:
        """Of a copy to a new file, which is removed: the least of all ways (or ``only`` some)."""
        taken: dict[str, float] = {}
        for name in only or WAYS[self.place]:
            try:
                taken[name] = self._copy(work, target, WAYS[self.place][name])
            except OSError:
                continue  # not on this file system
            self._taken.setdefault(name, []).append(taken[name])
        if not taken:
            raise CannotRun("no way to copy here")
        return min(taken.values())

    def _copy(self, work: Work, target: Path, ways: Sequence[Way]) -> float:
        is_direct = self.place == "direct"
        with _opened(work, target, is_direct) as (sources, fd):
            if is_direct:
                os.posix_fallocate(fd, 0, work.end)
            elif into_pages in ways:
                os.ftruncate(fd, work.end + work.pages * PAGE)
            share = _Share(work, sources, fd, early=self.durable and not is_direct)
            threads = [threading.Thread(target=share.carry, args=(way,)) for way in ways]
            start = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if share.error is not None:
                raise share.error
            if self.durable:
                os.fdatasync(fd)
            return time.perf_counter() - start


class _Share:
    """Pieces of which each thread takes the next one; what is only read comes first."""

    def __init__(self, work: Work, sources: dict[Path, int], fd: int, *, early: bool) -> None:
        self._sources = sources
        self._fd = fd
        self._early = early
        self._pieces = deque([(piece, False) for piece in work.read])
        self._pieces += [(piece, True) for piece in work.pieces]
        self._pages = deque(range(work.end, work.end + work.pages * PAGE, PAGE))
        self.error: OSError | None = None

    def carry(self, way: Way) -> None:
        """On each thread."""
        try:
            while self._pieces or self._pages:
                with suppress(IndexError):  # the other thread was faster
                    self._next(way)
        except OSError as error:
            self.error = error

    def _next(self, way: Way) -> None:
        if not self._pieces:
            os.pwrite(self._fd, _page, self._pages.popleft())
            return
        piece, copied = self._pieces.popleft()
        if not copied:
            _read(self._sources[piece.path], piece)
            return
        way(self._sources[piece.path], piece, self._fd)
        if self._early:
            start_writeback(self._fd, piece)


_page = mmap.mmap(-1, PAGE)


def _read(source: int, piece: Piece) -> None:
    """What is only looked at: is anything in it?"""
    for done in range(0, piece.length, BUFFERED_PIECE):
        length = min(BUFFERED_PIECE, piece.length - done)
        with memoryview(_buffers.bytes) as whole, whole[:length] as buffer:
            os.preadv(source, [buffer], piece.offset + done)
            np.frombuffer(buffer[: length // 8 * 8], np.uint64).max()


@contextmanager
def _opened(work: Work, target: Path, is_direct: bool) -> Iterator[tuple[dict[Path, int], int]]:
    flags = os.O_DIRECT if is_direct else 0
    target.unlink(missing_ok=True)
    fd = os.open(target, os.O_RDWR | os.O_CREAT | flags, 0o600)
    sources: dict[Path, int] = {}
    try:
        for piece in (*work.pieces, *work.read):
            if piece.path not in sources:
                sources[piece.path] = os.open(piece.path, os.O_RDONLY | flags)
        yield sources, fd
    finally:
        for source in sources.values():
            os.close(source)
        os.close(fd)
        target.unlink()
