"""The line editor, and the session over a pair of sockets."""

import asyncio
import dataclasses
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liveblockd.events import Publisher
from liveblockd.qmp.context import Context
from liveblockd.qmp.hmp.readline import LineEditor, ReadlineSession
from liveblockd.qmp.hmp.table import load


def terminal(output: bytes) -> str:
    """What stands on the last line of a terminal that was sent ``output``."""
    line: list[str] = []
    cursor = 0
    text = output.decode("latin-1").replace("\x1b[K", "\x00")
    for character in text:
        if character == "\x00":
            del line[cursor:]
        elif character == "\b":
            assert cursor > 0, "the cursor left the line"
            cursor -= 1
        elif character == "\r":
            cursor = 0
        elif character == "\n":
            line = []
        else:
            line[cursor : cursor + 1] = [character]
            cursor += 1
    return "".join(line)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (b"quit\n", "quit"),
        (b"quit\r", "quit"),
        (b"quit\r\n", "quit"),
        (b"quxt\x7f\x7fit\n", "quit"),
        (b"abc\x15quit\n", "quit"),
        (b"uit\x01q\n", "quit"),
        (b"qit\x1b[D\x1b[Du\n", "quit"),
        (b"quit now\x17\x08\n", "quit"),
        (b"xquit\x01\x04\n", "quit"),
        (b"quitxx\x02\x02\x0b\n", "quit"),
        (b"\x1b[5~quit\n", "quit"),
        (b"\xc3\xa4\n", "ä"),
        (b"\x1b[3~\x1b[3~q\x1bOHx\x7f\n", "q"),
    ],
)
def test_keys(keys, line):
    assert LineEditor().feed(keys) == [line]


def test_cr_lf_is_one_end_but_two_lf_are_two():
    assert LineEditor().feed(b"a\r\nb\r\n\n\rc\r") == ["a", "b", "", "", "c"]


def test_history():
    editor = LineEditor()
    assert editor.feed(b"one\ntwo\n\x10\x10\n") == ["one", "two", "one"]
    assert editor.feed(b"typed\x1b[A\x1b[A\x1b[B\x1b[B\n") == ["typed"]


def test_completion():
    load()
    editor = LineEditor()
    assert editor.feed(b"block_str\t\x7f\n") == ["block_stream"]
    assert editor.feed(b"info block-\t\n") == ["info block-jobs "]


@given(
    st.lists(
        st.sampled_from(
            [
                b"a",
                b"b ",
                b"\x01",
                b"\x02",
                b"\x04",
                b"\x05",
                b"\x06",
                b"\x08",
                b"\x0b",
                b"\x0e",
                b"\x10",
                b"\x15",
                b"\x17",
                b"\n",
                b"\x1b[D",
            ]
        )
    )
)
def test_the_terminal_shows_the_line_as_it_is(keys):
    editor = LineEditor()
    editor.feed(b"".join(keys))
    assert terminal(editor.take_echo()) == editor.partial


@given(st.binary(max_size=200))
def test_any_bytes_may_come_in_any_pieces(data):
    whole, pieces = LineEditor(), LineEditor()
    lines = whole.feed(data)
    assert [line for i in range(len(data)) for line in pieces.feed(data[i : i + 1])] == lines
    assert whole.take_echo() == pieces.take_echo()


def make_context():
    fields = {f.name: None for f in dataclasses.fields(Context) if f.default is dataclasses.MISSING
              and f.default_factory is dataclasses.MISSING}  # fmt: skip
    return Context(**(fields | {"publisher": Publisher(), "on_quit": lambda reason: None}))


async def test_session():
    context = make_context()
    ours, theirs = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=ours)
    session = asyncio.create_task(
        ReadlineSession(context).run(*await asyncio.open_connection(sock=theirs))
    )
    greeting = await asyncio.wait_for(reader.readuntil(b"(qemu) "), 30)
    assert greeting.startswith(b"liveblockd ")
    assert greeting.endswith(b" monitor - type 'help' for more information\r\n(qemu) ")
    writer.write(b"nosuch\nnosuch2\n")
    assert await asyncio.wait_for(reader.readuntil(b"2'\r\n(qemu) "), 30) == (
        b"nosuch\r\nunknown command: 'nosuch'\r\n(qemu) "
        b"nosuch2\r\nunknown command: 'nosuch2'\r\n(qemu) "
    )
    context.quitting = True
    writer.write(b"help quit\n")  # the daemon ends: nothing is run any more
    assert await asyncio.wait_for(reader.read(), 30) == b"help quit\r\n"
    await asyncio.wait_for(session, 30)
    writer.close()


async def test_a_client_that_vanishes_ends_its_session():
    ours, theirs = socket.socketpair()
    ours.sendall(b"help\nhelp\nhelp\n")
    ours.close()
    await asyncio.wait_for(
        ReadlineSession(make_context()).run(*await asyncio.open_connection(sock=theirs)), 5
    )
