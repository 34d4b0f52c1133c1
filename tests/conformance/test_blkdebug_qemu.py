"""blkdebug under the qcow2 engine: the same request fails at the same event as in QEMU."""

import asyncio
import json
import shutil
import subprocess

import pytest

from liveblockd.errors import BlockError
from liveblockd.storage.driver import Permission
from tests.simulation.bench import Bench
from tests.support.qcow2_images import needs, run

pytestmark = needs("qemu-img", "qemu-io")

KIB = 1024
NAMES = """
    l1_update l1_grow_alloc_table l2_load l2_update l2_alloc_cow_read l2_alloc_write read_aio
    read_backing_aio read_compressed write_aio write_compressed cow_read cow_write reftable_load
    reftable_grow reftable_update refblock_load refblock_update_part refblock_alloc
    refblock_alloc_hookup refblock_alloc_write cluster_alloc cluster_alloc_bytes cluster_free
    flush_to_os flush_to_disk pwritev pwritev_zero pwritev_done pwritev_rmw_head
    empty_image_prepare none
"""
#: of steps that need other images
GROWTH = """
    l1_update l1_grow_alloc_table l1_grow_write_table l1_grow_activate_table l2_alloc_cow_read
    l2_alloc_write reftable_grow refblock_alloc refblock_alloc_hookup refblock_alloc_write
    refblock_alloc_write_blocks refblock_alloc_write_table refblock_alloc_switch_table cluster_alloc
    cluster_free
"""

#: of qemu-io, with what the image holds there in the remarks
REQUESTS = [
    "read 0 64k",  # data
    "read 512k 64k",  # of the backing image
    "read 640k 64k",  # compressed
    "write 0 64k",  # in place
    "write 256k 64k",  # nothing
    "write 320k 512",  # the backing image has data there
    "write 641k 512",  # compressed
    "write -c 576k 64k",
    "write -z 0 64k",
    "discard 0 64k",
    "flush",
    "write 0 64k; flush",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    place = tmp_path_factory.mktemp("images")
    base, top = place / "base.qcow2", place / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", base, "4M")
    run("qemu-io", "-c", "write -P 1 320k 256k", base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    run("qemu-io", "-c", "write -P 2 0 64k", "-c", "write -c -P 3 640k 64k", top)
    return top


def options(path, rules):
    return {
        "driver": "raw" if "align" in rules else "qcow2",
        "discard": "unmap",
        "file": {
            "driver": "blkdebug",
            "image": {"driver": "file", "filename": str(path)},
            **rules,
        },
    }


def qemu_says(path, rules, request):
    """Whether a part of the request fails."""
    words = [word for part in request.split("; ") for word in ("-c", part)]
    done = subprocess.run(
        ["qemu-io", "-t", "writeback", *words, "json:" + json.dumps(options(path, rules))],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    # How the closing of the image ended is not in the exit status.
    return "not opened" if "can't open" in done.stderr else done.returncode != 0


async def we_say(path, rules, request):
    bench = Bench()
    try:
        node = await bench.open(node_name="n", **options(path, rules))
    except BlockError:
        await bench.close()
        return "not opened"
    user = await bench.graph.attach(node, Permission.CONSISTENT_READ | Permission.WRITE)
    failed = False
    for part in request.split("; "):
        words = part.split()
        flags = [word for word in words[1:] if word.startswith("-")]
        sizes = [_bytes(word) for word in words[1:] if not word.startswith("-")]
        offset, length = [0, 0, *sizes][-2:]
        try:
            if words[0] == "read":
                await user.read(offset, length)
            elif words[0] == "flush":
                await user.flush()
            elif words[0] == "truncate":
                await bench.graph.resize(node, length)
            elif words[0] == "discard":
                await user.discard(offset, length)
            elif "-z" in flags:
                await user.write_zeroes(offset, length)
            elif "-c" in flags:
                await user.write_compressed(offset, b"\xcd" * length)
            else:
                await user.write(offset, b"\xcd" * length)
        except (OSError, BlockError):
            failed = True
    await bench.graph.detach(user)
    await bench.close()
    return failed


def _bytes(word):
    return int(word.rstrip("kMG")) * {"k": KIB, "M": KIB**2, "G": KIB**3}.get(word[-1], 1)


async def compare(images, tmp_path, rules, requests=REQUESTS):
    answers = {}
    for request in requests:
        for who, says in (("qemu", qemu_says), ("we", we_say)):
            path = tmp_path / f"{who}.qcow2"
            shutil.copy(images, path)
            answer = says(path, rules, request)
            answers.setdefault(who, {})[request] = await answer if who == "we" else answer
    return answers


@pytest.mark.parametrize("event", NAMES.split())
async def test_where_requests_fail(event, images, tmp_path):
    answers = await compare(images, tmp_path, {"inject-error": [{"event": event}]})
    assert answers["we"] == answers["qemu"]


@pytest.mark.parametrize("rules", [
    {"inject-error": [{"event": "write_aio", "immediately": True, "once": True}]},
    {"inject-error": [{"event": "read_aio", "sector": 3}]},
    {"inject-error": [{"event": "none", "iotype": "write"}]},
    {"inject-error": [{"event": "none", "iotype": "flush"}]},
    {"inject-error": [{"event": "none", "iotype": "discard"}]},
    {"inject-error": [{"event": "flush_to_disk", "state": 2}],
     "set-state": [{"event": "write_aio", "new_state": 2}]},
    {"inject-error": [{"event": "pwritev", "state": 2}],
     "set-state": [{"event": "cow_read", "new_state": 2}]},
])  # fmt: skip
async def test_rules(rules, images, tmp_path):
    answers = await compare(images, tmp_path, rules)
    assert answers["we"] == answers["qemu"]


@pytest.fixture(scope="module")
def growing(tmp_path_factory):
    """Images whose next write makes tables: of the disk, of refcounts, of one with a snapshot."""
    place = tmp_path_factory.mktemp("growing")
    disk, blocks, shared = (place / f"{name}.qcow2" for name in ("disk", "blocks", "shared"))
    run("qemu-img", "create", "-q", "-f", "qcow2", disk, "2G")
    run("qemu-io", "-c", "write 0 64k", disk)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", blocks, "64M")
    shutil.copy(disk, shared)
    run("qemu-img", "snapshot", "-c", "s", shared)
    table = place / "table.qcow2"  # its refcount table is all but full
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", table, "64M")
    run("qemu-io", "-c", "write 0 7900k", table)
    return {
        table: ["write 7900k 300k; flush"],
        disk: ["write 1000M 64k; flush", "truncate 8G", "discard 0 64k; flush"],
        blocks: ["write 0 1M; flush"],
        shared: ["write 64k 64k; flush", "discard 0 64k; flush"],
    }


@pytest.mark.parametrize("event", GROWTH.split())
async def test_steps_that_make_tables(event, growing, tmp_path):
    for image, requests in growing.items():
        if event == "refblock_alloc_hookup" and image.stem == "table":
            continue  # where the last block of the old table lies is everybody's own affair
        answers = await compare(image, tmp_path, {"inject-error": [{"event": event}]}, requests)
        assert answers["we"] == answers["qemu"], image.name


@pytest.mark.parametrize("event", GROWTH.split())
async def test_states_after_steps(event, images, tmp_path):
    """The step itself does not fail, a flush after it does."""
    rules = {"inject-error": [{"event": "flush_to_disk", "state": 2}],
             "set-state": [{"event": event, "new_state": 2}]}  # fmt: skip
    requests = ["discard 0 64k; flush", "write 640k 64k; flush", "write -z 0 64k; flush"]
    answers = await compare(images, tmp_path, rules, requests)
    assert answers["we"] == answers["qemu"]


@pytest.mark.parametrize("event", [
    "pwritev_rmw_head", "pwritev_rmw_after_head", "pwritev_rmw_tail", "pwritev_rmw_after_tail"
])  # fmt: skip
async def test_parts_of_blocks(event, tmp_path_factory, tmp_path):
    image = tmp_path_factory.mktemp("raw") / "disk.raw"
    run("qemu-img", "create", "-q", "-f", "raw", image, "1M")
    rules = {"inject-error": [{"event": event}], "align": 4096}
    requests = ["write 0 4k", "write 512 512", "write 0 512", "write 3584 512", "write 512 8k",
                "write 512 3584", "write 0 4608", "write 3584 1k", "write 512 64k"]  # fmt: skip
    answers = await compare(image, tmp_path, rules, requests)
    assert answers["we"] == answers["qemu"]


async def test_a_copy_on_write_stands_at_a_breakpoint(images, tmp_path):
    """The cluster is there when it goes on, and other requests pass it by meanwhile."""
    path = tmp_path / "top.qcow2"
    shutil.copy(images, path)
    bench = Bench()
    node = await bench.open(node_name="n", **options(path, {}))
    user = await bench.graph.attach(node, Permission.CONSISTENT_READ | Permission.WRITE)
    blkdebug = node.file.driver
    blkdebug.suspend("cow_write", "A")
    write = asyncio.create_task(user.write(320 * KIB, b"\xcd" * 512))
    async with asyncio.timeout(10):
        while not blkdebug.is_suspended("A"):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert bytes(await user.read(320 * KIB, 1024)) == b"\x01" * 1024
        await user.write(0, b"\xce" * 512)
        assert not write.done()
        blkdebug.resume("A")
        await write
    assert bytes(await user.read(320 * KIB, 1024)) == b"\xcd" * 512 + b"\x01" * 512
    await bench.graph.detach(user)
    await bench.close()
    run("qemu-img", "check", "-q", path)
