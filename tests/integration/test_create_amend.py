"""New images and new passphrases by jobs: cancelled, failed, refused, beside guests and QEMU."""

import asyncio
import os
from errno import EIO, ENOSPC

import pytest

from liveblockd.errors import BlockError
from liveblockd.formats.luks_new import LuksCreateOptions
from liveblockd.formats.luks_slots import KeyslotState, LuksAmendment
from liveblockd.jobs import creating
from liveblockd.jobs.amending import amend_encryption
from liveblockd.jobs.creating import NewHostFile, NewQcow2, PreallocMode
from liveblockd.jobs.step import Create
from liveblockd.qapi import parse
from liveblockd.qmp.commands.create import BlockdevCreate, blockdev_create
from liveblockd.storage.driver import Permission
from tests.simulation.bench import Bench
from tests.support.qcow2_images import check, needs, run

MIB = 1 << 20
WRITER = Permission.CONSISTENT_READ | Permission.WRITE
SECRETS = {"old": b"swordfish", "new": b"another"}


@pytest.fixture
async def bench():
    made = Bench(secret=SECRETS.__getitem__)
    yield made
    await made.close()


async def start(bench, work, job_id="c"):
    job = Create(job_id, lambda _: work)
    bench.scheduler.create(job)
    await bench.scheduler.start(job)
    return job


async def made(bench, work, job_id="c"):
    job = await start(bench, work, job_id)
    await bench.end(job, "concluded")
    await bench.scheduler.dismiss(job)
    assert (job.offset, job.length) == (1, 1)
    return job.error


def file_options(bench, path):
    return bench.options(driver="file", filename=str(path))


async def test_a_cancelled_creation_leaves_no_file(bench, tmp_path):
    path = tmp_path / "big.raw"
    new = NewHostFile(str(path), 4 << 40, PreallocMode.FULL)
    job = await start(bench, creating.create_file(bench.graph, new))
    async with asyncio.timeout(30):
        while not path.exists() or not path.stat().st_blocks:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    before = asyncio.get_running_loop().time()
    bench.scheduler.cancel(job, force=True)
    await bench.end(job, "concluded")
    assert asyncio.get_running_loop().time() - before < 2
    assert job.error.message == "Operation canceled" and not path.exists()
    assert bench.course("c") == ["created", "running", "aborting", "concluded"]
    assert not bench.graph.nodes


async def test_what_was_there_before_stays_when_it_fails(bench, tmp_path):
    path = tmp_path / "a.raw"
    path.write_bytes(b"x" * 4096)
    error = await made(bench, creating.create_file(bench.graph, NewHostFile(str(path), 1 << 62)))
    assert error.message.startswith("Could not resize file:") and path.exists()
    path.unlink()
    await made(bench, creating.create_file(bench.graph, NewHostFile(str(path), 1 << 62)))
    assert not path.exists()


@pytest.mark.parametrize("code", [ENOSPC, EIO])
async def test_no_space(bench, tmp_path, monkeypatch, code):
    def refuse(fd, offset, length):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    path = tmp_path / "a.raw"
    new = NewHostFile(str(path), MIB, PreallocMode.FALLOC)
    error = await made(bench, creating.create_file(bench.graph, new))
    assert error.message.startswith("Could not preallocate data for the new file: ")
    assert error.errno == code and not path.exists()


@needs("qemu-img")
async def test_an_image_in_use_is_not_overwritten(bench, tmp_path):
    path = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "10M")
    before = path.read_bytes()
    node = await bench.open(driver="qcow2", node_name="disk", file=file_options(bench, path))
    file = node.file
    new = NewHostFile(str(path), 0)
    error = await made(bench, creating.create_file(bench.graph, new))
    assert "lock" in error.message or "in use" in error.message
    work = creating.create_qcow2_image(bench.graph, NewQcow2(file.name, MIB))
    error = await made(bench, work)
    assert error.message.startswith(f"Permission conflict on node '{file.name}'")
    user = await bench.graph.attach(node, WRITER, name="drive0")
    work = creating.create_qcow2_image(bench.graph, NewQcow2("disk", MIB))
    error = await made(bench, work)  # the guest would find its disk gone
    assert error.message.startswith("Permission conflict on node 'disk'")
    assert path.read_bytes() == before
    await bench.graph.detach(user)


async def test_a_node_stays_while_an_image_is_made_in_it(bench, tmp_path):
    path = tmp_path / "disk.qcow2"
    path.touch()
    await bench.open(driver="file", node_name="f", filename=str(path))
    async with creating.place_for_image(bench.graph, "f") as node:
        with pytest.raises(BlockError):
            await bench.graph.delete("f")
        with pytest.raises(BlockError, match="is in use by block job: create"):
            await bench.graph.resize(node, 0)
        with pytest.raises(BlockError):
            async with creating.place_for_image(bench.graph, "f"):
                pass
    await bench.graph.delete("f")


@needs("qemu-img")
async def test_old_contents_do_not_shine_through(bench, tmp_path):
    """Metadata preallocation promises zeros; version 2 has no other way to say so."""
    path = tmp_path / "disk.qcow2"
    path.write_bytes(b"\xee" * (4 * MIB))
    new = NewQcow2(
        file_options(bench, path), MIB, arguments={"preallocation": "metadata", "version": 2}
    )
    assert await made(bench, creating.create_qcow2_image(bench.graph, new)) is None
    assert check(path) == {} and path.stat().st_size < 2 * MIB
    node = await bench.open(driver="qcow2", node_name="disk", file=file_options(bench, path))
    assert not any(bytes(await node.read(0, MIB)))


@needs("qemu-img")
async def test_cancelled_at_any_step_it_is_no_image_or_a_whole_one(bench, tmp_path):
    for turns in range(0, 60, 4):
        path = tmp_path / f"{turns}.qcow2"
        path.touch()
        new = NewQcow2(file_options(bench, path), MIB, arguments={"preallocation": "full"})
        job = await start(bench, creating.create_qcow2_image(bench.graph, new), f"c{turns}")
        for _ in range(turns):
            await asyncio.sleep(0)
        if job.status == "running":
            bench.scheduler.cancel(job, force=True)
        await bench.end(job, "concluded")
        assert not bench.graph.nodes
        if path.read_bytes()[:4] == b"QFI\xfb":
            assert set(check(path)) <= {"leaks"}
        else:
            assert job.error is not None


class TestPassphrases:
    """x-blockdev-amend beside a guest."""

    @needs("qemu-img", "qemu-io")
    async def test_of_a_qcow2_image_in_use(self, bench, tmp_path):
        pytest.importorskip("cryptography")
        path = tmp_path / "disk.qcow2"
        path.touch()
        encrypt = LuksCreateOptions(key_secret="old", iter_time=1)
        new = NewQcow2(file_options(bench, path), 8 * MIB, encrypt=encrypt)
        assert await made(bench, creating.create_qcow2_image(bench.graph, new)) is None
        members = {"encrypt": {"format": "luks", "key-secret": "old"}}
        node = await bench.open(
            driver="qcow2", node_name="disk", file=file_options(bench, path), **members
        )
        user = await bench.graph.attach(node, WRITER, name="drive0")
        stop = False

        async def guest():
            number = 0
            while not stop:
                await user.write(number % 64 * 65536, bytes([number & 0xFF]) * 4096)
                await user.flush()
                number += 1
            return number

        writing = asyncio.create_task(guest())
        add = LuksAmendment(KeyslotState.ACTIVE, new_secret=SECRETS["new"], iter_time=1)
        erase = LuksAmendment(KeyslotState.INACTIVE, old_secret=SECRETS["old"])
        changing = asyncio.create_task(amend_encryption(bench.graph, node, add))
        await asyncio.sleep(0)
        assert node.op_blockers
        await changing
        await amend_encryption(bench.graph, node, erase, secret="new")
        stop = True
        assert await writing > 0 and not node.op_blockers
        last = bytes(await user.read(0, 1))
        await bench.graph.detach(user)
        await bench.graph.delete("disk")
        with pytest.raises(BlockError, match="Invalid password"):
            await bench.open(
                driver="qcow2", node_name="disk", file=file_options(bench, path), **members
            )
        secret = ("--object", f"secret,id=s,data={SECRETS['new'].decode()}")
        image = ("--image-opts", f"driver=qcow2,encrypt.key-secret=s,file.filename={path}")
        run("qemu-img", "check", "-q", *secret, *image)
        shown = run("qemu-io", *secret, "-r", "-c", f"read -P {last[0]} 0 4096", *image)
        assert "Pattern verification failed" not in shown


@pytest.mark.parametrize(
    ("driver", "message"),
    [("raw", "Driver does not support blockdev-create"),
     ("vmdk", "Driver does not support blockdev-create"),
     ("qed", "Block driver 'qed' not found or not supported")],
)  # fmt: skip
async def test_what_is_not_made_is_told_whatever_it_was_to_be(driver, message):
    options = {"driver": driver}
    if driver != "raw":
        options |= {"file": "f", "size": MIB, "subformat": "dynamic"}
    arguments = parse(BlockdevCreate, {"job-id": "c", "options": options})
    with pytest.raises(BlockError) as refused:
        await blockdev_create(None, arguments)
    assert refused.value.message == message
