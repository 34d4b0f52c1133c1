"""Requests that the NBD server looks for, and replies that go to the socket past the transport."""

import asyncio
import random
import socket
import struct
import time
from errno import ENOSPC
from itertools import pairwise

import pytest
import uvloop

from liveblockd.exports import nbd_line, polling
from liveblockd.exports.nbd_connection import NbdConnection
from liveblockd.nbd.constants import Command
from liveblockd.nbd.transmission import Request
from tests.integration.test_nbd_server import SIZE, Setup, pattern
from tests.support.memory import fail_once

KI = 1 << 10
MI = 1 << 20


@pytest.fixture(params=[asyncio.DefaultEventLoopPolicy, uvloop.EventLoopPolicy])
def event_loop_policy(request):
    return request.param()


@pytest.fixture
def disk(tmp_path, monkeypatch):
    # However slow this machine is, what a client sends at once is quick.
    monkeypatch.setattr(polling, "QUICK", 5 * 10**9)
    monkeypatch.setattr(polling, "FIRST_RUN", 4)
    monkeypatch.setattr(polling, "MAX_DOUBLINGS", 0)
    return Setup(tmp_path, [])


class OneByOne:
    """A client, without structured replies, that waits for each answer; for a thread."""

    def __init__(self, path, name=b"disk"):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(str(path))
        self.exactly(18)
        self.socket.sendall(struct.pack(">IQII", 3, 0x49484156454F5054, 1, len(name)) + name)
        self.exactly(10)
        self.cookie = 0

    def exactly(self, count):
        parts = []
        while count:
            parts.append(self.socket.recv(count))
            assert parts[-1], "disconnected"
            count -= len(parts[-1])
        return b"".join(parts)

    def send(self, command, offset, length, payload=b"", *, apart=False):
        self.cookie += 1
        head = Request(0, command, self.cookie, offset, length).to_bytes()
        if apart:
            self.socket.sendall(head)
            self.socket.sendall(payload)
        else:
            self.socket.sendall(head + payload)

    def answer(self, length=0):
        magic, error, cookie = struct.unpack(">IIQ", self.exactly(16))
        assert (magic, error) == (0x67446698, 0)
        return cookie, self.exactly(length)

    def write(self, offset, data, **how):
        self.send(Command.WRITE, offset, len(data), data, **how)
        assert self.answer() == (self.cookie, b"")

    def read(self, offset, length):
        self.send(Command.READ, offset, length)
        cookie, data = self.answer(length)
        assert cookie == self.cookie
        return data


async def gone(connection):
    while not connection._lost:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


def requests_against_a_model(path, seed, count=300):
    """Random ones, each compared."""
    rng, model = random.Random(seed), bytearray(SIZE)
    client = OneByOne(path)
    for number in range(count):
        length = rng.choice((1, 512, 4096, 60 * KI, 100 * KI, 3 * MI))
        offset = rng.randrange(SIZE - length)
        if rng.random() < 0.5:
            data = rng.randbytes(length)
            client.write(offset, data, apart=number % 2)
            model[offset : offset + length] = data
        else:
            assert client.read(offset, length) == model[offset : offset + length]
    assert client.read(0, SIZE) == model
    return client


@pytest.mark.parametrize("limit", [0, 50_000_000])
async def test_the_same_bytes_with_and_without_looking(disk, limit):
    async with disk.served() as registry:
        server = registry.nbd_server
        registry.exports["disk"].poll_ns = limit
        client = await asyncio.to_thread(requests_against_a_model, disk.path, seed=limit + 7)
        assert (server.found_early > 30) == bool(limit)
        assert len(server.connections) == 1
        for connection in tuple(server.connections):  # the end of the client was seen as well
            assert connection._line.at_once > 200
            client.socket.close()
            await asyncio.wait_for(gone(connection), 30)


def bursts(path, count, length=512):
    """Writes that come together, three times; each one is answered, and stored."""
    rng, client, model = random.Random(count), OneByOne(path), {}
    for _ in range(3):
        places = rng.sample(range(100), count)
        packet = b""
        for place in places:
            client.cookie += 1
            data = model[place] = rng.randbytes(length)
            head = Request(0, Command.WRITE, client.cookie, place * length, length)
            packet += head.to_bytes() + data
        client.socket.sendall(packet)
        cookies = [client.answer()[0] for _ in places]
        assert cookies == list(range(client.cookie - count + 1, client.cookie + 1))
    for place, data in model.items():
        assert client.read(place * length, length) == data


@pytest.mark.parametrize(
    ("count", "parts"), [(5, [5]), (8, [4, 4]), (16, [8, 8]), (31, [16, 15]), (40, [40])]
)
async def test_half_of_a_round_is_answered_while_the_other_is_done(disk, monkeypatch, count, parts):
    sent = []
    flush = NbdConnection._flush

    def recorded(self):
        if self._out:
            sent.append(len(self._out))
        flush(self)

    monkeypatch.setattr(NbdConnection, "_flush", recorded)
    async with disk.served() as registry:
        registry.exports["disk"].poll_ns = 0
        await asyncio.to_thread(bursts, disk.path, count)
    # Of the first round nobody knows how many come.
    assert sent[: 1 + 2 * len(parts)] == [count, *parts, *parts]


async def test_nobody_is_looked_for_while_workers_are_busy(disk):
    async with disk.served() as registry:
        registry.exports["disk"].poll_ns = 50_000_000
        registry.nbd_server.busy = lambda: True
        await asyncio.to_thread(requests_against_a_model, disk.path, seed=3, count=100)
        assert registry.nbd_server.found_early == 0


async def test_the_loop_goes_round_meanwhile(disk):
    """Timers and other clients have their turn although the next request is always there."""
    found = []

    def again():
        found.append(registry.nbd_server.found_early)
        handle[0] = loop.call_soon(again)

    def busy():
        client = OneByOne(disk.path)
        for _ in range(3000):
            client.read(0, 512)
        client.socket.close()

    loop = asyncio.get_running_loop()
    async with disk.served() as registry:
        registry.exports["disk"].poll_ns = 50_000_000
        handle = [loop.call_soon(again)]
        await asyncio.to_thread(busy)
        handle[0].cancel()
    assert found[-1] > 1000
    assert max(after - before for before, after in pairwise(found)) < 300


async def test_two_clients_are_not_looked_for(disk, monkeypatch):
    looks = []
    look = nbd_line.Line.look
    monkeypatch.setattr(
        nbd_line.Line, "look", lambda line, *how: looks.append(line) or look(line, *how)
    )
    async with disk.served() as registry:
        registry.exports["disk"].poll_ns = 1_000_000

        def both():
            clients = OneByOne(disk.path), OneByOne(disk.path)
            for number in range(200):
                clients[number % 2].read(0, 512)
            assert not looks
            for _ in range(50):
                clients[0].read(0, 512)
            assert looks
            for client in clients:
                client.socket.close()

        await asyncio.to_thread(both)


async def test_nothing_passes_what_the_transport_has_to_send():
    class Transport:
        unsent = 0

        def __init__(self):
            self.sent = b""

        def get_write_buffer_size(self):
            return self.unsent

        def writelines(self, out):
            self.sent += b"".join(out)

    here, there = socket.socketpair()
    with here, there:
        here.setblocking(False)
        line = nbd_line.Line(here, transport := Transport())
        line.write([b"now", b"!"])
        assert there.recv(100) == b"now!" and not transport.sent
        transport.unsent = 1
        line.write([b"later"])
        assert transport.sent == b"later"
        there.setblocking(False)
        with pytest.raises(BlockingIOError):
            there.recv(1)


async def test_what_the_socket_does_not_take_follows(disk, monkeypatch):
    """Large replies to a client that reads later: in order and whole, by both ways."""
    rests = []

    def rest(out, sent):
        rests.append(sent)
        return whole(out, sent)

    whole = nbd_line.rest
    monkeypatch.setattr(nbd_line, "rest", rest)
    content = pattern(SIZE)
    disk.driver._store(0, content)
    places = [(n * 240 * KI + n, 250 * KI + n) for n in range(30)]

    def client():
        one = OneByOne(disk.path)
        for offset, length in places:
            one.send(Command.READ, offset, length)
        time.sleep(0.2)  # nothing is read for a while
        for number, (offset, length) in enumerate(places, 1):
            assert one.answer(length) == (number, content[offset : offset + length])
        one.socket.close()

    async with disk.served():
        await asyncio.to_thread(client)
    assert rests


def test_what_is_left_of_buffers():
    out = [b"abc", bytearray(b""), memoryview(b"defg"), b"h"]
    for sent in range(9):
        assert b"".join(nbd_line.rest(out, sent)) == b"abcdefgh"[sent:]


@pytest.mark.parametrize("nowait", [True, False])
async def test_large_writes_are_stored_while_they_come(disk, nowait):
    """Pieces where the backend stores at once, one coroutine where it does not: the same bytes."""
    rng, model = random.Random(5), bytearray(SIZE)
    disk.driver.nowait = nowait

    def client():
        one = OneByOne(disk.path)
        for number in range(20):
            length = rng.randrange(65 * KI, 2 * MI)
            offset = rng.randrange(SIZE - length)
            data = rng.randbytes(length)
            model[offset : offset + length] = data
            one.write(offset, data, apart=number % 2)
        one.send(Command.WRITE, 0, MI, bytes(MI // 2))  # half of it
        model[: MI // 2] = bytes(MI // 2)
        one.socket.close()

    async with disk.served() as registry:
        await asyncio.to_thread(client)
        for connection in tuple(registry.nbd_server.connections):
            await asyncio.wait_for(gone(connection), 30)
    sizes = [r.length for r in disk.driver.log if r.operation == "write"]
    content = disk.driver.content()
    assert content[MI:] == model[MI:]
    if nowait:  # what has come of the last one is there, or not, by pieces
        assert max(sizes) <= 256 * KI and len(sizes) > 60
    else:
        assert len(sizes) == 20


async def test_an_error_in_the_middle_of_a_large_write(disk):
    def client():
        one = OneByOne(disk.path)
        one.send(Command.WRITE, 0, MI, b"x" * MI)
        assert struct.unpack(">IIQ", one.exactly(16)) == (0x67446698, 28, 1)
        one.write(0, b"y" * MI)
        assert one.read(0, MI) == b"y" * MI
        one.socket.close()

    async with disk.served():
        disk.driver.hook = fail_once("write", ENOSPC)
        await asyncio.to_thread(client)
