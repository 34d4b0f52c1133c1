"""A guest for the demo: it reads and writes an NBD export and knows what every byte must be.

The client is written from the NBD specification (doc/proto.md: fixed newstyle handshake,
NBD_OPT_GO, simple replies) and shares no code with the server, so that a mistake of the one
is not hidden by the same mistake of the other.

Runs on the event loop. ``MismatchError`` escapes when a byte is not what it must be, ``OSError``
when the server refuses a request or goes away.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
import time
from dataclasses import dataclass, field

SEGMENT = 1 << 20
READ, WRITE, FLUSH, TRIM, WRITE_ZEROES = 0, 1, 3, 4, 6
DISC = 2


class MismatchError(Exception):
    """The disk holds something else than what the guest wrote."""


class NbdClient:
    """One connection to one export; any number of requests in flight."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._waiting: dict[int, tuple[asyncio.Future[bytes], int]] = {}
        self._receiver: asyncio.Task[None] | None = None
        self._next = 0
        self.size = 0  # bytes

    @classmethod
    async def connect(cls, path: str, export: str) -> NbdClient:
        """Negotiate with the server on the UNIX socket ``path``; raises OSError."""
        reader, writer = await asyncio.open_unix_connection(path, limit=1 << 22)
        self = cls(reader, writer)
        magic, option_magic, _flags = struct.unpack(">8s8sH", await reader.readexactly(18))
        if (magic, option_magic) != (b"NBDMAGIC", b"IHAVEOPT"):
            raise OSError("this is no NBD server")
        name = export.encode()
        go = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        writer.write(struct.pack(">I8sII", 3, b"IHAVEOPT", 7, len(go)) + go)
        while True:
            _, _, kind, length = struct.unpack(">QIII", await reader.readexactly(20))
            payload = await reader.readexactly(length)
            if kind == 1:
                break
            if kind & 1 << 31:
                raise OSError(f"the server refuses the export: {payload.decode(errors='replace')}")
            if kind == 3 and payload[:2] == b"\0\0":
                self.size = int.from_bytes(payload[2:10], "big")
        self._receiver = asyncio.create_task(self._receive())
        return self

    async def _receive(self) -> None:
        try:
            while True:
                _, error, handle = struct.unpack(">IIQ", await self._reader.readexactly(16))
                future, length = self._waiting.pop(handle)
                payload = await self._reader.readexactly(length) if length and not error else b""
                if future.cancelled():
                    continue
                if error:
                    future.set_exception(OSError(error, "the server answers with an error"))
                else:
                    future.set_result(payload)
        except (asyncio.IncompleteReadError, ConnectionError):
            for future, _ in self._waiting.values():
                if not future.done():
                    future.set_exception(ConnectionResetError("the NBD server went away"))

    async def request(
        self, kind: int, offset: int = 0, length: int = 0, data: bytes = b""
    ) -> bytes:
        """Send one request and wait for its reply; returns what was read."""
        handle = self._next = self._next + 1
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[handle] = future, length if kind == READ else 0
        header = struct.pack(">IHHQQI", 0x25609513, 0, kind, handle, offset, length)
        self._writer.write(header + data)
        await self._writer.drain()
        return await future

    async def close(self) -> None:
        """Say goodbye and close."""
        self._writer.write(struct.pack(">IHHQQI", 0x25609513, 0, DISC, 0, 0, 0))
        self._writer.close()
        if self._receiver is not None:
            self._receiver.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await self._receiver
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


@dataclass
class Statistics:
    """What the guest did in one phase."""

    reads: int = 0
    writes: int = 0
    bytes: int = 0
    latencies: list[float] = field(default_factory=list)  # seconds, of writes

    def __str__(self) -> str:
        late = sorted(self.latencies) or [0.0]
        p99 = late[int(len(late) * 0.99)] * 1e3
        return (
            f"{self.reads} reads, {self.writes} writes, {self.bytes >> 20} MiB; "
            f"write latency p50 {late[len(late) // 2] * 1e3:.2f} ms, p99 {p99:.2f} ms, "
            f"max {late[-1] * 1e3:.2f} ms"
        )


class Guest:
    """Several workers at once, each with segments of its own, that compare all they read.

    ``model`` holds what the disk must hold; a range that a worker is writing belongs to that
    worker alone until the write is answered.
    """

    def __init__(self, client: NbdClient, model: bytearray, seed: int, workers: int = 4) -> None:
        self.client, self.model, self.seed, self.workers = client, model, seed, workers
        self.statistics = Statistics()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to work."""
        self._tasks = [asyncio.create_task(self._work(n)) for n in range(self.workers)]

    async def stop(self) -> None:
        """Finish what is in flight; raises what a worker has found."""
        for task in self._tasks:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    def check(self) -> None:
        """Raise what a worker has found so far."""
        for task in self._tasks:
            if task.done() and not task.cancelled():
                task.result()

    def new_phase(self) -> Statistics:
        """Statistics until now; counting starts again."""
        done, self.statistics = self.statistics, Statistics()
        return done

    async def _work(self, number: int) -> None:
        rng = random.Random(self.seed * 1000 + number)
        segments = range(number, len(self.model) // SEGMENT, self.workers)
        while True:
            start = rng.choice(segments) * SEGMENT
            length = rng.choice((512, 4096, 4096, 16384, rng.randrange(1, 100_000), 1 << 17))
            offset = start + rng.randrange(0, SEGMENT - length)
            # a request that was sent is carried through: the model must know its outcome
            reads = rng.random() < 0.5
            step = self._read(offset, length) if reads else self._write(rng, offset, length)
            task = asyncio.ensure_future(step)
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError:
                await task
                raise
            await asyncio.sleep(rng.random() * 0.004)

    async def _read(self, offset: int, length: int) -> None:
        data = await self.client.request(READ, offset, length)
        self.statistics.reads += 1
        self.statistics.bytes += length
        self.compare(offset, data)

    async def _write(self, rng: random.Random, offset: int, length: int) -> None:
        begin = time.perf_counter()
        kind = rng.random()
        if kind < 0.05:
            data = bytes(length)
            await self.client.request(WRITE_ZEROES, offset, length)
        else:
            data = rng.randbytes(length)
            await self.client.request(WRITE, offset, length, data)
            if kind > 0.95:
                await self.client.request(FLUSH)
        self.model[offset : offset + length] = data
        self.statistics.latencies.append(time.perf_counter() - begin)
        self.statistics.writes += 1
        self.statistics.bytes += length

    def compare(self, offset: int, data: bytes) -> None:
        """Raise MismatchError unless ``data`` is what the disk must hold at ``offset``."""
        if data != self.model[offset : offset + len(data)]:
            where = next(i for i, byte in enumerate(data) if byte != self.model[offset + i])
            raise MismatchError(f"the byte at {offset + where} is not what was written there")

    async def verify(self) -> int:
        """Read the whole disk and compare it; returns the number of bytes."""
        for offset in range(0, len(self.model), SEGMENT):
            self.compare(offset, await self.client.request(READ, offset, SEGMENT))
        return len(self.model)
