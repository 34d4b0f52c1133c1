"""The data of an encrypted image: between the engine, which sees plain bytes, and the file.

Specification: docs/interop/qcow2, "Full disk encryption header pointer": sectors of 512 bytes,
numbered by the host offset.

Runs on: the event loop; workers encrypt and decrypt what is large. Invariants: a request for a part
of a sector reads, changes and writes the whole, and no other write to that sector runs meanwhile.
Nobody gets a host file from here: nothing may be copied past the cipher.
Errors: OSError from below; ``BlockError`` from ``unlock_image``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from errno import ENOTSUP
from typing import Any, Final

from liveblockd.errors import BlockError
from liveblockd.formats.ciphers import SECTOR, SectorCipher
from liveblockd.formats.luks import MAX_BYTES, unlock
from liveblockd.formats.qcow2.header import Header
from liveblockd.formats.qcow2.layout import Crypt, Extension
from liveblockd.formats.qcow2.metadata import read_bytes
from liveblockd.runtime.workers import WorkerPool
from liveblockd.storage.driver import BlockIO, Buffer, Extent, HostFile
from liveblockd.storage.registry import Environment
from liveblockd.storage.serialise import Serialiser

#: bytes up to which the loop does it: 64 KiB take about 100 us
INLINE: Final = 64 << 10
_PIECE: Final = 1 << 20


class EncryptedStore:
    """A ``BlockIO`` of plain bytes above ``children[role]``."""

    def __init__(
        self,
        children: Mapping[str, BlockIO],
        role: str,
        cipher: SectorCipher,
        workers: WorkerPool,
    ) -> None:
        self._children = children
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
        return self._file.length // SECTOR * SECTOR

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """See ``BlockDriver``."""
        start, end = offset // SECTOR * SECTOR, -(-(offset + length) // SECTOR) * SECTOR
        if end - start > INLINE or end > self._file.length:
            return None
        data = self._file.read_nowait(start, end - start)
        if data is None:
            return None
        plain = self._cipher.decrypt(start // SECTOR, data)
        return plain[offset - start : offset - start + length]

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        """See ``BlockDriver``."""
        if self._partial or (offset | len(data)) % SECTOR or len(data) > INLINE:
            return False
        return self._file.write_nowait(offset, self._cipher.encrypt(offset // SECTOR, data))

    async def read(self, offset: int, length: int) -> Buffer:
        """See ``BlockDriver``."""
        start, end = offset // SECTOR * SECTOR, -(-(offset + length) // SECTOR) * SECTOR
        data = await read_bytes(self._file, start, end - start)
        plain = await self._run(self._cipher.decrypt, start, data)
        if end - start == length:
            return plain
        return plain[offset - start : offset - start + length]

    async def write(self, offset: int, data: Buffer) -> None:
        """See ``BlockDriver``."""
        start, end = offset // SECTOR * SECTOR, -(-(offset + len(data)) // SECTOR) * SECTOR
        partial = end - start != len(data)
        self._partial += partial
        try:
            section = await self._serialiser.enter(start, end, exclusive=partial)
            try:
                if partial:
                    data = await self._whole(start, end, offset, data)
                secret = await self._run(self._cipher.encrypt, start, data)
                await self._file.write(start, secret)
            finally:
                self._serialiser.leave(section)
        finally:
            self._partial -= partial

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
        await self._file.discard(offset, length)

    async def flush(self) -> None:
        """See ``BlockDriver``."""
        await self._file.flush()

    async def map(self, offset: int, length: int) -> list[Extent]:
        """See ``BlockDriver``."""
        return await self._file.map(offset, length)

    async def truncate(self, length: int) -> None:
        """See ``BlockDriver``."""
        await self._file.truncate(length)

    def host_file(self) -> HostFile | None:
        """None: its bytes are not those of the disk."""
        return None


def crypto_header_place(header: Header, file_length: int) -> tuple[int, int]:
    """(host_offset, length) of the LUKS header in bytes; raises BlockError."""
    data = header.extension(Extension.ENCRYPTION)
    if data is None or len(data) != 16:
        raise BlockError("CRYPTO header extension size is not 16 bytes or it is missing")
    offset, length = int.from_bytes(data[:8], "big"), int.from_bytes(data[8:], "big")
    if offset % header.geometry.cluster_size or not offset:
        raise BlockError(
            f"Encryption header offset '{offset}' is not a multiple of cluster size "
            f"'{header.geometry.cluster_size}'"
        )
    if not 0 < length <= MAX_BYTES or offset + length > file_length:
        raise BlockError("Encryption header lies outside the image or is too large")
    return offset, length


async def unlock_image(
    header: Header,
    encrypt: Mapping[str, Any] | None,
    children: Mapping[str, BlockIO],
    environment: Environment,
) -> SectorCipher | None:
    """The cipher of an encrypted image, None for one that is not; raises BlockError."""
    given = dict(encrypt or {})
    if header.crypt_method != Crypt.LUKS:
        return None
    if given.get("format", "luks") != "luks":
        raise BlockError(
            f"Header reported 'luks' encryption format but options specify '{given['format']}'"
        )
    name = given.get("key-secret")
    if name is None:
        raise BlockError("Parameter 'encrypt.key-secret' is required for cipher")
    passphrase = environment.secret(str(name))
    offset, length = crypto_header_place(header, children["file"].length)
    try:
        data = bytes(await read_bytes(children["file"], offset, length))
    except OSError as error:
        raise BlockError.from_os_error("Unable to read LUKS header", error) from error
    return await environment.workers.run(unlock, data, passphrase)
