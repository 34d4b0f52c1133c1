"""A process that streams, or commits, under writes until it is killed.

``python -m tests.simulation.victim IMAGE SEED stream|commit``.

It tells on stdout what it does, a line at a time and at once: ``ready``; ``w INDEX OFFSET LENGTH``
when a write begins and ``d INDEX`` when it is done; ``f COUNT`` when a flush is done that began
after COUNT writes were; ``completed`` when BLOCK_JOB_COMPLETED is published; ``active PATH`` when
the guest goes on with another image, before anything is written to that.
"""

from __future__ import annotations

import asyncio
import os
import random
import struct
import sys

from liveblockd.errors import BlockError
from liveblockd.graph import chain
from liveblockd.storage.driver import Permission
from tests.simulation.bench import Bench
from tests.simulation.jitter import JitterPool
from tests.simulation.small_chunks import small_chunks

KIB = 1024
SECTOR = 512


def pattern(index: int, length: int) -> bytes:
    """What write ``index`` writes; every sector of it tells the index. One in nine are zeros."""
    if index % 9 == 4:
        return bytes(length)
    return struct.pack("<Q", 0xABCD_0000_0000 + index) * (length // 8)


def tell(line: str) -> None:
    """A whole line in one system call: what was told is known, whatever comes."""
    os.write(1, f"{line}\n".encode())


class Victim:
    """One guest with one stream after the other."""

    def __init__(self, bench: Bench, rng: random.Random) -> None:
        self.bench = bench
        self.rng = rng
        self.done = 0

    async def run(self, path: str, mode: str) -> None:
        bench = self.bench
        node = await bench.open(
            driver="qcow2",
            node_name="top",
            discard="unmap",
            file={"driver": "file", "filename": path},
        )
        self.backend = await bench.graph.attach(
            node, Permission.CONSISTENT_READ | Permission.WRITE, Permission.ALL, name="vda"
        )
        bench.publisher.subscribe(self._note)
        tell("ready")
        self.active = node
        self.backend.on_change.append(self._changed)
        work = {"stream": self._stream, "commit": self._commit}[mode]
        await asyncio.gather(self._write(), self._flush(), work())

    def _changed(self) -> None:
        node = chain.skip_filters(self.backend.node)
        if node is not None and node is not self.active:  # None: a filter is on its way in
            self.active = node
            assert node.file is not None
            tell(f"active {node.file.filename}")

    def _note(self, event: object) -> None:
        if getattr(event, "name", "") == "BLOCK_JOB_COMPLETED" and not event.error:  # type: ignore[attr-defined]
            tell("completed")

    async def _write(self) -> None:
        rng, size = self.rng, self.backend.length // SECTOR
        while True:
            offset = rng.randrange(size)
            length = min(rng.choice((1, 1, 8, 8, 64, 300)), size - offset)
            tell(f"w {self.done} {offset} {length}")
            data = pattern(self.done, length * SECTOR)
            if not any(data):
                await self.backend.write_zeroes(offset * SECTOR, len(data), may_unmap=True)
            elif not self.backend.write_nowait(offset * SECTOR, data):
                await self.backend.write(offset * SECTOR, data)
            tell(f"d {self.done}")
            self.done += 1
            await asyncio.sleep(rng.choice((0, 0, 0.001, 0.003)))

    async def _flush(self) -> None:
        while True:
            await asyncio.sleep(self.rng.choice((0.001, 0.01, 0.05)))
            done = self.done
            await self.backend.flush()
            tell(f"f {done}")

    async def _stream(self) -> None:
        number = 0
        while True:
            layers = chain.chain(self.backend.node)
            if len(layers) == 1:
                await asyncio.sleep(0.01)
                continue
            base = self.rng.choice([None, *layers[1:]])
            speed = self.rng.choice((0, 8 * KIB * KIB))
            try:
                job = await self.bench.stream(
                    "vda", f"s{number}", speed=speed, base_node=base and base.name
                )
            except BlockError as error:
                tell(f"error {error}")
                return
            number += 1
            while job.status != "null":  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    async def _commit(self) -> None:
        """Intermediate images, and the active one into images that are no longer."""
        rng, number = self.rng, 0
        while True:
            await asyncio.sleep(0.005)
            layers = chain.chain(self.backend.node)
            pairs = [(t, b) for t in range(len(layers)) for b in range(t + 1, len(layers))]
            pairs = [(t, b) for t, b in pairs if t or layers[b].length <= layers[0].length]
            if not pairs:
                continue
            top, base = (layers[n] for n in rng.choice(pairs))
            speed = rng.choice((0, 8 * KIB * KIB))
            number += 1
            try:
                job = await self.bench.commit(
                    "vda", f"c{number}", speed=speed, top_node=top.name, base_node=base.name
                )
            except BlockError as error:
                tell(f"error {error}")
                return
            while job.status not in ("ready", "null"):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            if job.status == "ready":
                self.bench.scheduler.complete(job)
            while job.status != "null":  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            if "top" in self.bench.graph.nodes and self.active.name != "top":
                await self.bench.graph.delete("top")  # what is left over of a pivot


def main() -> None:
    """Until killed."""
    path, seed, mode = sys.argv[1:]
    rng = random.Random(int(seed))
    pool = JitterPool(random.Random(rng.random()), rng.choice((0, 0.001, 0.005)))
    with small_chunks(rng.choice((64 * KIB, 512 * KIB)), least_copy=rng.choice((4, 128)) * KIB):

        async def run() -> None:
            await Victim(Bench(pool), rng).run(path, mode)

        asyncio.run(run())


if __name__ == "__main__":
    main()
