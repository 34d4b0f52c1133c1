"""Filters, replicas and throttle groups: the same answers as from qemu-storage-daemon.

Each scenario is QMP commands and qemu-io on an export, given to both daemons. What differs on
purpose, or between releases of QEMU, is taken out by ``comparable``.
"""

import json
import re
import shutil
import subprocess

import pytest

from tests.support.daemon import DaemonProcess, QmpError
from tests.support.qsd import QsdProcess

SIZE = 1 << 20
SERVER = ("--nbd-server", "addr.type=unix,addr.path=nbd.sock")
#: members of later releases than the peer's, or of the moment
LEFT_OUT = frozenset(("limits", "active", "children", "actual-size"))


@pytest.fixture(autouse=True)
def peers():
    for name in ("qemu-storage-daemon", "qemu-img", "qemu-io"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")


def blockdev(driver, name, **members):
    given = {k.replace("_", "-"): v for k, v in members.items()}
    return "blockdev-add", {"driver": driver, "node-name": name, **given}


def group(name, **limits):
    return "object-add", {
        "qom-type": "throttle-group",
        "id": name,
        "limits": {k.replace("_", "-"): v for k, v in limits.items()},
    }


def export(node):
    given = {"type": "nbd", "id": node, "node-name": node, "name": node, "writable": True}
    return "block-export-add", given


def qemu_io(node, *commands):
    return "qemu-io", {"export": node, "commands": commands}


def comparable(value):
    if isinstance(value, dict):
        grows = value.get("format") in ("file", "blkdebug")  # as the engine allocates
        file = ("format-specific", "virtual-size") if grows else ()
        return {k: comparable(v) for k, v in value.items() if k not in LEFT_OUT and k not in file}
    if isinstance(value, list):
        found = [comparable(v) for v in value]
        nodes = found and isinstance(found[0], dict) and "node-name" in found[0]
        return (
            sorted(
                found,
                key=lambda n: json.dumps((n["node-name"], n["drv"], n["file"]), sort_keys=True),
            )
            if nodes
            else found
        )
    if isinstance(value, str):
        if value.startswith("#block"):
            return "#block"
        if value.startswith("json:"):
            return json.loads(value[5:])
        value = value.replace("therange", "the range")  # a slip of 7.2
        return value.replace("Cannot change 'backing'", "Cannot change frozen 'backing'")
    return value


def edges(graph):
    """(parent, role, child, permissions) of x-debug-query-block-graph, of nodes only.

    Ours may be resized under an export.
    """
    names = {n["id"]: n["name"] for n in graph["nodes"] if n["type"] == "block-driver"}
    return sorted(
        (names[e["parent"]], e["name"], comparable(names[e["child"]]),
         sorted(e["perm"]), sorted({*e["shared-perm"]} - {"resize"}))
        for e in graph["edges"]
        if e["parent"] in names and names[e["parent"]][0] != "#" and e["name"] != "backing"
    )  # fmt: skip


def one(client, directory, name, given):
    if name == "qemu-io":
        words = [w for command in given["commands"] for w in ("-c", command)]
        url = f"nbd+unix:///{given['export']}?socket=nbd.sock"
        done = subprocess.run(
            ["qemu-io", "-f", "raw", "-t", "writeback", *words, url],
            cwd=directory, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        return re.sub(r"ops; .*", "ops", done.stdout), done.returncode
    if name == "file":
        with open(directory / given["name"], "r+b") as file:
            file.seek(given["offset"])
            file.write(given["data"])
        return None
    answer = client(name, **given)
    if name == "query-blockstats":
        return {comparable(s["node-name"]): s.get("driver-specific") for s in answer}
    return edges(answer) if name == "x-debug-query-block-graph" else comparable(answer)


def play(daemon_class, directory, scenario):
    directory.mkdir()
    for name in "abcd":
        (directory / f"{name}.img").write_bytes(bytes(SIZE))
    for name in ("base", "image"):
        backing = ["-b", "base.qcow2", "-F", "qcow2"] if name == "image" else []
        create = ["qemu-img", "create", "-q", "-f", "qcow2", *backing, f"{name}.qcow2", str(SIZE)]
        subprocess.run(create, cwd=directory, check=True, timeout=60)
    found = []
    with daemon_class(directory, *SERVER) as daemon:
        client = daemon.qmp()
        for name, given in scenario:
            try:
                answer = one(client, directory, name, given)
            except QmpError as error:
                answer = f"error: {comparable(str(error))}"
            found.append((name, given, answer))
        names = ("QUORUM_FAILURE", "QUORUM_REPORT_BAD")
        found += [("event", e["event"], e["data"]) for e in client.events if e["event"] in names]
    return found


FILES = [blockdev("file", name, filename=f"{name}.img") for name in "abcd"]
IMAGE = [
    blockdev(
        "qcow2", "image",
        file={"driver": "file", "filename": "image.qcow2"},
        backing={"driver": "qcow2", "node-name": "base",
                 "file": {"driver": "file", "filename": "base.qcow2"}},
    ),
]  # fmt: skip
QUERIES = [
    ("query-blockstats", {"query-nodes": True}),
    ("query-named-block-nodes", {"flat": True}),
    ("x-debug-query-block-graph", {}),
]

SCENARIOS = {
    "throttle groups": [
        group("g0", iops_total=100, iops_read=3),
        group("g1", iops_total=-1),
        group("g2", iops_total=100, iops_total_max=50),
        group("g3", iops_total_max=50),
        group("g4", iops_total=100, iops_total_max_length=5),
        group("g5", iops_total=100, iops_total_max=200, iops_total_max_length=0),
        group("g6", iops_total=2 * 10**15),
        group("g7", iops_size=4096),
        group("g8", iops_total=100, iops_total_max=10**12, iops_total_max_length=10**8),
        group("g9", iops_total=5, iops_total_max=7, iops_total_max_length=5 * 10**9),
        group("h0", bps_total_max=100, bps_write_max=3),
        ("object-add", {"qom-type": "throttle-group", "id": "h1", "x-iops-total": -5}),
        ("object-add", {"qom-type": "throttle-group", "id": "ok", "x-bps-total": 1 << 20}),
        ("qom-get", {"path": "/objects/ok", "property": "limits"}),
        ("qom-get", {"path": "ok", "property": "x-bps-total-max-length"}),
        ("qom-get", {"path": "ok", "property": "ghost"}),
        ("qom-set", {"path": "ok", "property": "x-bps-total", "value": 5}),
        ("qom-set", {"path": "ok", "property": "limits", "value": {"iops-total": 7}}),
        ("qom-set", {"path": "ok", "property": "limits", "value": {"iops-read": 5}}),
        ("qom-set", {"path": "ok", "property": "limits", "value": 5}),
        ("qom-set", {"path": "ok", "property": "limits", "value": {"foo": 5}}),
        ("qom-set", {"path": "ok", "property": "ghost", "value": 5}),
        ("qom-set", {"path": "ok", "property": "type", "value": "x"}),
        ("qom-get", {"path": "ok", "property": "limits"}),
        *FILES,
        blockdev("throttle", "t", throttle_group="ok", file="a"),
        blockdev("throttle", "u", throttle_group="ghost", file="a"),
        blockdev("throttle", "v", file="a"),
        export("t"),
        qemu_io("t", "write -P 3 0 4k", "read -P 3 0 4k", "write -z 4k 4k", "flush"),
        *QUERIES,
    ],
    "filters of a chain": [
        *IMAGE,
        blockdev("copy-on-read", "c0", file="image", bottom="base"),
        blockdev("copy-on-read", "c1", file="image", bottom="ghost"),
        blockdev("copy-on-read", "c2", file="image", bottom="c0"),
        blockdev("copy-on-read", "c3", file="image", bottom="base"),
        blockdev("compress", "z", file="image"),
        blockdev("null-co", "n", size=SIZE, read_zeroes=True),
        blockdev("compress", "y", file="n"),
        blockdev("null-co", "m", latency_ns=-1),
        export("c0"),
        qemu_io("c0", "read -P 0 0 64k", "write -P 7 64k 4k", "read -P 7 64k 4k"),
        *QUERIES,
    ],
    "preallocate": [
        *FILES,
        blockdev("preallocate", "p", file="a"),
        blockdev("preallocate", "q", file="b", prealloc_align=1000),
        blockdev("preallocate", "r", file="b", prealloc_align=4096, prealloc_size=100),
        export("p"),
        qemu_io("p", "write -P 7 64k 4k", "read -P 7 64k 4k"),
        *QUERIES,
    ],
    "blkdebug": [
        *FILES,
        blockdev("blkdebug", "d0", image="a"),
        blockdev("blkdebug", "d1", image="a", align=5),
        blockdev("blkdebug", "d2", image="a", align=512, max_transfer=1000),
        blockdev("blkdebug", "d3", image="a", opt_discard=512, max_discard=1000),
        blockdev("blkdebug", "d4", image="a", config="ghost"),
        blockdev("blkdebug", "d5", image="b", max_transfer=65536, opt_write_zero=512),
        blockdev("blkdebug", "d6", image="c", take_child_perms=["resize"],
                 unshare_child_perms=["write-unchanged"]),
        blockdev("qcow2", "image", file={
            "driver": "blkdebug", "image": {"driver": "file", "filename": "image.qcow2"},
            "inject-error": [
                {"event": "write_aio", "errno": 28, "once": True},
                {"event": "flush_to_disk", "iotype": "flush", "once": True}]}),
        export("d5"),
        export("image"),
        qemu_io("d5", "write -P 7 0 256k", "read -P 7 0 256k"),
        qemu_io("image", "write 0 4k", "write 0 4k", "flush", "flush", "read 0 4k"),
        *QUERIES,
    ],
    "quorum": [
        *FILES,
        blockdev("null-co", "n", size=5 * SIZE),
        blockdev("quorum", "k1", children=["a", "b"], vote_threshold=3),
        blockdev("quorum", "k2", children=[], vote_threshold=1),
        blockdev("quorum", "k3", children=["a", "b"], vote_threshold=0),
        blockdev("quorum", "k4", children=["a", "b"], vote_threshold=1, blkverify=True),
        blockdev("quorum", "k5", children=["a", "b"], vote_threshold=2, blkverify=True,
                 rewrite_corrupted=True),
        blockdev("quorum", "k6", children=["a", "n"], vote_threshold=2),
        blockdev("quorum", "k", children=["a", "b", "c"], vote_threshold=2),
        export("k"),
        qemu_io("k", "write -P 3 0 64k", "write -z 64k 64k", "flush", "read -P 3 0 4k"),
        ("file", {"name": "b.img", "offset": 1000, "data": b"bad"}),
        qemu_io("k", "read -P 3 512 2k"),
        ("file", {"name": "c.img", "offset": 1000, "data": b"worse"}),
        qemu_io("k", "read -P 3 0 4k"),
        ("x-blockdev-change", {"parent": "k", "node": "a"}),
        ("x-blockdev-change", {"parent": "k", "node": "ghost"}),
        ("x-blockdev-change", {"parent": "ghost", "node": "d"}),
        ("x-blockdev-change", {"parent": "k", "child": "children.9"}),
        ("x-blockdev-change", {"parent": "k", "child": "children.1", "node": "d"}),
        ("x-blockdev-change", {"parent": "k"}),
        ("x-blockdev-change", {"parent": "a", "node": "n"}),
        ("x-blockdev-change", {"parent": "k", "node": "d"}),
        *QUERIES,
        ("x-blockdev-change", {"parent": "k", "child": "children.1"}),
        ("x-blockdev-change", {"parent": "k", "child": "children.3"}),
        ("x-blockdev-change", {"parent": "k", "child": "children.0"}),
        *QUERIES,
    ],
    "blkverify and blklogwrites": [
        *FILES[:3],
        blockdev("blkverify", "v", test="a", raw="b"),
        export("v"),
        qemu_io("v", "write -P 3 0 64k", "read -P 3 0 4k", "flush"),
        *(
            blockdev("blklogwrites", f"l{n}", file="c", log={"driver": "file", "filename": "d.img"},
                     **members)
            for n, members in enumerate((
                {"log_sector_size": 100},
                {"log_sector_size": 512, "log_append": True},
                {"log_append": True},
            ))
        ),
        blockdev("blklogwrites", "l", file="c", log={"driver": "file", "filename": "d.img"}),
        export("l"),
        qemu_io("l", "write -P 3 0 4k", "read -P 3 0 4k", "flush"),
        *QUERIES,
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SCENARIOS)
def test_as_qemu(name, tmp_path):
    scenario = SCENARIOS[name]
    theirs = play(QsdProcess, tmp_path / "theirs", scenario)
    ours = play(DaemonProcess, tmp_path / "ours", scenario)
    for their, our in zip(theirs, ours, strict=True):
        assert our == their
