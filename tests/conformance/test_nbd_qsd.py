"""What NBD clients see of a backing chain: the same from us as from qemu-storage-daemon."""

import contextlib
import json
import shutil
import subprocess
import time

import pytest

from tests.support.warm import LIVEBLOCKD, begin

QSD = "qemu-storage-daemon"


@pytest.fixture(autouse=True)
def peers():
    for name in (QSD, "qemu-img", "qemu-io", "nbdinfo"):
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not installed")


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.fixture
def chain(tmp_path):
    """base (4 MiB) <- mid (2 MiB, shorter) <- top (5 MiB): data, zeros and holes in each."""
    images = {
        "base": ("4M", ["write -P 1 0 256k", "write -z 1M 128k", "write -P 2 3M 1M"]),
        "mid": ("2M", ["write -P 3 64k 64k", "write -z 128k 64k", "write -P 4 1920k 128k"]),
        "top": ("5M", ["write -P 5 64k 4k", "write -z 512k 64k", "write -P 6 4M 64k"]),
    }
    below = []
    for name, (size, commands) in images.items():
        path = str(tmp_path / f"{name}.qcow2")
        run("qemu-img", "create", "-q", "-f", "qcow2", *below, path, size)
        run("qemu-io", "-f", "qcow2", *(w for c in commands for w in ("-c", c)), path)
        below = ["-b", path, "-F", "qcow2"]
    return tmp_path / "top.qcow2"


@contextlib.contextmanager
def daemon(command, image, socket):
    pidfile = socket.with_suffix(".pid")  # the exports come after the socket, and this after them
    process = begin(
        [
            *command,
            *("--blockdev", f"driver=qcow2,node-name=disk,file.driver=file,file.filename={image}"),
            *("--nbd-server", f"addr.type=unix,addr.path={socket}"),
            *("--export", "nbd,id=a,node-name=disk,name=w,writable=on,allocation-depth=on"),
            *("--export", "nbd,id=b,node-name=disk,name=r,description=to read"),
            *("--pidfile", str(pidfile)),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 20
        while not pidfile.exists():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()


def seen(socket):
    answers = {}
    for name in ("w", "r"):
        uri = f"nbd+unix:///{name}?socket={socket}"
        (export,) = json.loads(run("nbdinfo", "--json", "--no-content", uri))["exports"]
        del export["uri"]
        answers[name] = export
        answers[name, "map"] = run("nbdinfo", "--map", uri)
    answers["depth"] = run("nbdinfo", "--map=qemu:allocation-depth", uri.replace("/r?", "/w?"))
    answers["qemu-img map"] = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", uri))
    return answers


def test_a_chain_looks_the_same(chain, tmp_path):
    with daemon((QSD,), chain, tmp_path / "theirs.sock"):
        theirs = seen(tmp_path / "theirs.sock")
    with daemon(LIVEBLOCKD, chain, tmp_path / "ours.sock"):
        assert seen(tmp_path / "ours.sock") == theirs
        uri = f"nbd+unix:///r?socket={tmp_path / 'ours.sock'}"
        # the image is locked by the daemon, so look at it with -U
        run("qemu-img", "compare", "-U", "-f", "qcow2", "-F", "raw", str(chain), uri)
