"""Which requests are taken."""

import pytest

from liveblockd.nbd.constants import MAX_PAYLOAD, Command, CommandFlag
from liveblockd.nbd.transmission import Request, refusal

SIZE = 1 << 30


def ask(command, offset=0, length=512, flags=0, **state):
    known = {"size": SIZE, "read_only": False, "structured": True, "contexts": True} | state
    found = refusal(Request(flags, command, 1, offset, length), **known)
    return None if found is None else found.error.name


@pytest.mark.parametrize("command", [c for c in Command if c is not Command.DISC])
def test_inside(command):
    assert ask(command) is None
    assert ask(command, SIZE - 512) is None
    assert ask(command, flags=CommandFlag.FUA) is None


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (Command.READ, "EINVAL"),
        (Command.WRITE, "ENOSPC"),
        (Command.TRIM, "EINVAL"),
        (Command.CACHE, "EINVAL"),
        (Command.WRITE_ZEROES, "ENOSPC"),
        (Command.BLOCK_STATUS, "EINVAL"),
    ],
)
@pytest.mark.parametrize("offset", [SIZE - 511, SIZE, SIZE + 512, 2**63, 2**64 - 1, 2**64 - 256])
def test_past_the_end(command, error, offset):
    assert ask(command, offset) == error


def test_flush_has_no_range():
    assert ask(Command.FLUSH, 2**64 - 1, 2**32 - 1) is None


@pytest.mark.parametrize("command", [Command.READ, Command.WRITE, Command.CACHE])
def test_too_long(command):
    assert ask(command, 0, MAX_PAYLOAD) is None
    assert ask(command, 0, MAX_PAYLOAD + 1) == "EINVAL"


@pytest.mark.parametrize("command", [Command.TRIM, Command.WRITE_ZEROES, Command.BLOCK_STATUS])
def test_no_payload_no_limit(command):
    assert ask(command, 0, 2**32 - 1, size=2**40) is None


@pytest.mark.parametrize("command", list(Command))
def test_read_only(command):
    if command is Command.DISC:
        return
    changing = command in (Command.WRITE, Command.TRIM, Command.WRITE_ZEROES)
    assert ask(command, read_only=True) == ("EPERM" if changing else None)


VALID = {
    Command.READ: {1, 4},
    Command.WRITE: {1},
    Command.FLUSH: {1},
    Command.TRIM: {1},
    Command.CACHE: {1},
    Command.WRITE_ZEROES: {1, 2, 16},
    Command.BLOCK_STATUS: {1, 8},
}


@pytest.mark.parametrize("command", list(VALID))
@pytest.mark.parametrize("bit", range(16))
def test_flags(command, bit):
    flag = 1 << bit
    assert ask(command, flags=flag) == (None if flag in VALID[command] else "EINVAL")


def test_df_needs_structured_replies():
    assert ask(Command.READ, flags=CommandFlag.DF, structured=False) == "EINVAL"


def test_block_status():
    assert ask(Command.BLOCK_STATUS, contexts=False) == "EINVAL"
    assert ask(Command.BLOCK_STATUS, length=0) == "EINVAL"


@pytest.mark.parametrize("command", [8, 99, 65535])
def test_unknown_command(command):
    assert ask(command) == "EINVAL"
