"""The same requests to qemu-storage-daemon and to liveblockd: the same answers and events.

Answers are compared in their order, events source by source, for how both interleave is no promise.
Afterwards both have to have left the same files, and images of the same content that
``qemu-img check`` finds nothing in.
"""

import difflib
import json
import os
import pprint
import shutil
import subprocess

import pytest

from tests.support.peer import Peer
from tests.support.warm import LIVEBLOCKD

MONITOR = ("--chardev", "socket,id=m,path=qmp.sock,server=on,wait=off", "--monitor", "m")
MIB = 1 << 20


def run(directory, *command):
    return subprocess.run(
        command, cwd=directory, check=True, capture_output=True, text=True, timeout=30
    ).stdout


def disk(directory, name, *writes, size="2M", backing=None):
    based = ("-b", backing, "-F", "qcow2") if backing else ()
    run(directory, "qemu-img", "create", "-q", "-f", "qcow2", *based, name, size)
    commands = [part for write in writes for part in ("-c", f"write -P {write}")]
    if commands:
        run(directory, "qemu-io", "-f", "qcow2", *commands, name)


def make_images(directory):
    directory.mkdir()
    for number in (0, 1):
        disk(directory, f"d{number}.qcow2", f"{number + 1} 0 1M", f"{number + 3} 1M 64k")
        disk(directory, f"t{number}.qcow2")
    disk(directory, "base.qcow2", "5 0 1M")
    disk(directory, "mid.qcow2", "6 512k 256k", backing="base.qcow2")
    disk(directory, "top.qcow2", "7 1M 64k", backing="mid.qcow2")
    return directory


def answers(log):
    """Requests with their answers."""
    return [entry for entry in log if "event" not in entry]


def events(log):
    """Events by what they are about."""
    found = {}
    for entry in log:
        if "event" in entry:
            data = entry["data"]
            if data.get("type") == "mirror":
                del data["len"]  # what is not allocated counts, or not
            source = data.get("id") or data.get("device") or data.get("node-name") or ""
            found.setdefault(source, []).append(entry)
    return found


def left_behind(directory):
    """Files, and what is in those that are images."""
    found = {}
    for path in sorted(directory.iterdir()):
        if path.suffix not in (".qcow2", ".raw", ".img", ".luks"):
            continue
        info = json.loads(run(directory, "qemu-img", "info", "--output=json", path.name))
        if info["format"] == "qcow2":
            run(directory, "qemu-img", "check", "-q", path.name)
        for key in ("actual-size", "dirty-flag", "children", "filename"):
            info.pop(key, None)
        specific = info.get("format-specific", {}).get("data", {})
        specific.pop("encrypt", None)
        specific.get("bitmaps", []).sort(key=lambda bitmap: bitmap["name"])
        for snapshot in info.get("snapshots", ()):
            for key in ("date-sec", "date-nsec", "vm-clock-sec", "vm-clock-nsec"):
                snapshot.pop(key)
        if info["format"] == "luks":
            del info["format-specific"]  # salts, and what the machine can do in a second
        found[path.name] = info
    return found


def same(theirs, ours, before=()):
    """Fails with what differs, line by line."""
    texts = [pprint.pformat(value, width=120).splitlines() for value in (theirs, ours)]
    assert theirs == ours, "\n".join([*map(str, before), *difflib.unified_diff(*texts, n=1)])


@pytest.fixture
def compared(tmp_path, monkeypatch):
    """compared(session, *options): with both, in directories of their own."""
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    for name in ("qemu-img", "qemu-io", "qemu-storage-daemon"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")

    def compare(session, *options):
        logs = []
        directories = []
        programs = (("qemu-storage-daemon",), LIVEBLOCKD)
        for name, program in zip(("theirs", "ours"), programs, strict=True):
            directory = make_images(tmp_path / name)
            with Peer(directory, *program, *options, *MONITOR) as peer:
                session(peer)
            logs.append(peer.log)
            directories.append(directory)
        expected, found = logs
        if "Unable to get accurate CPU usage" in str(expected):
            pytest.skip("QEMU could not measure the processor")
        for number, pair in enumerate(zip(answers(expected), answers(found), strict=False)):
            same(*pair, before=answers(found)[max(0, number - 2) : number])
        assert len(answers(found)) == len(answers(expected))
        same(events(expected), events(found))
        same(*map(left_behind, directories))
        for name, info in left_behind(directories[0]).items():
            pair = [str(directory / name) for directory in directories]
            names = str(info.get("backing-filename")), str(info.get("format-specific"))
            one_place = names[0].startswith("json:") or "data-file" in names[1]
            if "encrypted" not in info and not one_place:
                run(tmp_path, "qemu-img", "compare", "-q", *pair)

    return compare


def blockdev(name, *more):
    file = f"file.driver=file,file.filename={name}.qcow2"
    return ("--blockdev", ",".join(("driver=qcow2", f"node-name={name}", file, *more)))


def export(peer, *names):
    peer.do("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})
    for name in names:
        peer.do("block-export-add", type="nbd", id=f"e-{name}", node_name=name, writable=True)


def act(kind, **data):
    return {"type": kind, "data": {k.replace("_", "-"): v for k, v in data.items()}}


def sync(node, overlay, **data):
    return act(
        "blockdev-snapshot-sync", node_name=node, snapshot_file=f"{overlay}.qcow2",
        snapshot_node_name=overlay, **data,
    )  # fmt: skip


def bitmap(verb, node, name, **data):
    return act(f"block-dirty-bitmap-{verb}", node=node, name=name, **data)


def transact(peer, *actions, **properties):
    peer.do("transaction", actions=list(actions), **properties)
    look(peer)


def look(peer):
    """All nodes, of each what it is and what hangs on it."""
    peer.do("query-named-block-nodes")
    found = []
    for node in peer.log[-1]["return"]:
        named = [b for b in node.get("dirty-bitmaps", ()) if "name" in b]  # jobs have some, too
        bitmaps = sorted(named, key=lambda b: b["name"])
        names = [s["name"] for s in node["image"].get("snapshots", ())]
        keys = ("node-name", "drv", "file", "ro", "backing_file", "backing_file_depth")
        found.append([*(node.get(key) for key in keys), bitmaps, names])
    peer.log[-1] = {"return": sorted(found, key=str)}


def snapshots(peer):
    export(peer, "d0", "d1")
    transact(peer)
    transact(peer, sync("d0", "s0"), sync("d1", "s1"))
    transact(peer, sync("s0", "x0"), sync("d1", "x1"))  # d1 has an overlay
    transact(peer, sync("s0", "y0"), sync("s1", "s1"))  # QEMU 7.2 aborts with two of s0
    transact(peer, sync("s0", "y0"), sync("y0", "z0"))
    transact(peer, sync("s1", "y1", mode="existing"))  # there is no such file
    transact(peer, sync("s1", "y1", format="bogus"))
    transact(peer, sync("s1", "y1", format="raw"))
    peer.do("blockdev-add", driver="qcow2", node_name="over", backing=None,
            file={"driver": "file", "filename": "t0.qcow2"})  # fmt: skip
    transact(peer, act("blockdev-snapshot", node="s1", overlay="over"), act("abort"))
    transact(peer, act("blockdev-snapshot", node="s1", overlay="ghost"))
    transact(peer, act("blockdev-snapshot", node="s1", overlay="over"), sync("over", "last"))


def test_transactions_of_snapshots(compared):
    compared(snapshots, *blockdev("d0"), *blockdev("d1"))


def bitmaps(peer):
    export(peer, "d0")
    transact(peer, bitmap("add", "d0", "a"), bitmap("add", "d0", "b", granularity=4096))
    transact(peer, bitmap("add", "d0", "c"), bitmap("add", "d0", "a"))
    transact(peer, bitmap("disable", "d0", "a"), bitmap("enable", "d0", "b"))
    transact(peer, bitmap("enable", "d0", "a"), bitmap("clear", "d0", "b"), act("abort"))
    transact(peer, bitmap("remove", "d0", "a"), bitmap("clear", "d0", "a"))
    transact(peer, bitmap("remove", "d0", "a"), bitmap("add", "d0", "a"))
    transact(peer, bitmap("remove", "d0", "a"), act("abort"))
    merge = act("block-dirty-bitmap-merge", node="d0", target="all", bitmaps=["a", "b"])
    transact(peer, bitmap("add", "d0", "all", disabled=True, persistent=True), merge)
    transact(peer, bitmap("remove", "d0", "b"), bitmap("remove", "d0", "ghost"))
    transact(peer, bitmap("remove", "d0", "b"), bitmap("add", "d1", "b", persistent=True))
    transact(peer, bitmap("add", "ghost", "b"))
    transact(peer, bitmap("remove", "d0", "all"), act("abort"))
    transact(peer, bitmap("add", "d0", "keep", persistent=True), sync("d0", "s0"))
    transact(peer, bitmap("clear", "d0", "keep"))
    transact(peer, bitmap("remove", "d0", "keep"))


def test_transactions_of_bitmaps(compared):
    compared(bitmaps, *blockdev("d0"), *blockdev("d1"))


def internal(peer):
    def take(device, name):
        return act("blockdev-snapshot-internal-sync", device=device, name=name)

    transact(peer, take("d0", "one"), take("d1", "one"))
    transact(peer, take("d0", "two"), take("d1", "one"))
    transact(peer, take("d0", ""))
    transact(peer, take("d0", "two"), act("abort"))
    transact(peer, take("d0", "two"), sync("d0", "s0"))
    transact(peer, take("ghost", "two"))


def test_transactions_of_internal_snapshots(compared):
    compared(internal, *blockdev("d0"), *blockdev("d1"))


def one_step(peer, command, **arguments):
    """A job that is there until it is dismissed."""
    job_id = f"j{len(peer.log)}"
    if "error" in peer.do(command, job_id=job_id, **arguments):
        return
    peer.until("JOB_STATUS_CHANGE", id=job_id, status="concluded")
    peer.do("query-jobs")
    peer.do("query-block-jobs")
    peer.do("job-dismiss", id=job_id)


def create(peer, driver, **options):
    options = {"driver": driver} | {k.replace("_", "-"): v for k, v in options.items()}
    one_step(peer, "blockdev-create", options=options)


def create_files(peer):
    create(peer, "file", filename="a.raw", size=MIB)
    create(peer, "file", filename="a.raw", size=100)
    create(peer, "file", filename="b.raw", size=MIB, preallocation="falloc", nocow=True)
    create(peer, "file", filename="c.raw", size=MIB, preallocation="full")
    create(peer, "file", filename="c.raw", size=MIB, preallocation="x")
    create(peer, "file", filename="b.raw", size=MIB, preallocation="metadata")
    create(peer, "file", filename="b.raw", size=1 << 62)
    create(peer, "file", filename="b.raw", size=3 * MIB, extent_size_hint=1 << 16)
    create(peer, "file", filename="b.raw", size=MIB, extent_size_hint=1 << 33)
    create(peer, "file", filename="/", size=MIB)
    create(peer, "file", filename="no/where", size=MIB)
    create(peer, "file", filename="b.raw")
    for driver in ("null-co", "raw", "nbd", "throttle", "host_device", "nosuch"):
        create(peer, driver)
    peer.do("blockdev-create", job_id="1", options={"driver": "null-co"})
    peer.do("blockdev-create", options={"driver": "null-co"})


def test_blockdev_create_of_files(compared):
    compared(create_files)


REFUSED = (
    {"size": (1 << 63) - 512}, {"size": 1 << 62}, {"size": 100}, {"version": "v4"},
    {"version": "v2", "lazy_refcounts": True}, {"version": "v2", "refcount_bits": 8},
    {"version": "v2", "extended_l2": True}, {"version": "v2", "compression_type": "zstd"},
    {"version": "v2", "data_file": "data"}, {"refcount_bits": 3}, {"refcount_bits": 128},
    {"refcount_bits": 0}, {"cluster_size": 256}, {"cluster_size": 4 << 20}, {"cluster_size": 0},
    {"cluster_size": 5000}, {"cluster_size": 8192, "extended_l2": True},
    {"compression_type": "lzo"}, {"backing_fmt": "qcow2"}, {"backing_fmt": "nosuch"},
    {"backing_file": "x" * 1100, "backing_fmt": "raw"},
    {"backing_file": "b", "backing_fmt": "raw", "preallocation": "metadata"},
    {"preallocation": "x"}, {"data_file": "ghost"}, {"data_file_raw": True},
    {"data_file": "data", "data_file_raw": True, "backing_file": "b", "backing_fmt": "raw"},
    {"encrypt": {"format": "luks"}}, {"encrypt": {"format": "luks", "key-secret": "ghost"}},
    {"encrypt": {"format": "x"}}, {"encrypt": {}}, {"file": "ghost"}, {"file": 1},
    {"file": {"driver": "file", "filename": "nosuch.img"}}, {"nosuch": 1},
)  # fmt: skip

MADE = (
    {}, {"size": 0}, {"size": 5 << 40}, {"version": "v2"}, {"refcount_bits": 1},
    {"refcount_bits": 64, "lazy_refcounts": True}, {"cluster_size": 512},
    {"cluster_size": 2 << 20}, {"extended_l2": True}, {"compression_type": "zstd"},
    {"backing_file": "base.qcow2"}, {"backing_file": "base.qcow2", "backing_fmt": "qcow2"},
    {"preallocation": "off"}, {"preallocation": "metadata"}, {"preallocation": "falloc"},
    {"preallocation": "full"}, {"size": 3 << 20, "cluster_size": 4096, "preallocation": "full"},
    {"backing_file": "base.qcow2", "backing_fmt": "qcow2", "preallocation": "full",
     "extended_l2": True}, {"data_file": "data"}, {"data_file": "data", "data_file_raw": True},
)  # fmt: skip


def create_images(peer):
    for name in ("data.raw", "used.qcow2", "again.qcow2"):
        create(peer, "file", filename=name, size=0)
    peer.do("blockdev-add", driver="file", node_name="data", filename="data.raw")
    peer.do("blockdev-add", driver="file", node_name="again", filename="again.qcow2")
    for options in REFUSED:
        create(peer, "qcow2", **{"file": "again", "size": MIB} | options)
    for number, options in enumerate(MADE):
        create(peer, "file", filename=f"n{number}.qcow2", size=0)
        file = {"driver": "file", "filename": f"n{number}.qcow2"}
        create(peer, "qcow2", **{"file": file, "size": MIB} | options)
    for options in MADE[:-2]:
        if "preallocation" in options:
            continue  # QEMU refuses some of these, for the file is longer
        create(peer, "qcow2", **{"file": "again", "size": MIB} | options)
    peer.do("blockdev-add", driver="file", node_name="file", filename="used.qcow2")
    create(peer, "qcow2", file="file", size=MIB)
    peer.do("blockdev-add", driver="qcow2", node_name="used", file="file")
    create(peer, "qcow2", file="file", size=2 * MIB)
    create(peer, "qcow2", file="used", size=MIB // 2)
    create(peer, "qcow2", file="used", size=MIB // 2, preallocation="metadata")
    look(peer)


def test_blockdev_create_of_qcow2_images(compared):
    compared(create_images)


def amend(peer, node, driver, *, force=False, **options):
    options = {"driver": driver} | {k.replace("_", "-"): v for k, v in options.items()}
    one_step(peer, "x-blockdev-amend", node_name=node, options=options, force=force)


def amend_slots(peer):
    create(peer, "file", filename="l.luks", size=0)
    file = {"driver": "file", "filename": "l.luks"}
    create(peer, "luks", file=file, size=MIB, key_secret="ghost")
    create(peer, "luks", file=file, size=MIB)
    create(peer, "luks", file="ghost", size=MIB, key_secret="s0")
    create(peer, "luks", file=file, size=MIB, key_secret="s0", iter_time=20)
    peer.do("blockdev-add", driver="luks", node_name="l", file=file, key_secret="s0")
    amend(peer, "ghost", "qcow2")
    amend(peer, "d0", "qcow2")
    amend(peer, "d0", "luks", state="active")
    amend(peer, "d0", "luks")
    amend(peer, "d0", "file")
    amend(peer, "d0", "qcow2", encrypt={"format": "luks", "state": "active", "new-secret": "s1"})
    amend(peer, "d0", "qcow2", encrypt={"format": "qcow"})
    amend(peer, "l", "qcow2")
    amend(peer, "l", "luks", state="active")
    amend(peer, "l", "luks", state="active", new_secret="ghost")
    amend(peer, "l", "luks", state="active", new_secret="s1", iter_time=20)
    amend(peer, "l", "luks", state="active", new_secret="s1", keyslot=0, iter_time=20)
    amend(peer, "l", "luks", state="active", new_secret="s1", keyslot=9)
    amend(peer, "l", "luks", state="inactive")
    amend(peer, "l", "luks", state="inactive", old_secret="s1")
    amend(peer, "l", "luks", state="inactive", keyslot=0)
    amend(peer, "l", "luks", state="inactive", keyslot=3)
    amend(peer, "l", "luks", state="inactive", old_secret="s1")
    amend(peer, "l", "luks", state="inactive", new_secret="s1")
    amend(peer, "l", "luks", state="inactive", iter_time=3)
    amend(peer, "l", "luks", state="active", new_secret="s1", secret="s1", iter_time=20)


@pytest.mark.slow  # QEMU measures the processor for a second with each passphrase
def test_blockdev_amend(compared):
    pytest.importorskip("cryptography")
    secrets = [f"secret,id=s{n},data=geheim{n}" for n in (0, 1)]
    compared(amend_slots, *blockdev("d0"), "--object", secrets[0], "--object", secrets[1])


CHAIN = (
    *blockdev("base", "read-only=on"),
    *blockdev("mid", "read-only=on", "backing=base"),
    *blockdev("top", "backing=mid"),
)


def ended(peer, job_id):
    peer.until("JOB_STATUS_CHANGE", id=job_id, status="null")
    look(peer)


def streams(peer):
    export(peer, "top")
    peer.do("block-stream", device="top", job_id="s", base_node="ghost")
    peer.do("block-stream", device="top", job_id="s", base="base.qcow2", base_node="base")
    peer.do("block-stream", device="top", job_id="s0", base_node="base")
    ended(peer, "s0")
    peer.do("block-stream", device="top", job_id="s1", auto_finalize=False, auto_dismiss=False)
    peer.until("BLOCK_JOB_PENDING", id="s1")
    peer.do("job-finalize", id="s1")
    peer.do("query-jobs")
    peer.do("job-dismiss", id="s1")
    look(peer)


def commits(peer):
    export(peer, "top")
    peer.do("block-commit", device="top", job_id="c", top_node="mid", base_node="ghost")
    peer.do("block-commit", device="top", job_id="c", top_node="mid", base_node="top")
    peer.do("block-commit", device="top", job_id="c0", top_node="mid", base_node="base")
    ended(peer, "c0")
    peer.do("blockdev-del", node_name="mid")  # QEMU would write to its backing node all the same
    peer.do("block-commit", device="top", job_id="c1")
    peer.until("BLOCK_JOB_READY", device="c1")
    peer.do("job-complete", id="c1")
    ended(peer, "c1")


def mirrors(peer):
    export(peer, "d0")
    for name in ("t0", "t1"):
        peer.do("blockdev-add", driver="qcow2", node_name=name,
                file={"driver": "file", "filename": f"{name}.qcow2"})  # fmt: skip
    peer.do("blockdev-mirror", device="d0", target="ghost", sync="full", job_id="m")
    peer.do("blockdev-mirror", device="d0", target="d0", sync="full", job_id="m")
    peer.do("blockdev-mirror", device="d0", target="t0", sync="incremental", job_id="m")
    peer.do("blockdev-mirror", device="d0", target="t0", sync="full", job_id="m0")
    peer.until("BLOCK_JOB_READY", device="m0")
    peer.do("block-job-cancel", device="m0")
    ended(peer, "m0")
    peer.do("blockdev-mirror", device="d0", target="t1", sync="full", job_id="m1",
            copy_mode="write-blocking")  # fmt: skip
    peer.until("BLOCK_JOB_READY", device="m1")
    peer.do("job-complete", id="m1")
    ended(peer, "m1")


def backups(peer):
    export(peer, "d0", "d1")
    for name in ("t0", "t1"):
        peer.do("blockdev-add", driver="qcow2", node_name=name,
                file={"driver": "file", "filename": f"{name}.qcow2"})  # fmt: skip

    def backup(number, **data):
        data = {"device": f"d{number}", "target": f"t{number}", "sync": "full"} | data
        return act("blockdev-backup", **{"job_id": f"b{number}"} | data)

    transact(peer, backup(0), act("abort"))
    transact(peer, backup(0), backup(1, target="ghost"))
    transact(peer, backup(0), backup(0))
    transact(peer, backup(0, sync="incremental"))
    peer.do("transaction", actions=[
        backup(0, job_id="x0"), backup(1, job_id="x1"), bitmap("add", "d0", "b"),
    ])  # fmt: skip
    peer.until("JOB_STATUS_CHANGE", id="x0", status="null")
    ended(peer, "x1")


def test_streams(compared):
    compared(streams, *CHAIN)


def test_commits(compared):
    compared(commits, *CHAIN)


def test_mirrors(compared):
    compared(mirrors, *blockdev("d0"))


def test_transactions_with_backups(compared):
    compared(backups, *blockdev("d0"), *blockdev("d1"))


def bad_arguments(peer):
    peer.do("transaction")
    peer.do("transaction", actions={})
    peer.do("transaction", actions=[{}])
    peer.do("transaction", actions=[{"type": "abort"}])
    peer.do("transaction", actions=[{"type": "abort", "data": {"x": 1}}])
    peer.do("transaction", actions=[{"type": "abort", "data": {}, "x": 1}])
    peer.do("transaction", actions=[{"type": 1, "data": {}}])
    peer.do("transaction", actions=[act("abort")], properties={"completion-mode": "x"})
    peer.do("transaction", actions=[act("abort")], properties={"completion-mode": "individual"})
    peer.do("transaction", actions=[], properties={"completion-mode": "grouped"})
    peer.do("transaction", actions=[], properties={})


def test_arguments_of_transaction(compared):
    compared(bad_arguments)
