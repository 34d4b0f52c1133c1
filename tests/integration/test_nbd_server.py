"""The NBD server over real sockets: commands, refusals, clients that vanish or do not read."""

import asyncio
import gc
import random
import socket
import struct
from errno import EIO, ENOSPC, EOPNOTSUPP, ESTALE

import pytest
import uvloop

from liveblockd.errors import BlockError
from liveblockd.events import Publisher
from liveblockd.exports import nbd_connection
from liveblockd.nbd.constants import Command, CommandFlag, Option
from liveblockd.nbd.errno import NbdError
from liveblockd.nbd.transmission import Request
from liveblockd.qapi.sockets import InetSocketAddress, UnixSocketAddress
from tests.support.descriptors import descriptors
from tests.support.memory import Gate, MemoryDriver, fail_once
from tests.support.patience import until
from tests.unit.exports.memory_export import MemoryBackend, options, served
from tests.unit.exports.nbd_client import Client, option_bytes, text

SIZE = 8 << 20
BASE, DEPTH = "base:allocation", "qemu:allocation-depth"
MI = 1 << 20


@pytest.fixture(params=[asyncio.DefaultEventLoopPolicy, uvloop.EventLoopPolicy])
def event_loop_policy(request):
    return request.param()


class Setup:
    def __init__(self, tmp_path, noise):
        self.noise = noise
        self.path = tmp_path / "nbd.sock"
        self.driver = MemoryDriver(SIZE)
        self.backend = MemoryBackend("disk", self.driver)
        self.publisher = Publisher()
        self.events = []
        self.publisher.subscribe(lambda e: self.events.append((e.name, e.data())))

    def served(self, *more, server=(), **members):
        members = {"writable": True, "allocation_depth": True} | members
        exports = [options("disk", "disk", **members), *more]
        return served(
            self.path, self.backend, exports=exports, publisher=self.publisher, **dict(server)
        )

    def connected(self, name="disk", **how):
        return Client.connected(self.path, name, **how)


@pytest.fixture
async def disk(tmp_path):
    found = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: found.append(context))
    yield Setup(tmp_path, found)
    await asyncio.sleep(0)
    gc.collect()
    assert not found


def pattern(size, seed=1):
    return random.Random(seed).randbytes(size)


# -- data


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("nowait", [True, False])
async def test_reads_and_writes(disk, structured, nowait):
    disk.driver.nowait = nowait
    async with disk.served(), disk.connected(structured=structured) as client:
        assert client.size == SIZE
        for offset, size in ((0, 1), (511, 4096), (MI, 65536), (2 * MI, 65537), (3 * MI, 5 * MI)):
            data = pattern(size, offset)
            await client.write(offset, data)
            assert await client.read(offset, size) == data
        assert disk.driver.content()[3 * MI :] == pattern(5 * MI, 3 * MI)
        assert await client.read(0, 0) == b""
        await client.write(0, b"")


async def test_what_guests_ask_for_is_counted(disk):
    async with disk.served() as registry, disk.connected() as client:
        guests = registry.nbd_server.demand.guests
        before = guests.requests
        for _ in range(5):
            await client.read(0, 512)
        assert guests.requests >= before + 5


@pytest.mark.parametrize("structured", [True, False])
async def test_zeros(disk, structured):
    async with disk.served(), disk.connected(structured=structured) as client:
        for flags in (0, CommandFlag.DF) if structured else (0,):
            for size in (512, 65536, 65536 + 3, MI):
                assert await client.read(5, size, flags) == bytes(size)
        data = bytearray(MI)
        for place in (0, 1, MI // 2 + 1, MI - 2):
            data[place] = 1
            await client.write(0, bytes(data))
            assert await client.read(0, MI) == bytes(data)
            data[place] = 0


async def test_zeros_travel_as_a_hole_unless_df(disk):
    async with disk.served(), disk.connected() as client:
        client.send(Command.READ, 0, MI)
        reply = await client.reply()
        assert reply.type == 2 and reply.hole() == (0, MI)
        client.send(Command.READ, 0, MI, CommandFlag.DF)
        assert (await client.reply()).type == 1


async def test_a_pipeline_in_one_piece_and_byte_by_byte(disk):
    async with disk.served(), disk.connected() as client:
        stream = b"".join(
            [
                Request(0, Command.WRITE, 1, 0, 600).to_bytes() + b"a" * 600,
                Request(0, Command.READ, 2, 0, 600).to_bytes(),
                Request(0, 99, 3, 0, 0).to_bytes(),
                Request(0, Command.WRITE, 4, SIZE, 600).to_bytes() + b"b" * 600,
                Request(CommandFlag.FUA, Command.WRITE, 5, 600, 10).to_bytes() + b"c" * 10,
            ]
        )
        client.reads = {2: 600}
        for step in (len(stream), 1, 29):
            for start in range(0, len(stream), step):
                client.writer.write(stream[start : start + step])
                if step == 1:
                    await client.writer.drain()
                    await asyncio.sleep(0)
            answers = {}
            while len(answers) < 5:
                reply = await client.reply()
                answers[reply.cookie] = reply
            assert sorted(answers) == [1, 2, 3, 4, 5]
            assert answers[2].data() == (0, b"a" * 600)
            assert answers[3].error()[0] == NbdError.EINVAL
            assert answers[4].error()[0] == NbdError.ENOSPC
            assert disk.driver.content()[:611] == b"a" * 600 + b"c" * 10 + b"\0"
            disk.driver.pages.clear()


async def test_small_writes_are_done_in_order(disk):
    """More than the receive buffer holds, in every alignment of it; they overlap."""
    chance = random.Random(7)
    expected = bytearray(SIZE)
    async with disk.served(), disk.connected() as client:
        for _ in range(10):
            for _ in range(100):
                size = chance.choice((1, 512, 5000, 40000, 65536))
                offset = chance.randrange(SIZE // 4 - size)
                data = chance.randbytes(size)
                expected[offset : offset + size] = data
                client.send(Command.WRITE, offset, size, 0, data)
            for _ in range(100):
                assert not (await client.reply()).error
        assert disk.driver.content() == bytes(expected)


@pytest.mark.parametrize("flags", [0, CommandFlag.FUA])
async def test_a_write_that_waits_keeps_its_data(disk, flags):
    """The receive buffer is used again while the write still waits."""
    gate = Gate("write")
    async with disk.served(), disk.connected() as client:
        disk.driver.hook = gate
        client.send(Command.WRITE, 0, 4096, flags, b"x" * 4096)
        await until(lambda: gate.waiting == 1)
        client.send(Command.WRITE, 4096, 4096, flags, b"y" * 4096)
        await asyncio.sleep(0.05)
        gate.open()
        for _ in range(2):
            assert not (await client.reply()).error
        assert disk.driver.content()[:8192] == b"x" * 4096 + b"y" * 4096


async def test_disjoint_writes_of_all_sizes(disk):
    async with disk.served(), disk.connected() as client:
        sizes = [1, 28, 512, 65535, 65536, 65537, 100000, 262144, 300000, 7]
        offset, parts = 0, []
        for round_ in range(4):
            for size in sizes:
                if offset + size > SIZE:
                    break
                data = pattern(size, size + round_)
                client.send(Command.WRITE, offset, size, 0, data)
                parts.append(data)
                offset += size
        for _ in parts:
            assert not (await client.reply()).error
        assert disk.driver.content()[:offset] == b"".join(parts)


# -- other commands


async def test_flush_and_fua(disk):
    async with disk.served(), disk.connected() as client, disk.connected() as other:
        await client.write(0, b"x" * 512)
        assert disk.driver.flushes == 0
        assert await other.ask(Command.FLUSH) == (0, None)
        assert disk.driver.synced_content()[:512] == b"x" * 512
        await client.write(512, b"y" * 512, CommandFlag.FUA)
        assert disk.driver.synced_content()[:1024] == b"x" * 512 + b"y" * 512
        await client.ask(Command.WRITE_ZEROES, 0, 512, CommandFlag.FUA)
        assert disk.driver.synced_content()[:1024] == bytes(512) + b"y" * 512
        flushes = disk.driver.flushes
        assert await client.ask(Command.TRIM, 0, 512, CommandFlag.FUA) == (0, None)
        assert disk.driver.flushes == flushes + 1


async def test_writethrough(disk):
    async with disk.served(writethrough=True), disk.connected() as client:
        await client.write(0, b"x" * 512)
        assert disk.driver.synced_content()[:512] == b"x" * 512
        assert await client.ask(Command.WRITE_ZEROES, 0, 512) == (0, None)
        assert disk.driver.synced_content()[:512] == bytes(512)


async def test_write_zeroes_and_trim(disk):
    calls = []
    write_zeroes = disk.driver.write_zeroes

    async def recorded(offset, length, *, may_unmap=False, fast_only=False):
        calls.append((offset, length, may_unmap, fast_only))
        if offset == 4096:
            raise OSError(EOPNOTSUPP, "Operation not supported")
        await write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)

    disk.backend.write_zeroes = recorded
    async with disk.served(), disk.connected() as client:
        await client.write(0, b"x" * 8192)
        assert await client.ask(Command.WRITE_ZEROES, 0, 4096) == (0, None)
        flags = CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO
        assert await client.ask(Command.WRITE_ZEROES, 0, 4096, flags) == (0, None)
        fast = await client.ask(Command.WRITE_ZEROES, 4096, 512, CommandFlag.FAST_ZERO)
        assert fast[0] == NbdError.ENOTSUP
        assert (await client.ask(Command.WRITE_ZEROES, 4096, 512))[0] == NbdError.EINVAL
        assert calls.pop() == (4096, 512, True, False)
        assert calls == [(0, 4096, True, False), (0, 4096, False, True), (4096, 512, True, True)]
        assert await client.read(0, 8192) == bytes(4096) + b"x" * 4096
        assert await client.ask(Command.TRIM, 4096, 4096) == (0, None)
        assert disk.driver.log[-1].operation == "discard"
        assert await client.ask(Command.WRITE_ZEROES, 0, SIZE) == (0, None)
        assert await client.ask(Command.WRITE_ZEROES, 0, 0) == (0, None)


async def test_trim_is_a_hint(disk):
    disk.driver.hook = fail_once("discard", EOPNOTSUPP)
    async with disk.served(), disk.connected() as client:
        assert await client.ask(Command.TRIM, 0, 4096) == (0, None)
        disk.driver.hook = fail_once("discard", EIO)
        assert (await client.ask(Command.TRIM, 0, 4096))[0] == NbdError.EIO


async def test_cache_reads(disk):
    async with disk.served(), disk.connected() as client:
        assert await client.ask(Command.CACHE, 512, 3 * MI) == (0, None)
        reads = [(r.offset, r.length) for r in disk.driver.log if r.operation == "read"]
        assert sum(length for _, length in reads) == 3 * MI and reads[0][0] == 512


async def test_block_status(disk):
    async with disk.served(), disk.connected(contexts=[BASE, DEPTH]) as client:
        await client.write(MI, b"x" * 4096)
        error, content = await client.ask(Command.BLOCK_STATUS, 0, SIZE)
        rest = SIZE - MI - 4096
        assert (error, content) == (
            0,
            [(0, [(MI, 3), (4096, 0), (rest, 3)]), (1, [(MI, 0), (4096, 1), (rest, 0)])],
        )
        _, content = await client.ask(Command.BLOCK_STATUS, 512, SIZE - 512, CommandFlag.REQ_ONE)
        assert content == [(0, [(MI - 512, 3)]), (1, [(MI - 512, 0)])]
        _, content = await client.ask(Command.BLOCK_STATUS, MI, 1)
        assert content == [(0, [(1, 0)]), (1, [(1, 1)])]
        disk.driver.hook = fail_once("map", EIO)
        assert (await client.ask(Command.BLOCK_STATUS, 0, 512))[0] == NbdError.EIO


async def test_block_status_comes_in_parts(disk):
    map_all = disk.driver.map
    disk.driver.map = lambda offset, length: map_all(offset, min(length, 10_000))
    async with disk.served(), disk.connected(contexts=[BASE]) as client:
        assert await client.ask(Command.BLOCK_STATUS, 0, SIZE) == (0, [(0, [(SIZE, 3)])])
        await client.write(4096, b"x" * 4096)
        expected = [(4096, 3), (4096, 0), (SIZE - 8192, 3)]
        assert await client.ask(Command.BLOCK_STATUS, 0, SIZE) == (0, [(0, expected)])


async def test_dirty_bitmap(disk):
    disk.backend.bitmaps["b0"] = lambda offset, length: [(512, 1), (length - 512, 0)]
    context = "qemu:dirty-bitmap:b0"
    async with disk.served(bitmaps=["b0"]), disk.connected(contexts=[context, BASE]) as client:
        _, content = await client.ask(Command.BLOCK_STATUS, 0, 4096)
        assert content == [(0, [(4096, 3)]), (1, [(512, 1), (3584, 0)])]


# -- errors


async def test_errors_of_the_backend(disk):
    async with disk.served(), disk.connected() as client:
        for nowait in (True, False):
            disk.driver.nowait = nowait
            for operation, ask in (
                ("read", (Command.READ, 0, 512)),
                ("read", (Command.READ, 0, MI)),
                ("write", (Command.WRITE, 0, 512, 0, bytes(512))),
                ("write", (Command.WRITE, 0, MI, 0, bytes(MI))),
                ("write_zeroes", (Command.WRITE_ZEROES, 0, 512)),
                ("flush", (Command.FLUSH,)),
                ("flush", (Command.WRITE, 0, 512, CommandFlag.FUA, bytes(512))),
                ("read", (Command.CACHE, 0, 512)),
            ):
                for errno, expected in (
                    (EIO, NbdError.EIO),
                    (ENOSPC, NbdError.ENOSPC),
                    (ESTALE, NbdError.EIO),
                ):
                    disk.driver.hook = fail_once(operation, errno)
                    assert (await client.ask(*ask))[0] == expected, (operation, ask[:3])
                    assert (await client.ask(*ask))[0] == 0


@pytest.mark.parametrize("structured", [True, False])
async def test_a_defect_below_is_eio_and_logged(disk, structured, caplog):
    def broken(*_):
        raise ZeroDivisionError

    async with disk.served(), disk.connected(structured=structured) as client:
        for nowait in (True, False):
            disk.driver.nowait = nowait
            disk.driver.hook = broken
            assert (await client.ask(Command.READ, 0, 512))[0] == NbdError.EIO
            assert (await client.ask(Command.WRITE, 0, 4, 0, b"abcd"))[0] == NbdError.EIO
            disk.driver.hook = None
            assert await client.read(0, 4) == bytes(4)
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("structured", [True, False])
async def test_refusals_keep_in_step(disk, structured):
    export = options("ro", "disk", name="ro")
    async with disk.served(export), disk.connected("ro", structured=structured) as client:
        for size in (1, 512, 65536, 65537, 3 * MI):
            answer = await client.ask(Command.WRITE, 0, size, 0, b"x" * size)
            assert answer[0] == NbdError.EPERM
        assert (await client.ask(Command.TRIM, 0, 512))[0] == NbdError.EPERM
        assert (await client.ask(Command.WRITE_ZEROES, 0, 512))[0] == NbdError.EPERM
        assert (await client.ask(Command.READ, SIZE - 1, 2))[0] == NbdError.EINVAL
        assert (await client.ask(Command.BLOCK_STATUS, 0, 512))[0] == NbdError.EINVAL
        assert await client.read(0, 512) == bytes(512)
        assert disk.driver.content() == bytes(SIZE)


async def test_a_write_longer_than_allowed_is_read_to_its_end(disk):
    size = (32 << 20) + 1
    async with disk.served(), disk.connected() as client:
        cookie = client.send(Command.WRITE, 0, size)
        for _ in range(32):
            client.writer.write(bytes(MI))
            await client.writer.drain()
        client.writer.write(b"!")
        assert (await client.done(cookie))[0] == NbdError.EINVAL
        assert await client.read(0, 512) == bytes(512)


async def test_the_answer_to_a_refused_write_waits_for_its_payload(disk):
    export = options("ro", "disk", name="ro")
    async with disk.served(export), disk.connected("ro") as client:
        cookie = client.send(Command.WRITE, 0, MI, 0, bytes(MI - 1))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.reply(), 0.1)
        client.writer.write(b"x")
        assert (await client.done(cookie))[0] == NbdError.EPERM


@pytest.mark.parametrize("when", ["at once", "behind a request"])
async def test_bad_magic_ends_the_connection(disk, when):
    async with disk.served(), disk.connected() as client:
        if when != "at once":
            cookie = client.send(Command.READ, 0, 512)
        client.writer.write(b"GET / HTTP/1.1\r\nHost: nobody\r\n\r\n")
        if when != "at once":
            assert await client.done(cookie) == (0, bytes(512))
        await client.ended()


async def test_garbage_instead_of_a_client(disk):
    seed = random.randrange(1 << 32)
    print("seed", seed)  # noqa: T201
    chance = random.Random(seed)
    async with disk.served() as registry:
        for _ in range(30):
            reader, writer = await asyncio.open_unix_connection(str(disk.path))
            data = chance.randbytes(chance.randrange(200))
            if chance.random() < 0.5:
                data = (
                    b"\0\0\0\3" + option_bytes(chance.randrange(12), data)[: chance.randrange(200)]
                )
            writer.write(data)
            writer.write_eof()
            await asyncio.wait_for(reader.read(), 30)
            writer.close()
        async with disk.connected() as client:
            assert await client.read(0, 1) == b"\0"
        await until(lambda: not registry.nbd_server.connections)


# -- ends of connections


async def test_disc_waits_for_requests_in_flight(disk):
    gate = Gate("write")
    async with disk.served(), disk.connected() as client:
        disk.driver.hook = gate
        cookie = client.send(Command.WRITE, 0, 512, 0, b"x" * 512)
        client.send(Command.DISC)
        client.send(Command.WRITE, 512, 512, 0, b"y" * 512)  # nothing counts after DISC
        await until(lambda: gate.waiting == 1)
        await asyncio.sleep(0.05)
        assert gate.waiting == 1
        gate.open()
        assert await client.done(cookie) == (0, None)
        await client.ended()
        assert disk.driver.content()[:1024] == b"x" * 512 + bytes(512)


async def test_half_closed_client_gets_its_answers(disk):
    gate = Gate("read")
    async with disk.served(), disk.connected() as client:
        disk.driver.hook = gate
        cookie = client.send(Command.READ, 0, 512)
        client.writer.write_eof()
        await asyncio.sleep(0.05)
        gate.open()
        assert await client.done(cookie) == (0, bytes(512))
        await client.ended()


async def test_a_vanished_client_leaves_finished_writes_and_nothing_else(disk):
    gate = Gate("write")
    async with disk.served() as registry:
        async with disk.connected() as client:
            disk.driver.hook = gate
            client.send(Command.WRITE, 0, 512, 0, b"x" * 512)
            client.send(Command.WRITE, 512, MI, 0, b"y" * (MI - 1))  # never complete
            await until(lambda: gate.waiting == 1)
            client.writer.transport.abort()
        await asyncio.sleep(0.05)
        export = registry.exports["disk"]
        assert export.in_use and gate.waiting == 1
        gate.open()
        await until(lambda: not export.in_use and not registry.nbd_server.connections)
        assert disk.driver.content()[:513] == b"x" * 512 + b"\0"


def begins(driver):
    """Writes are begun, as over a file on ext4 that others are at."""
    driver.nowait, driver.begins = False, True
    return driver


async def test_writes_are_begun_without_a_task(disk, monkeypatch):
    driver = begins(disk.driver)
    content, model = random.Random(3), bytearray(SIZE)
    async with disk.served() as registry, disk.connected() as client:
        (connection,) = registry.nbd_server.connections
        monkeypatch.setattr(connection, "_serve", None)  # a task would fail
        cookies = []
        for number in range(300):
            offset = number * 8192 + content.randrange(4096)
            data = content.randbytes(content.randrange(1, 4096))
            model[offset : offset + len(data)] = data
            cookies.append(client.send(Command.WRITE, offset, len(data), 0, data))
        assert {(await client.reply()).cookie for _ in cookies} == set(cookies)
    assert driver.begun == 300 and driver.content() == model
    assert not connection._begun and not connection._bytes


async def test_a_begun_write_that_fails_is_answered(disk):
    begins(disk.driver).hook = fail_once("write", ENOSPC)
    async with disk.served(), disk.connected() as client:
        assert (await client.done(client.send(Command.WRITE, 0, 9, 0, b"x" * 9)))[0] == (
            NbdError.ENOSPC
        )
        assert await client.done(client.send(Command.WRITE, 0, 9, 0, b"y" * 9)) == (0, None)
    assert disk.driver.content()[:9] == b"y" * 9


@pytest.mark.parametrize("end", ["vanish", "disc", "eof"])
async def test_begun_writes_are_ended_whatever_becomes_of_the_client(disk, end):
    gate = begins(disk.driver).hook = Gate("write")
    async with disk.served() as registry:
        async with disk.connected() as client:
            cookies = [client.send(Command.WRITE, n * 512, 512, 0, b"x" * 512) for n in range(4)]
            await until(lambda: gate.waiting == 4)
            export = registry.exports["disk"]
            if end == "vanish":
                client.writer.transport.abort()
            elif end == "disc":
                client.send(Command.DISC)
            else:
                client.writer.write_eof()
            await asyncio.sleep(0.05)
            assert export.in_use and gate.waiting == 4
            gate.open()
            if end != "vanish":
                assert {(await client.reply()).cookie for _ in cookies} == set(cookies)
                await client.ended()
        await until(lambda: not export.in_use and not registry.nbd_server.connections)
    assert disk.driver.content()[:2049] == b"x" * 2048 + b"\0"


async def test_begun_writes_in_flight_are_bounded(disk):
    gate = begins(disk.driver).hook = Gate("write")
    most = nbd_connection.MAX_REQUESTS
    async with disk.served(), disk.connected() as client:
        for _ in range(3 * most):
            client.send(Command.WRITE, 0, 512, 0, b"x" * 512)
        await until(lambda: gate.waiting == most)
        await asyncio.sleep(0.1)
        assert gate.waiting == most
        gate.open()
        for _ in range(3 * most):
            await client.reply()


async def test_vanishing_at_every_byte(disk):
    stream = (
        struct.pack(">I", 3)
        + option_bytes(Option.STRUCTURED_REPLY)
        + option_bytes(Option.GO, text("disk") + b"\0\0")
        + Request(0, Command.WRITE, 1, 0, 16).to_bytes()
        + b"d" * 16
        + Request(0, Command.READ, 2, 0, 16).to_bytes()
    )
    async with disk.served() as registry:
        for end in range(len(stream) + 1):
            _, writer = await asyncio.open_unix_connection(str(disk.path))
            writer.write(stream[:end])
            await writer.drain()
            if end % 2:
                writer.transport.abort()
            else:
                writer.close()
        server, export = registry.nbd_server, registry.exports["disk"]
        await until(lambda: not server.connections and not export.in_use)


# -- bounds


async def test_requests_in_flight_are_bounded(disk):
    gate = Gate("read")
    async with disk.served() as registry, disk.connected() as client:
        disk.driver.hook = gate
        for _ in range(3000):
            client.send(Command.READ, 0, 512)
        await until(lambda: gate.waiting == nbd_connection.MAX_REQUESTS)
        await asyncio.sleep(0.2)
        (connection,) = registry.nbd_server.connections
        assert gate.waiting == nbd_connection.MAX_REQUESTS == len(connection._tasks)
        gate.open()
        seen = set()
        while len(seen) < 3000:
            seen.add((await client.reply()).cookie)
        assert connection._bytes == 0


async def test_bytes_in_flight_are_bounded(disk, monkeypatch):
    monkeypatch.setattr(nbd_connection, "MAX_BYTES", 4 * MI)
    gate = Gate("write")
    async with disk.served(), disk.connected() as client:
        disk.driver.hook = gate
        for _ in range(20):
            client.send(Command.WRITE, 0, MI, 0, bytes(MI))
        await until(lambda: gate.waiting == 4)
        await asyncio.sleep(0.2)
        assert gate.waiting == 4
        gate.open()
        for _ in range(20):
            assert not (await client.reply()).error


@pytest.mark.parametrize("nowait", [True, False])
async def test_a_client_that_does_not_read_is_not_served(disk, nowait):
    disk.driver.nowait = nowait
    disk.driver._store(0, b"x" * SIZE)
    async with disk.served() as registry, disk.connected() as client:
        count = 4000
        client.writer.transport.pause_reading()
        for _ in range(count):
            client.send(Command.READ, 0, 256 << 10)
        await asyncio.sleep(0.3)
        (connection,) = registry.nbd_server.connections
        held = connection._transport.get_write_buffer_size()
        done = sum(r.operation == "read" for r in disk.driver.log)
        assert held < 80 * MI and done < count / 4
        async with disk.connected() as other:  # others are
            assert await other.read(0, 1) == b"x"
        client.writer.transport.resume_reading()
        for _ in range(200):
            assert len((await client.reply()).payload) == 8 + (256 << 10)


async def test_a_negotiation_that_does_not_read_is_bounded(disk):
    exports = [options(f"e{i}", "disk", name="e" * 4000 + str(i)) for i in range(50)]
    async with disk.served(*exports) as registry:
        client = await Client.greeted(disk.path)
        client.writer.transport.pause_reading()
        for _ in range(100):
            client.writer.write(option_bytes(Option.LIST) * 100)
        await asyncio.sleep(0.2)
        (connection,) = registry.nbd_server.connections
        assert connection._transport.get_write_buffer_size() < 4 * MI
        client.close()


async def test_connections_are_bounded(disk):
    served = disk.served(server={"max_connections": 2})
    async with served, disk.connected() as first, disk.connected():
        third = asyncio.ensure_future(Client.greeted(disk.path))
        await asyncio.sleep(0.1)
        assert not third.done()
        first.send(Command.DISC)
        client = await asyncio.wait_for(third, 30)
        await client.choose("disk")
        assert await client.read(0, 1) == b"\0"
        client.close()


async def test_a_slow_negotiation_is_dropped(disk):
    async with disk.served(server={"handshake_seconds": 0.2}), disk.connected() as quick:
        slow = await Client.greeted(disk.path)
        await slow.ended()
        assert await quick.read(0, 1) == b"\0"
        slow.close()


# -- changes below


async def test_resize_counts_at_once(disk):
    async with disk.served(), disk.connected() as client:
        assert (await client.ask(Command.READ, SIZE, 512))[0] == NbdError.EINVAL
        await disk.driver.truncate(SIZE + 4096)
        assert await client.read(SIZE, 512) == bytes(512)
        await disk.driver.truncate(4096)
        assert (await client.ask(Command.WRITE, 4096, 1, 0, b"x"))[0] == NbdError.ENOSPC
        async with disk.connected() as late:
            assert late.size == 4096


async def test_read_only_node_below_counts_at_once(disk):
    async with disk.served(), disk.connected() as client:
        await client.write(0, b"x")
        disk.driver.read_only = True
        assert (await client.ask(Command.WRITE, 0, 1, 0, b"y"))[0] == NbdError.EPERM
        async with disk.connected() as late:
            assert late.flags & 2


# -- the server


async def test_options_of_absent_exports(disk):
    async with disk.served():
        client = await Client.greeted(disk.path)
        with pytest.raises(ConnectionRefusedError, match="ERR_UNKNOWN"):
            await client.option(Option.GO, text("nope") + b"\0\0")
        replies = await client.option(Option.LIST)
        assert [d[4:] for _, d in replies[:-1]] == [b"disk"]
        await client.choose("disk")
        assert await client.read(0, 1) == b"\0"
        client.close()


async def test_removal(disk):
    async with disk.served() as registry:
        async with disk.connected() as client:
            with pytest.raises(BlockError, match=r"^export 'disk' still in use$"):
                await registry.remove("disk")
            assert await client.read(0, 1) == b"\0"
            await registry.remove("disk", hard=True)
            assert disk.events == [("BLOCK_EXPORT_DELETED", {"id": "disk"})]
            assert disk.backend.released == 1 and not registry.exports
            await client.ended()
        with pytest.raises(BlockError, match=r"^Export 'disk' is not found$"):
            await registry.remove("disk")
        await registry.add(options("disk", "disk"))
        await registry.remove("disk")
        assert disk.backend.released == 2


async def test_hard_removal_waits_for_requests_in_flight(disk):
    gate = Gate("write")
    async with disk.served() as registry, disk.connected() as client:
        disk.driver.hook = gate
        client.send(Command.WRITE, 0, 512, 0, b"x" * 512)
        await until(lambda: gate.waiting)
        await registry.remove("disk", hard=True)
        assert registry.exports["disk"].shutting_down and not disk.events
        assert disk.backend.released == 0
        with pytest.raises(BlockError, match="already shutting down"):
            await registry.remove("disk", hard=True)
        with pytest.raises(BlockError, match="already in use"):
            await registry.add(options("disk", "disk"))
        gate.open()
        await until(lambda: disk.events)
        assert disk.events == [("BLOCK_EXPORT_DELETED", {"id": "disk"})]
        assert disk.driver.content()[:512] == b"x" * 512 and disk.backend.released == 1


async def test_stop_and_start_again(disk):
    async with disk.served(options("two", "disk", name="two")) as registry:
        greeted = await Client.greeted(disk.path)
        async with disk.connected() as client:
            await registry.stop_nbd_server()
            await client.ended()
            await greeted.ended()
        greeted.close()
        assert not disk.path.exists() and not registry.exports
        assert [data["id"] for _, data in disk.events] == ["disk", "two"]
        with pytest.raises(BlockError, match=r"^NBD server not running$"):
            await registry.stop_nbd_server()
        with pytest.raises(BlockError, match=r"^NBD server not running$"):
            await registry.add(options("e", "disk"))
        assert disk.backend.released == 3
        await registry.nbd_server.start(UnixSocketAddress(path=str(disk.path)))
        await registry.add(options("disk", "disk"))
        async with disk.connected() as client:
            assert await client.read(0, 1) == b"\0"


async def test_tcp(disk):
    async with disk.served() as registry:
        await registry.stop_nbd_server()
        server = registry.nbd_server
        await server.start(InetSocketAddress(host="127.0.0.1", port="0", keep_alive_idle=60))
        await registry.add(options("disk", "disk", writable=True))
        port = server._listeners.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        client = Client(reader, writer)
        await reader.readexactly(18)
        writer.write(struct.pack(">I", 3))
        await client.choose("disk")
        await client.write(0, pattern(MI))
        assert await client.read(0, MI) == pattern(MI)
        client.send(Command.DISC)
        await client.ended()
        client.close()


async def test_descriptors_run_out(disk, monkeypatch):
    """The listener rests and comes back; it does not spin and does not die."""
    async with disk.served() as registry:
        accept = socket.socket.accept
        failures = []

        def failing(self):
            if len(failures) < 1:
                failures.append(1)
                raise OSError(24, "Too many open files")
            return accept(self)

        monkeypatch.setattr(socket.socket, "accept", failing)
        client = await asyncio.wait_for(Client.greeted(disk.path), 30)
        assert failures and registry.nbd_server.running
        client.close()


async def test_cancelled_commands_leave_nothing_half_done(disk):
    gate = Gate("write")
    async with disk.served() as registry, disk.connected() as client:
        disk.driver.hook = gate
        client.send(Command.WRITE, 0, 512, 0, b"x" * 512)
        await until(lambda: gate.waiting)
        stop = asyncio.ensure_future(registry.stop_nbd_server())
        await asyncio.sleep(0.05)
        stop.cancel()
        await asyncio.wait({stop})
        gate.open()
        await until(lambda: not registry.exports and disk.backend.released == 1 and disk.events)
        assert disk.events == [("BLOCK_EXPORT_DELETED", {"id": "disk"})]


def test_no_descriptor_leaks(tmp_path):
    async def once():
        setup = Setup(tmp_path, [])
        async with setup.served(), setup.connected() as client:
            await client.read(0, 1)

    asyncio.run(once())
    before = descriptors()
    for _ in range(3):
        asyncio.run(once())
    assert not descriptors() - before


async def test_each_reply_is_sent_once(disk):
    """Replies leave while another request waits (its list must not be held over the await)."""
    release = asyncio.Event()
    disk.driver.hook = lambda _, offset, __: release.wait() if offset == 0 else None
    async with disk.served(), disk.connected() as client:
        slow = client.send(Command.READ, 0, 512)
        await asyncio.sleep(0.02)
        for offset in (512, 1024):
            assert await client.read(offset, 512) == bytes(512)
        release.set()
        assert await client.done(slow) == (0, bytes(512))
        assert await client.read(512, 512) == bytes(512)
        assert not client.input


async def test_replies_of_requests_that_end_together(disk):
    async with disk.served(), disk.connected() as client:
        disk.driver.nowait = False
        disk.driver.hook = lambda *_: asyncio.sleep(0)
        for _ in range(20):
            cookies = [client.send(Command.READ, 0, 512) for _ in range(100)]
            seen = [(await client.reply()).cookie for _ in cookies]
            assert sorted(seen) == cookies
