"""Internal snapshots of disks behind filters, in step with qemu-storage-daemon.

A filter, or a raw node, that stands on one node alone has the snapshots of that; others have none.
"""

import asyncio
import json
import subprocess

import pytest

from liveblockd.errors import BlockError
from liveblockd.graph import internal_snapshot
from liveblockd.storage.driver import Permission
from tests.conformance.test_random_requests_qsd import directories
from tests.simulation.bench import Bench
from tests.support.imagetool import ours, qemu
from tests.support.in_step import InStep

__all__ = ["directories"]

FILTERS = {
    "throttle": {"throttle-group": "g", "file": "d0"},
    "copy-on-read": {"file": "top"},
    "blkdebug": {"image": "d0"},
    "raw": {"file": "d0"},
    "compress": {"file": "d0"},
    "preallocate": {"file": "d0"},
    "copy-before-write": {"file": "d0", "target": "scratch"},
    "blklogwrites": {"file": "d0", "log": "scratch"},
    "blkverify": {"test": "d0", "raw": "scratch"},
    "quorum": {"children": ["d0"], "vote-threshold": 1},
}
STACKED = {"throttle-group": "g", "file": {"driver": "blkdebug", "image": "d0"}}
OPTIONS = (
    *("--object", "throttle-group,id=g,x-iops-total=1000"),
    *("--blockdev", "driver=null-co,node-name=scratch,size=2097152,read-zeroes=on"),
    *("--blockdev", "driver=qcow2,node-name=d0,file.driver=file,file.filename=d0.qcow2"),
    *("--blockdev", "driver=qcow2,node-name=base,file.driver=file,file.filename=base.qcow2"),
    *("--blockdev", "driver=qcow2,node-name=mid,file.driver=file,file.filename=mid.qcow2,"
      "backing=base"),
    *("--blockdev", "driver=qcow2,node-name=top,file.driver=file,file.filename=top.qcow2,"
      "backing=mid"),
)  # fmt: skip


def take(name):
    return {"type": "blockdev-snapshot-internal-sync", "data": {"device": "f", "name": name}}


@pytest.mark.parametrize(
    ("driver", "members"), [*FILTERS.items(), ("throttle", STACKED)], ids=[*FILTERS, "stacked"]
)
def test_taken_and_deleted(driver, members, directories):
    with InStep(*directories, *OPTIONS) as both:
        added = both.do("blockdev-add", driver=driver, node_name="f", **members)
        assert "return" in added, added
        alone = driver not in ("copy-before-write", "blklogwrites", "blkverify", "quorum")
        for name, done in (("one", alone), ("one", False), ("", False)):
            answer = both.do("blockdev-snapshot-internal-sync", device="f", name=name)
            assert ("return" in answer) == done
        both.do("transaction", actions=[take("two")])
        both.do("transaction", actions=[take("three"), {"type": "abort", "data": {}}])
        assert shown(both) == (["one", "two"] if alone else [])
        both.look()
        for given in ({"name": "ghost"}, {"name": "two", "id": "2"}, {"name": "one"}, {}):
            delete(both, **given)
        assert shown(both) == []
        both.do("blockdev-del", node_name="f")
        both.look()


def delete(both, **given):
    answers = [p.do("blockdev-snapshot-delete-internal-sync", device="f", **given)
               for p in both.peers]  # fmt: skip
    for answer in answers:  # when it was taken
        for member in ("date-sec", "date-nsec", "vm-clock-sec", "vm-clock-nsec"):
            answer.get("return", {}).pop(member, None)
    assert answers[0] == answers[1]


def shown(both):
    nodes = {node["node-name"]: node for node in both.ask("query-named-block-nodes")}
    return [snapshot["name"] for snapshot in nodes["f"]["image"].get("snapshots", ())]


async def opened(directory):
    bench = Bench()
    file = {"driver": "file", "filename": str(directory / "d0.qcow2")}
    await bench.open(driver="qcow2", node_name="d0", file=file)
    await bench.open(driver="raw", node_name="f", file="d0")
    return bench


async def test_every_user_of_the_image_stands_still(directories, monkeypatch):
    """A guest of the image itself, too: the snapshot is of one instant."""
    bench = await opened(directories[1])
    used = Permission.CONSISTENT_READ | Permission.WRITE
    guest = await bench.graph.attach(bench.graph.nodes["d0"], used, Permission.ALL)
    await guest.write(0, b"old" * 1024)
    driver = bench.graph.nodes["d0"].driver
    real = driver.create_snapshot

    async def slow(*args, **more):
        write = asyncio.create_task(guest.write(0, b"new" * 1024))
        await asyncio.sleep(0.01)
        assert not write.done()
        await real(*args, **more)
        writes.append(write)

    writes = []
    monkeypatch.setattr(driver, "create_snapshot", slow)
    await internal_snapshot.create(bench.graph, "f", "s")
    await writes[0]
    assert bytes(await guest.read(0, 3)) == b"new"
    await bench.close()
    image = directories[1] / "d0.qcow2"
    copied = directories[1] / "copied.raw"
    convert = ["qemu-img", "convert", "-l", "snapshot.name=s", "-O", "raw", image, copied]
    subprocess.run(convert, check=True, timeout=30)
    assert copied.read_bytes()[:3072] == b"old" * 1024
    subprocess.run(["qemu-img", "check", "-q", image], check=True, timeout=30)


async def test_a_job_on_the_image_below_is_not_met(directories):
    """QEMU looks at the node that is named, alone."""
    bench = await opened(directories[1])
    bench.graph.nodes["d0"].op_blockers.append("a job")
    with pytest.raises(BlockError, match="Node 'd0' is busy: a job"):
        await internal_snapshot.create(bench.graph, "f", "s")
    bench.graph.nodes["d0"].op_blockers.clear()
    await bench.close()


def test_the_image_tool(directories):
    """As ``qemu-img``, which sees through filters as well."""
    for option in (["-c", "s"], ["-c", "t"], ["-a", "s"], ["-d", "s"], ["-d", "s"]):
        answers = []
        for directory, tool in zip(directories, (qemu, ours), strict=True):
            file = {"driver": "file", "filename": str(directory / "d0.qcow2")}
            image = {"driver": "raw", "file": {"driver": "qcow2", "file": file}}
            answers.append(tool("snapshot", *option, "json:" + json.dumps(image)))
        assert answers[0] == answers[1], option
    listed = ours("snapshot", "-l", "json:" + json.dumps(image))
    assert " t " in listed[1]
    assert " s " not in listed[1]
