"""Bytes <-> values in both directions, whole and byte by byte."""

import json
from pathlib import Path

import pytest

from liveblockd.nbd import transmission
from liveblockd.nbd.options import ExportInfo, Negotiation, Phase
from liveblockd.nbd.transmission import ProtocolError, Request, parse_reply

VECTORS = json.loads((Path(__file__).parents[2] / "vectors/nbd.json").read_text())


class Exports:
    disks = (
        ExportInfo("disk", 1 << 20, False, contexts=("base:allocation", "qemu:allocation-depth")),
        ExportInfo("ro", 512, True, "hello", contexts=("base:allocation",)),
    )

    def find(self, name):
        return next((d for d in self.disks if d.name == name), None)

    def listed(self):
        return self.disks


@pytest.mark.parametrize("vector", VECTORS["requests"], ids=lambda v: v["hex"][:20])
def test_request(vector):
    data = bytes.fromhex(vector["hex"])
    request = Request(*(vector[m] for m in Request._fields))
    assert request.to_bytes() == data
    assert Request(*transmission.REQUEST.unpack(data)[1:]) == request


@pytest.mark.parametrize("vector", VECTORS["replies"], ids=lambda v: v["call"])
def test_reply(vector):
    data = bytes.fromhex(vector["hex"])
    options = {"done": vector["done"]} if "done" in vector else {}
    built = getattr(transmission, vector["call"])(*vector["arguments"], **options)
    assert built + bytes.fromhex(vector.get("then", "")) == data
    for end in range(len(data)):
        assert parse_reply(data[:end]) is None
    parsed, used = parse_reply(b"?" + data + b"more", 1)
    assert used == 1 + len(data)
    expected = vector["parsed"]
    for member in parsed._fields:
        value = getattr(parsed, member)
        if callable(value):
            continue
        assert (value.hex() if member == "payload" else value) == expected[member]
    if "data" in expected:
        offset, content = parsed.data()
        assert [offset, content.hex()] == expected["data"]
    if "hole" in expected:
        assert list(parsed.hole()) == expected["hole"]
    if "error" in expected and "type" in expected:
        assert list(type(parsed).error(parsed)) == expected["error"]
    if "extents" in expected:
        context, extents = parsed.extents()
        assert [context, [list(e) for e in extents]] == expected["extents"]


@pytest.mark.parametrize("data", [b"x" * 16, b"\x66\x8e\x33\xef" + b"\xff" * 16])
def test_reply_out_of_step(data):
    with pytest.raises(ProtocolError):
        parse_reply(data)


@pytest.mark.parametrize("step", [1, 3, 1000])
@pytest.mark.parametrize("vector", VECTORS["negotiations"], ids=lambda v: v["title"])
def test_negotiation(vector, step):
    negotiation = Negotiation(Exports())
    client = bytes.fromhex(vector["client"])
    server = bytearray()
    for start in range(0, len(client), step):
        if negotiation.phase is Phase.TRANSMISSION:
            assert step < 1000  # the rest belongs to the next phase
            break
        server += negotiation.feed(client[start : start + step])
        assert not negotiation.more
    assert server.hex() == vector["server"].replace(" ", "")
    assert negotiation.phase is Phase[vector["phase"]]
    if "export" in vector:
        assert negotiation.export.name == vector["export"]
        assert negotiation.contexts == tuple(vector.get("contexts", ()))
        if step == 1000:
            assert negotiation.rest.hex() == vector.get("rest", "")
    else:
        assert bool(negotiation.problem) is (vector["title"] != "LIST and ABORT")
