"""Option haggling: what each option answers, and what no client can do."""

import random
import struct

import pytest

from liveblockd.nbd.constants import (
    MAX_OPTION,
    MAX_OPTION_SKIPPED,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
)
from liveblockd.nbd.options import ExportInfo, Negotiation, Phase

BASE = "base:allocation"
DEPTH = "qemu:allocation-depth"
BITMAP = "qemu:dirty-bitmap:b0"


class Exports(dict):
    def __init__(self, *exports):
        super().__init__({e.name: e for e in exports})

    def find(self, name):
        return self.get(name)

    def listed(self):
        return self.values()


DISK = ExportInfo("disk", 1 << 20, False, contexts=(BASE, DEPTH, BITMAP))
OTHER = ExportInfo("other", 4096, True, "my disk", contexts=(BASE,))


def text(value):
    data = value.encode()
    return struct.pack(">I", len(data)) + data


def query(name, *queries):
    return text(name) + struct.pack(">I", len(queries)) + b"".join(map(text, queries))


def info(name, *wanted):
    return text(name) + struct.pack(f">{len(wanted) + 1}H", len(wanted), *wanted)


class Client:
    """Sends options to a ``Negotiation`` and takes its replies apart."""

    def __init__(self, *exports, flags=3):
        self.negotiation = Negotiation(Exports(*(exports or (DISK, OTHER))))
        assert self.negotiation.feed(struct.pack(">I", flags)) == b""

    def raw(self, option, data=b"", length=None):
        length = len(data) if length is None else length
        head = struct.pack(">QII", 0x49484156454F5054, option, length)
        return self.negotiation.feed(head + data)

    def option(self, option, data=b"", length=None):
        out = self.raw(option, data, length)
        while self.negotiation.more:
            out += self.negotiation.feed(b"")
        return parse(out, option)


def parse(out, option):
    replies = []
    while out:
        magic, of, kind, length = struct.unpack_from(">QIII", out)
        assert magic == 0x3E889045565A9 and of == option
        replies.append((OptionReply(kind), out[20 : 20 + length]))
        out = out[20 + length :]
    return replies


def kinds(replies):
    return [kind.name for kind, _ in replies]


def error(replies):
    ((kind, message),) = replies
    assert message.decode()
    return kind.name


def contexts(replies):
    assert replies[-1] == (OptionReply.ACK, b"")
    assert all(kind is OptionReply.META_CONTEXT for kind, _ in replies[:-1])
    return [(struct.unpack_from(">I", d)[0], d[4:].decode()) for _, d in replies[:-1]]


def test_unknown_options_are_refused_and_skipped():
    client = Client()
    for option in (4, 11, 12, 99, 0xFFFFFFFF):
        assert error(client.option(option, b"abc")) == "ERR_UNSUP"
    assert kinds(client.option(Option.LIST)) == ["SERVER", "SERVER", "ACK"]


@pytest.mark.parametrize("option", [Option.LIST, Option.STARTTLS, Option.STRUCTURED_REPLY])
def test_options_without_data(option):
    assert error(Client().option(option, b"x")) == "ERR_INVALID"


def test_starttls_is_against_policy():
    assert error(Client().option(Option.STARTTLS)) == "ERR_POLICY"


def test_structured_reply_once():
    client = Client()
    assert kinds(client.option(Option.STRUCTURED_REPLY)) == ["ACK"]
    assert error(client.option(Option.STRUCTURED_REPLY)) == "ERR_INVALID"
    assert client.negotiation.structured


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"abc",
        text("disk"),
        text("disk") + b"\0",
        text("disk") + b"\0\1",
        info("disk") + b"zz",
        struct.pack(">I", 400) + b"disk\0\0",
        struct.pack(">I", 0xFFFFFFFF) + b"disk\0\0",
        struct.pack(">I", 2) + b"\xff\xfe" + b"\0\0",
        info("d" * 5000),
    ],
)
def test_malformed_info(option, data):
    client = Client()
    assert error(client.option(option, data)) == "ERR_INVALID"
    assert client.negotiation.phase is Phase.OPTIONS


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
def test_absent_export(option):
    client = Client()
    for name in ("nope", "", "Disk"):
        assert error(client.option(option, info(name))) == "ERR_UNKNOWN"


def facts(replies):
    assert replies[-1] == (OptionReply.ACK, b"")
    found = {}
    for kind, data in replies[:-1]:
        assert kind is OptionReply.INFO
        found[Info(struct.unpack_from(">H", data)[0])] = data[2:]
    return found


def test_info():
    client = Client()
    plain = facts(client.option(Option.INFO, info("disk")))
    assert set(plain) == {Info.EXPORT, Info.BLOCK_SIZE}
    assert struct.unpack(">III", plain[Info.BLOCK_SIZE]) == (1, 4096, 32 << 20)
    size, flags = struct.unpack(">QH", plain[Info.EXPORT])
    assert size == DISK.size and not flags & TransmissionFlag.SEND_DF
    assert client.negotiation.phase is Phase.OPTIONS
    named = facts(client.option(Option.INFO, info("other", 1, 2, 3, 77)))
    assert named[Info.NAME] == b"other" and named[Info.DESCRIPTION] == b"my disk"
    _, flags = struct.unpack(">QH", named[Info.EXPORT])
    assert flags & TransmissionFlag.READ_ONLY
    assert not flags & (TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES)


def test_go_chooses():
    client = Client()
    client.option(Option.STRUCTURED_REPLY)
    found = facts(client.option(Option.GO, info("disk")))
    assert struct.unpack(">QH", found[Info.EXPORT])[1] & TransmissionFlag.SEND_DF
    assert client.negotiation.phase is Phase.TRANSMISSION
    assert client.negotiation.export is DISK and client.negotiation.contexts == ()


def test_contexts_need_structured_replies():
    client = Client()
    assert error(client.option(Option.SET_META_CONTEXT, query("disk", BASE))) == "ERR_INVALID"


@pytest.mark.parametrize(
    ("queries", "listed", "chosen"),
    [
        ((), [BASE, DEPTH, BITMAP], []),
        (("base:",), [BASE], []),
        (("qemu:",), [DEPTH, BITMAP], []),
        (("qemu:dirty-bitmap:",), [BITMAP], []),
        (("base",), [], []),
        (("x-none:y",), [], []),
        ((BASE, DEPTH, BASE), [BASE, DEPTH], [BASE, DEPTH]),
        ((BITMAP, BASE), [BASE, BITMAP], [BASE, BITMAP]),
        (("qemu:dirty-bitmap:b1",), [], []),
    ],
)
def test_meta_contexts(queries, listed, chosen):
    client = Client()
    client.option(Option.STRUCTURED_REPLY)
    answer = contexts(client.option(Option.LIST_META_CONTEXT, query("disk", *queries)))
    assert answer == [(0, c) for c in listed]
    answer = contexts(client.option(Option.SET_META_CONTEXT, query("disk", *queries)))
    assert answer == list(enumerate(chosen))
    client.option(Option.GO, info("disk"))
    assert client.negotiation.contexts == tuple(chosen)


def test_contexts_are_of_one_export():
    client = Client()
    client.option(Option.STRUCTURED_REPLY)
    client.option(Option.SET_META_CONTEXT, query("disk", BASE))
    client.option(Option.GO, info("other"))
    assert client.negotiation.contexts == ()


def test_a_failed_query_leaves_no_context():
    client = Client()
    client.option(Option.STRUCTURED_REPLY)
    client.option(Option.SET_META_CONTEXT, query("disk", BASE))
    assert error(client.option(Option.SET_META_CONTEXT, query("nope", BASE))) == "ERR_UNKNOWN"
    client.option(Option.GO, info("disk"))
    assert client.negotiation.contexts == ()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        text("disk"),
        text("disk") + struct.pack(">I", 1),
        text("disk") + struct.pack(">I", 0xFFFFFFFF),
        text("disk") + struct.pack(">II", 1, 500) + b"base:",
        query("disk", BASE) + b"x",
        query("disk", "b" * 4097),
    ],
)
@pytest.mark.parametrize("option", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
def test_malformed_query(option, data):
    client = Client()
    client.option(Option.STRUCTURED_REPLY)
    assert error(client.option(option, data)) == "ERR_INVALID"


def test_large_options():
    client = Client()
    data = bytes(MAX_OPTION + 1)
    assert error(client.option(Option.INFO, data)) == "ERR_TOO_BIG"
    assert kinds(client.option(Option.LIST)) == ["SERVER", "SERVER", "ACK"]
    assert client.raw(99, length=MAX_OPTION_SKIPPED + 1) == b""
    assert client.negotiation.phase is Phase.CLOSED and client.negotiation.problem


def test_a_skipped_option_is_not_kept():
    client = Client()
    client.raw(99, length=MAX_OPTION_SKIPPED)
    for _ in range(MAX_OPTION_SKIPPED >> 20):
        assert client.negotiation.feed(bytes(1 << 20)) == b""
        assert len(client.negotiation.rest) == 0
    assert kinds(client.option(Option.LIST)) == ["SERVER", "SERVER", "ACK"]


def test_long_export_name_ends_it():
    client = Client()
    assert client.raw(Option.EXPORT_NAME, b"d" * 4097) == b""
    assert client.negotiation.phase is Phase.CLOSED


def test_abort():
    client = Client()
    assert kinds(client.option(Option.ABORT)) == ["ACK"]
    assert client.negotiation.phase is Phase.CLOSED and not client.negotiation.problem


def test_many_answers_come_in_portions():
    exports = [ExportInfo("e" * 4000 + str(i), 1, True) for i in range(20)]
    client = Client(*exports)
    flood = struct.pack(">QII", 0x49484156454F5054, Option.LIST, 0) * 10
    out = client.negotiation.feed(flood)
    assert client.negotiation.more and len(out) < 200_000
    rounds = 1
    while client.negotiation.more:
        out += client.negotiation.feed(b"")
        rounds += 1
    assert rounds >= 10
    assert kinds(parse(out, Option.LIST)) == (["SERVER"] * 20 + ["ACK"]) * 10


def test_any_bytes_are_answered_or_end_it():
    seed = random.randrange(1 << 32)
    print("seed", seed)  # noqa: T201
    chance = random.Random(seed)
    for _ in range(300):
        client = Client(flags=chance.choice((3, 1, 0)))
        for _ in range(20):
            option = chance.choice((*range(13), chance.getrandbits(32)))
            size = chance.choice((0, 1, 4, 9, 40))
            data = chance.randbytes(size)
            if chance.random() < 0.5:
                data = chance.choice((info, query))("disk", *[]) + data[:2]
            client.raw(option, data, chance.choice((None, None, None, size + 3)))
            if client.negotiation.phase in (Phase.CLOSED, Phase.TRANSMISSION):
                break
