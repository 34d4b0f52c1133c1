"""Encrypted qcow2 images: where their key is, and how it is got.

Specification: docs/interop/qcow2, "Full disk encryption header pointer", "Data encryption": with
LUKS the sectors of 512 bytes are numbered by the host offset, with the legacy AES by the guest
offset.

Runs on: the event loop; deriving a key and large requests are for workers. Invariant: legacy AES is
read only: the engine writes by host offsets.
Errors: OSError from below; ``BlockError`` from ``unlock_image``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from errno import EPERM
from typing import Any

from liveblockd.errors import BlockError
from liveblockd.formats.ciphers import SECTOR, SectorCipher, sector_cipher
from liveblockd.formats.encrypted_store import EncryptedStore
from liveblockd.formats.luks import MAX_BYTES, LuksHeader, parse_luks, unlock
from liveblockd.formats.qcow2.header import Header
from liveblockd.formats.qcow2.layout import Crypt, Extension
from liveblockd.formats.qcow2.metadata import read_bytes
from liveblockd.storage.driver import BlockIO, Buffer, Done
from liveblockd.storage.registry import Environment

#: bytes of the key of legacy AES
_AES_KEY = 16


class LegacyAesStore(EncryptedStore):
    """Read-only; every read has to say for which guest offset it is."""

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """None: ``read_guest`` is the only way."""
        del offset, length
        return None

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        """Never."""
        del offset, data
        return False

    def begin_write(self, offset: int, data: Buffer, done: Done) -> bool:
        """Never."""
        del offset, data, done
        return False

    async def read_guest(self, guest_offset: int, host_offset: int, length: int) -> Buffer:
        """The plain bytes at a guest offset; both offsets are as far into their sector."""
        skip = guest_offset % SECTOR
        whole = -(-(skip + length) // SECTOR) * SECTOR
        data = await read_bytes(self._file, host_offset - skip, whole)
        plain = await self._run(self._cipher.decrypt, guest_offset - skip, data)
        return plain[skip : skip + length]

    async def read(self, offset: int, length: int) -> Buffer:
        """EPERM: no guest offset is known."""
        del offset, length
        raise OSError(EPERM, os.strerror(EPERM))

    async def write(self, offset: int, data: Buffer) -> None:
        """EPERM."""
        del offset, data
        raise OSError(EPERM, os.strerror(EPERM))


class NoKey:
    """Stands for the cipher of an image of which only the header is asked for."""

    def encrypt(self, sector: int, data: Buffer) -> bytes:
        """EPERM."""
        del sector, data
        raise OSError(EPERM, os.strerror(EPERM))

    decrypt = encrypt


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


async def _crypto_header(header: Header, file: BlockIO) -> bytes:
    offset, length = crypto_header_place(header, file.length)
    try:
        return bytes(await read_bytes(file, offset, length))
    except OSError as error:
        raise BlockError.from_os_error("Unable to read LUKS header", error) from error


async def describe_luks(header: Header, file: BlockIO) -> LuksHeader | None:
    """What the LUKS header says, None where there is none; raises BlockError."""
    if header.crypt_method != Crypt.LUKS:
        return None
    return parse_luks(await _crypto_header(header, file))


async def unlock_image(
    header: Header,
    encrypt: Mapping[str, Any] | None,
    children: Mapping[str, BlockIO],
    environment: Environment,
) -> SectorCipher | None:
    """The cipher of an encrypted image, None for one that is not; raises BlockError."""
    given = dict(encrypt or {})
    if header.crypt_method == Crypt.NONE:
        return None
    if environment.no_io:
        return NoKey()
    kind = Crypt(header.crypt_method).name.lower()
    if given.get("format", kind) != kind:
        raise BlockError(
            f"Header reported '{kind}' encryption format but options specify '{given['format']}'"
        )
    name = given.get("key-secret")
    if name is None:
        raise BlockError("Parameter 'encrypt.key-secret' is required for cipher")
    passphrase = environment.secret(str(name))
    if header.crypt_method == Crypt.AES:
        # The passphrase is the key, as it is: that is why nobody should use this.
        return sector_cipher("aes", "cbc-plain64", passphrase[:_AES_KEY].ljust(_AES_KEY, b"\0"))
    data = await _crypto_header(header, children["file"])
    return await environment.workers.run(unlock, data, passphrase)
