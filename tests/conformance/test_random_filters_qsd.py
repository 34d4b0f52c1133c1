"""Filters and protocols with random options under random requests, beside qemu-storage-daemon.

A seed puts a stack of one to three drivers over files that are the same for both, gives qemu-io the
same requests of both exports, and compares the answers to ``blockdev-add``, every line of qemu-io,
what is read of the export afterwards, the statistics of the drivers, and each file when all is
closed: raw ones and their length, images by their contents, logs by their entries but for flushes
(QEMU adds some: a write with FUA counts as not flushed).

A read that fails makes QEMU's server hang up, so no rule of blkdebug is for reads.

``WALKS``, ``FIRST_WALK``: as in ``test_random_requests_qsd``.
"""

import hashlib
import json
import os
import random
import re
import struct
import subprocess
from typing import Any

import pytest

from tests.support.daemon import DaemonProcess, QmpError
from tests.support.in_step import PeerEndedError, missing, words
from tests.support.qsd import QsdProcess

SIZE = 2 << 20
FIRST = int(os.environ.get("FIRST_WALK", "1"))
REQUESTS = 30
SERVER = ("--nbd-server", "addr.type=unix,addr.path=nbd.sock")
EVENTS = ("QUORUM_FAILURE", "QUORUM_REPORT_BAD")


@pytest.fixture(autouse=True)
def peers():
    if (name := missing()) is not None:
        pytest.skip(f"{name} is not installed")


def image(directory, rng, name, backing=None):
    """Some of its clusters have data."""
    based = ["-b", backing, "-F", "qcow2"] if backing else []
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=64k", *based]
    subprocess.run([*create, name, str(SIZE)], cwd=directory, check=True, timeout=60)
    writes = []
    for _ in range(4):
        at = rng.randrange(SIZE // 65536) * 65536
        writes += ["-c", f"write -P {rng.randrange(256)} {at} 64k"]
    command = ["qemu-io", "-f", "qcow2", *writes, name]
    subprocess.run(command, cwd=directory, check=True, timeout=60, stdout=subprocess.DEVNULL)


def make_files(directory, seed):
    directory.mkdir()
    rng = random.Random(seed)
    data = rng.randbytes(SIZE)
    for name in "abc":
        (directory / f"{name}.img").write_bytes(data)
    (directory / "log.img").touch()
    image(directory, rng, "base.qcow2")
    image(directory, rng, "top.qcow2", "base.qcow2")
    image(directory, rng, "target.qcow2")


class Stack:
    """``blockdev-add``s by a seed; ``top`` is the node that is exported."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.adds: list[dict[str, Any]] = [
            {"driver": "file", "node-name": name, "filename": f"{name}.img"}
            for name in ("a", "b", "c", "log")
        ]
        self.top = rng.choice("aaai")
        self.made = 0
        if self.top == "i":
            self.adds.append(self.qcow2("i", "top.qcow2", "j"))
        self.exact = True  # files below are the same byte by byte
        kinds = [self.raw, self.throttle, self.blkdebug, self.blklogwrites, self.compress]
        if self.top == "i":
            kinds = [self.copy_on_read, self.compress, self.throttle, self.blklogwrites, self.cbw]
        else:
            kinds += [self.quorum, self.blkverify, self.preallocate]
        for _ in range(rng.choice((1, 1, 2, 3))):
            kind = rng.choice(kinds)
            if kind in (self.quorum, self.blkverify, self.blklogwrites, self.cbw):
                kinds = [k for k in kinds if k not in (self.quorum, self.blkverify, kind)]
            if kind == self.compress and self.made:
                kind = self.throttle  # with the format below, or it is refused
            given = kind()
            self.made += 1
            name = f"n{self.made}"
            self.adds.append({"node-name": name, **given})
            self.top = name

    def qcow2(self, name, filename, base):
        return {
            "driver": "qcow2", "node-name": name, "discard": "unmap",
            "file": {"driver": "file", "filename": filename},
            "backing": {"driver": "qcow2", "node-name": base,
                        "file": {"driver": "file", "filename": "base.qcow2"}},
        }  # fmt: skip

    def some(self, chance, *values):
        return self.rng.choice(values) if self.rng.random() < chance else None

    def over(self, driver, **members):
        found = {"driver": driver, "file": self.top}
        found |= {k.replace("_", "-"): v for k, v in members.items() if v is not None}
        return found

    def raw(self):
        return self.over(
            "raw",
            offset=self.some(0.7, 0, 512, 4096, 1000, 65536, SIZE // 2, SIZE, SIZE + 512),
            size=self.some(0.6, SIZE // 2, 512, 1 << 20, 1000, SIZE, 0),
        )

    def throttle(self):
        self.adds.append(
            {
                "group": f"g{self.made}",
                "limits": self.some(
                    0.7, {"bps-total": 1 << 40}, {"iops-total": 100000, "iops-size": 4096}
                )
                or {},
            }
        )
        return self.over("throttle", throttle_group=f"g{self.made}")

    def blkdebug(self):
        rules = []
        for _ in range(self.rng.choice((0, 1, 2, 3))):
            rule = {
                "event": self.rng.choice(
                    ("none", "read_aio", "write_aio", "flush_to_disk", "pwritev", "pwritev_zero")
                ),
                "iotype": self.rng.choice(("write", "write-zeroes", "discard", "flush")),
                "errno": self.some(0.5, 5, 28, 1, 95),
                "sector": self.some(0.4, 0, 1, 128, 2048),
                "once": self.some(0.6, True),
                "immediately": self.some(0.2, True),
                "state": self.some(0.3, 1, 2),
            }
            if rule["event"] not in [known["event"] for known in rules]:
                rules.append({k: v for k, v in rule.items() if v is not None})
        states = [{"event": "write_aio", "state": 1, "new_state": 2}]
        found = self.over(
            "blkdebug", image=self.top, inject_error=rules or None,
            set_state=self.some(0.3, states),
            align=self.some(0.1, 1000),
        )  # fmt: skip
        del found["file"]
        # Events of data are called out by the format above.
        self.adds.append({"node-name": f"d{self.made}", **found})
        self.top = f"d{self.made}"
        return self.over("raw")

    def blklogwrites(self):
        return self.over(
            "blklogwrites", log="log",
            log_sector_size=self.some(0.4, 512, 4096, 1000),
            log_append=self.some(0.2, True, False),
            log_super_update_interval=self.some(0.3, 1, 3, 0),
        )  # fmt: skip

    def compress(self):
        return self.over("compress")

    def preallocate(self):
        return self.over(
            "preallocate",
            prealloc_align=self.some(0.5, 4096, 65536, 1000),
            prealloc_size=self.some(0.5, 65536, 1 << 20, 1000),
        )

    def copy_on_read(self):
        return self.over("copy-on-read", bottom=self.some(0.5, "i", "j", "ghost"))

    def cbw(self):
        self.adds.append(
            {
                "driver": "qcow2",
                "node-name": "t",
                "file": {"driver": "file", "filename": "target.qcow2"},
            }
        )
        return self.over(
            "copy-before-write",
            target="t",
            on_cbw_error=self.some(0.3, "break-guest-write", "break-snapshot"),
        )

    def quorum(self):
        return {
            "driver": "quorum", "children": [self.top, "b", "c"],
            "vote-threshold": self.rng.choice((1, 2, 2, 3, 4, 0)),
            **({"rewrite-corrupted": True} if self.rng.random() < 0.4 else {}),
            **({"read-pattern": "fifo"} if self.rng.random() < 0.2 else {}),
        }  # fmt: skip

    def blkverify(self):
        return {"driver": "blkverify", "test": self.top, "raw": "b"}


def requests(rng):
    found = []
    for _ in range(REQUESTS):
        at = rng.choice((0, 512, 1000, 65536, 60_000, rng.randrange(SIZE), SIZE - 4096))
        length = rng.choice((512, 4096, 65536, 100, rng.randrange(1, 200_000)))
        pattern = rng.randrange(256)
        found.append(rng.choice((
            f"write -P {pattern} {at} {length}", f"write -P {pattern} {at} {length}",
            f"write -z {at} {length}", f"write -z -u {at} {length}", f"write -f {at} {length}",
            f"read -P {pattern} {at} {length}", f"read -v {at} 64", f"discard {at} {length}",
            f"read {at} {length}", "flush",
        )))  # fmt: skip
    return found


def lines(directory, node, given):
    options = [part for line in given for part in ("-c", line)]
    url = f"nbd+unix:///{node}?socket=nbd.sock"
    done = subprocess.run(
        ["qemu-io", "-f", "raw", "-t", "writeback", "-d", "unmap", *options, url],
        cwd=directory, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return re.sub(r"ops; .*", "ops", done.stdout).splitlines()


def whole(directory, node):
    """What is read of the export."""
    (directory / "whole").unlink(missing_ok=True)
    command = ["qemu-img", "convert", "-f", "raw", "-O", "raw",
               f"nbd+unix:///{node}?socket=nbd.sock", "whole"]  # fmt: skip
    done = subprocess.run(command, cwd=directory, capture_output=True, timeout=120, check=False)
    return None if done.returncode else (directory / "whole").read_bytes()


def play(daemon_class, directory, seed, stack, asked):
    make_files(directory, seed)
    found: list[tuple[str, Any]] = []
    with daemon_class(directory, *SERVER) as daemon:
        client = daemon.qmp()

        def do(name, given):
            try:
                answer = client(name, **given)
            except QmpError as error:
                answer = words(str(error))
            found.append((json.dumps({name: given}), answer))

        for given in stack.adds:
            if "group" in given:
                do("object-add", {"qom-type": "throttle-group", "id": given["group"],
                                  "limits": given["limits"]})  # fmt: skip
            else:
                do("blockdev-add", given)
        do("block-export-add", {"type": "nbd", "id": "e", "node-name": stack.top, "name": "e",
                                "writable": True})  # fmt: skip
        found += zip(asked, [""] * len(asked), strict=True)
        told = lines(directory, "e", asked)
        if daemon.process.poll() is not None:
            raise PeerEndedError
        found += [("line", line) for line in told]
        found.append(("whole", whole(directory, "e")))
        stats = client("query-blockstats", **{"query-nodes": True})
        found += sorted((f"statistics of {s['node-name']}", s.get("driver-specific"))
                        for s in stats if s["node-name"].isalnum())  # fmt: skip
        found += [("event", e["data"]) for e in client.events if e["event"] in EVENTS]
        client("quit")
        try:
            daemon.process.wait(5)
        except subprocess.TimeoutExpired:
            daemon.process.kill()
            assert daemon_class is QsdProcess, "liveblockd does not end"
            raise PeerEndedError from None
    for name in ("a.img", "b.img", "c.img"):
        found.append((name, (directory / name).read_bytes()))
    found.append(("log.img", entries((directory / "log.img").read_bytes())))
    for name in ("top.qcow2", "target.qcow2"):
        subprocess.run(["qemu-img", "check", "-q", name], cwd=directory, check=True, timeout=60)
        command = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", name, "whole"]
        subprocess.run(command, cwd=directory, check=True, timeout=60)
        found.append((name, (directory / "whole").read_bytes()))
    return found


def entries(data):
    """Of a log: sector, sectors, flags and digest of what was written."""
    if not data:
        return []
    _, _, count, unit = struct.unpack_from("<QQQI", data)
    found, at = [], unit
    for _ in range(count):
        sector, sectors, flags, _ = struct.unpack_from("<QQQQ", data, at)
        size = 0 if flags & 4 else sectors * unit
        written = data[at + unit : at + unit + size].ljust(size, b"\0")
        if not flags & 1:
            found.append((sector, sectors, flags, hashlib.sha256(written).hexdigest()[:8]))
        at += unit + size
    return found


@pytest.mark.parametrize("seed", range(FIRST, FIRST + int(os.environ.get("WALKS", "4"))))
def test_walk(seed, tmp_path):
    rng = random.Random(seed)
    stack, asked = Stack(rng), requests(rng)
    try:
        theirs = play(QsdProcess, tmp_path / "theirs", seed, stack, asked)
    except PeerEndedError:
        pytest.skip("qemu-storage-daemon ended")
    ours = play(DaemonProcess, tmp_path / "ours", seed, stack, asked)
    told = [f"{what}: {shown(answer)}" for what, answer in ours]
    if any(given["driver"] == "compress" for given in stack.adds if "driver" in given):
        theirs, ours = up_to_an_error(theirs, ours)
    for (what, their), (_, our) in zip(theirs, ours, strict=True):
        if their != our:
            at = differs(their, our)
            story = "\n".join(told[: len(stack.adds) + 1 + len(asked)])
            raise AssertionError(
                f"{story}\n{what}{at}\n  theirs {shown(their)}\n  ours   {shown(our)}"
            )


def up_to_an_error(theirs, ours):
    """QEMU cannot compress a cluster that has data."""
    failed = ("line", "write failed: Input/output error")
    end = theirs.index(failed) if failed in theirs else None
    return theirs[:end], ours[:end]


def shown(answer):
    return f"{len(answer)} bytes" if isinstance(answer, bytes) else answer


def differs(theirs, ours):
    if not isinstance(theirs, bytes) or not isinstance(ours, bytes):
        return ""
    both = zip(theirs, ours, strict=False)
    at = next((n for n, (a, b) in enumerate(both) if a != b), min(len(theirs), len(ours)))
    return f" differs at {at}: {theirs[at : at + 16].hex()} {ours[at : at + 16].hex()}"
