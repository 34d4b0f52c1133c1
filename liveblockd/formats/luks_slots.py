"""Adding and erasing the passphrases of a LUKS image, in use or not.

Specification: LUKS On-Disk Format 1.2.3, "LUKS operations"; qapi/crypto.json,
QCryptoBlockAmendOptionsLUKS.

Runs on: the event loop; workers derive keys. The master key stays: guests go on. Invariants: a slot
says that it is in use only after its key material and all else of it are durable, and no longer
before its material is overwritten; each of these is one write within a sector, so that at every
instant each passphrase opens the image or does not. The last one is erased only by force. A slot
that is not in use and has a count of iterations was not erased to the end (no room, a crash): who
erases it again, or any other by its passphrase, completes that.
Errors: ``BlockError`` in QEMU's words; OSError.
"""

from __future__ import annotations

import enum
import hashlib
import os
import struct
from dataclasses import dataclass
from errno import EINVAL, EPERM
from typing import Final

from liveblockd.errors import BlockError
from liveblockd.formats.ciphers import sector_cipher
from liveblockd.formats.luks import (
    ACTIVE,
    HEADER_BYTES,
    INACTIVE,
    SLOTS,
    STRIPES,
    LuksHeader,
    iterations_for,
    open_slot,
    parse_luks,
    slot_place,
    spread,
)
from liveblockd.runtime.unbroken import to_its_end
from liveblockd.runtime.workers import WorkerPool
from liveblockd.storage.driver import BlockIO

#: milliseconds that a new passphrase takes to open the image, as QEMU
DEFAULT_ITER_TIME: Final = 2000
#: how often erased key material is overwritten
_WIPES: Final = 5
_WORD: Final = struct.Struct(">I")
_SALT_BYTES: Final = 32
_FIELDS: Final = struct.Struct(f">I{_SALT_BYTES}s")  # iterations, salt


class KeyslotState(enum.StrEnum):
    """What becomes of the slot."""

    ACTIVE = "active"
    INACTIVE = "inactive"


@dataclass(frozen=True, slots=True)
class LuksAmendment:
    """Add ``new_secret``, or erase a slot or all that ``old_secret`` opens; time in ms."""

    state: KeyslotState
    new_secret: bytes | None = None
    old_secret: bytes | None = None
    keyslot: int | None = None
    iter_time: int | None = None


async def amend_luks(
    file: BlockIO,
    workers: WorkerPool,
    passphrase: bytes,
    amendment: LuksAmendment,
    *,
    base: int = 0,
    length: int,
    force: bool = False,
) -> None:
    """Do it to the header at ``base`` of ``length`` bytes; durable on return.

    ``passphrase``: one that opens the image. It runs to its end however often the caller is
    cancelled. One at a time, the caller sees to that. Raises BlockError, OSError: some of it may be
    done then.
    """
    _check(amendment)

    async def run() -> None:
        data = bytes(await file.read(base, length))
        if amendment.state is KeyslotState.ACTIVE:
            await _add(file, workers, data, base, passphrase, amendment)
        else:
            await _erase(file, workers, data, base, amendment, force=force)

    await to_its_end(run())


def _check(amendment: LuksAmendment) -> None:
    slot = amendment.keyslot
    if slot is not None and not 0 <= slot < SLOTS:
        raise BlockError(
            f"Invalid keyslot {slot} specified, must be between 0 and {SLOTS - 1}", errno=EINVAL
        )
    if amendment.state is KeyslotState.ACTIVE:
        if amendment.new_secret is None:
            raise BlockError("'new-secret' is required to activate a keyslot")
        if amendment.old_secret is not None:
            raise BlockError("'old-secret' must not be given when activating keyslots")
        return
    if amendment.new_secret is not None:
        raise BlockError("'new-secret' must not be given when erasing keyslots")
    if amendment.iter_time is not None:
        raise BlockError("'iter-time' must not be given when erasing keyslots")
    if slot is None and amendment.old_secret is None:
        raise BlockError(
            "To erase keyslot(s), either explicit keyslot index or the password currently "
            "contained in them must be given"
        )


# -- adding


async def _add(
    file: BlockIO,
    workers: WorkerPool,
    data: bytes,
    base: int,
    passphrase: bytes,
    amendment: LuksAmendment,
) -> None:
    header = parse_luks(data)
    number = amendment.keyslot
    if number is None:
        free = [n for n, slot in enumerate(header.slots) if not slot.active]
        if not free:
            raise BlockError("Can't add a keyslot - all keyslots are in use")
        number = free[0]
    elif header.slots[number].active:
        raise BlockError(f"Refusing to overwrite active keyslot {number} - please erase it first")
    _check_place(header, number, len(data))
    assert amendment.new_secret is not None
    fields, material = await workers.run(
        _new_slot, data, header, passphrase, amendment.new_secret,
        DEFAULT_ITER_TIME if amendment.iter_time is None else amendment.iter_time,
    )  # fmt: skip
    place = base + slot_place(number)
    await file.write(base + header.slots[number].offset, material)
    await file.write(place + 4, fields)
    await file.write(place + 44, _WORD.pack(STRIPES))
    await file.flush()
    await file.write(place, _WORD.pack(ACTIVE))
    await file.flush()


def _check_place(header: LuksHeader, number: int, length: int) -> None:
    """Nothing else of the image lies where the key material of a free slot goes."""
    start = header.slots[number].offset
    end = start + header.material_bytes
    bad = start < HEADER_BYTES or end > min(length, header.payload_offset)
    for other, slot in enumerate(header.slots):
        if other != number and slot.active:
            bad |= start < slot.offset + header.material_bytes and slot.offset < end
    if bad:
        raise BlockError(f"Keyslot {number} is overlapping with something else")


def _new_slot(
    data: bytes, header: LuksHeader, passphrase: bytes, new: bytes, iter_time: int
) -> tuple[bytes, bytes]:
    """Iterations and salt as they are stored, and the key material. A worker's work."""
    master = next(
        (key for slot in header.active if (key := open_slot(header, slot, data, passphrase))), None
    )
    if master is None:
        raise BlockError("Invalid password, cannot unlock any keyslot", errno=EPERM)
    iterations = iterations_for(header.hash_name, header.key_bytes, iter_time)
    salt = os.urandom(_SALT_BYTES)
    key = hashlib.pbkdf2_hmac(header.hash_name, new, salt, iterations, header.key_bytes)
    split = spread(master, header.hash_name).ljust(header.material_bytes, b"\0")
    material = sector_cipher(header.cipher, header.mode, key).encrypt(0, split)
    return _FIELDS.pack(iterations, salt), material


# -- erasing


async def _erase(
    file: BlockIO,
    workers: WorkerPool,
    data: bytes,
    base: int,
    amendment: LuksAmendment,
    *,
    force: bool,
) -> None:
    header = parse_luks(data)
    chosen = await workers.run(_chosen, data, header, amendment)
    in_use = sum(header.slots[number].active for number in chosen)
    if in_use and in_use >= len(header.active) and not force:
        if amendment.old_secret is not None:
            raise BlockError(
                "All the active keyslots match the (old) password that was given and erasing them "
                "will erase all the data in the image irreversibly - refusing operation"
            )
        raise BlockError(
            f"Attempt to erase the only active keyslot {amendment.keyslot} which will erase all "
            "the data in the image irreversibly - refusing operation"
        )
    for number in chosen:
        _check_place(header, number, len(data))
        place = base + slot_place(number)
        await file.write(place, _WORD.pack(INACTIVE))
        await file.flush()
        await file.write(place + 8, bytes(_SALT_BYTES))
        for _ in range(_WIPES):
            noise = os.urandom(header.material_bytes)
            await file.write(base + header.slots[number].offset, noise)
            await file.flush()
        await file.write(place + 4, _WORD.pack(0))
        await file.flush()


def _chosen(data: bytes, header: LuksHeader, amendment: LuksAmendment) -> list[int]:
    """The slots to erase. A worker's work."""
    number, old = amendment.keyslot, amendment.old_secret
    begun = [n for n, slot in enumerate(header.slots) if not slot.active and slot.iterations]
    if number is not None:
        slot = header.slots[number]
        if number in begun:
            return [number]
        if old is not None:
            if not slot.active or open_slot(header, slot, data, old) is None:
                raise BlockError(
                    f"Given keyslot {number} doesn't contain the given old password for erase "
                    "operation"
                )
        elif not slot.active:
            raise BlockError(f"Given keyslot {number} is already erased (inactive) ")
        return [number]
    assert old is not None
    found = [
        n
        for n, slot in enumerate(header.slots)
        if slot.active and open_slot(header, slot, data, old) is not None
    ]
    if not found and not begun:
        raise BlockError("No keyslots match given (old) password for erase operation")
    return found + begun
