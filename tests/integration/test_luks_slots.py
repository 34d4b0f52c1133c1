"""Passphrases of LUKS images: added, erased, at every instant; qemu-img and qemu-io beside it."""

from __future__ import annotations

import asyncio
import subprocess
from errno import ENOSPC
from pathlib import Path

import pytest

from liveblockd.errors import BlockError
from liveblockd.formats.luks import SLOTS, new_luks, parse_luks, unlock
from liveblockd.formats.luks_image import Luks, LuksOptions
from liveblockd.formats.luks_slots import KeyslotState, LuksAmendment
from liveblockd.qapi import parse
from liveblockd.storage.registry import Environment
from tests.support.memory import MemoryDriver
from tests.support.qcow2_images import needs
from tests.support.workers import InlineWorkers

pytest.importorskip("cryptography")
OLD, NEW = b"swordfish", b"new one"


async def open_luks(file: MemoryDriver, passphrase: bytes = OLD) -> Luks:
    options = parse(LuksOptions, {"driver": "luks", "file": "f", "key-secret": "s"})
    environment = Environment(InlineWorkers(), secret=lambda name: passphrase)
    return await Luks.open(options, {"file": file}, environment)


def image() -> MemoryDriver:
    return MemoryDriver.of(new_luks(OLD, iter_time=1) + bytes(1 << 20))


def opens(data: bytes, passphrase: bytes) -> bool:
    try:
        unlock(data, passphrase)
    except BlockError:
        return False
    return True


def add(new: bytes = NEW, **more) -> LuksAmendment:
    return LuksAmendment(KeyslotState.ACTIVE, new_secret=new, iter_time=1, **more)


def erase(**more) -> LuksAmendment:
    return LuksAmendment(KeyslotState.INACTIVE, **more)


async def test_every_instant() -> None:
    file = image()
    luks = await open_luks(file)
    await luks.write(0, b"\1" * 4096)
    states: list[bytes] = []
    length = luks.header.payload_offset

    def keep(operation: str, offset: int, size: int) -> None:
        if operation in ("write", "flush"):
            states.append(file.content()[:length])

    file.hook = keep
    await luks.amend_encryption(OLD, add(keyslot=6))  # its description crosses sectors
    assert len(states) >= 6 and all(opens(state, OLD) for state in states)
    assert luks.header.slots[6].active
    states.clear()
    await luks.amend_encryption(NEW, erase(old_secret=OLD))
    assert len(states) >= 8 and all(opens(state, NEW) for state in states)
    # No longer said to be in use: then its material goes.
    gone = [not parse_luks(state).slots[0].active for state in states]
    assert gone == sorted(gone) and gone[1]
    file.hook = None
    assert not opens(file.content()[:length], OLD)
    again = await open_luks(file, NEW)
    assert bytes(await again.read(0, 4096)) == b"\1" * 4096


async def test_cancelled_callers_and_all_slots() -> None:
    file = image()
    luks = await open_luks(file)
    file.nowait = False

    async def slow() -> None:
        await asyncio.sleep(0)

    file.hook = lambda op, offset, length: slow()
    task = asyncio.create_task(luks.amend_encryption(OLD, add()))
    for _ in range(4):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert opens(file.content(), NEW) and opens(file.content(), OLD)
    await asyncio.gather(*(luks.amend_encryption(NEW, add(b"%d" % n)) for n in range(SLOTS - 2)))
    assert len(luks.header.active) == SLOTS
    with pytest.raises(BlockError, match="all keyslots are in use"):
        await luks.amend_encryption(OLD, add())


@pytest.mark.parametrize("how", ["passphrase", "keyslot", "both"])
@pytest.mark.parametrize("what", ["add", "erase"])
async def test_without_room_at_any_step(what: str, how: str) -> None:
    """Nothing is lost, what is shown of the slots is true; with room it can be done again."""
    given = {"passphrase": {"old_secret": OLD}, "keyslot": {"keyslot": 0}}
    given["both"] = given["passphrase"] | given["keyslot"]
    amendment = add() if what == "add" else erase(**given[how])
    for step in range(40):
        file = image()
        luks = await open_luks(file)
        if what == "erase":
            await luks.amend_encryption(OLD, add())
        slot = luks.header.slots[0]
        place = slice(slot.offset, slot.offset + luks.header.material_bytes)
        before = file.content()[place]
        count = 0

        def full(operation: str, offset: int, size: int, step: int = step) -> None:
            nonlocal count
            if operation in ("write", "flush"):
                count += 1
                if count > step:
                    raise OSError(ENOSPC, "No space left on device")

        file.hook = full
        kept = OLD if what == "add" else NEW
        try:
            await luks.amend_encryption(kept, amendment)
        except OSError as error:
            assert error.errno == ENOSPC
        else:
            break
        assert opens(file.content(), kept)
        assert luks.header.describe() == parse_luks(file.content()).describe()
        file.hook = None
        if what == "add" or luks.header.slots[0].iterations:  # else all was written, not flushed
            await luks.amend_encryption(kept, amendment)
        assert opens(file.content(), NEW) and opens(file.content(), OLD) == (what == "add")
        if what == "erase":
            assert file.content()[place] != before
            with pytest.raises(BlockError):
                await luks.amend_encryption(kept, amendment)
    assert 4 < step < 30


REFUSED = [
    (OLD, LuksAmendment(KeyslotState.ACTIVE), "'new-secret' is required to activate a keyslot"),
    (OLD, add(old_secret=OLD), "'old-secret' must not be given when activating keyslots"),
    (OLD, add(keyslot=0), "Refusing to overwrite active keyslot 0 - please erase it first"),
    (OLD, add(keyslot=9), "Invalid keyslot 9 specified, must be between 0 and 7"),
    (b"x", add(), "Invalid password, cannot unlock any keyslot"),
    (OLD, erase(), "To erase keyslot"),
    (OLD, erase(new_secret=NEW, keyslot=0), "'new-secret' must not be given when erasing"),
    (OLD, erase(iter_time=9, keyslot=0), "'iter-time' must not be given when erasing keyslots"),
    (OLD, erase(keyslot=3), "Given keyslot 3 is already erased"),
    (OLD, erase(old_secret=NEW), "No keyslots match given"),
    (OLD, erase(old_secret=NEW, keyslot=0), "Given keyslot 0 doesn't contain the given old"),
    (OLD, erase(keyslot=0), "Attempt to erase the only active keyslot 0"),
    (OLD, erase(old_secret=OLD), "All the active keyslots match the"),
]


@pytest.mark.parametrize("case", REFUSED, ids=[words for _, _, words in REFUSED])
async def test_refused(case: tuple[bytes, LuksAmendment, str]) -> None:
    passphrase, amendment, words = case
    file = image()
    luks = await open_luks(file)
    before = file.content()
    with pytest.raises(BlockError, match=words):
        await luks.amend_encryption(passphrase, amendment)
    assert file.content() == before


@needs("qemu-img", "qemu-io")
async def test_qemu_opens_it(tmp_path: Path) -> None:
    file = image()
    luks = await open_luks(file)
    await luks.write(0, b"\7" * 65536)
    await luks.amend_encryption(OLD, add())
    await luks.amend_encryption(NEW, erase(keyslot=0))
    path = tmp_path / "i.luks"
    path.write_bytes(file.content())

    def read(secret: bytes) -> int:
        return subprocess.run(
            ["qemu-io", "-r", "--object", f"secret,id=s,data={secret.decode()}", "-c",
             "read -P 7 0 64k", "--image-opts", f"driver=luks,file.filename={path},key-secret=s"],
            capture_output=True, timeout=60, check=False,
        ).returncode  # fmt: skip

    assert read(NEW) == 0 and read(OLD) != 0
