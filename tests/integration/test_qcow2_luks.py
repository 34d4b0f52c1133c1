"""LUKS in qcow2: images of qemu-img used here and the other way round, also in the daemon."""

from __future__ import annotations

import asyncio
import random
import subprocess
from pathlib import Path

import pytest

from liveblockd.errors import BlockError
from liveblockd.formats.luks import new_luks
from liveblockd.formats.qcow2.image import Qcow2
from liveblockd.formats.qcow2.options import Qcow2Options
from liveblockd.formats.qcow2.preallocate import Preallocation
from liveblockd.qapi import parse
from liveblockd.storage.registry import Environment
from tests.support.begun import begin, write_as_export
from tests.support.daemon import DaemonProcess, QmpError
from tests.support.memory import Gate, MemoryDriver
from tests.support.patience import until
from tests.support.qcow2_images import check as check_plain
from tests.support.qcow2_images import needs, new_qcow2, run
from tests.support.workers import InlineWorkers

pytest.importorskip("cryptography")
pytestmark = needs("qemu-img", "qemu-io")
K = 1024
SECRET = "secret,id=s,data=swordfish"
CIPHERS = [
    ("aes-256", "xts", "plain64", "sha512"),
    ("aes-128", "cbc", "essiv", "sha1"),
    ("aes-128", "cbc", "plain", "sha256"),
]
#: qemu-img measures the processor for seconds before it makes one: two of them each time
MADE_BY_QEMU = [0, 1, pytest.param(2, marks=pytest.mark.slow)]


def spec(path: Path) -> str:
    return f"driver=qcow2,file.filename={path},encrypt.key-secret=s"


def create(path: Path, size: int, *, cluster: int = 64, **cipher: str) -> None:
    names = {k.replace("_", "-"): v for k, v in cipher.items()}
    options = ["encrypt.format=luks", "encrypt.key-secret=s", "encrypt.iter-time=10"]
    options += [f"encrypt.{name}={value}" for name, value in names.items()]
    options.append(f"cluster_size={cluster}k")
    command = ["qemu-img", "create", "-q", "--object", SECRET, "-f", "qcow2", "-o",
               ",".join(options), str(path), str(size)]  # fmt: skip
    for _ in range(8):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if "accurate CPU usage" not in done.stderr:  # of its clock, on a busy machine
            break
    assert done.returncode == 0, done.stderr


def by_qemu(path: Path, *commands: str) -> str:
    arguments = [a for c in commands for a in ("-c", c)]
    return run("qemu-io", "--object", SECRET, *arguments, "--image-opts", spec(path))


def check(path: Path) -> None:
    run("qemu-img", "check", "--object", SECRET, "--image-opts", spec(path))


def content(path: Path) -> bytes:
    raw = path.with_suffix(".content")
    run("qemu-img", "convert", "--object", SECRET, "--image-opts", spec(path), "-O", "raw", raw)
    return raw.read_bytes()


async def open_luks(file: MemoryDriver, password: bytes = b"swordfish", backing=None, **more):
    options = parse(
        Qcow2Options,
        {"driver": "qcow2", "file": "f", "discard": "unmap",
         "encrypt": {"format": "luks", "key-secret": "s"}, **more},
    )  # fmt: skip
    children = {"file": file}
    environment = Environment(InlineWorkers(), secret=lambda name: password)
    image = await Qcow2.open(options, children, environment, autosync=None)
    if backing is not None:
        children["backing"] = backing
    return image


async def use(image: Qcow2, disk: bytearray, rng: random.Random, count: int = 40) -> None:
    """Random requests, also of parts of sectors."""
    size = len(disk)
    for _ in range(count):
        offset = rng.randrange(size)
        length = min(size - offset, rng.choice((1, 100, 512, 4096, 70000, 200000)))
        what = rng.choice(("write", "write", "aligned", "zero", "discard"))
        if what == "aligned":
            offset, length = offset // 512 * 512, -(-length // 512) * 512
            length = min(size - offset, length)
        if what in ("write", "aligned"):
            data = rng.randbytes(length)
            await write_as_export(image, offset, data)
            disk[offset : offset + length] = data
        elif what == "zero":
            await image.write_zeroes(offset, length, may_unmap=rng.random() < 0.5)
            disk[offset : offset + length] = bytes(length)
        else:
            await image.discard(offset, length)
            disk[offset : offset + length] = await image.read(offset, length)
        found = image.read_nowait(offset, length)
        if found is None:
            found = await image.read(offset, length)
        assert bytes(found) == disk[offset : offset + length]


@pytest.mark.parametrize("seed", MADE_BY_QEMU)
async def test_images_of_qemu(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    alg, mode, ivgen, hash_alg = CIPHERS[seed]
    path, size = tmp_path / "i.qcow2", 900 * K
    cluster = rng.choice((4, 64, 256))
    more = {"ivgen_hash_alg": "sha256"} if ivgen == "essiv" else {}
    create(path, size, cluster=cluster, cipher_alg=alg, cipher_mode=mode, ivgen_alg=ivgen,
           hash_alg=hash_alg, **more)  # fmt: skip
    by_qemu(path, "write -P 7 0 100k", "write -P 9 300k 5k", "write -z 20k 30k")
    disk = bytearray(content(path))
    assert disk[0] == 7 and disk[300 * K] == 9
    file = MemoryDriver.of(path.read_bytes())
    image = await open_luks(file)
    assert bytes(await image.read(0, size)) == disk
    await use(image, disk, rng)
    await image.close()
    path.write_bytes(file.content())
    assert content(path) == disk
    check(path)
    again = await open_luks(file)
    assert bytes(await again.read(0, size)) == disk
    await again.close()


@pytest.mark.parametrize("version", [2, 3])
async def test_images_of_ours(tmp_path: Path, version: int) -> None:
    rng = random.Random(version)
    size = 700 * K
    header = new_luks(b"swordfish", iter_time=10)
    below = rng.randbytes(size)
    file = await new_qcow2(size=size, version=version, crypto_header=header)
    path = tmp_path / "o.qcow2"
    image = await open_luks(file, backing=MemoryDriver.of(below, read_only=True))
    disk = bytearray(below)
    await use(image, disk, rng, 20)
    await image.populate(0, below)
    image.children.pop("backing")
    assert bytes(await image.read(0, size)) == disk
    assert image.data_host_file() is None
    await image.close()
    path.write_bytes(file.content())
    assert content(path) == disk
    check(path)
    assert below[:512] not in file.content()


async def test_what_is_refused(tmp_path: Path) -> None:
    file = await new_qcow2(size=64 * K, crypto_header=new_luks(b"swordfish", iter_time=1))
    with pytest.raises(BlockError, match="Invalid password, cannot unlock any keyslot"):
        await open_luks(file, b"wrong")
    with pytest.raises(BlockError, match=r"'encrypt\.key-secret' is required for cipher"):
        await open_luks(file, encrypt={"format": "luks"})
    with pytest.raises(BlockError, match="Header reported 'luks' encryption format but options"):
        await open_luks(file, encrypt={"format": "aes", "key-secret": "s"})
    plain = await new_qcow2(size=64 * K)
    with pytest.raises(BlockError, match="No encryption in image header, but options specified"):
        await open_luks(plain)


def add(qmp, node: str, name: str, **more) -> None:
    qmp("blockdev-add", driver="qcow2", node_name=node,
        file={"driver": "file", "filename": name}, **more)  # fmt: skip


def stream(qmp, node: str) -> None:
    qmp.events.clear()
    qmp("block-stream", job_id="job", device=node, auto_dismiss=False)
    qmp.wait("JOB_STATUS_CHANGE", id="job", status="concluded")
    job = next(j for j in qmp("query-jobs") if j["id"] == "job")
    assert "error" not in job, job
    qmp("job-dismiss", id="job")


async def test_stream_into_and_out_of_an_encrypted_image(tmp_path: Path) -> None:
    expected = random.Random(1).randbytes(3 << 20)
    (tmp_path / "base.raw").write_bytes(expected)
    mid, top = tmp_path / "mid.qcow2", tmp_path / "top.qcow2"
    file = await new_qcow2(
        size=3 << 20, crypto_header=new_luks(b"swordfish", iter_time=10),
        backing_file=str(tmp_path / "base.raw"), backing_format="raw",
    )  # fmt: skip
    mid.write_bytes(file.content())
    subprocess.run(["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "mid.qcow2", "-F",
                    "qcow2", "top.qcow2", "3M"], cwd=tmp_path, check=True, timeout=60)  # fmt: skip
    encrypt = {"format": "luks", "key-secret": "s"}
    with DaemonProcess(tmp_path) as daemon:
        qmp = daemon.qmp()
        with pytest.raises(QmpError, match="No secret with id 's'"):
            add(qmp, "mid", "mid.qcow2", encrypt=encrypt)
        qmp("object-add", qom_type="secret", id="wrong", data="x")
        with pytest.raises(QmpError, match="Invalid password, cannot unlock any keyslot"):
            add(qmp, "mid", "mid.qcow2", encrypt={"format": "luks", "key-secret": "wrong"})
        qmp("object-add", qom_type="secret", id="s", data="c3dvcmRmaXNo", format="base64")
        add(qmp, "mid", "mid.qcow2", encrypt=encrypt)
        nodes = {n["node-name"]: n for n in qmp("query-named-block-nodes", flat=True)}
        assert nodes["mid"]["encrypted"] and nodes["mid"]["image"]["encrypted"]
        stream(qmp, "mid")
        add(qmp, "top", "top.qcow2", backing="mid")
        stream(qmp, "top")
        qmp("blockdev-del", node_name="top")
        qmp("blockdev-del", node_name="mid")
    assert content(mid) == expected
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", top, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == expected
    assert check_plain(top) == {}
    check(mid)
    assert expected[:4096] not in mid.read_bytes()


async def test_parts_of_one_sector_at_the_same_time() -> None:
    """Neither undoes the other, whether the other one is whole sectors or not."""
    file = await new_qcow2(size=64 * K, crypto_header=new_luks(b"swordfish", iter_time=1))
    image = await open_luks(file)
    await image.write(0, bytes(64 * K))
    file.nowait = False

    async def slow() -> None:
        await asyncio.sleep(0.005)

    file.hook = lambda op, offset, length: slow()
    await asyncio.gather(*(image.write(n * 50, bytes([n + 1]) * 50) for n in range(40)))
    file.hook, file.nowait = None, True
    expected = b"".join(bytes([n + 1]) * 50 for n in range(40))
    assert bytes(await image.read(0, 2000)) == expected
    await image.close()


async def test_whole_sectors_are_begun_and_parts_of_them_wait() -> None:
    file = await new_qcow2(size=64 * K, crypto_header=new_luks(b"swordfish", iter_time=1))
    image = await open_luks(file)
    await image.write(0, bytes(64 * K))
    file.nowait, file.begins = False, True
    assert not await begin(image, 100, b"x" * 512), "a part of a sector"
    gate = file.hook = Gate("write")
    begun = asyncio.create_task(begin(image, 4096, b"a" * 1024))
    await until(lambda: gate.waiting)
    part = asyncio.create_task(image.write(4096 + 100, b"b" * 50))
    await asyncio.sleep(0.01)
    assert gate.waiting == 1, "the other one reads the sector after the first one has written it"
    refused = asyncio.wait_for(begin(image, 8192, b"c" * 512), 30)
    assert not await refused, "parts of sectors go first"
    gate.open()
    assert await begun
    await part
    expected = bytearray(b"a" * 1024)
    expected[100:150] = b"b" * 50
    assert bytes(await image.read(4096, 1024)) == expected
    assert await begin(image, 8192, b"c" * 512)
    assert file.begun == 2
    assert b"c" * 64 not in file.content() and b"a" * 64 not in file.content()
    await image.close()


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
async def test_preallocated_images_are_no_noise(tmp_path: Path, mode: str, extended: bool) -> None:
    """Clusters that nobody has encrypted read as zeros; QEMU makes images in which they do not."""
    path, size = tmp_path / "p.qcow2", 700 * K
    header = new_luks(b"swordfish", iter_time=1)
    file = await new_qcow2(
        size=size, crypto_header=header, preallocation=mode, extended_l2=extended
    )
    path.write_bytes(file.content())
    assert content(path) == bytes(size)
    check(path)
    image = await open_luks(file)
    disk = bytearray(size)
    await use(image, disk, random.Random(1), 20)
    await image.truncate(size + 300 * K)
    await image.preallocate(Preallocation(mode), size, 300 * K)
    disk += bytes(300 * K)
    assert bytes(await image.read(0, len(disk))) == disk
    await image.close()
    path.write_bytes(file.content())
    assert content(path) == disk
    check(path)


async def test_preallocation_that_would_be_noise() -> None:
    header = new_luks(b"swordfish", iter_time=1)
    with pytest.raises(BlockError, match="Encrypted images of version 2 cannot be preallocated"):
        await new_qcow2(size=64 * K, version=2, crypto_header=header, preallocation="metadata")
    with pytest.raises(BlockError, match="raw data file cannot hold"):
        await new_qcow2(
            size=64 * K, crypto_header=header, data_file=MemoryDriver(), data_file_raw=True
        )
