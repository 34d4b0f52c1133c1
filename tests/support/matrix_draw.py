"""What the differential matrix of qcow2 images is made of: combinations, and random operations.

Everything is drawn from one seed. A combination is one kind of image with what lies below it;
``pairwise`` draws few of them in which every two values that may go together do go together.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from itertools import combinations as pairs_of

K = 1024
SECTOR = 512
DIMENSIONS: dict[str, tuple[object, ...]] = {
    "cluster_size": (512, 1 * K, 4 * K, 16 * K, 64 * K, 256 * K, 2048 * K),
    "version": (2, 3),
    "refcount_bits": (1, 2, 4, 8, 16, 32, 64),
    "extended_l2": (False, True),
    "data_file": ("", "plain", "raw"),
    "compression": ("zlib", "zstd"),
    "luks": (False, True),
    "lazy_refcounts": (False, True),
    "depth": (0, 1, 2, 3, 4),
    "preallocation": ("off", "metadata"),
    "snapshots": (False, True),
    "packed": (False, True),
}


@dataclass(frozen=True)
class Combination:
    """One point of the matrix; ``depth`` counts the images below, ``packed``: compressed writes."""

    cluster_size: int = 64 * K
    version: int = 3
    refcount_bits: int = 16
    extended_l2: bool = False
    data_file: str = ""
    compression: str = "zlib"
    luks: bool = False
    lazy_refcounts: bool = False
    depth: int = 0
    preallocation: str = "off"
    snapshots: bool = False
    packed: bool = False

    @property
    def possible(self) -> bool:
        """Whether the format, QEMU and a comparison allow it."""
        newer = self.extended_l2 or self.data_file or self.compression != "zlib"
        if self.version == 2 and (newer or self.lazy_refcounts or self.refcount_bits != 16):
            return False
        if self.extended_l2 and self.cluster_size < 16 * K:
            return False
        if self.data_file and (self.snapshots or self.packed):
            return False
        if self.data_file == "raw" and self.depth:
            return False
        if self.preallocation != "off" and self.depth and not self.extended_l2:
            return False
        # Made by QEMU these are full of noise: clusters that were never encrypted, decrypted.
        noisy = self.data_file == "raw" or (self.preallocation != "off" and not self.extended_l2)
        if self.luks and (noisy or self.packed):  # compressed clusters would not be encrypted
            return False
        # A snapshot is one more reference, and several compressed clusters share a host cluster.
        return not self.snapshots or self.refcount_bits >= (16 if self.packed else 2)

    @property
    def most_snapshots(self) -> int:
        """That refcounts of this width can tell apart, four at most."""
        return min(4, (1 << self.refcount_bits) - 2) if self.snapshots else 0

    def __str__(self) -> str:
        plain = Combination()
        shown = [
            f"{f.name}={getattr(self, f.name)}"
            for f in fields(self)
            if getattr(self, f.name) != getattr(plain, f.name)
        ]
        return " ".join(shown) or "plain"


Pair = tuple[tuple[str, object], tuple[str, object]]


def pairs(combination: Combination) -> set[Pair]:
    """Every two values that it has together."""
    values = [(name, getattr(combination, name)) for name in DIMENSIONS]
    return set(pairs_of(values, 2))


def draw(rng: random.Random) -> Combination:
    """Any one that is possible."""
    bits = rng.getrandbits
    while True:
        found = object.__new__(Combination)  # there are hundreds of thousands of tries
        members = found.__dict__
        for name, values in DIMENSIONS.items():
            count = len(values)  # what follows is ``rng.choice(values)``
            width = count.bit_length()
            number = bits(width)
            while number >= count:
                number = bits(width)
            members[name] = values[number]
        if found.possible:
            return found


def possible_pairs(rng: random.Random, tries: int = 3000) -> set[Pair]:
    """Those that some combination has; found by drawing."""
    found: set[Pair] = set()
    for _ in range(tries):
        found |= pairs(draw(rng))
    return found


def pairwise(seed: int) -> list[Combination]:
    """Combinations that together have every possible pair of values."""
    rng = random.Random(seed)
    missing = possible_pairs(rng)
    chosen: list[Combination] = []
    while missing:
        wanted = dict(rng.choice(sorted(missing, key=repr)))
        candidates = [draw(rng) for _ in range(20)]
        candidates += _with(rng, wanted)
        best = max(candidates, key=lambda c: len(pairs(c) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def _with(rng: random.Random, wanted: dict[str, object]) -> list[Combination]:
    found: list[Combination] = []
    while not found:
        tried = [replace(draw(rng), **wanted) for _ in range(60)]  # type: ignore[arg-type]
        found = [c for c in tried if c.possible]
    return found


# -- operations


@dataclass(frozen=True)
class Operation:
    """One step; ``value`` of a write: the byte, or 256 and more: a pattern of many bytes."""

    name: str
    offset: int = 0
    length: int = 0
    value: int = 0
    text: str = ""


@dataclass
class Drawer:
    """Draws operations for one disk and knows what they leave."""

    rng: random.Random
    combination: Combination
    size: int
    snapshots: dict[str, int] = field(default_factory=dict)  # name -> size of the disk
    touched: set[int] = field(default_factory=set)  # clusters that may be allocated
    #: the largest size, in bytes
    limit: int = 0
    _names: int = 0

    def __post_init__(self) -> None:
        self.limit = self.limit or 2 * self.size + 4 * self.combination.cluster_size
        if self.combination.preallocation != "off":
            self._touch(0, self.size)

    def batch(self, count: int) -> list[Operation]:
        """``count`` of them, about."""
        return [operation for _ in range(count) for operation in self._next()]

    def _next(self) -> Iterable[Operation]:
        weights = {
            "write": 14, "zero": 4, "unmap": 4, "discard": 4, "flush": 1, "reopen": 0.5,
            "resize": 0.8, "compress": 2 * self.combination.packed,
            "pack": 1.5 * self.combination.packed, "snapshot": self.combination.snapshots,
        }  # fmt: skip
        name = self.rng.choices(list(weights), list(weights.values()))[0]
        if name in ("flush", "reopen"):
            return [Operation(name)]
        if name == "resize":
            return self._resize()
        if name == "snapshot":
            return self._snapshot()
        if name in ("compress", "pack"):
            return self._compress(name)
        return self._request(name)

    def _touch(self, offset: int, length: int) -> None:
        size = self.combination.cluster_size
        self.touched.update(range(offset // size, -(-(offset + length) // size)))

    def _value(self) -> int:
        return self.rng.choice((self.rng.randrange(1, 256), 256 + self.rng.randrange(4)))

    def _request(self, name: str) -> Iterable[Operation]:
        rng, cluster = self.rng, self.combination.cluster_size
        unit = cluster // 32 if self.combination.extended_l2 else cluster
        # A discard of part of a cluster: neither has to do anything, and need not do the same.
        step = cluster if name == "discard" else rng.choice((1, SECTOR, unit, cluster))
        most = min(rng.choice((1, SECTOR, unit, 3 * unit, cluster, 5 * cluster)), 3072 * K)
        offset = rng.randrange(0, self.size, step)
        length = min(max(step, rng.randrange(most + 1) // step * step), self.size - offset)
        self._touch(offset, length)
        return [Operation(name, offset, length, self._value() if name == "write" else 0)]

    def _compress(self, name: str) -> Iterable[Operation]:
        """``compress``: QEMU can into what is not allocated; ``pack``: it writes plainly."""
        cluster = self.combination.cluster_size
        number = self.rng.randrange(-(-self.size // cluster))
        if number in self.touched and name == "compress":
            return []
        self.touched.add(number)
        length = min(cluster, self.size - number * cluster)
        return [Operation(name, number * cluster, length, self._value())]

    def _resize(self) -> Iterable[Operation]:
        if self.combination.version == 2 and self.snapshots:
            return []
        old = self.size
        top = min(self.limit, 2 * old + self.combination.cluster_size)
        if self.combination.version == 2 and self.combination.depth:
            top = old  # QEMU refuses to hide with zeros what the backing file has there
        self.size = self.rng.randrange(max(SECTOR, old // 2), top + 1) // SECTOR * SECTOR
        cluster = self.combination.cluster_size
        self.touched = {c for c in self.touched if c * cluster < self.size}
        wanted = [Operation("resize", 0, self.size, old)]
        edge = min(-old % cluster, self.size - old)
        if edge > 0:
            # What QEMU shows of a cluster that was cut off before is not said: make it known.
            wanted.append(Operation("zero", old, edge))
            self._touch(old, edge)
        return wanted

    def _snapshot(self) -> Iterable[Operation]:
        what = self.rng.choice(("create", "create", "apply", "delete"))
        if what == "create":
            if len(self.snapshots) >= self.combination.most_snapshots:
                return []
            self._names += 1
            name = f"s{self._names}"
            self.snapshots[name] = self.size
            return [Operation("create", text=name)]
        if not self.snapshots:
            return []
        name = self.rng.choice(sorted(self.snapshots))
        if what == "delete":
            del self.snapshots[name]
            return [Operation("delete", text=name)]
        if self.combination.version == 2 and self.snapshots[name] != self.size:
            return []
        self.size = self.snapshots[name]
        self._touch(0, self.size)
        return [Operation("apply", text=name, length=self.size)]

    def amendment(self) -> Operation | None:
        """What both can do, or both refuse; ``text`` as qemu-img amend has it."""
        combination = self.combination
        choices = ["compat=0.10", "compat=1.1"]
        if combination.version == 3:
            choices += ["lazy_refcounts=on", "lazy_refcounts=off"]
        if combination.version == 3 and combination.cluster_size <= 16 * K:  # else QEMU takes ages
            least = 16 if combination.packed or self.snapshots else 1
            choices += [f"refcount_bits={1 << n}" for n in range(7) if 1 << n >= least]
        text = self.rng.choice(choices)
        if text == "compat=0.10" and len({self.size, *self.snapshots.values()}) > 1:
            return None  # version 2 has one size for all
        if text == "compat=0.10" and combination.compression != "zlib":
            return None  # QEMU 7.2 does it, and reads zstd clusters as zlib from then on
        if text == "compat=0.10" and combination.luks and combination.depth:
            return None  # QEMU 7.2 writes its zeros as they are: they read as noise
        return Operation("amend", text=text)

    def amended(self, text: str) -> None:
        """It was done."""
        name, value = text.split("=")
        changes: dict[str, object] = {
            "compat": {"version": 2 if value == "0.10" else 3},
            "lazy_refcounts": {"lazy_refcounts": value == "on"},
            "refcount_bits": {"refcount_bits": int(value) if value.isdigit() else 0},
        }[name]  # type: ignore[assignment]
        if value == "0.10":
            changes["lazy_refcounts"] = False  # type: ignore[index]
        self.combination = replace(self.combination, **changes)  # type: ignore[arg-type]


def merged(extents: Iterable[tuple[int, int, str]]) -> Iterator[tuple[int, int, str]]:
    """Adjacent extents of one kind as one: (offset, length, kind)."""
    last: tuple[int, int, str] | None = None
    for offset, length, kind in extents:
        if last is not None and last[2] == kind:
            last = (last[0], last[1] + length, kind)
            continue
        if last is not None:
            yield last
        last = (offset, length, kind)
    if last is not None:
        yield last
