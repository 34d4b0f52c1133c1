"""Small qcow2 images of qemu-img, and ways to damage them byte by byte; for 16-bit refcounts."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

CLUSTER = 4096
COPIED = 1 << 63
COMPRESSED = 1 << 62
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00


class Image:
    """The bytes of an image file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, offset: int, form: str) -> int:
        with self.path.open("rb") as file:
            file.seek(offset)
            return int(struct.unpack(form, file.read(struct.calcsize(form)))[0])

    def put(self, offset: int, form: str, value: int) -> None:
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(struct.pack(form, value))

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    # -- places

    @property
    def l1(self) -> int:
        return self.get(40, ">Q")

    @property
    def reftable(self) -> int:
        return self.get(48, ">Q")

    def l2(self, index: int) -> int:
        return self.get(self.l1 + 8 * index, ">Q") & OFFSET_MASK

    def l2_place(self, cluster: int) -> int:
        return self.l2(cluster // 512) + cluster % 512 * 8

    def entry(self, cluster: int) -> int:
        return self.get(self.l2_place(cluster), ">Q")

    def set_entry(self, cluster: int, value: int) -> None:
        self.put(self.l2_place(cluster), ">Q", value)

    def set_l1(self, index: int, value: int) -> None:
        self.put(self.l1 + 8 * index, ">Q", value)

    def refblock(self, index: int = 0) -> int:
        return self.get(self.reftable + 8 * index, ">Q")

    def refcount_place(self, host_offset: int) -> int:
        index, within = divmod(host_offset // CLUSTER, CLUSTER // 2)
        return self.refblock(index) + 2 * within

    def refcount(self, host_offset: int) -> int:
        return self.get(self.refcount_place(host_offset), ">H")

    def set_refcount(self, host_offset: int, value: int) -> None:
        self.put(self.refcount_place(host_offset), ">H", value)

    def host(self, cluster: int) -> int:
        return self.entry(cluster) & OFFSET_MASK

    def set_incompatible(self, bits: int) -> None:
        self.put(72, ">Q", self.get(72, ">Q") | bits)


def make(path: Path, *options: str) -> Image:
    """8 MiB in clusters of 4 KiB: data, a zero cluster with and one without space."""
    run = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096"]
    subprocess.run([*run, *options, str(path), "8M"], check=True, timeout=60)
    commands = ["write -P 1 0 64k", "write -P 2 2M 32k", "write -P 3 4M 20k", "write -z 1M 16k"]
    commands += ["write -P 4 5M 8k", "write -z 5M 8k", "write -P 5 6M 100"]
    io = ["qemu-io", "-f", "qcow2"]
    for command in commands:
        io += ["-c", command]
    subprocess.run([*io, str(path)], check=True, timeout=60, stdout=subprocess.DEVNULL)
    return Image(path)


def make_damaged(path: Path, template: Path, name: str) -> Image:
    """A copy of an image of ``make`` with the damage of that name."""
    path.write_bytes(template.read_bytes())
    image = Image(path)
    DAMAGES[name](image)
    return image


def _snapshots(image: Image) -> None:
    for name in ("one", "two"):
        subprocess.run(["qemu-img", "snapshot", "-c", name, str(image.path)], check=True)
        subprocess.run(
            ["qemu-io", "-f", "qcow2", "-c", "write -P 9 0 12k", str(image.path)],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip


def _swap_for(image: Image, cluster: int, offset: int) -> None:
    image.set_entry(cluster, offset | COPIED)


def _bitmap(image: Image) -> None:
    command = ["qemu-img", "bitmap", "--add", "-g", "4096", str(image.path), "b0"]
    subprocess.run(command, check=True)


def _compressed(image: Image) -> None:
    raw = image.path.with_suffix(".raw")
    raw.write_bytes(b"abcd" * 40000 + bytes(range(256)) * 500)
    subprocess.run(
        ["qemu-img", "convert", "-c", "-O", "qcow2", "-o", "cluster_size=4096", str(raw),
         str(image.path)],
        check=True,
    )  # fmt: skip


def _compressed_copied(image: Image) -> None:
    _compressed(image)
    image.set_entry(1, image.entry(1) | COPIED)


def _missing_block(image: Image) -> None:
    image.put(image.reftable, ">Q", 0)


def _lost_write(image: Image) -> None:
    """What lazy refcounts leave behind after a crash."""
    for cluster in range(4):
        image.set_refcount(image.host(cluster), 0)
    image.set_incompatible(1)


def _snapshot_l1_unaligned(image: Image) -> None:
    _snapshots(image)
    place = image.get(64, ">Q")
    image.put(place, ">Q", image.get(place, ">Q") + 512)


def _snapshot_shared_low(image: Image) -> None:
    _snapshots(image)
    image.set_refcount(image.host(200 + 312), 1)  # three tables refer to it


def _snapshots_block_missing(image: Image) -> None:
    _snapshots(image)
    image.put(image.reftable, ">Q", 0)


def _cut(image: Image) -> None:
    with image.path.open("r+b") as file:
        file.truncate(image.host(1024) + CLUSTER)


def _shrunk_end(image: Image) -> None:
    with image.path.open("r+b") as file:
        file.truncate(image.size - 100)


Damage = Callable[[Image], object]

DAMAGES: dict[str, Damage] = {
    "none": lambda i: None,
    "refcount too low": lambda i: i.set_refcount(i.host(0), 0),
    "refcount too high": lambda i: i.set_refcount(i.host(0), 3),
    "refcount of a free cluster": lambda i: i.set_refcount(i.size, 1),
    "refcount of an L2 table 0": lambda i: i.set_refcount(i.l2(0), 0),
    "refcount of the L1 table 2": lambda i: i.set_refcount(i.l1, 2),
    "refcount of the header 0": lambda i: i.set_refcount(0, 0),
    "entry into the L1 table": lambda i: _swap_for(i, 3, i.l1),
    "entry into the header": lambda i: i.set_entry(3, 1 << 9 | COPIED),
    "entry into a refcount block": lambda i: _swap_for(i, 3, i.refblock()),
    "entry into the refcount table": lambda i: _swap_for(i, 3, i.reftable),
    "entry into its L2 table": lambda i: _swap_for(i, 3, i.l2(0)),
    "unaligned entry": lambda i: i.set_entry(3, i.entry(3) + 512),
    "unaligned zero entry": lambda i: i.set_entry(1280, i.entry(1280) + 512),
    "entry with reserved bits": lambda i: i.set_entry(3, i.entry(3) | 1 << 3),
    "entry beyond the end": lambda i: i.set_entry(3, 1 << 40 | COPIED),
    "two entries, one cluster": lambda i: i.set_entry(3, i.entry(4)),
    "entry taken away": lambda i: i.set_entry(3, 0),
    "COPIED missing": lambda i: i.set_entry(3, i.entry(3) & ~COPIED),
    "COPIED of L1 missing": lambda i: i.set_l1(0, i.l2(0)),
    "COPIED and refcount 2": lambda i: i.set_refcount(i.host(3), 2),
    "L2 table shared": lambda i: i.set_l1(1, i.l2(0) | COPIED),
    "L1 entry unaligned": lambda i: i.set_l1(1, (i.l2(1) + 512) | COPIED),
    "L1 entry reserved bits": lambda i: i.set_l1(1, i.l2(1) | COPIED | 1),
    "L1 entry beyond the end": lambda i: i.set_l1(1, 1 << 40 | COPIED),
    "L1 entry into the header": lambda i: i.set_l1(1, 1 << 9 | COPIED),
    "refcount block missing": _missing_block,
    "refcount block unaligned": lambda i: i.put(i.reftable, ">Q", i.refblock() + 512),
    "refcount block reserved bits": lambda i: i.put(i.reftable, ">Q", i.refblock() | 1),
    "refcount block beyond the end": lambda i: i.put(i.reftable + 8, ">Q", i.size + 16 * CLUSTER),
    "refcount block twice": lambda i: i.put(i.reftable + 8, ">Q", i.refblock()),
    "refcount block is data": lambda i: i.put(i.reftable, ">Q", i.host(5)),
    "dirty, refcounts lost": _lost_write,
    "dirty": lambda i: i.set_incompatible(1),
    "corrupt": lambda i: i.set_incompatible(2),
    "cut off": _cut,
    "last cluster short": _shrunk_end,
    "snapshots": _snapshots,
    "snapshot shares, refcount low": _snapshot_shared_low,
    "snapshots, refcount block missing": _snapshots_block_missing,
    "snapshot L1 unaligned": _snapshot_l1_unaligned,
    "bitmap": _bitmap,
    "bitmap, autoclear bit lost": lambda i: (_bitmap(i), i.put(88, ">Q", 0)),
    "compressed": _compressed,
    "compressed and COPIED": _compressed_copied,
}
