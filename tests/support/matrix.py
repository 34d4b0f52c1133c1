"""The differential matrix of qcow2 images: ``python -m tests.support.matrix --seeds 200``.

Two twins of one image, one made by qemu-img and one by this engine, get the same random operations.
In every round QEMU works on one of them and this engine on the other; then they change places, so
that each goes on with what the other wrote. After every round both read both: the bytes, the
allocation, qemu-img check. ``--seed N`` runs one seed again; its images stay with ``--keep``.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

from liveblockd.formats.qcow2.checking import check_image
from liveblockd.formats.qcow2.image import Qcow2
from tests.support.matrix_draw import SECTOR, Combination, Drawer, K, Operation, draw, pairwise
from tests.support.matrix_hands import (
    DifferenceError,
    Extents,
    Here,
    Image,
    create_here,
    map_here,
    open_here,
    qemu_checks,
    qemu_creates,
    qemu_does,
    qemu_maps,
    qemu_reads,
    read_here,
)
from tests.support.memory import MemoryDriver
from tests.support.unlocked import unlocked_once


@dataclass
class Report:
    """What was done for one seed."""

    combination: Combination
    operations: int = 0
    rounds: int = 0


class Matrix:
    """One combination."""

    def __init__(self, seed: int, combination: Combination | None, directory: Path) -> None:
        self.rng = random.Random(seed)
        self.combination = combination or draw(self.rng)
        self.directory = directory
        self.report = Report(self.combination)
        self.twins: list[Image] = []

    async def run(self, rounds: int = 2, steps: int = 22) -> Report:
        """Raises ``DifferenceError``, with what had been done."""
        try:
            await self._run(rounds, steps)
        except Exception as error:
            raise DifferenceError(self._told(error)) from error
        return self.report

    async def _run(self, rounds: int, steps: int) -> None:
        layers = await self._layers()
        below = layers[-1] if layers else None
        size = self._size(self.combination)
        self.twins = [
            Image(self.directory / f"{name}.qcow2", self.combination, below) for name in "ab"
        ]
        await self._create(self.twins[0], size, 1)
        await create_here(self.twins[1], size)
        self.drawer = Drawer(self.rng, self.combination, size)
        first = self.rng.randrange(2)
        for number in range(rounds):
            qemus, ours = self.twins[(first + number) % 2], self.twins[(first + number + 1) % 2]
            await self._round(qemus, ours, steps)

    def _told(self, error: Exception) -> str:
        stories = "\n".join(f"-- {twin.path.name}\n" + "\n".join(twin.story) for twin in self.twins)
        return f"{self.combination}\n{stories}\n{error!r}"

    def _size(self, combination: Combination) -> int:
        cluster = combination.cluster_size
        least, most = (64, 250) if cluster < 4 * K else (100, 700)
        sectors = self.rng.randrange(least, most) * 2 + self.rng.randrange(3)
        return max(sectors * SECTOR, self.rng.randrange(3) * cluster + sectors * SECTOR)

    # -- below

    async def _layers(self) -> list[Image]:
        found: list[Image] = []
        for number in range(self.combination.depth):
            below = found[-1] if found else None
            path = self.directory / f"{number}.base"
            if not found and self.rng.random() < 0.35:
                image = Image(path, None)
                data = self.rng.randbytes(self.rng.randrange(1, 700) * SECTOR)
                path.write_bytes(data + bytes(self.rng.randrange(2) * 20 * K))
                found.append(image)
                continue
            combination = replace(
                draw(self.rng), depth=number, snapshots=False, preallocation="off"
            )
            if not combination.possible or self.rng.random() < 0.8:
                combination = replace(combination, luks=False)
            if below is not None and combination.data_file == "raw":
                combination = replace(combination, data_file="plain")
            found.append(await self._layer(Image(path, combination, below)))
        return found

    async def _layer(self, image: Image) -> Image:
        assert image.combination is not None
        size = self._size(image.combination)
        operations = Drawer(self.rng, image.combination, size).batch(self.rng.randrange(10))
        await self._create(image, size, 0.5)
        if self.rng.random() < 0.5:
            qemu_does(image, operations)
        else:
            await _here_does(image, operations)
        return image

    async def _create(self, image: Image, size: int, chance: float) -> None:
        """By qemu-img, or here: for LUKS it would measure the processor for a second."""
        if self.rng.random() < chance and not image.luks:
            qemu_creates(image, size)
        else:
            await create_here(image, size)

    # -- one round

    async def _round(self, qemus: Image, ours: Image, steps: int) -> None:
        operations = self.drawer.batch(steps)
        tail = self._tail(qemus)
        operations += tail
        told = [str(operation) for operation in operations]
        qemus.story += ["QEMU:", *told]
        ours.story += ["here:", *told]
        theirs, here = await asyncio.gather(
            asyncio.to_thread(qemu_does, qemus, operations), _here_does(ours, operations)
        )
        if theirs != here:
            raise DifferenceError(f"refused: QEMU {theirs}, here {here}")
        if tail and tail[-1].name == "kill":
            # Refcounts were behind, the image is dirty: who opens it next repairs it.
            qemus.story.append("here: repair")
            await _here_does(qemus, [])
        self._after(tail, done=bool(here and here[-1]))
        await self._compare()
        self.report.operations += len(operations)
        self.report.rounds += 1

    def _tail(self, image: Image) -> list[Operation]:
        """The last step of a round: something that changes what the image is."""
        chance = self.rng.random()
        combination = self.drawer.combination
        if chance < 0.35 and combination.lazy_refcounts:
            return [Operation("flush"), Operation("kill")]
        if chance < 0.6:
            amendment = self.drawer.amendment()
            return [amendment] if amendment is not None else []
        if image.below is not None:
            return self._rebase(image)
        return []

    def _rebase(self, image: Image) -> list[Operation]:
        below, names = image.below, [""]
        assert below is not None
        hidden = below.luks
        if len(qemu_reads(below)) < self.drawer.size:
            return []  # QEMU 7.2 gives up at the end of the old backing file
        while below.below is not None:
            below = below.below
            hidden |= below.luks
            names.append(f"{below.kind}:{below.path}")
        if hidden:
            return []
        # All of the disk may be allocated afterwards.
        self.drawer.touched.update(range(self.drawer.size // self.combination.cluster_size + 1))
        return [Operation("rebase", text=self.rng.choice(names))]

    def _after(self, tail: list[Operation], *, done: bool) -> None:
        if not tail or not done:
            return
        if tail[-1].name == "amend":
            self.drawer.amended(tail[-1].text)
        elif tail[-1].name == "rebase":
            for twin in self.twins:
                below = twin.below
                while below is not None and f"{below.kind}:{below.path}" != tail[-1].text:
                    below = below.below
                twin.below = below

    async def _compare(self) -> None:
        jobs = [asyncio.to_thread(_seen_by_qemu, twin) for twin in self.twins]
        seen = await asyncio.gather(*jobs)
        for twin, (data, extents, counts) in zip(self.twins, seen, strict=True):
            await self._compare_one(twin, data, extents, counts)
        (data_a, map_a, _), (data_b, map_b, _) = seen
        equal("bytes of the twins", data_a, data_b)
        kinds = [_sectors(extents, data_a) for extents in (map_a, map_b)]
        equal("allocation of the twins", *kinds)

    async def _compare_one(
        self, twin: Image, data: bytes, extents: Extents, counts: dict[str, int]
    ) -> None:
        name = twin.path.name
        errors = {k: counts[k] for k in ("corruptions", "leaks", "check-errors") if counts[k]}
        equal(f"qemu-img check of {name}", {}, errors)
        opened = await open_here(twin, read_only=True)
        assert isinstance(opened, Qcow2)
        equal(f"{name} as QEMU and we read it", data, await read_here(opened))
        equal(f"{name} as QEMU and we map it", extents, await map_here(opened))
        await opened.close()
        result = await check_image(MemoryDriver.of(twin.path.read_bytes()))
        found = {
            "corruptions": result.corruptions, "leaks": result.leaks,
            "check-errors": result.check_errors,
            "allocated-clusters": result.allocated_clusters,
            "compressed-clusters": result.compressed_clusters,
        }  # fmt: skip
        equal(f"check of {name}", counts, found)
        if self.combination.data_file == "raw" and twin.data is not None:
            equal(f"raw data file of {name}", data, twin.data.read_bytes()[: len(data)])


def _seen_by_qemu(image: Image) -> tuple[bytes, Extents, dict[str, int]]:
    return qemu_reads(image), qemu_maps(image), qemu_checks(image)


async def _here_does(image: Image, operations: list[Operation]) -> list[bool]:
    here = await Here.open(image)
    try:
        return await here.do(operations)
    finally:
        await here.close()


def _sectors(extents: Extents, data: bytes) -> list[str]:
    """The kind of each sector, where it cannot be one thing to QEMU and another one to us.

    Zeros may be stored, or said to be zeros, or be those that are below.
    """
    kinds = [kind for _, length, kind in extents for _ in range(length // SECTOR)]
    nothing = bytes(SECTOR)
    return [
        "ZERO" if data[n * SECTOR : (n + 1) * SECTOR] == nothing else kind
        for n, kind in enumerate(kinds)
    ]


def equal(what: str, one: object, other: object) -> None:
    """Raise ``DifferenceError``, with the first one."""
    if one == other:
        return
    if isinstance(one, (bytes, list)) and isinstance(other, (bytes, list)):
        shared = min(len(one), len(other))
        at = next((n for n in range(shared) if one[n] != other[n]), shared)
        raise DifferenceError(
            f"{what}: differ from {at} on: {one[at : at + 12]!r} {other[at : at + 12]!r} "
            f"(lengths {len(one)}, {len(other)})"
        )
    raise DifferenceError(f"{what}: {one} {other}")


def run(
    seed: int, combination: Combination | None, *, rounds: int, again: str = "", keep: bool = False
) -> Report:
    """One combination (None: any) in a directory of its own; raises ``DifferenceError``.

    ``again``: the arguments that, beside the seed, choose the combination.
    """
    directory = Path(tempfile.mkdtemp(prefix="liveblockd-matrix-"))
    try:
        with unlocked_once():
            return asyncio.run(Matrix(seed, combination, directory).run(rounds))
    except DifferenceError as difference:
        if keep:
            say(f"images: {directory}")
        if not isinstance(difference.__cause__, (DifferenceError, type(None))):
            say("".join(traceback.format_exception(difference.__cause__)[-8:]))
        command = f"python -m tests.support.matrix --rounds {rounds} {again} --seed {seed} --keep"
        raise DifferenceError(f"seed {seed}: {difference}\nagain: {command}") from difference
    finally:
        if not keep:
            shutil.rmtree(directory, ignore_errors=True)


def main() -> int:
    """Exit status 1 if there was a difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many")
    parser.add_argument("--start", type=int, default=0, help="the first one")
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument(
        "--pairwise", type=int, help="the combinations of this seed", metavar="SEED"
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--keep", action="store_true", help="leave the images of a failed seed")
    arguments = parser.parse_args()
    chosen: list[Combination | None] = []
    if arguments.pairwise is not None:
        chosen += pairwise(arguments.pairwise)
    seeds = range(arguments.start, arguments.start + (len(chosen) or arguments.seeds))
    if arguments.seed is not None:
        seeds = range(arguments.seed, arguments.seed + 1)
    started, operations, failed = time.monotonic(), 0, []
    for done, seed in enumerate(seeds):
        combination = chosen[seed] if chosen else None
        more = f"--pairwise {arguments.pairwise}" if chosen else ""
        try:
            report = run(
                seed, combination, rounds=arguments.rounds, again=more, keep=arguments.keep
            )
            operations += report.operations
        except DifferenceError as difference:
            failed.append(seed)
            say(f"FAILED: {difference}")
        if done % 20 == 19 or seed == seeds[-1]:
            seconds = time.monotonic() - started
            say(f"{done + 1} combinations, {operations} operations, {seconds:.0f} s; "
                f"failed: {failed}")  # fmt: skip
    return 1 if failed else 0


def say(line: str) -> None:
    """To stdout, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
