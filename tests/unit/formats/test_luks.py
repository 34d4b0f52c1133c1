"""Sector ciphers beside plain ones, the splitter, and headers that cannot be."""

from __future__ import annotations

import contextlib
import hashlib
import random

import pytest

from liveblockd.errors import BlockError
from liveblockd.formats import luks
from liveblockd.formats.ciphers import sector_cipher

ciphers = pytest.importorskip("cryptography.hazmat.primitives.ciphers")
Cipher, algorithms, modes = ciphers.Cipher, ciphers.algorithms, ciphers.modes


@pytest.mark.parametrize("bits", [128, 256])
def test_xts(bits: int) -> None:
    rng = random.Random(bits)
    key, data = rng.randbytes(bits // 4), rng.randbytes(512 * 5)
    ours = sector_cipher("aes", "xts-plain64", key)
    first = (1 << 40) + 3
    secret = ours.encrypt(first, data)
    for number in range(5):
        iv = (first + number).to_bytes(16, "little")
        plain = Cipher(algorithms.AES(key), modes.XTS(iv)).encryptor()
        part = slice(number * 512, number * 512 + 512)
        assert secret[part] == plain.update(data[part])
    assert ours.decrypt(first, secret) == data


@pytest.mark.parametrize("size", [16, 24, 32])
@pytest.mark.parametrize("generator", ["plain", "plain64", "essiv:sha256"])
def test_cbc(size: int, generator: str) -> None:
    rng = random.Random(size)
    key, data = rng.randbytes(size), rng.randbytes(512 * 3)
    ours = sector_cipher("aes", f"cbc-{generator}", key)
    first = (1 << 32) + 7
    secret = ours.encrypt(first, data)
    for number in range(3):
        value = first + number
        iv = (value & 0xFFFFFFFF if generator == "plain" else value).to_bytes(16, "little")
        if generator.startswith("essiv"):
            salt = hashlib.sha256(key).digest()
            iv = Cipher(algorithms.AES(salt), modes.ECB()).encryptor().update(iv)
        plain = Cipher(algorithms.AES(key), modes.CBC(iv)).encryptor()
        part = slice(number * 512, number * 512 + 512)
        assert secret[part] == plain.update(data[part])
    assert ours.decrypt(first, secret) == data


def test_split_and_merge() -> None:
    key = bytes(range(64))
    assert luks.merge(luks.spread(key, "sha256", 10), 64, "sha256") == key


def test_a_new_header_opens_with_its_passphrase_alone() -> None:
    data = luks.new_luks(b"secret", iter_time=1)
    cipher = luks.unlock(data, b"secret")
    assert cipher.decrypt(9, cipher.encrypt(9, b"x" * 512)) == b"x" * 512
    with pytest.raises(BlockError, match="Invalid password, cannot unlock any keyslot"):
        luks.unlock(data, b"other")


@pytest.mark.parametrize("seed", range(60))
def test_damaged_headers(seed: int) -> None:
    """One kind of error, and at once: no count of a header is believed."""
    rng = random.Random(seed)
    data = bytearray(_HEADER)
    for _ in range(rng.randrange(1, 4)):
        data[rng.randrange(300)] = rng.randrange(256)
    with contextlib.suppress(BlockError):
        luks.parse_luks(bytes(data[: rng.choice((100, len(data)))]))


_HEADER = luks.new_luks(b"secret", iter_time=1)
