"""Plain bytes above a file that holds encrypted sectors.

Specification: sectors of 512 bytes, numbered from ``base`` on (LUKS On-Disk Format, "Bulk data").

Runs on: the event loop; workers encrypt and decrypt what is large. Invariants: a request for a part
of a sector reads, changes and writes the whole, and no other write to that sector runs meanwhile.
Nobody gets a host file from here: nothing may be copied past the cipher.
Errors: OSError from below.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from errno import ENOTSUP
from functools import partial
from typing import Any, Final

from liveblockd.formats.ciphers import SECTOR, SectorCipher
from liveblockd.runtime.workers import WorkerPool
from liveblockd.storage.driver import BlockIO, Buffer, Done, Extent, HostFile, Source
from liveblockd.storage.serialise import Section, Serialiser

#: bytes up to which the loop does it: 64 KiB take about 100 us
INLINE: Final = 64 << 10
_PIECE: Final = 1 << 20


class EncryptedStore:
    """A ``BlockIO`` of plain bytes above ``children[role]`` from its byte ``base`` on."""

    def __init__(
        self,
        children: Mapping[str, BlockIO],
        role: str,
        cipher: SectorCipher,
        workers: WorkerPool,
        *,
        base: int = 0,
    ) -> None:
        self._children = children
        self._base = base
        self._role = role
        self._cipher = cipher
        self._workers = workers
        self._serialiser = Serialiser()
        #: writes of parts of sectors that are under way or wait
        self._partial = 0

    @property
    def _file(self) -> BlockIO:
        return self._children[self._role]

    @property
    def length(self) -> int:
        """Whole sectors of the file, in bytes."""
        return max(0, self._file.length - self._base) // SECTOR * SECTOR

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """See ``BlockDriver``."""
        start, end = offset // SECTOR * SECTOR, -(-(offset + length) // SECTOR) * SECTOR
        if end - start > INLINE or self._base + end > self._file.length:
            return None
        data = self._file.read_nowait(self._base + start, end - start)
        if data is None:
            return None
        plain = self._cipher.decrypt(start // SECTOR, data)
        return plain[offset - start : offset - start + length]

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        """See ``BlockDriver``."""
        if self._partial or (offset | len(data)) % SECTOR or len(data) > INLINE:
            return False
        secret = self._cipher.encrypt(offset // SECTOR, data)
        return self._file.write_nowait(self._base + offset, secret)

    def read_many_nowait(self, offsets: Sequence[int], length: int) -> list[Buffer]:
        """Left to ``read_nowait``: the cipher is what takes the time."""
        del offsets, length
        return []

    def write_many_nowait(self, offsets: Sequence[int], parts: Sequence[Buffer]) -> int:
        """Left to ``write_nowait``."""
        del offsets, parts
        return 0

    def copy_nowait(self, offset: int, source: Source, inside: int, data: Buffer) -> bool:
        """Never: what lies elsewhere is not what lies here."""
        del offset, source, inside, data
        return False

    def begin_write(self, offset: int, data: Buffer, done: Done) -> bool:
        """See ``BlockDriver``: whole sectors, encrypted here."""
        length = len(data)
        # Who writes a part of a sector, or waits for that, goes first.
        if self._partial or (offset | length) % SECTOR or length > INLINE:
            return False
        section = self._serialiser.enter_now(offset, offset + length)
        if section is None:
            return False
        begun = False
        try:
            secret = self._cipher.encrypt(offset // SECTOR, data)
            ended = partial(self._begun_ended, section, done)
            begun = self._file.begin_write(self._base + offset, secret, ended)
        finally:
            if not begun:
                self._serialiser.leave(section)
        return begun

    def _begun_ended(self, section: Section, done: Done, error: OSError | None) -> None:
        self._serialiser.leave(section)
        done(error)

    async def read(self, offset: int, length: int) -> Buffer:
        """See ``BlockDriver``."""
        start, end = offset // SECTOR * SECTOR, -(-(offset + length) // SECTOR) * SECTOR
        data = await self._read_stored(start, end - start)
        plain = await self._run(self._cipher.decrypt, start, data)
        if end - start == length:
            return plain
        return plain[offset - start : offset - start + length]

    async def _read_stored(self, offset: int, length: int) -> Buffer:
        """What the file has there; zeros past its end."""
        offset += self._base
        there = min(length, max(0, self._file.length - offset))
        data = await self._file.read(offset, there) if there else b""
        return data if there == length else bytes(data).ljust(length, b"\0")

    async def write(self, offset: int, data: Buffer) -> None:
        """See ``BlockDriver``."""
        start, end = offset // SECTOR * SECTOR, -(-(offset + len(data)) // SECTOR) * SECTOR
        in_part = end - start != len(data)
        self._partial += in_part
        try:
            section = await self._serialiser.enter(start, end, exclusive=in_part)
            try:
                if in_part:
                    data = await self._whole(start, end, offset, data)
                secret = await self._run(self._cipher.encrypt, start, data)
                await self._file.write(self._base + start, secret)
            finally:
                self._serialiser.leave(section)
        finally:
            self._partial -= in_part

    async def _whole(self, start: int, end: int, offset: int, data: Buffer) -> Buffer:
        """``data`` within the sectors around it."""
        whole = bytearray(end - start)
        whole[:SECTOR] = await self.read(start, SECTOR)
        whole[-SECTOR:] = await self.read(end - SECTOR, SECTOR)
        whole[offset - start : offset - start + len(data)] = data
        return whole

    async def _run(self, crypt: Any, offset: int, data: Buffer) -> bytes:
        if len(data) <= INLINE:
            return bytes(crypt(offset // SECTOR, data))
        return bytes(await self._workers.run(crypt, offset // SECTOR, data))

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, fast_only: bool = False
    ) -> None:
        """See ``BlockDriver``; written, for a hole does not decrypt to zeros."""
        del may_unmap
        if fast_only:
            raise OSError(ENOTSUP, os.strerror(ENOTSUP))
        zeroes = memoryview(bytes(min(_PIECE, length)))
        for start in range(offset, offset + length, _PIECE):
            await self.write(start, zeroes[: offset + length - start])

    async def discard(self, offset: int, length: int) -> None:
        """See ``BlockDriver``."""
        await self._file.discard(self._base + offset, length)

    async def flush(self) -> None:
        """See ``BlockDriver``."""
        await self._file.flush()

    async def map(self, offset: int, length: int) -> list[Extent]:
        """See ``BlockDriver``."""
        return await self._file.map(self._base + offset, length)

    async def truncate(self, length: int) -> None:
        """See ``BlockDriver``."""
        await self._file.truncate(self._base + length)

    def host_file(self) -> HostFile | None:
        """None: its bytes are not those of the disk."""
        return None
