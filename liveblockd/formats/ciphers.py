"""AES over sectors of 512 bytes, as LUKS uses it: XTS and CBC with plain, plain64 and ESSIV.

Specification: IEEE 1619 (XTS-AES); LUKS On-Disk Format 1.2, "Cipher and Hash specification".

Runs on: the loop for small requests, workers for large ones; objects have no state that a call
changes. AES itself is that of the module ``cryptography``; many sectors cost few calls of it, for
the chaining and the tweaks are done on all of them at once. Errors: ``BlockError`` for what there
is not.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from liveblockd.errors import BlockError

SECTOR: Final = 512
_BLOCKS: Final = SECTOR // 16
_STEPS: Final = np.arange(_BLOCKS, dtype=np.uint64)[None, :]

Words = npt.NDArray[np.uint64]
Data = bytes | bytearray | memoryview


class SectorCipher(Protocol):
    """Whole sectors; ``sector`` is the number of the first one."""

    def encrypt(self, sector: int, data: Data) -> bytes:
        """What is stored for ``data``."""

    def decrypt(self, sector: int, data: Data) -> bytes:
        """What is read for stored ``data``."""


class _Aes:
    """Single blocks under one key."""

    def __init__(self, key: bytes) -> None:
        try:
            from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        except ImportError:
            raise BlockError(
                "Encrypted images need the Python module 'cryptography', which is not installed "
                "(pip install liveblockd[crypto])",
                errno=95,
            ) from None
        self._cipher: Any = Cipher(algorithms.AES(key), modes.ECB())

    def encrypt(self, data: Data) -> bytes:
        return bytes(self._cipher.encryptor().update(data))

    def decrypt(self, data: Data) -> bytes:
        return bytes(self._cipher.decryptor().update(data))


def _words(data: Data) -> Words:
    """(sectors, blocks, 2) little endian words."""
    return np.frombuffer(data, "<u8").reshape(-1, _BLOCKS, 2).astype(np.uint64, copy=False)


class _Vectors:
    """Initialisation vectors: the sector number, for ESSIV under a hash of the key."""

    def __init__(self, generator: str, key: bytes) -> None:
        name, _, hash_name = generator.partition(":")
        self._mask = 0xFFFF_FFFF if name == "plain" else 0xFFFF_FFFF_FFFF_FFFF
        self._aes = None
        if name == "essiv":
            if hash_name not in hashlib.algorithms_available:
                raise BlockError(f"Hash algorithm '{hash_name}' is not supported", errno=95)
            self._aes = _Aes(hashlib.new(hash_name, key).digest())
        elif name not in ("plain", "plain64"):
            raise BlockError(f"IV generator '{generator}' is not supported", errno=95)

    def __call__(self, sector: int, count: int) -> bytes:
        numbers = np.zeros((count, 2), "<u8")
        numbers[:, 0] = np.arange(sector, sector + count, dtype=np.uint64) & np.uint64(self._mask)
        data = numbers.tobytes()
        return data if self._aes is None else self._aes.encrypt(data)


class Xts:
    """XTS-AES; the key is that of the data and that of the tweaks."""

    def __init__(self, key: bytes, generator: str) -> None:
        half = len(key) // 2
        self._data, self._tweak = _Aes(key[:half]), _Aes(key[half:])
        self._vectors = _Vectors(generator, key)

    def _tweaks(self, sector: int, count: int) -> Words:
        """For every block: the tweak of its sector times x to the number of the block."""
        first = np.frombuffer(self._tweak.encrypt(self._vectors(sector, count)), "<u8")
        low, high = first.reshape(-1, 2)[:, :1], first.reshape(-1, 2)[:, 1:]
        one, rest = np.uint64(1), np.uint64(63) - _STEPS
        # At most 31 bits leave at the top; they come back times x^7 + x^2 + x + 1.
        out = (high >> one) >> rest
        back = out ^ out << one ^ out << np.uint64(2) ^ out << np.uint64(7)
        found = np.empty((count, _BLOCKS, 2), np.uint64)
        found[:, :, 0] = low << _STEPS ^ back
        found[:, :, 1] = high << _STEPS | (low >> one) >> rest
        return found

    def encrypt(self, sector: int, data: Data) -> bytes:
        """See ``SectorCipher``."""
        tweaks = self._tweaks(sector, len(data) // SECTOR)
        mixed = self._data.encrypt((_words(data) ^ tweaks).tobytes())
        return (_words(mixed) ^ tweaks).tobytes()

    def decrypt(self, sector: int, data: Data) -> bytes:
        """See ``SectorCipher``."""
        tweaks = self._tweaks(sector, len(data) // SECTOR)
        mixed = self._data.decrypt((_words(data) ^ tweaks).tobytes())
        return (_words(mixed) ^ tweaks).tobytes()


class Cbc:
    """CBC within each sector."""

    def __init__(self, key: bytes, generator: str) -> None:
        self._aes = _Aes(key)
        self._vectors = _Vectors(generator, key)

    def _before(self, sector: int, count: int) -> Words:
        return np.frombuffer(self._vectors(sector, count), "<u8").reshape(-1, 2).astype(np.uint64)

    def encrypt(self, sector: int, data: Data) -> bytes:
        """See ``SectorCipher``; block by block, of all sectors at once."""
        plain = _words(data)
        result = np.empty_like(plain)
        last = self._before(sector, len(plain))
        for block in range(_BLOCKS):
            done = self._aes.encrypt((plain[:, block] ^ last).tobytes())
            last = np.frombuffer(done, "<u8").reshape(-1, 2).astype(np.uint64)
            result[:, block] = last
        return result.tobytes()

    def decrypt(self, sector: int, data: Data) -> bytes:
        """See ``SectorCipher``."""
        secret = _words(data)
        result = _words(self._aes.decrypt(data)).copy()
        result[:, 0] ^= self._before(sector, len(secret))
        result[:, 1:] ^= secret[:, :-1]
        return result.tobytes()


def sector_cipher(name: str, mode: str, key: bytes) -> SectorCipher:
    """As LUKS names them: ``aes``, ``xts-plain64``. Raises BlockError."""
    chaining, _, generator = mode.partition("-")
    if name != "aes" or chaining not in ("xts", "cbc"):
        raise BlockError(f"Algorithm '{name}' with mode '{mode}' is not supported", errno=95)
    half = len(key) // 2 if chaining == "xts" else len(key)
    if half not in (16, 24, 32):
        raise BlockError(f"Cipher key length {len(key)} is not supported", errno=95)
    return Xts(key, generator) if chaining == "xts" else Cbc(key, generator)
