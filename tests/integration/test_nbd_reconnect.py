"""NBD servers that are killed and come back while guests and jobs use them."""

import asyncio
import contextlib
import json
import random
import signal
import socket
import subprocess
import time
from errno import EIO

import pytest

from liveblockd.jobs.mirror import MirrorCopyMode, MirrorOptions
from liveblockd.jobs.mirror_job import MirrorParameters, MirrorSyncMode
from liveblockd.jobs.mirror_start import start_mirror
from liveblockd.storage import nbd_link
from tests.simulation.bench import Bench
from tests.support.daemon import DaemonProcess
from tests.support.qcow2_images import needs, run

KIB, MIB = 1024, 1024 * 1024
SIZE = 8 * MIB
LANES = 4


class Server:
    """One that can be killed and started again on the same socket and image."""

    def __init__(self, directory, *command):
        self.path = directory / "nbd.sock"
        self.command = [str(part) for part in command]
        self.directory = directory
        self.process = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exc):
        self.kill()

    def start(self):
        self.path.unlink(missing_ok=True)
        self.process = subprocess.Popen(self.command, cwd=self.directory)
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(self.path))
                return
            assert self.process.poll() is None, "no start"
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def kill(self, number=signal.SIGKILL):
        self.process.send_signal(number)
        self.process.wait(20)

    async def again(self, away=0.02):
        self.kill()
        await asyncio.sleep(away)
        await asyncio.to_thread(self.start)

    @property
    def address(self):
        return {"type": "unix", "path": str(self.path)}


def qemu_nbd(directory, image, image_format="raw", *more):
    command = ("qemu-nbd", "-t", "-e", "8", "-k", directory / "nbd.sock", "-f", image_format)
    return Server(directory, *command, *more, image)


def nbdkit(directory, image):
    command = ("nbdkit", "-f", "-U", directory / "nbd.sock", "file", image)
    return Server(directory, *command)


async def guest(node, model, seed, number, stopping):
    """One lane of a guest; no request may fail."""
    rng = random.Random(f"{seed} {number}")
    part = len(model) // LANES
    low = number * part
    while not stopping.is_set():
        offset = low + rng.randrange(part)
        length = min(rng.choice((1, 512, 4 * KIB, 64 * KIB, 300 * KIB)), low + part - offset)
        match rng.randrange(8):
            case 0:
                await node.flush()
            case 1:
                await node.write_zeroes(offset, length, may_unmap=True)
                model[offset : offset + length] = bytes(length)
            case 2:
                assert await node.read(offset, length) == model[offset : offset + length]
            case _:
                data = rng.randbytes(length)
                await node.write(offset, data)
                model[offset : offset + length] = data
        await asyncio.sleep(0)


def content(image, image_format):
    if image_format == "raw":
        return image.read_bytes()
    run("qemu-img", "convert", "-O", "raw", image, image.with_suffix(".flat"))
    return image.with_suffix(".flat").read_bytes()


@needs("qemu-nbd", "qemu-img", "nbdkit")
@pytest.mark.parametrize(("seed", "kind"), [(1, "qcow2"), (2, "qcow2"), (3, "raw"), (4, "nbdkit")])
async def test_a_guest_notices_nothing(seed, kind, tmp_path, monkeypatch):
    """Every answered write is there at the end, though the server was killed with its caches."""
    monkeypatch.setattr(nbd_link, "UNFLUSHED", 2 * MIB)
    image_format = "qcow2" if kind == "qcow2" else "raw"
    image = tmp_path / "disk"
    run("qemu-img", "create", "-q", "-f", image_format, image, SIZE)
    made = nbdkit(tmp_path, image) if kind == "nbdkit" else qemu_nbd(tmp_path, image, image_format)
    rng = random.Random(seed)
    model, stopping = bytearray(SIZE), asyncio.Event()
    with made as server:
        bench = Bench()
        node = await bench.open(
            driver="nbd", node_name="n", server=server.address, reconnect_delay=30
        )
        lanes = [
            asyncio.create_task(guest(node, model, seed, number, stopping))
            for number in range(LANES)
        ]
        for _ in range(5):
            await asyncio.sleep(rng.uniform(0.05, 0.3))
            await server.again()
        stopping.set()
        await asyncio.gather(*lanes)
        assert bytes(await node.read(0, SIZE)) == bytes(model)
        await node.flush()
        server.kill()  # its caches go with it: only what was flushed is left
        assert content(image, image_format) == model
        await bench.close()


@needs("qemu-nbd")
async def test_the_delay_ends_and_the_server_comes_later(tmp_path):
    image = tmp_path / "disk"
    image.write_bytes(b"a" * MIB)
    with qemu_nbd(tmp_path, image) as server:
        bench = Bench()
        node = await bench.open(
            driver="nbd", node_name="n", server=server.address, reconnect_delay=1
        )
        await node.write(0, b"b" * 512)
        server.kill()
        begun = time.monotonic()
        with pytest.raises(OSError) as caught:
            await node.read(0, 512)
        assert caught.value.errno == EIO
        assert 0.8 < time.monotonic() - begun < 5
        begun = time.monotonic()
        with pytest.raises(OSError):
            await node.read(0, 512)
        assert time.monotonic() - begun < 0.5
        image.write_bytes(b"c" * MIB)  # as if the host had lost what was not flushed
        server.start()
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(OSError):
                    assert bytes(await node.read(0, 1024)) == b"b" * 512 + b"c" * 512
                    break
                await asyncio.sleep(0.05)
        await bench.close()


@needs("qemu-nbd")
@pytest.mark.parametrize("flushed", [True, False])
async def test_without_a_delay(flushed, tmp_path):
    """The server may come back to a disk of which all is durable; else requests fail for ever."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(MIB))
    with qemu_nbd(tmp_path, image) as server:
        bench = Bench()
        node = await bench.open(driver="nbd", node_name="n", server=server.address)
        await node.write(0, b"b" * 512)
        if flushed:
            await node.flush()
        await server.again()
        with pytest.raises(OSError):
            await node.read(0, 512)
        read = b""
        deadline = time.monotonic() + (10 if flushed else 1.5)
        while not read and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                read = bytes(await node.read(0, 512))
            await asyncio.sleep(0.02)
        assert read == (b"b" * 512 if flushed else b"")
        await bench.close()


@needs("qemu-nbd")
@pytest.mark.parametrize("change", ["smaller", "read-only"])
async def test_another_disk_is_refused(change, tmp_path):
    image = tmp_path / "disk"
    image.write_bytes(bytes(MIB))
    with qemu_nbd(tmp_path, image) as server:
        bench = Bench()
        node = await bench.open(
            driver="nbd", node_name="n", server=server.address, reconnect_delay=20
        )
        server.kill()
        if change == "smaller":
            image.write_bytes(bytes(MIB // 2))
        else:
            server.command.insert(1, "-r")
        write = asyncio.create_task(node.write(0, b"b" * 512))
        await asyncio.to_thread(server.start)
        async with asyncio.timeout(10):
            with pytest.raises(OSError) as caught:
                await write
        assert caught.value.errno == EIO
        await bench.close()
    assert not any(image.read_bytes())


@needs("nbdkit")
async def test_a_server_that_says_it_ends(tmp_path):
    """SIGTERM of nbdkit answers requests with ESHUTDOWN: the next server gets them."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(MIB))
    with nbdkit(tmp_path, image) as server:
        bench = Bench()
        node = await bench.open(
            driver="nbd", node_name="n", server=server.address, reconnect_delay=20
        )
        model, stopping = bytearray(MIB), asyncio.Event()
        lanes = [asyncio.create_task(guest(node, model, 9, n, stopping)) for n in range(LANES)]
        for _ in range(3):
            await asyncio.sleep(0.1)
            await asyncio.to_thread(server.kill, signal.SIGTERM)
            await asyncio.to_thread(server.start)
        stopping.set()
        await asyncio.gather(*lanes)
        assert bytes(await node.read(0, MIB)) == bytes(model)
        await bench.close()


@needs("qemu-nbd", "qemu-img")
@pytest.mark.parametrize("cancel", [False, True])
@pytest.mark.parametrize("mode", list(MirrorCopyMode))
async def test_mirror_to_a_server_that_comes_and_goes(mode, cancel, tmp_path):
    rng = random.Random(7)
    data = rng.randbytes(SIZE)
    (tmp_path / "source").write_bytes(data)
    image = tmp_path / "target"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, SIZE)
    with qemu_nbd(tmp_path, image, "qcow2") as server:
        bench = Bench()
        file = {"driver": "file", "filename": str(tmp_path / "source")}
        await bench.open(driver="raw", node_name="top", file=file)
        await bench.open(driver="nbd", node_name="t", server=server.address, reconnect_delay=60)
        options = MirrorOptions(copy_mode=mode, speed=0 if not cancel else 64 * KIB)
        job = await start_mirror(
            bench.graph,
            bench.scheduler,
            MirrorParameters("m", "top", "t", MirrorSyncMode.FULL, options=options),
        )
        if cancel:
            server.kill()
            bench.scheduler.jobs["m"].limit.set_speed(0, 0.0)
            await asyncio.sleep(0.2)
            begun = time.monotonic()
            bench.scheduler.cancel(job, force=True)
            await bench.end(job)
            assert time.monotonic() - begun < 1
            await bench.close()
            return
        for _ in range(4):
            await asyncio.sleep(rng.uniform(0, 0.05))
            await server.again()
        await bench.end(job, "ready")
        bench.scheduler.complete(job)
        await bench.end(job)
        assert "error" not in bench.completion("m")
        await bench.close()
        server.kill()
    assert content(image, "qcow2") == data


@needs("qemu-nbd")
def test_the_daemon_ends_without_waiting(tmp_path):
    """SIGTERM while a guest's request, and a command behind it, wait for the server."""
    (tmp_path / "disk").write_bytes(bytes(MIB))
    with qemu_nbd(tmp_path, tmp_path / "disk") as server:
        node = {
            "driver": "nbd", "node-name": "n", "server": server.address, "reconnect-delay": 600
        }  # fmt: skip
        with DaemonProcess(tmp_path, "--blockdev", json.dumps(node)) as daemon:
            qmp = daemon.qmp()
            server.kill()
            request = {
                "execute": "human-monitor-command",
                "arguments": {"command-line": 'qemu-io n "read 0 512"'},
            }
            qmp.socket.sendall(json.dumps(request).encode())
            time.sleep(0.3)
            begun = time.monotonic()
            assert daemon.stop() == 0
            assert time.monotonic() - begun < 5


@needs("qemu-nbd")
async def test_open_timeout(tmp_path):
    (tmp_path / "disk").write_bytes(bytes(MIB))
    server = qemu_nbd(tmp_path, tmp_path / "disk")
    bench = Bench()
    opening = asyncio.create_task(
        bench.open(driver="nbd", node_name="n", server=server.address, open_timeout=20)
    )
    await asyncio.sleep(0.3)
    assert not opening.done()
    await asyncio.to_thread(server.__enter__)
    node = await opening
    assert node.length == MIB
    await bench.close()
    server.kill()
