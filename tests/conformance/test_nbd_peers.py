"""Other people's NBD clients against our server, over a disk in memory."""

import json
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.support.warm import begin

SESSION = Path(__file__).parents[1] / "unit/exports/libnbd_session.py"
SIZE = 64 << 20


def program(name):
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*command, status=0):
    done = subprocess.run(
        [program(str(command[0])), *map(str, command[1:])],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == status, (command, done.stdout, done.stderr)
    return done.stdout


@pytest.fixture(params=["at once", "slow"])
def nbd(tmp_path, request):
    """The path of a socket that serves ``disk``, ``ram`` and ``ro``."""
    path = tmp_path / "nbd.sock"
    delay = ["--delay", "0.0005"] if request.param == "slow" else []
    process = begin(
        [sys.executable, "-m", "tests.unit.exports.memory_export", path, *delay],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    watchdog = threading.Timer(110, process.kill)
    watchdog.start()
    try:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        yield path
        _, noise = process.communicate(timeout=20)
        assert process.returncode == 0 and not noise
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


def uri(path, name="disk"):
    return f"nbd+unix:///{name}?socket={path}"


@pytest.fixture
def image(tmp_path):
    """A sparse raw file with data in some places."""
    path = tmp_path / "image.raw"
    chance = random.Random(3)
    with open(path, "wb") as file:
        file.truncate(SIZE)
        for offset in (0, 65536, 1 << 20, 10 << 20, SIZE - 8192):
            file.seek(offset)
            file.write(chance.randbytes(8192))
        file.seek(20 << 20)
        file.write(chance.randbytes(5 << 20))
    return path


def test_nbdinfo(nbd):
    (export,) = json.loads(run("nbdinfo", "--json", "--no-content", uri(nbd)))["exports"]
    del export["uri"]
    assert export == {
        "export-name": "disk",
        "contexts": ["base:allocation", "qemu:allocation-depth"],
        "is_rotational": False,
        "is_read_only": False,
        "can_cache": True,
        "can_df": True,
        "can_fast_zero": True,
        "can_flush": True,
        "can_fua": True,
        "can_multi_conn": True,
        "can_trim": True,
        "can_zero": True,
        "block_size_minimum": 1,
        "block_size_preferred": 4096,
        "block_size_maximum": 32 << 20,
        "export-size": SIZE,
        "export-size-str": "64M",
    }
    listed = json.loads(run("nbdinfo", "--list", "--json", f"nbd+unix:///?socket={nbd}"))
    assert [e["export-name"] for e in listed["exports"]] == ["disk", "ram", "ro"]
    assert listed["exports"][2]["description"] == "hello"
    assert listed["exports"][2]["is_read_only"] and not listed["exports"][2]["can_trim"]
    run("nbdinfo", uri(nbd, "absent"), status=1)


def test_nbdinfo_map(nbd):
    run("qemu-io", "-f", "raw", "-c", "write -P 1 64k 128k", uri(nbd))
    allocation = json.loads(run("nbdinfo", "--json", "--map", uri(nbd)))
    assert [(e["offset"], e["length"], e["type"]) for e in allocation] == [
        (0, 65536, 3),
        (65536, 131072, 0),
        (196608, SIZE - 196608, 3),
    ]
    depth = json.loads(run("nbdinfo", "--json", "--map=qemu:allocation-depth", uri(nbd)))
    assert [(e["length"], e["type"]) for e in depth] == [
        (65536, 0),
        (131072, 1),
        (SIZE - 196608, 0),
    ]


def test_nbdcopy(nbd, image, tmp_path):
    run("nbdcopy", image, uri(nbd))
    run("nbdcopy", uri(nbd), tmp_path / "copy.raw")
    assert (tmp_path / "copy.raw").read_bytes() == image.read_bytes()


def test_qemu_img(nbd, image):
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "-m", "16", "-W", image, uri(nbd))
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, uri(nbd))
    mapped = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", uri(nbd)))
    assert sum(e["length"] for e in mapped) == SIZE
    assert [e["start"] for e in mapped if e["data"]][:2] == [0, 65536]
    run("qemu-img", "info", uri(nbd))
    run("qemu-io", "-f", "raw", "-c", "write 0 512", uri(nbd, "ro"), status=1)


def test_qemu_io(nbd):
    commands = [
        "write -P 1 1k 100k",
        "write -P 2 -f 2M 3M",
        "read -P 1 1k 100k",
        "write -z 10k 20k",
        "write -z -u 3M 64k",
        "read -P 0 10k 20k",
        "read -P 0 3M 64k",
        "read -P 2 4M 1M",
        "discard 2M 64k",
        "aio_write -P 7 6M 4M",
        "aio_read 0 1M",
        "aio_flush",
        "read -P 7 6M 4M",
        "flush",
    ]
    arguments = [word for command in commands for word in ("-c", command)]
    out = run("qemu-io", "-f", "raw", "-t", "none", *arguments, uri(nbd))
    assert "fail" not in out.lower()


@pytest.mark.parametrize("rw", ["randwrite", "randrw"])
def test_fio_verifies(nbd, rw, tmp_path):
    arguments = [
        "--name=job",
        "--ioengine=nbd",
        f"--uri={uri(nbd)}",
        f"--rw={rw}",
        "--bsrange=512-256k",
        "--blockalign=512",
        "--iodepth=16",
        "--size=24m",
        "--verify=crc32c",
        "--verify_backlog=64",
        "--fsync=32",
        "--randseed=42",
        f"--aux-path={tmp_path}",
    ]
    if "nbd" not in run("fio", "--enghelp"):
        pytest.skip("fio has no nbd engine")
    run("fio", *arguments)


def test_libnbd(nbd):
    python = Path("/usr/bin/python3")
    if not python.exists():
        pytest.skip("no Python of the system")
    done = subprocess.run([python, "-c", "import nbd"], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("python3-libnbd is not installed")
    done = subprocess.run(
        [python, SESSION, nbd], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
