"""The driver ``nbd`` against servers of all kinds: what is written is there, errors come back."""

import asyncio
import contextlib
import random
import signal
from errno import EIO, ENOSPC

import pytest

from liveblockd.errors import BlockError
from liveblockd.exports.addresses import listen
from liveblockd.graph import filenames
from liveblockd.qapi.sockets import UnixSocketAddress
from tests.simulation.bench import Bench
from tests.support.nbd_peer import server
from tests.support.qcow2_images import needs

KIB, MIB = 1024, 1024 * 1024
SIZE = 8 * MIB + 512


def qemu_nbd(directory, image, image_format="raw", *more):
    return server(
        directory, "qemu-nbd", "-t", "-k", directory / "nbd.sock", "-f", image_format, *more, image
    )


async def opened(bench, directory, **members):
    address = {"type": "unix", "path": str(directory / "nbd.sock")}
    return await bench.open(driver="nbd", node_name="n", server=address, open_timeout=5, **members)


async def exercise(node, model, rng, count=60):
    for _ in range(count):
        offset = rng.randrange(0, len(model) - 1)
        length = min(rng.choice((1, 512, 4096, 70000, 3 * MIB)), len(model) - offset)
        match rng.randrange(6):
            case 0 | 1:
                data = rng.randbytes(length)
                await node.write(offset, data)
                model[offset : offset + length] = data
            case 2:
                await node.write_zeroes(offset, length, may_unmap=rng.random() < 0.5)
                model[offset : offset + length] = bytes(length)
            case 3:
                assert bytes(await node.read(offset, length)) == model[offset : offset + length]
            case 4:
                position = offset
                for extent in await node.map(offset, length):
                    if extent.kind.name == "ZERO":
                        assert not any(model[position : position + extent.length])
                    position += extent.length
                assert offset < position <= offset + length
            case 5:
                await node.flush()
    assert bytes(await node.read(0, len(model))) == bytes(model)


@needs("qemu-nbd", "qemu-img")
@pytest.mark.parametrize("seed", range(3))
async def test_qemu_nbd(seed, tmp_path):
    rng = random.Random(seed)
    image = tmp_path / "disk"
    content = rng.randbytes(MIB) + bytes(SIZE - MIB)
    image.write_bytes(content)
    with qemu_nbd(tmp_path, image, "raw", "--discard=unmap"):
        bench = Bench()
        node = await opened(bench, tmp_path, discard="unmap")
        model = bytearray(content)
        assert node.length == SIZE
        assert node.filename == f"nbd+unix://?socket={tmp_path}/nbd.sock"
        await exercise(node, model, rng)
        await node.discard(0, MIB)
        await bench.close()
    assert image.read_bytes()[MIB:] == model[MIB:]


@needs("nbdkit")
@pytest.mark.parametrize("options", [
    (),
    ("--filter=blocksize-policy", "blocksize-minimum=4096", "blocksize-error-policy=error"),
    ("--no-sr",),
])  # fmt: skip
async def test_nbdkit(options, tmp_path):
    command = ("nbdkit", "-f", "-U", "nbd.sock", *[o for o in options if o.startswith("-")],
               "memory", "8M", *[o for o in options if not o.startswith("-")])  # fmt: skip
    with server(tmp_path, *command):
        bench = Bench()
        node = await opened(bench, tmp_path)
        await exercise(node, bytearray(8 * MIB), random.Random(5))
        await bench.close()


@needs("nbdkit")
async def test_a_node_that_is_closed_has_flushed(tmp_path):
    command = ("nbdkit", "-f", "-U", "nbd.sock", "--filter=log", "memory", "1M", "logfile=log")
    with server(tmp_path, *command):
        bench = Bench()
        node = await opened(bench, tmp_path)
        await node.write(0, b"x" * 512)
        assert "Flush" not in (tmp_path / "log").read_text()
        await bench.graph.delete("n")
        log = (tmp_path / "log").read_text()
        assert log.index("Write") < log.index("Flush")
        await bench.close()


@needs("nbdkit")
async def test_errors_of_the_server(tmp_path):
    with server(
        tmp_path, "nbdkit", "-f", "-U", "nbd.sock", "--filter=error", "memory", "1M",
        "error-pwrite=ENOSPC", "error-pread=EIO", "error-rate=100%",
    ):  # fmt: skip
        bench = Bench()
        node = await opened(bench, tmp_path)
        for request, code in ((node.write(0, bytes(512)), ENOSPC), (node.read(0, 512), EIO)):
            with pytest.raises(OSError) as caught:
                await request
            assert caught.value.errno == code
        await bench.close()


@needs("qemu-nbd")
async def test_a_server_that_dies(tmp_path):
    (tmp_path / "disk").write_bytes(bytes(MIB))
    with qemu_nbd(tmp_path, tmp_path / "disk") as process:
        bench = Bench()
        node = await opened(bench, tmp_path)
        await node.write(0, b"x" * 512)
        process.send_signal(signal.SIGSTOP)
        waiting = [asyncio.ensure_future(node.read(0, 512)) for _ in range(3)]
        await asyncio.sleep(0.05)
        process.kill()
        for done in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(done, OSError) and done.errno == EIO
        for request in (node.write(0, b"y" * 512), node.flush()):
            with pytest.raises(OSError):
                await request
        await bench.close()


@needs("qemu-nbd")
async def test_refusals(tmp_path):
    (tmp_path / "disk").write_bytes(bytes(MIB))
    bench = Bench()
    address = {"type": "unix", "path": str(tmp_path / "nbd.sock")}
    with pytest.raises(BlockError, match=r"Failed to connect to '.*nbd.sock': No such file"):
        await bench.open(driver="nbd", node_name="n", server=address)
    with qemu_nbd(tmp_path, tmp_path / "disk", "raw", "-r", "-x", "there", "-e", "4"):
        for members, message in (
            ({"export": "elsewhere", "read_only": True}, "Requested export not available"),
            ({"export": "there"}, "request on denied for read-only export"),
            ({"tls_creds": "x"}, "No TLS credentials with id 'x'"),
        ):
            with pytest.raises(BlockError, match=message):
                await bench.open(driver="nbd", node_name="n", server=address, **members)
        node = await bench.open(
            driver="nbd", node_name="n", server=address, export="there", auto_read_only=True
        )
        assert node.read_only
        with pytest.raises(BlockError):
            await node.truncate(2 * MIB)
    await bench.close()


@pytest.mark.parametrize("seed", range(30))
async def test_a_server_that_talks_nonsense(seed, tmp_path):
    """Whatever comes: an error, soon, and no crash."""
    rng = random.Random(seed)
    greeting = b"NBDMAGICIHAVEOPT\0\x03"
    option = bytes.fromhex("0003e889045565a9")

    def reply(number, kind, data=b""):
        lengths = (number, kind, len(data))
        return option + b"".join(n.to_bytes(4, "big") for n in lengths) + data

    honest = [
        greeting,
        reply(8, 1),
        reply(10, 4, b"\0\0\0\x07base:allocation"),
        reply(10, 1),
        reply(7, 3, b"\0\0" + (1 << 20).to_bytes(8, "big") + b"\0\x6d"),
        reply(7, 3, b"\0\x03" + bytes.fromhex("000000010000100002000000")),
        reply(7, 1),
    ]
    said = b"".join(honest)
    if seed % 3:
        at = rng.randrange(len(said))
        said = said[:at] + rng.randbytes(rng.randrange(1, 9)) + said[at + rng.randrange(9) :]
    chunks = rng.choice((
        rng.randbytes(64),
        bytes.fromhex("668e33ef0001000100000000000000010000000c") + rng.randbytes(12),
        bytes.fromhex("668e33ef000100050000000000000001") + (4).to_bytes(4, "big") + bytes(4),
        bytes.fromhex("668e33ef00018001000000000000000100000002") + bytes(2),
        bytes.fromhex("668e33ef0001000100000000000000017fffffff"),
        bytes.fromhex("67446698000000000000000000000001"),
    ))  # fmt: skip

    async def serve(reader, writer):
        with contextlib.suppress(ConnectionError):
            writer.write(said)
            await asyncio.sleep(0.02)
            writer.write(chunks)
            await writer.drain()
            await asyncio.sleep(0.02)
            writer.close()

    listeners = await listen(UnixSocketAddress(path=str(tmp_path / "nbd.sock")), 4)
    listening = await asyncio.start_unix_server(serve, sock=listeners.sockets[0])
    bench = Bench()
    async with asyncio.timeout(30):
        with contextlib.suppress(BlockError, OSError):
            address = {"type": "unix", "path": str(tmp_path / "nbd.sock")}
            node = await bench.open(driver="nbd", node_name="n", server=address)
            await asyncio.gather(node.read(0, 512), node.map(0, 4096), return_exceptions=True)
            with pytest.raises(OSError):
                await node.read(0, 512)
                await node.read(0, 512)
        await bench.close()
    listening.close()


def test_names():
    for name, shown in (
        ("nbd://localhost:1/x", None),
        ("nbd+unix:///x?socket=/p", None),
        ("nbd://[::1]:1/x", None),
        ("nbd:localhost:1:exportname=x", "nbd://localhost:1/x"),
        ("nbd:unix:/p:exportname=x", "nbd+unix:///x?socket=/p"),
        ("nbd:unix:/p", "nbd+unix://?socket=/p"),
        ("nbd://localhost", "nbd://localhost:10809"),
    ):
        members = filenames.protocol_options(name)
        assert members.pop("driver") == "nbd"
        options = Bench.options(driver="nbd", node_name="n", **members)
        assert filenames.nbd_url.to_url(members["server"], members.get("export")) == shown or name
        assert options.export in (None, "x")
    for name in ("nbd:", "nbd:x", "nbd+unix://host/x", "nbd://?socket=x"):
        with pytest.raises(BlockError):
            filenames.protocol_options(name)
