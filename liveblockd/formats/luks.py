"""LUKS version 1: the header, its key slots, a new one.

Specification: LUKS On-Disk Format Specification 1.2.3.

Runs on: workers (deriving a key from a passphrase is made to be slow). Invariants: every number of
the header is checked before it is used; the time that a stranger's header costs is bounded by
``MAX_ITERATIONS``.
Errors: ``BlockError`` in QEMU's words.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
import time
import uuid
from dataclasses import dataclass
from errno import EPERM
from functools import partial
from typing import Any, Final

from liveblockd.errors import BlockError
from liveblockd.formats.ciphers import SECTOR, SectorCipher, sector_cipher

MAGIC: Final = b"LUKS\xba\xbe"
_HEADER: Final = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT: Final = struct.Struct(">II32sII")
SLOTS: Final = 8
HEADER_BYTES: Final = _HEADER.size + SLOTS * _SLOT.size
ACTIVE: Final = 0x00AC71F3
INACTIVE: Final = 0x0000DEAD
STRIPES: Final = 4000
#: a header that asks for more is refused: it would take hours
MAX_ITERATIONS: Final = 1 << 28
#: bytes that a header with its key material may take
MAX_BYTES: Final = 16 << 20
_ALIGNMENT: Final = 4096
_HASHES: Final = ("sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160")


@dataclass(frozen=True, slots=True)
class Slot:
    """One key slot; ``offset`` in bytes from the header."""

    active: bool
    iterations: int
    salt: bytes
    offset: int
    stripes: int


@dataclass(frozen=True, slots=True)
class LuksHeader:
    """What the header says; ``payload_offset`` in bytes."""

    cipher: str
    mode: str
    hash_name: str
    payload_offset: int
    key_bytes: int
    digest: bytes
    digest_salt: bytes
    digest_iterations: int
    uuid: str
    slots: tuple[Slot, ...]

    @property
    def active(self) -> tuple[Slot, ...]:
        """The slots that are in use."""
        return tuple(slot for slot in self.slots if slot.active)

    @property
    def material_bytes(self) -> int:
        """Bytes of the key material of one slot, as they are on the disk."""
        return -(-self.key_bytes * STRIPES // SECTOR) * SECTOR

    def describe(self) -> dict[str, Any]:
        """QCryptoBlockInfoLUKS (qapi/crypto.json)."""
        chaining, _, generator = self.mode.partition("-")
        generator, _, generator_hash = generator.partition(":")
        bits = self.key_bytes * (4 if chaining == "xts" else 8)
        info: dict[str, Any] = {"ivgen-alg": generator}
        if generator_hash:
            info["ivgen-hash-alg"] = generator_hash
        info |= {
            "hash-alg": self.hash_name,
            "cipher-alg": f"{self.cipher}-{bits}",
            "uuid": self.uuid,
            "cipher-mode": chaining,
            "slots": [_describe_slot(slot) for slot in self.slots],
            "payload-offset": self.payload_offset,
            "master-key-iters": self.digest_iterations,
            "detached-header": False,
        }
        return info


def _describe_slot(slot: Slot) -> dict[str, Any]:
    if not slot.active:
        return {"active": False, "key-offset": slot.offset}
    return {
        "active": True,
        "iters": slot.iterations,
        "key-offset": slot.offset,
        "stripes": slot.stripes,
    }


def parse_luks(data: bytes) -> LuksHeader:
    """The header at the start of ``data``; raises BlockError."""
    if len(data) < HEADER_BYTES or data[:6] != MAGIC:
        raise BlockError("Volume is not in LUKS format")
    (
        _, version, cipher, mode, hash_name, payload, key_bytes, digest, salt, iterations, name,
    ) = _HEADER.unpack_from(data)  # fmt: skip
    if version != 1:
        raise BlockError(f"LUKS version {version} is not supported", errno=95)
    found = []
    for number in range(SLOTS):
        active, count, slot_salt, start, stripes = _SLOT.unpack_from(
            data, _HEADER.size + number * _SLOT.size
        )
        found.append(Slot(active == ACTIVE, count, slot_salt, start * SECTOR, stripes))
    texts = [_text(cipher), _text(mode), _text(hash_name)]
    header = LuksHeader(
        texts[0], texts[1], texts[2], payload * SECTOR, key_bytes, digest, salt, iterations,
        _text(name), tuple(found),
    )  # fmt: skip
    _check(header, len(data))
    return header


def slot_place(number: int) -> int:
    """Where the slot is described, in bytes from the header."""
    return _HEADER.size + number * _SLOT.size


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("ascii", "replace")


def _check(header: LuksHeader, available: int) -> None:
    if header.hash_name not in _HASHES or header.hash_name not in hashlib.algorithms_available:
        raise BlockError(f"Hash algorithm '{header.hash_name}' is not supported", errno=95)
    if header.key_bytes not in (16, 24, 32, 48, 64):
        raise BlockError(f"Cipher key length {header.key_bytes} is not supported", errno=95)
    if not 0 < header.digest_iterations <= MAX_ITERATIONS:
        raise BlockError("LUKS key iteration count is not possible")
    for number, slot in enumerate(header.slots):
        if not slot.active:
            continue
        if slot.stripes != STRIPES:
            raise BlockError(f"Keyslot {number} is corrupted (stripes {slot.stripes} != {STRIPES})")
        if not 0 < slot.iterations <= MAX_ITERATIONS:
            raise BlockError(f"Keyslot {number} iteration count is not possible")
        end = slot.offset + header.key_bytes * STRIPES
        if slot.offset < HEADER_BYTES or end > available:
            raise BlockError(f"Keyslot {number} is overlapping with the LUKS header or its end")


def unlock(data: bytes, passphrase: bytes) -> SectorCipher:
    """The cipher of the payload; ``data`` is the header with its key material. BlockError."""
    header = parse_luks(data)
    for slot in header.active:
        master = open_slot(header, slot, data, passphrase)
        if master is not None:
            return sector_cipher(header.cipher, header.mode, master)
    raise BlockError("Invalid password, cannot unlock any keyslot", errno=EPERM)


def open_slot(header: LuksHeader, slot: Slot, data: bytes, passphrase: bytes) -> bytes | None:
    """The master key, if ``passphrase`` is that of the slot."""
    key = hashlib.pbkdf2_hmac(
        header.hash_name, passphrase, slot.salt, slot.iterations, header.key_bytes
    )
    length = header.key_bytes * slot.stripes
    secret = data[slot.offset : slot.offset + length]
    padded = secret.ljust(-(-length // SECTOR) * SECTOR, b"\0")
    split = sector_cipher(header.cipher, header.mode, key).decrypt(0, padded)[:length]
    master = merge(split, header.key_bytes, header.hash_name)
    return master if hmac.compare_digest(_digest(header, master), header.digest) else None


def _digest(header: LuksHeader, master: bytes) -> bytes:
    return hashlib.pbkdf2_hmac(
        header.hash_name, master, header.digest_salt, header.digest_iterations, 20
    )


# -- the anti-forensic splitter


def _mix(stripes: bytes, key_bytes: int, hash_name: str) -> bytes:
    """What all stripes come to; thousands of rounds, each time an image is opened."""
    new = getattr(hashlib, hash_name, None) or partial(hashlib.new, hash_name)
    size = new().digest_size
    starts = range(0, key_bytes, size)
    parts = [(number.to_bytes(4, "big"), start) for number, start in enumerate(starts)]
    mixed = bytes(key_bytes)
    for start in range(0, len(stripes), key_bytes):
        mixed = _xor(mixed, stripes[start : start + key_bytes])
        digests = [new(number + mixed[at : at + size]).digest() for number, at in parts]
        mixed = b"".join(digests)[:key_bytes]
    return mixed


def _xor(one: bytes, other: bytes) -> bytes:
    value = int.from_bytes(one, "big") ^ int.from_bytes(other, "big")
    return value.to_bytes(len(one), "big")


def merge(split: bytes, key_bytes: int, hash_name: str) -> bytes:
    """The key that was spread over many stripes."""
    last = len(split) - key_bytes
    return _xor(_mix(split[:last], key_bytes, hash_name), split[last:])


def spread(key: bytes, hash_name: str, stripes: int = STRIPES) -> bytes:
    """The opposite of ``merge``, with random stripes."""
    noise = os.urandom(len(key) * (stripes - 1))
    return noise + _xor(_mix(noise, len(key), hash_name), key)


# -- a new header


def _new_material_bytes(key_bytes: int) -> int:
    return -(-key_bytes * STRIPES // _ALIGNMENT) * _ALIGNMENT


def new_header_bytes(key_bytes: int) -> int:
    """Bytes of what ``new_luks`` gives."""
    return _ALIGNMENT + SLOTS * _new_material_bytes(key_bytes)


def new_luks(
    passphrase: bytes,
    *,
    cipher: str = "aes",
    mode: str = "xts-plain64",
    hash_name: str = "sha256",
    key_bytes: int = 64,
    iter_time: int = 2000,
) -> bytes:
    """A header with one key slot and a random key; ``iter_time``: milliseconds to unlock it."""
    master = os.urandom(key_bytes)
    material = _new_material_bytes(key_bytes)
    iterations = iterations_for(hash_name, key_bytes, iter_time)
    salt, digest_salt = os.urandom(32), os.urandom(32)
    key = hashlib.pbkdf2_hmac(hash_name, passphrase, salt, iterations, key_bytes)
    split = spread(master, hash_name)
    padded = split.ljust(-(-len(split) // SECTOR) * SECTOR, b"\0")
    secret = sector_cipher(cipher, mode, key).encrypt(0, padded)
    digest_iterations = max(1000, iterations // 8)
    digest = hashlib.pbkdf2_hmac(hash_name, master, digest_salt, digest_iterations, 20)
    payload = new_header_bytes(key_bytes)
    data = _HEADER.pack(
        MAGIC, 1, cipher.encode(), mode.encode(), hash_name.encode(), payload // SECTOR, key_bytes,
        digest, digest_salt, digest_iterations, str(uuid.uuid4()).encode(),
    )  # fmt: skip
    for number in range(SLOTS):
        start = (_ALIGNMENT + number * material) // SECTOR
        if number == 0:
            data += _SLOT.pack(ACTIVE, iterations, salt, start, STRIPES)
        else:
            data += _SLOT.pack(INACTIVE, 0, bytes(32), start, STRIPES)
    return (data.ljust(_ALIGNMENT, b"\0") + secret).ljust(payload, b"\0")


def iterations_for(hash_name: str, key_bytes: int, iter_time: int) -> int:
    """How many take ``iter_time`` milliseconds on this machine."""
    probe = 1 << 14
    started = time.thread_time()
    hashlib.pbkdf2_hmac(hash_name, b"probe", bytes(32), probe, key_bytes)
    spent = max(time.thread_time() - started, 1e-4)
    return min(MAX_ITERATIONS, max(1000, int(probe * iter_time / 1000 / spent)))
