"""Requests that cannot be done, or come at the wrong time: refused as qemu-storage-daemon does.

Each scenario is one table of requests, given to both daemons in step: every answer, event and state
is compared after each. The graph is that of the random walks.
"""

import pytest

from tests.conformance.test_random_requests_qsd import directories, graph
from tests.support.in_step import InStep

__all__ = ["directories"]

UNIX = {"type": "unix", "data": {"path": "nbd.sock"}}
SERVER = ("nbd-server-start", {"addr": UNIX})
VERBS = ("cancel", "pause", "resume", "complete", "finalize", "dismiss")


def job_verbs(job_id):
    """Every steering command, in both spellings, but those that would end or free the job."""
    found = [(f"job-{verb}", {"id": job_id}) for verb in VERBS]
    for verb in VERBS:
        name = "id" if verb in ("finalize", "dismiss") else "device"
        found.append((f"block-job-{verb}", {name: job_id}))
    return [*found, ("block-job-set-speed", {"device": job_id, "speed": -1}),
            ("block-job-set-speed", {"device": job_id, "speed": 0})]  # fmt: skip


def verbs(job_id, *names):
    return [(name, given) for name, given in job_verbs(job_id) if name.split("-")[-1] in names]


def mirror(job_id="m", **more):
    given = {"job-id": job_id, "device": "d0", "target": "t0", "sync": "full"}
    return "blockdev-mirror", given | {k.replace("_", "-"): v for k, v in more.items()}


def backup(job_id="b", **more):
    given = {"job-id": job_id, "device": "d0", "target": "t0", "sync": "full"}
    return "blockdev-backup", given | {k.replace("_", "-"): v for k, v in more.items()}


def stream(job_id="s", **more):
    given = {"job-id": job_id, "device": "top"}
    return "block-stream", given | {k.replace("_", "-"): v for k, v in more.items()}


def commit(job_id="c", **more):
    given = {"job-id": job_id, "device": "top"}
    return "block-commit", given | {k.replace("_", "-"): v for k, v in more.items()}


def many(make, *mistakes):
    return [make(**mistake) for mistake in mistakes]


def bitmap(verb, name="b", node="d0", **more):
    return f"block-dirty-bitmap-{verb}", {"node": node, "name": name, **more}


def act(kind, **data):
    return {"type": kind, "data": {k.replace("_", "-"): v for k, v in data.items()}}


def transaction(*actions, mode=None):
    given = {"actions": list(actions)}
    if mode is not None:
        given["properties"] = {"completion-mode": mode}
    return "transaction", given


ENDED = [*job_verbs("ghost"), ("query-jobs", {}), ("query-block-jobs", {})]
KEPT = {"auto_finalize": False, "auto_dismiss": False}
IDS = ("", "1st", "-", "a b", "a/b", "x" * 200, "_", "A-z_0.9")

SCENARIOS = {
    "no job": ENDED,
    "stream, wrong": many(
        stream,
        *({"job_id": name, "base": "ghost"} for name in IDS),
        {"device": "ghost"}, {"device": ""}, {"base": "nowhere.qcow2"}, {"base": "top.qcow2"},
        {"base": ""}, {"base_node": "ghost"}, {"base_node": "top"}, {"base_node": "d0"},
        {"base_node": "top-file"}, {"bottom": "ghost"}, {"bottom": "d0"}, {"bottom": "top-file"},
        {"base": "base.qcow2", "base_node": "base"}, {"base": "base.qcow2", "bottom": "mid"},
        {"base_node": "base", "bottom": "mid"}, {"backing_file": "x"},
        {"bottom": "base", "backing_file": "x"}, {"speed": -1}, {"speed": "1"}, {"on_error": "x"},
        {"on_error": "enospc", "base": "nowhere"}, {"filter_node_name": "top"},
        {"filter_node_name": "9x"}, {"filter_node_name": ""}, {"auto_finalize": "on"},
        {"device": "top-file"}, {"nosuch": 1}, {"device": "mid", "base_node": "top"},
    ),
    "stream, wrong time": [
        SERVER, stream(**KEPT), *verbs("s", "pause", "resume", "complete", "dismiss"),
        stream(), stream("s2"), stream("s2", device="mid"), commit(), backup("s"), mirror("s"),
        ("blockdev-del", {"node-name": "top"}), ("blockdev-del", {"node-name": "mid"}),
        ("block_resize", {"node-name": "mid", "size": 1 << 20}),
        ("blockdev-snapshot", {"node": "top", "overlay": "t0"}),
        ("blockdev-snapshot-internal-sync", {"device": "top", "name": "x"}),
        ("change-backing-file", {"device": "top", "image-node-name": "mid", "backing-file": "x"}),
        ("blockdev-reopen", {"options": [{"driver": "qcow2", "node-name": "mid",
                                          "file": "mid-file", "backing": None}]}),
        ("job-finalize", {"id": "s"}), *verbs("s", "pause", "resume", "complete", "finalize"),
        *verbs("s", "speed", "cancel"), stream(), ("job-dismiss", {"id": "s"}),
        *verbs("s", "cancel"),
    ],
    "commit, wrong": many(
        commit,
        *({"job_id": name, "base_node": "ghost"} for name in IDS), {"device": "ghost"},
        {"device": "mid"}, {"device": "base"}, {"device": "top-file"}, {"base_node": "top-file"},
        {"base_node": "d0"}, {"base_node": "top"}, {"base": "nowhere.qcow2"}, {"base": "top.qcow2"},
        {"base": "base.qcow2", "base_node": "base"}, {"top": "nowhere.qcow2"}, {"top_node": "d0"},
        {"top": "mid.qcow2", "top_node": "mid"}, {"top_node": "base"}, {"speed": -1},
        {"top_node": "mid", "base_node": "mid"}, {"top_node": "base", "base_node": "mid"},
        {"backing_file": "x"}, {"top_node": "top", "backing_file": "x"}, {"on_error": "x"},
        {"filter_node_name": "top"}, {"filter_node_name": "9"}, {"nosuch": 1}, {"device": "d0"},
        {"device": "flat"},
    ),
    "active commit, wrong time": [
        SERVER, ("block-export-add",
        {"type": "nbd", "id": "x", "node-name": "top", "writable": True}),
        commit(**KEPT), *verbs("c", "finalize", "dismiss"), stream(), commit("c2"), mirror("c"),
        mirror("c2", device="top"), backup("c2", device="base"), ("blockdev-del",
        {"node-name": "base"}),
        ("block_resize", {"node-name": "base", "size": 1 << 20}),
        ("blockdev-snapshot", {"node": "top", "overlay": "t0"}),
        ("block-job-pause", {"device": "c"}), ("block-job-cancel", {"device": "c"}),
        ("block-job-resume", {"device": "c"}), ("job-complete", {"id": "c"}),
        *verbs("c", "complete", "dismiss"), ("job-finalize", {"id": "c"}),
        *verbs("c", "complete", "finalize", "cancel", "pause", "resume"), ("job-dismiss",
        {"id": "c"}),
    ],
    "mirror, wrong": many(
        mirror,
        *({"job_id": name, "target": "ghost"} for name in IDS), {"target": "ghost"},
        {"device": "ghost"}, {"target": "d0"}, {"target": "d0-file"}, {"target": "mid"},
        {"device": "mid"}, {"device": "d0-file"}, {"target": "top-file"}, {"granularity": 1000},
        {"granularity": 256}, {"granularity": 1 << 27}, {"granularity": -1}, {"buf_size": -1},
        {"speed": -1}, {"sync": "incremental"}, {"sync": "bitmap"}, {"sync": "x"},
        {"replaces": "ghost"}, {"replaces": "mid"}, {"replaces": "d1"}, {"copy_mode": "x"},
        {"filter_node_name": "top"}, {"filter_node_name": "9"}, {"on_source_error": "x"},
        {"on_target_error": "x"}, {"nosuch": 1},
    ),
    "mirror, wrong time": [
        SERVER, mirror(**KEPT), *verbs("m", "finalize", "dismiss"), mirror(), mirror("m2"),
        mirror("m2", target="t1"), mirror("m2", device="t0", target="t1"),
        stream("m2", device="d0"),
        backup("m2", target="t1"), backup("m2", device="d1"), ("blockdev-del", {"node-name": "t0"}),
        ("blockdev-snapshot", {"node": "t0", "overlay": "t1"}),
        ("block_resize", {"node-name": "t0", "size": 1 << 20}),
        ("blockdev-snapshot-internal-sync", {"device": "t0", "name": "x"}),
        ("block-export-add", {"type": "nbd", "id": "y", "node-name": "t0", "writable": True}),
        ("job-pause", {"id": "m"}), ("job-pause", {"id": "m"}), ("job-resume", {"id": "m"}),
        ("job-resume", {"id": "m"}), ("block-job-cancel", {"device": "m"}), *verbs("m", "complete"),
        ("job-finalize", {"id": "m"}), ("job-dismiss", {"id": "m"}),
        mirror("m3"), ("job-cancel", {"id": "m3"}), mirror("m4", copy_mode="write-blocking"),
        ("job-complete", {"id": "m4"}),
    ],
    "backup, wrong": many(
        backup,
        *({"job_id": name, "target": "ghost"} for name in IDS), {"target": "ghost"},
        {"device": "ghost"}, {"target": "d0"}, {"target": "flat", "sync": "x"}, {"speed": -1},
        {"sync": "incremental"}, {"sync": "bitmap"}, {"bitmap": "b"}, {"bitmap_mode": "never"},
        {"sync": "incremental", "bitmap": "ghost"}, {"sync": "bitmap", "bitmap": "ghost"},
        {"sync": "bitmap", "bitmap": "b", "bitmap_mode": "x"},
        {"sync": "incremental", "bitmap": "b", "bitmap_mode": "never"},
        {"sync": "full", "bitmap": "ghost", "bitmap_mode": "always"},
        {"sync": "full", "bitmap": "ghost", "bitmap_mode": "on-success"},
        {"filter_node_name": "top"}, {"filter_node_name": "9"}, {"x_perf": {"max-workers": 0}},
        {"x_perf": {"max-chunk": -1}}, {"x_perf": {"max-chunk": 1000}}, {"x_perf": {"x": 1}},
        {"on_source_error": "x"}, {"nosuch": 1}, {"target": "d0-file"},
        {"compress": True, "target": "flat"},
    ),
    "backup, wrong time": [
        bitmap("add"), backup(sync="bitmap", bitmap="b", bitmap_mode="always", **KEPT),
        *verbs("b", "complete", "resume", "dismiss"), bitmap("remove"), bitmap("clear"),
        bitmap("disable"), bitmap("enable"), bitmap("add"),
        ("block-dirty-bitmap-merge", {"node": "d0", "target": "b", "bitmaps": ["b"]}),
        backup(), backup("b2"), backup("b2", target="t1", sync="bitmap", bitmap="b",
                                       bitmap_mode="never"),
        mirror("b2"), ("blockdev-del", {"node-name": "t0"}), ("blockdev-del", {"node-name": "d0"}),
        ("job-finalize", {"id": "b"}), *verbs("b", "finalize", "cancel", "complete", "pause"),
        bitmap("clear"), ("job-dismiss", {"id": "b"}), bitmap("remove"),
    ],
    "filters of the source": [
        ("blockdev-add", {"driver": "copy-on-read", "node-name": "cor", "file": "d0"}),
        backup(device="cor", target="d0"), backup(device="cor", target="cor"),
        mirror(target="cor"), mirror(device="cor", target="d0"), mirror(replaces="cor", **KEPT),
        ("job-complete", {"id": "m"}), ("job-finalize", {"id": "m"}), ("job-dismiss", {"id": "m"}),
        ("blockdev-del", {"node-name": "cor"}),
    ],
    "drive-mirror, wrong": [
        ("drive-mirror", {"job-id": "m", "device": "d0", "target": "n.qcow2", "sync": "full",
                          **more})
        for more in (
            {"job-id": ""}, {"job-id": "1st"}, {"device": "ghost"}, {"device": "mid"},
            {"device": "d0-file"}, {"target": "no/where"}, {"target": "d0.qcow2"},
            {"target": "base.qcow2"}, {"format": "nosuch"}, {"sync": "x"},
            {"sync": "bitmap"}, {"mode": "existing", "target": "absent"}, {"mode": "x"},
            {"node-name": "top"}, {"node-name": "9"}, {"granularity": 1000}, {"replaces": "ghost"},
            {"replaces": "d0"}, {"speed": -1}, {"nosuch": 1}, {"target": ""},
            {"target": "nosuch:x"})
    ],
    "drive-backup, wrong": [
        ("drive-backup", {"job-id": "b", "device": "d0", "target": "n.qcow2", "sync": "full",
                          **more})
        for more in (
            {"job-id": ""}, {"job-id": "1st"}, {"device": "ghost"}, {"target": "no/where"},
            {"target": "d0.qcow2"}, {"target": "base.qcow2"}, {"format": "nosuch"},
            {"sync": "x"}, {"sync": "incremental"}, {"sync": "bitmap"},
            {"bitmap": "ghost"}, {"mode": "existing", "target": "absent"}, {"mode": "x"},
            {"speed": -1}, {"nosuch": 1}, {"target": ""}, {"filter-node-name": "top"},
            {"compress": True, "format": "raw"})
    ],
    "bitmaps, wrong": [
        bitmap("add"), bitmap("add"), bitmap("add", ""), bitmap("add", "x" * 1024),
        bitmap("add", "c", granularity=100), bitmap("add", "c", granularity=0),
        bitmap("add", "c", granularity=256), bitmap("add", "c", granularity=1 << 32),
        bitmap("add", "c", granularity=-512), bitmap("add", "c", "ghost"),
        bitmap("add", "c", "flat", persistent=True), bitmap("add", "c", "d0-file"),
        bitmap("add", "c", persistent=1), bitmap("add", "c", nosuch=1),
        *(bitmap(verb, *where) for verb in ("remove", "clear", "enable", "disable")
          for where in (("ghost",), ("b", "ghost"), ("b", "d1"), ("",))),
        *(("block-dirty-bitmap-merge", {"node": "d0", "target": target, "bitmaps": sources})
          for target, sources in (("ghost", ["b"]), ("b", ["ghost"]), ("b", ["b"]),
                                  ("b", [1]), ("b", [{"node": "ghost", "name": "b"}]),
                                  ("b", [{"node": "d1", "name": "b"}]), ("b", [{}]))),
        ("x-debug-block-dirty-bitmap-sha256", {"node": "d0", "name": "b"}),
        ("x-debug-block-dirty-bitmap-sha256", {"node": "d0", "name": "ghost"}),
        ("x-debug-block-dirty-bitmap-sha256", {"node": "ghost", "name": "b"}),
    ],
    "transactions, wrong": [
        bitmap("add"),
        *(transaction(action, act("abort"), mode=mode)
          for mode in (None, "individual", "grouped")
          for action in (
              act("block-dirty-bitmap-add", node="d0", name="c"),
              act("block-dirty-bitmap-remove", node="d0", name="b"),
              act("block-dirty-bitmap-clear", node="d0", name="b"),
              act("block-dirty-bitmap-disable", node="d0", name="b"),
              act("block-dirty-bitmap-enable", node="d0", name="b"),
              act("block-dirty-bitmap-merge", node="d0", target="b", bitmaps=["b"]),
              act("blockdev-snapshot", node="d0", overlay="t0"),
              act("blockdev-snapshot-internal-sync", device="d0", name="s"),
              act("blockdev-backup", job_id="b", device="d0", target="t0", sync="full"),
          ) if mode != "grouped" or action["type"] == "blockdev-backup"),
        transaction(act("blockdev-backup", job_id="b", device="d0", target="t0", sync="full"),
                    act("blockdev-backup", job_id="b2", device="d1", target="ghost", sync="full"),
                    mode="grouped"),
        transaction(act("blockdev-backup", job_id="b", device="d0", target="t0", sync="full",
                        **KEPT),
                    act("blockdev-backup", job_id="b2", device="d1", target="t1", sync="full",
                        **KEPT), mode="grouped"),
        *verbs("b", "complete", "dismiss", "resume"), ("job-finalize", {"id": "b"}),
        ("job-finalize", {"id": "b2"}), ("job-dismiss", {"id": "b"}), ("job-dismiss", {"id": "b2"}),
        transaction(act("blockdev-backup", job_id="b", device="d0", target="t0", sync="full",
                        **KEPT),
                    act("blockdev-backup", job_id="b2", device="d1", target="t1", sync="full",
                        **KEPT), mode="grouped"),
        ("job-cancel", {"id": "b2"}), ("job-dismiss", {"id": "b"}), ("job-dismiss", {"id": "b2"}),
        transaction(act("nosuch")), transaction({"type": "abort"}),
    ],
    "snapshots, wrong": [
        *(("blockdev-snapshot", {"node": node, "overlay": overlay}) for node, overlay in (
            ("ghost", "t0"), ("d0", "ghost"), ("d0", "d0"), ("d0", "flat"), ("mid", "t0"),
            ("d0", "top"), ("d0", "d0-file"), ("d0-file", "t0"))),
        *(("blockdev-snapshot-internal-sync", {"device": device, "name": name})
          for device, name in (("ghost", "x"), ("d0", ""), ("flat", "x"), ("mid", "x"), ("d0", "x"),
                               ("d0", "x"), ("d0-file", "y"))),
        *(("blockdev-snapshot-delete-internal-sync", {"device": device, **which})
          for device, which in (("ghost", {"name": "x"}), ("d0", {}), ("d0", {"name": ""}),
                                ("d0", {"id": "9"}), ("d0", {"id": "1", "name": "y"}),
                                ("flat", {"name": "x"}), ("d0", {"id": "1", "name": "x"}),
                                ("mid", {"id": ""}))),
        *(("blockdev-snapshot-sync", {"node-name": "d0", "snapshot-file": "n.qcow2", **more})
          for more in ({}, {"snapshot-node-name": "top"}, {"snapshot-node-name": "9"},
                       {"snapshot-node-name": "n", "format": "nosuch"},
                       {"snapshot-node-name": "n", "format": "raw"},
                       {"snapshot-node-name": "n", "mode": "existing", "snapshot-file": "absent"},
                       {"snapshot-node-name": "n", "mode": "x"},
                       {"snapshot-node-name": "n", "snapshot-file": "no/where"},
                       {"snapshot-node-name": "n", "snapshot-file": "d0.qcow2"},
                       {"snapshot-node-name": "n", "node-name": "ghost"},
                       {"snapshot-node-name": "n", "node-name": "mid"})),
    ],
    "exports, wrong": [
        ("nbd-server-stop", {}), ("nbd-server-add", {"device": "d0"}),
        ("block-export-add", {"type": "nbd", "id": "e", "node-name": "d0"}),
        ("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "no/where.sock"}}}),
        ("nbd-server-start", {"addr": {"type": "unix", "data": {}}}),
        ("nbd-server-start", {"addr": {"type": "x", "data": {}}}),
        ("nbd-server-start", {"addr": UNIX, "max-connections": -1}),
        SERVER, SERVER,
        *(("block-export-add", {"type": "nbd", "id": "e", "node-name": "d0", **more}) for more in (
            {"id": "9"}, {"id": ""}, {"node-name": "ghost"}, {"type": "x"}, {"bitmaps": ["ghost"]},
            {"bitmaps": [{"node": "d1", "name": "b"}]}, {"writable": 1}, {"name": "x" * 5000},
            {"description": "x" * 5000}, {"node-name": "mid", "writable": True}, {"nosuch": 1},
            {}, {}, {"id": "f"}, {"id": "f", "name": "d0"}, {"id": "f", "name": ""})),
        ("nbd-server-add", {"device": "ghost"}), ("nbd-server-add", {"device": "d0"}),
        ("nbd-server-add", {"device": "d1", "name": "e"}), ("nbd-server-add", {"device": "d1"}),
        ("nbd-server-add", {"device": "d1", "name": "z", "bitmap": "ghost"}),
        ("nbd-server-remove", {"name": "ghost"}), ("nbd-server-remove",
        {"name": "d1", "mode": "x"}),
        ("nbd-server-remove", {"name": "d1"}), ("block-export-del", {"id": "ghost"}),
        ("block-export-del", {"id": "e", "mode": "x"}), ("blockdev-del", {"node-name": "d0"}),
        ("block-export-del", {"id": "e"}), ("nbd-server-stop", {}), ("nbd-server-stop", {}),
    ],
    "nodes, wrong": [
        *(("blockdev-add", given) for given in (
            {}, {"driver": "x"}, {"driver": "null-co"}, {"driver": "null-co", "node-name": "d0"},
            {"driver": "null-co", "node-name": ""}, {"driver": "null-co", "node-name": "9"},
            {"driver": "null-co", "node-name": "x" * 32}, {"driver": "null-co", "node-name": "n",
                                                           "size": -1, "x": 1},
            {"driver": "file", "node-name": "n", "filename": "ghost"},
            {"driver": "file", "node-name": "n", "filename": "/"},
            {"driver": "file", "node-name": "n"},
            {"driver": "qcow2", "node-name": "n", "file": "ghost"},
            {"driver": "qcow2", "node-name": "n", "file": "flat"},
            {"driver": "qcow2", "node-name": "n", "file": "d0-file"},
            {"driver": "qcow2", "node-name": "n", "file": 1},
            {"driver": "qcow2", "node-name": "n", "file": None},
            {"driver": "qcow2", "node-name": "n",
            "file": {"driver": "file", "filename": "d0.qcow2"}},
            {"driver": "qcow2", "node-name": "n", "file": "t0-file", "backing": "ghost"},
            {"driver": "raw", "node-name": "n", "file": "flat", "offset": 5 << 20},
            {"driver": "raw", "node-name": "n", "file": "flat", "size": 1000},
            {"driver": "raw", "node-name": "n", "file": "flat", "size": 5 << 20},
            {"driver": "raw", "node-name": "n", "file": "flat", "detect-zeroes": "unmap"},
            {"driver": "raw", "node-name": "n", "file": "flat", "force-share": True},
            {"driver": "throttle", "node-name": "n", "file": "flat", "throttle-group": "ghost"},
            {"driver": "throttle", "node-name": "n", "file": "flat"})),
        *(("blockdev-del", {"node-name": name}) for name in ("ghost", "mid", "top-file", "")),
        *(("block_resize", {"node-name": name, "size": size}) for name, size in (
            ("ghost", 512), ("d0", -1), ("d0", 1000), ("d0", (1 << 63) - 1), ("mid", 512),
            ("d0-file", 512), ("top", 512))),
        ("block_resize", {"size": 512}), ("block_resize", {"device": "ghost", "size": 512}),
        ("block-set-write-threshold", {"node-name": "ghost", "write-threshold": 1}),
        ("block-set-write-threshold", {"node-name": "d0", "write-threshold": -1}),
        ("x-blockdev-change", {"parent": "top", "node": "d0"}),
        ("x-blockdev-change", {"parent": "ghost"}), ("x-blockdev-change", {"parent": "top"}),
        ("x-blockdev-set-iothread", {"node-name": "ghost", "iothread": None}),
        ("x-blockdev-set-iothread", {"node-name": "d0", "iothread": "ghost"}),
        *(("change-backing-file", {"device": device, "image-node-name": image, "backing-file": "x"})
          for device, image in (("ghost", "mid"), ("top", "ghost"), ("mid", "mid"), ("d0", "d0"),
                                ("d0", "mid"), ("top", "base"))),
    ],
    "reopen": [
        *(("blockdev-reopen", {"options": [{"driver": "qcow2", "file": "d0-file", **more}]})
          for more in (
              {}, {"node-name": "ghost"}, {"node-name": "d0", "driver": "raw"},
              {"node-name": "d0", "lazy-refcounts": True},
              {"node-name": "d0", "l2-cache-size": 65536},
              {"node-name": "d0", "cache-size": 1 << 20, "l2-cache-size": 1 << 21},
              {"node-name": "d0", "cache-clean-interval": 5},
              {"node-name": "d0", "discard": "unmap"},
              {"node-name": "d0", "overlap-check": "all"}, {"node-name": "d0", "read-only": True},
              {"node-name": "d0"}, {"node-name": "d0", "backing": "ghost"},
              {"node-name": "d0", "backing": "d0"}, {"node-name": "d0", "detect-zeroes": "on"},
              {"node-name": "d0", "detect-zeroes": "unmap"}, {"node-name": "d0", "backing": "base"},
              {"node-name": "d0", "backing": None}, {"node-name": "d0", "file": "ghost"},
              {"node-name": "base", "file": "base-file", "backing": "top"},
              {"node-name": "mid", "file": "mid-file"},
              *({"node-name": "base", "file": "base-file", "detect-zeroes": "unmap", **more}
                for more in ({}, {"discard": "ignore"})))),
        ("object-add", {"qom-type": "throttle-group", "id": "g"}),
        ("blockdev-add", {"driver": "throttle", "node-name": "slow", "throttle-group": "g",
                          "file": "d0-file"}),
        ("blockdev-reopen", {"options": [{"driver": "qcow2", "node-name": "d0", "file": "slow"}]}),
        ("blockdev-del", {"node-name": "slow"}),
        ("blockdev-reopen",
        {"options": [{"driver": "qcow2", "node-name": "d0", "file": "d0-file"}]}),
        ("blockdev-del", {"node-name": "slow"}),
    ],
    "objects, wrong": [
        *(("object-add", given) for given in (
            {}, {"qom-type": "x", "id": "a"}, {"qom-type": "secret"},
            {"qom-type": "secret", "id": "a"},
            {"qom-type": "secret", "id": "9", "data": "x"}, {"qom-type": "secret", "id": "a",
                                                             "data": "x", "file": "y"},
            {"qom-type": "secret", "id": "a", "file": "ghost"},
            {"qom-type": "throttle-group", "id": "a", "limits": {"iops-total": -1}},
            {"qom-type": "throttle-group", "id": "a", "limits": {"iops-total": 1, "iops-read": 1}},
            {"qom-type": "throttle-group", "id": "a", "limits": {"bps-total-max": 1}},
            {"qom-type": "throttle-group", "id": "g9"}, {"qom-type": "iothread", "id": "io"},
            {"qom-type": "iothread", "id": "io"})),
        *(("object-del", {"id": name}) for name in ("ghost", "io", "io", "")),
        ("qom-get", {"path": "/objects/g9", "property": "x"}),
        ("qom-get", {"path": "/nowhere", "property": "x"}), ("qom-list", {"path": "/nowhere"}),
    ],
    "chardevs": [
        *(("chardev-add", {"id": name, "backend": {"type": kind, "data": data}})
          for name, kind, data in (("r", "ringbuf", {"size": 8}), ("r", "ringbuf", {"size": 8}),
                                   ("x", "ringbuf", {"size": 5}), ("d", "ringbuf", {}),
                                   ("n", "null", {}), ("x", "nosuch", {}),
                                   ("y", "memory", {"size": 4}), ("y", "null", {"x": 1}))),
        ("chardev-add", {"id": "z", "backend": {"type": "null"}}),
        *(("ringbuf-write", given) for given in (
            {"device": "r", "data": "hello world"}, {"device": "ghost", "data": "x"},
            {"device": "m", "data": "x"}, {"device": "n", "data": "x"},
            {"device": "d", "data": "aGFsbG8=", "format": "base64"},
            {"device": "d", "data": "!!", "format": "base64"},
            {"device": "d", "data": "x", "format": "x"})),
        *(("ringbuf-read", {"device": device, "size": size}) for device, size in (
            ("r", 3), ("r", 100), ("r", 1), ("r", 0), ("r", -1), ("d", 2), ("ghost", 1), ("n", 1))),
        ("ringbuf-read", {"device": "d", "size": 2, "format": "base64"}),
        ("ringbuf-write", {"device": "d", "data": "/w==", "format": "base64"}),
        ("ringbuf-read", {"device": "d", "size": 9}),
        *((f"chardev-{verb}", {"id": name}) for verb in ("send-break", "remove")
          for name in ("ghost", "m", "r", "r", "") if (verb, name) != ("send-break", "")),
        *(("chardev-change", {"id": name, "backend": {"type": kind, "data": data}})
          for name, kind, data in (("ghost", "null", {}), ("m", "null", {}), ("d", "null", {}),
                                   ("n", "ringbuf", {"size": 3}))),
        ("ringbuf-read", {"device": "d", "size": 9}),
    ],
    "create, wrong time": [
        *(("blockdev-create", {"job-id": name, "options": {"driver": "null-co"}}) for name in IDS),
        ("blockdev-create", {"job-id": "c", "options": {"driver": "file", "filename": "f.raw",
                                                       "size": 1 << 20}}),
        *verbs("c", "pause", "resume", "complete", "finalize", "cancel", "speed"),
        ("blockdev-create", {"job-id": "c", "options": {"driver": "file", "filename": "f.raw",
                                                       "size": 1 << 20}}),
        ("job-dismiss", {"id": "c"}), ("job-dismiss", {"id": "c"}),
        ("x-blockdev-amend", {"job-id": "a", "node-name": "d0", "options": {"driver": "raw"}}),
        ("x-blockdev-amend", {"job-id": "a", "node-name": "ghost", "options": {"driver": "qcow2"}}),
        ("x-blockdev-amend", {"job-id": "a", "node-name": "flat", "options": {"driver": "file"}}),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SCENARIOS)
def test_as_qemu(name, directories):
    with InStep(*directories, *graph()) as both:
        for command, given in SCENARIOS[name]:
            both.do(command, **given)
        both.look()
