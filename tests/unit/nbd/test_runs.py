"""Runs of requests: found where they are, and nowhere else."""

import random

import pytest

from liveblockd.nbd.constants import Command, CommandFlag
from liveblockd.nbd.runs import LEAST, find_run, payloads, write_replies
from liveblockd.nbd.transmission import REQUEST_SIZE, Request, simple_reply


def stream(*requests):
    """Their bytes; the payload of a WRITE is its cookie, again and again."""
    out = bytearray()
    for request in requests:
        out += request.to_bytes()
        if request.command == Command.WRITE:
            out += bytes([request.cookie & 0xFF]) * request.length
    return memoryview(out)


def request(command, cookie, length=64, flags=0):
    return Request(flags, command, cookie, cookie % 1000 * 512, length)


@pytest.mark.parametrize("command", [Command.READ, Command.WRITE])
@pytest.mark.parametrize("count", range(9))
def test_alike_as_far_as_they_go(command, count):
    alike = [request(command, 2**63 + n) for n in range(count)]
    for other in (
        [],
        [request(command, 7, length=65)],
        [request(Command.READ if command == Command.WRITE else Command.WRITE, 7)],
        [request(command, 7, flags=CommandFlag.FUA)],
        [request(Command.FLUSH, 7, length=0)] * 3,
    ):
        view = stream(request(Command.FLUSH, 1), *alike, *other)
        run = find_run(view, REQUEST_SIZE, len(view), command, 64, 100)
        if count < LEAST:
            assert run is None, other
            continue
        assert [int.from_bytes(c, "big") for c in run.cookies] == [r.cookie for r in alike]
        assert list(run.offsets) == [r.offset for r in alike]


def test_no_more_than_may_be_and_than_is_there():
    view = stream(*(request(Command.WRITE, n) for n in range(8)))
    frame = len(view) // 8
    assert len(find_run(view, 0, len(view), Command.WRITE, 64, 5).offsets) == 5
    assert len(find_run(view, 0, len(view) - 1, Command.WRITE, 64, 9).offsets) == 7
    assert find_run(view, 0, LEAST * frame - 1, Command.WRITE, 64, 9) is None
    assert find_run(view, 0, len(view), Command.WRITE, 64, LEAST - 1) is None
    assert find_run(view, 0, len(view), Command.WRITE, 64, 0) is None


def test_payloads_and_replies():
    view = stream(*(request(Command.WRITE, n) for n in range(3, 9)))
    run = find_run(view, 0, len(view), Command.WRITE, 64, 100)
    parts = payloads(view, 0, 64, len(run.offsets))
    assert [bytes(part) for part in parts] == [bytes([n]) * 64 for n in range(3, 9)]
    assert write_replies(run.cookies) == b"".join(simple_reply(n) for n in range(3, 9))
    assert write_replies(run.cookies[:1]) == simple_reply(3)


@pytest.mark.parametrize("seed", range(20))
def test_what_single_requests_say(seed):
    source = random.Random(seed)
    requests = [
        request(
            source.choice([Command.READ, Command.WRITE, Command.WRITE]),
            n,
            length=source.choice([32, 64, 64, 64]),
            flags=source.choice([0] * 12 + [1]),
        )
        for n in range(200)
    ]
    view, position, found = stream(*requests), 0, 0
    for number, first in enumerate(requests):
        if not first.flags:
            run = find_run(view, position, len(view), first.command, first.length, 128)
            like = [r.cookie for r in requests[number : number + 128]]
            for n, other in enumerate(requests[number : number + 128]):
                if (other.flags, other.command, other.length) != first[:2] + first[4:]:
                    like = like[:n]
                    break
            got = [] if run is None else [int.from_bytes(c, "big") for c in run.cookies]
            assert got == (like if len(like) >= LEAST else []), number
            found += bool(got)
        position += REQUEST_SIZE + (first.length if first.command == Command.WRITE else 0)
    assert found
