"""The payload of a large WRITE, stored while it comes or collected."""

import random
from itertools import pairwise

import pytest

from liveblockd.exports.nbd_payload import BOUNDARY, PIECE, Payload
from liveblockd.nbd.transmission import Request

LENGTHS = (BOUNDARY + 1, PIECE - 1, PIECE, PIECE + 1, (1 << 20) - 512, 3 << 20)
OFFSETS = (0, 512, BOUNDARY - 1, PIECE + 4096)


def receive(payload, data, rng):
    position = 0
    while True:
        room = payload.room
        count = rng.randint(1, len(room))
        room[:count] = data[position : position + count]
        position += count
        if payload.arrived(count):
            assert position == len(data)
            return


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("pieces", [None, 0, 1, 2, 99])
def test_every_byte_once_and_in_order(length, offset, pieces):
    """``pieces`` are taken at once, then one is refused; None: none is asked for."""
    rng = random.Random(length * 7 + offset)
    data = rng.randbytes(length)
    written, tries = [], []

    def store(place, window):
        tries.append(place)
        if len(tries) > pieces:
            return False
        written.append((place, bytes(window)))
        return True

    request = Request(0, 1, 77, offset, length)
    chunk = memoryview(bytearray(PIECE))
    payload = Payload(request, None if pieces is None else store, chunk)
    begin = rng.randrange(length)
    payload.put(memoryview(data)[:begin])
    receive(payload, data[begin:], rng)
    rest = payload.rest()
    if rest is not None:
        left, buffer = rest
        assert left == request._replace(offset=left.offset, length=len(buffer))
        written.append((left.offset, bytes(buffer)))
    assert b"".join(part for _, part in written) == data
    assert written[0][0] == offset
    for (place, part), (following, _) in pairwise(written):
        assert place + len(part) == following
        assert following % BOUNDARY == 0
    assert pieces is None or len(tries) == min(pieces + 1, len(tries))
    if pieces == 99:
        assert rest is None and len(written) >= length // PIECE
    if pieces in (None, 0):
        assert len(written) == 1


def test_nothing_is_stored_after_an_error():
    data, tries = random.Random(1).randbytes(1 << 20), []

    def store(place, window):
        tries.append(place)
        if len(tries) == 2:
            raise OSError(5, "oops")
        return True

    payload = Payload(Request(0, 1, 1, 0, len(data)), store, memoryview(bytearray(PIECE)))
    receive(payload, data, random.Random(2))
    assert payload.rest() is None and payload.error.errno == 5
    assert tries == [0, PIECE]
