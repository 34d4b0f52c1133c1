"""The driver ``luks``: a disk encrypted by LUKS version 1, and nothing else.

Specification: LUKS On-Disk Format 1.2.3; qapi/block-core.json, BlockdevOptionsLUKS.

Runs on: the event loop; workers derive the key and do large requests. Invariants: those of
``EncryptedStore``; the header is never reached by a guest's request. Errors: OSError, BlockError.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from errno import EPERM
from typing import Any, ClassVar, Final, Self

from liveblockd.errors import BlockError
from liveblockd.formats.ciphers import SECTOR, SectorCipher
from liveblockd.formats.encrypted_store import EncryptedStore
from liveblockd.formats.luks import HEADER_BYTES, MAX_BYTES, LuksHeader, parse_luks, unlock
from liveblockd.formats.luks_slots import LuksAmendment, amend_luks
from liveblockd.storage.driver import (
    BlockDriver,
    BlockIO,
    Buffer,
    Done,
    Extent,
    ExtentKind,
    HostFile,
)
from liveblockd.storage.options import BlockdevOptions, BlockdevRef
from liveblockd.storage.registry import Environment, register_driver

#: bytes in one extent of ``map``: nothing is known of what the disk holds
_MAP: Final = 1 << 30


class LuksOptions(BlockdevOptions):
    """Members of ``blockdev-add``."""

    file: BlockdevRef
    key_secret: str | None = None


@register_driver
class Luks(BlockDriver):
    """One image; ``open`` makes it."""

    driver_name = "luks"
    is_format = True
    child_roles = ("file",)
    Options: ClassVar[type[BlockdevOptions]] = LuksOptions
    request_alignment = SECTOR

    def __init__(
        self,
        children: dict[str, BlockIO],
        header: LuksHeader,
        cipher: SectorCipher | None,
        environment: Environment,
    ) -> None:
        self.children = children
        self.read_only = True
        self.header = header
        self._workers = environment.workers
        self._amending = asyncio.Lock()
        self._store: EncryptedStore | None = None
        if cipher is not None:
            self._store = EncryptedStore(
                children, "file", cipher, environment.workers, base=header.payload_offset
            )

    @classmethod
    async def open(
        cls, options: LuksOptions, children: dict[str, BlockIO], environment: Environment
    ) -> Self:
        """Unlock the image; raises BlockError."""
        try:
            data = await _read_header(children["file"])
        except OSError as error:
            raise BlockError.from_os_error("Unable to read LUKS header", error) from error
        header = parse_luks(data)
        if not len(data) <= header.payload_offset:
            raise BlockError("The payload overlaps with the LUKS header")
        cipher = None
        if not environment.no_io:
            if options.key_secret is None:
                raise BlockError("Parameter 'key-secret' is required for cipher")
            passphrase = environment.secret(options.key_secret)
            cipher = await environment.workers.run(unlock, data, passphrase)
        self = cls(children, header, cipher, environment)
        self.read_only = bool(options.read_only)
        return self

    @property
    def _plain(self) -> EncryptedStore:
        if self._store is None:
            raise OSError(EPERM, os.strerror(EPERM))
        return self._store

    def _check_writable(self, end: int) -> None:
        if self.read_only:
            raise OSError(EPERM, os.strerror(EPERM))
        assert end <= self.length, "requests lie inside the disk"

    @property
    def length(self) -> int:
        """Bytes of the disk: whole sectors behind the header."""
        return max(0, self.children["file"].length - self.header.payload_offset) // SECTOR * SECTOR

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """See ``BlockDriver``."""
        return self._plain.read_nowait(offset, length)

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        """See ``BlockDriver``."""
        return not self.read_only and self._plain.write_nowait(offset, data)

    def begin_write(self, offset: int, data: Buffer, done: Done) -> bool:
        """See ``BlockDriver``."""
        return not self.read_only and self._plain.begin_write(offset, data, done)

    async def read(self, offset: int, length: int) -> Buffer:
        """See ``BlockDriver``."""
        return await self._plain.read(offset, length)

    async def write(self, offset: int, data: Buffer) -> None:
        """See ``BlockDriver``."""
        self._check_writable(offset + len(data))
        await self._plain.write(offset, data)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, fast_only: bool = False
    ) -> None:
        """See ``BlockDriver``: zeros are written, for a hole does not decrypt to zeros."""
        self._check_writable(offset + length)
        await self._plain.write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)

    async def discard(self, offset: int, length: int) -> None:
        """Nothing: what a hole decrypts to is neither the old bytes nor zeros."""

    async def flush(self) -> None:
        """See ``BlockDriver``."""
        if not self.read_only:
            await self.children["file"].flush()

    async def map(self, offset: int, length: int) -> list[Extent]:
        """All of it is data, which only ``read`` can give."""
        del offset
        return [Extent(min(length, _MAP), ExtentKind.COMPRESSED)]

    async def truncate(self, length: int) -> None:
        """Whole sectors; new ones read as what zeros decrypt to, so they are written."""
        if self.read_only:
            raise OSError(EPERM, os.strerror(EPERM))
        old = self.length
        length = -(-length // SECTOR) * SECTOR
        await self._plain.truncate(length)
        if length > old:
            await self._plain.write_zeroes(old, length - old)
        await self.children["file"].flush()

    def host_file(self) -> HostFile | None:
        """None: its bytes are not those of the disk."""
        return None

    def data_host_file(self) -> HostFile | None:
        """None."""
        return None

    async def amend_encryption(
        self, passphrase: bytes, amendment: LuksAmendment, *, force: bool = False
    ) -> None:
        """Add or erase a passphrase; durable on return. Raises BlockError, OSError."""
        if self.read_only:
            raise OSError(EPERM, os.strerror(EPERM))
        length = min(self.header.payload_offset, self.children["file"].length, MAX_BYTES)
        async with self._amending:
            try:
                await amend_luks(
                    self.children["file"], self._workers, passphrase, amendment,
                    length=length, force=force,
                )  # fmt: skip
            finally:
                self.header = parse_luks(bytes(await self.children["file"].read(0, length)))

    @property
    def encrypted(self) -> bool:
        """Yes."""
        return True

    def actual_size(self) -> int | None:
        """Bytes of the file child in use."""
        file = self.children["file"]
        size = getattr(getattr(file, "driver", file), "actual_size", None)
        return None if size is None else size()

    def format_specific(self) -> Mapping[str, Any]:
        """ImageInfoSpecificLUKS."""
        return {"type": "luks", "data": self.header.describe()}


async def _read_header(file: BlockIO) -> bytes:
    """The header and its key material."""
    start = bytes(await file.read(0, min(file.length, HEADER_BYTES)))
    header = parse_luks(start.ljust(MAX_BYTES, b"\0")[:MAX_BYTES])
    ends = [slot.offset + header.material_bytes for slot in header.active]
    end = max([HEADER_BYTES, *ends])
    return bytes(await file.read(0, min(file.length, end)))
