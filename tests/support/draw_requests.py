"""Random QMP requests over a small graph: mostly sensible ones, each with its share of mistakes.

``draw(random, state)`` gives one (command, arguments). All names come from small pools, so that
requests meet: a node that another job has, a bitmap that is there already, an id that is taken.
Pure but for the random number generator, which is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

Request = tuple[str, dict[str, Any]]
MIB = 1 << 20

#: --blockdev of the graph that every walk begins with
START = {
    "base": "base.qcow2",
    "mid": "mid.qcow2",
    "top": "top.qcow2",
    "d0": "d0.qcow2",
    "d1": "d1.qcow2",
    "t0": "t0.qcow2",
    "t1": "t1.qcow2",
}
NODES = (*START, *(f"{name}-file" for name in ("top", "d0", "t0")), "flat")
JOBS = ("j0", "j1", "j2")


class Draw:
    """Requests by a seed; ``made`` counts names of new images."""

    def __init__(self, random: Random, **more: float) -> None:
        self.random = random
        #: of requests, by the name of what makes them
        self.weights = [more.get(make.__name__, weight) for make, weight in MAKERS.items()]
        self.made = 0
        self.nodes = list(NODES)

    def request(self) -> Request:
        """The next one."""
        makers = list(MAKERS)
        maker = self.random.choices(makers, self.weights)[0]
        name, given = maker(self)
        return name, {k.replace("_", "-"): v for k, v in given.items() if v is not None}

    # -- small choices

    def some(self, chance: float) -> bool:
        return self.random.random() < chance

    def one(self, *values: Any) -> Any:
        return self.random.choice(values)

    def maybe(self, chance: float, *values: Any) -> Any:
        """One of the values, or None: left out."""
        return self.one(*values) if self.some(chance) else None

    def node(self, *likely: str) -> str:
        if likely and self.some(0.75):
            return self.one(*likely)
        return self.one("ghost", "") if self.some(0.08) else self.one(*self.nodes)

    def job(self) -> str:
        return self.one("ghost", "1st", "") if self.some(0.06) else self.one(*JOBS)

    def chain_name(self) -> str:
        return self.node("base", "mid", "top")

    def file(self) -> str:
        return self.one("base.qcow2", "mid.qcow2", "top.qcow2", "d0.qcow2", "ghost.qcow2", "")

    def properties(self) -> dict[str, Any]:
        """What every block job takes. A speed keeps it running until it is taken away."""
        return {
            "job_id": self.job(),
            "speed": self.maybe(0.35, 1, 1, 1, -1, 1 << 40),
            "auto_finalize": self.maybe(0.4, False, False, True),
            "auto_dismiss": self.maybe(0.3, False, True),
        }

    def new_name(self) -> str:
        self.made += 1
        return f"n{self.made}"


def stream(d: Draw) -> Request:
    return "block-stream", d.properties() | {
        "device": d.node("top", "mid", "d0"),
        "base": d.maybe(0.1, d.file()),
        "base_node": d.maybe(0.3, d.chain_name()),
        "bottom": d.maybe(0.12, d.chain_name()),
        "backing_file": d.maybe(0.1, "base.qcow2"),
        "on_error": d.maybe(0.1, "stop", "ignore", "enospc", "auto", "x"),
        "filter_node_name": d.maybe(0.1, "flt", "top", "9"),
    }


def commit(d: Draw) -> Request:
    return "block-commit", d.properties() | {
        "speed": d.maybe(
            0.1, -1, 1 << 40
        ),  # how much comes before the first rest is nobody's affair
        "device": d.node("top", "top", "top", "mid"),
        "base_node": d.maybe(0.4, d.chain_name()),
        "top_node": d.maybe(0.5, d.chain_name()),
        "base": d.maybe(0.07, d.file()),
        "top": d.maybe(0.07, d.file()),
        "backing_file": d.maybe(0.1, "base.qcow2"),
        "on_error": d.maybe(0.1, "stop", "ignore", "enospc", "x"),
        "filter_node_name": d.maybe(0.1, "flt", "top", "9"),
    }


def mirror(d: Draw) -> Request:
    return "blockdev-mirror", d.properties() | {
        "speed": d.maybe(0.1, -1, 1 << 40),
        "device": d.node("d0", "d1", "top"),
        "target": d.node("t0", "t1"),
        "sync": d.one("full", "full", "top", "none", "incremental", "x"),
        "granularity": d.maybe(0.2, 512, 4096, 65536, 1000, 0, 1 << 27, 256),
        "buf_size": d.maybe(0.1, 0, 4096, 1 << 20, -1),
        "replaces": d.maybe(0.1, d.node("d0", "mid")),
        "copy_mode": d.maybe(0.2, "background", "write-blocking", "x"),
        "filter_node_name": d.maybe(0.1, "flt", "top", "9"),
        "on_source_error": d.maybe(0.1, "stop", "ignore"),
        "on_target_error": d.maybe(0.1, "stop", "enospc"),
    }


def backup_arguments(d: Draw) -> dict[str, Any]:
    return d.properties() | {
        "device": d.node("d0", "d1"),
        "target": d.node("t0", "t1"),
        "sync": d.one("full", "full", "top", "incremental", "bitmap"),
        "bitmap": d.maybe(0.35, *BITMAPS),
        "bitmap_mode": d.maybe(0.3, "on-success", "never", "always"),
        "compress": d.maybe(0.1, True),
        "filter_node_name": d.maybe(0.1, "flt", "top", "9"),
        "x_perf": d.maybe(0.1, {"max-workers": 1}, {"max-workers": 0}, {"max-chunk": -1},
                          {"use-copy-range": True}, {"max-chunk": 1000}),
    }  # fmt: skip


def backup(d: Draw) -> Request:
    return "blockdev-backup", backup_arguments(d)


def drive_backup(d: Draw) -> Request:
    given = backup_arguments(d)
    return "drive-backup", given | {
        "target": d.one("m.qcow2", "m.qcow2", "no/where", "d0.qcow2", "base.qcow2"),
        "format": d.maybe(0.5, "qcow2", "qcow2", "raw", "nosuch"),
        "mode": d.maybe(0.3, "existing", "absolute-paths"),
    }


def drive_mirror(d: Draw) -> Request:
    given = mirror(d)[1]
    return "drive-mirror", given | {
        "target": d.one("m.qcow2", "m.qcow2", "no/where", "d0.qcow2", "base.qcow2"),
        "filter_node_name": None,
        "node_name": d.maybe(0.3, "made", "top", "9"),
        "format": d.maybe(0.5, "qcow2", "qcow2", "raw", "nosuch"),
        "mode": d.maybe(0.3, "existing", "absolute-paths"),
        "unmap": d.maybe(0.2, True, False),
    }


def steer(d: Draw) -> Request:
    verb = d.one("cancel", "pause", "resume", "complete", "finalize", "dismiss", "set-speed",
                 "finalize", "dismiss", "complete")  # fmt: skip
    if verb != "set-speed" and d.some(0.4):
        return f"job-{verb}", {"id": d.job()}
    name = "id" if verb in ("finalize", "dismiss") else "device"
    given: dict[str, Any] = {name: d.job()}
    if verb == "set-speed":
        given["speed"] = d.one(0, 0, 0, 1, -1)
    if verb == "cancel":
        given["force"] = d.maybe(0.3, True)
    return f"block-job-{verb}", given


BITMAPS = ("b0", "b1", "b2")


def bitmap_arguments(d: Draw, verb: str) -> dict[str, Any]:
    node = d.node("d0", "d0", "d0", "top")
    if verb == "merge":
        sources = [d.one(*BITMAPS, {"node": d.node("d0"), "name": d.one(*BITMAPS)})
                   for _ in range(d.one(0, 1, 1, 2))]  # fmt: skip
        return {"node": node, "target": d.one(*BITMAPS), "bitmaps": sources}
    given = {"node": node, "name": d.one(*BITMAPS, *BITMAPS, "")}
    if verb == "add":
        given["granularity"] = d.maybe(0.3, 512, 4096, 65536, 100, 0, 1 << 31)
        given["persistent"] = d.maybe(0.3, True)
        given["disabled"] = d.maybe(0.3, True)
    return given


VERBS = ("add", "add", "add", "remove", "clear", "enable", "disable", "merge")


def bitmap(d: Draw) -> Request:
    verb = d.one(*VERBS)
    return f"block-dirty-bitmap-{verb}", bitmap_arguments(d, verb)


def digest(d: Draw) -> Request:
    return "x-debug-block-dirty-bitmap-sha256", {"node": d.node("d0"), "name": d.one(*BITMAPS)}


def overlay_arguments(d: Draw) -> dict[str, Any]:
    name = d.new_name()
    return {
        "node_name": d.node("d0", "d1", "top"),
        "snapshot_file": d.one(f"{name}.qcow2", f"{name}.qcow2", "no/where", "top.qcow2"),
        "snapshot_node_name": d.one(name, name, name, "d0", "9", None),
        "format": d.maybe(0.1, "qcow2", "raw", "nosuch"),
        "mode": d.maybe(0.1, "existing", "absolute-paths"),
    }


def snapshot_sync(d: Draw) -> Request:
    return "blockdev-snapshot-sync", overlay_arguments(d)


def snapshot_arguments(d: Draw) -> dict[str, Any]:
    return {"node": d.node("d0", "d1", "top"), "overlay": d.node("t0", "t1", "over")}


def snapshot(d: Draw) -> Request:
    return "blockdev-snapshot", snapshot_arguments(d)


def internal(d: Draw) -> Request:
    return "blockdev-snapshot-internal-sync", {
        "device": d.node("d0", "d1"),
        "name": d.one("s0", "s1", "s2", ""),
    }


def internal_delete(d: Draw) -> Request:
    return "blockdev-snapshot-delete-internal-sync", {
        "device": d.node("d0", "d1"),
        "name": d.maybe(0.8, "s0", "s1", "s2", ""),
        "id": d.maybe(0.2, "1", "2", "9", ""),
    }


def transaction(d: Draw) -> Request:
    actions: list[dict[str, Any]] = []
    for _ in range(d.one(0, 1, 2, 2, 3)):
        verb = d.one(*VERBS)
        kind, given = d.one(
            (f"block-dirty-bitmap-{verb}", bitmap_arguments(d, verb)),
            (f"block-dirty-bitmap-{verb}", bitmap_arguments(d, verb)),
            ("blockdev-backup", backup_arguments(d)),
            ("drive-backup", drive_backup(d)[1]),
            ("blockdev-snapshot-sync", overlay_arguments(d)),
            ("blockdev-snapshot", snapshot_arguments(d)),
            ("blockdev-snapshot-internal-sync", internal(d)[1]),
            ("abort", {}),
        )
        data = {k.replace("_", "-"): v for k, v in given.items() if v is not None}
        actions.append({"type": kind, "data": data})
    mode = d.maybe(0.3, "individual", "grouped", "grouped")
    return "transaction", {
        "actions": actions,
        "properties": {"completion-mode": mode} if mode else None,
    }


def export_add(d: Draw) -> Request:
    return "block-export-add", {
        "type": "nbd",
        "id": d.one("e0", "e1", "e2", "9"),
        "node_name": d.node("d0", "d1", "top"),
        "name": d.maybe(0.3, "one", "two", "x" * 5000),
        "writable": d.maybe(0.5, True, False),
        "description": d.maybe(0.1, "words", "x" * 5000),
        "bitmaps": d.maybe(0.2, ["b0"], ["b0", "b1"], [{"node": "d0", "name": "b0"}]),
        "allocation_depth": d.maybe(0.1, True),
        "writethrough": d.maybe(0.1, True),
    }


def export_del(d: Draw) -> Request:
    return "block-export-del", {
        "id": d.one("e0", "e1", "e2", "ghost"),
        "mode": d.maybe(0.3, "safe", "hard", "x"),
    }


def server_add(d: Draw) -> Request:
    return "nbd-server-add", {
        "device": d.node("d0", "d1", "top"),
        "name": d.maybe(0.4, "e0", "one", "x" * 5000),
        "writable": d.maybe(0.5, True),
        "bitmap": d.maybe(0.1, "b0"),
    }


def server_remove(d: Draw) -> Request:
    return "nbd-server-remove", {
        "name": d.one("e0", "d0", "one", "top"),
        "mode": d.maybe(0.3, "safe", "hard"),
    }


def server(d: Draw) -> Request:
    if d.some(0.3):
        return "nbd-server-stop", {}
    address = {"type": "unix", "data": {"path": d.one("nbd.sock", "nbd.sock", "no/where.sock")}}
    return "nbd-server-start", {
        "addr": address,
        "tls_creds": d.maybe(0.1, "ghost", "g0"),
        "max_connections": d.maybe(0.1, 1, 0, -1),
    }


def add(d: Draw) -> Request:
    name = d.one("over", "again", "d0", "9", "x" * 32, "#x")
    file = d.one("t0.qcow2", "t1.qcow2", "d0.qcow2", "base.qcow2", "ghost.img")
    driver = d.one("qcow2", "qcow2", "qcow2", "raw", "file", "null-co", "nosuch", "throttle")
    given: dict[str, Any] = {"driver": driver, "node_name": name}
    if driver in ("qcow2", "raw", "throttle"):
        given["file"] = d.one({"driver": "file", "filename": file}, "flat", "ghost", "t0-file")
    if driver == "file":
        given["filename"] = file
    if driver == "qcow2":
        given["backing"] = d.maybe(0.6, "base", "ghost", "mid", "over")
    if driver == "throttle":
        given["throttle-group"] = d.one("g0", "ghost")
    given["read_only"] = d.maybe(0.3, True, False)
    given["auto_read_only"] = d.maybe(0.1, True)
    given["discard"] = d.maybe(0.15, "unmap", "ignore", "x")
    given["detect_zeroes"] = d.maybe(0.15, "on", "unmap", "off")
    given["cache"] = d.maybe(0.1, {"no-flush": True}, {"x": 1})
    return "blockdev-add", given


def remove(d: Draw) -> Request:
    return "blockdev-del", {"node_name": d.node("over", "again", "t0", "t1")}


def reopen(d: Draw) -> Request:
    name = d.node("d0", "d1", "t0", "mid", "top")
    given: dict[str, Any] = {"driver": d.one("qcow2", "qcow2", "qcow2", "raw"), "node-name": name}
    given["file"] = d.one(f"{name}-file", f"{name}-file", "flat", "ghost")
    backing = d.maybe(0.6, "base", "mid", "ghost", "d0")
    if backing is not None:
        given["backing"] = backing
    for key, *values in (("read-only", True, True, False), ("discard", "unmap"),
                         ("detect-zeroes", "on"), ("lazy-refcounts", True),
                         ("force-share", True), ("l2-cache-size", 65536)):  # fmt: skip
        if d.some(0.2):
            given[key] = d.one(*values)
    return "blockdev-reopen", {"options": [given]}


def resize(d: Draw) -> Request:
    return "block_resize", {
        "node_name": d.node("t0", "t1", "d0"),
        "size": d.one(2 * MIB, 2 * MIB, 2 * MIB, 1000, -1, 0, (1 << 63) - 1),
    }


def backing_string(d: Draw) -> Request:
    return "change-backing-file", {
        "device": d.node("top", "top", "mid"),
        "image_node_name": d.node("top", "mid"),
        "backing_file": d.one("base.qcow2", "mid.qcow2", ""),
    }


def threshold(d: Draw) -> Request:
    return "block-set-write-threshold", {
        "node_name": d.node("d0"),
        "write_threshold": d.one(0, 1, 1 << 40, -1),
    }


def make(d: Draw) -> Request:
    name = d.one("m.raw", "m.qcow2", "no/where")
    options = d.one(
        {"driver": "file", "filename": name, "size": d.one(0, MIB, -1, 1000)},
        {"driver": "qcow2", "file": d.one("d0-file", "ghost"), "size": MIB},
        {"driver": "null-co"},
    )
    return "blockdev-create", {"job_id": d.job(), "options": options}


def thing_add(d: Draw) -> Request:
    return "object-add", {
        "qom_type": d.one("throttle-group", "throttle-group", "secret", "iothread", "nosuch"),
        "id": d.one("g0", "g1", "s0", "9"),
        "data": d.maybe(0.3, "geheim"),
        "limits": d.maybe(
            0.2, {"iops-total": 100}, {"iops-total": -1}, {"bps-total": 1, "bps-read": 1}
        ),
    }  # fmt: skip


def thing_del(d: Draw) -> Request:
    return "object-del", {"id": d.one("g0", "g1", "s0", "ghost")}


def change(d: Draw) -> Request:
    return "x-blockdev-change", {
        "parent": d.node("top", "ghost"),
        "child": d.maybe(0.5, "backing", "ghost"),
        "node": d.maybe(0.5, d.node("d0")),
    }


MAKERS: dict[Callable[[Draw], Request], float] = {
    stream: 5, commit: 5, mirror: 5, backup: 5, drive_backup: 2, drive_mirror: 2,
    steer: 16, bitmap: 8, digest: 1, snapshot_sync: 3,
    snapshot: 2, internal: 2, internal_delete: 2, transaction: 4, export_add: 4, export_del: 2,
    server_add: 2, server_remove: 1, server: 2, add: 4, remove: 3, reopen: 3, resize: 2,
    backing_string: 1, threshold: 1, make: 2, thing_add: 2, thing_del: 1, change: 0.5,
}  # fmt: skip
