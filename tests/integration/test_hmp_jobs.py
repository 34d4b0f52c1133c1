"""Commands of the human monitor that move data, on real images; qemu-img judges what they leave."""

import shutil
import subprocess

import pytest

from tests.support.daemon import DaemonProcess

pytestmark = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="no qemu-io")

SIZE = 4 << 20


def run(*words, **more):
    return subprocess.run([str(word) for word in words], check=True, timeout=60, **more)


@pytest.fixture
def chain(tmp_path):
    """base <- top, with something of its own, zeros and something shadowed in each."""
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", base, SIZE - (1 << 20))
    run("qemu-io", "-c", "write -P 1 0 2M", base, stdout=subprocess.DEVNULL)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top, SIZE)
    run("qemu-io", "-c", "write -P 2 1M 64k", "-c", "write -z 0 128k", "-c", "write -P 3 3M 70000",
        top, stdout=subprocess.DEVNULL)  # fmt: skip
    run("qemu-img", "convert", "-O", "raw", top, tmp_path / "expected.raw")
    return tmp_path


def same(directory, image, *options):
    run("qemu-img", "check", "-q", directory / image)
    run("qemu-img", "compare", *options, directory / image, directory / "expected.raw",
        stdout=subprocess.DEVNULL)  # fmt: skip


DRIVE = ("--drive", "id=d0,file=top.qcow2,format=qcow2")


def test_commit_fills_the_base_and_empties_the_image(chain):
    with DaemonProcess(chain, *DRIVE) as daemon:
        client = daemon.qmp()

        def say(line):
            return client("human-monitor-command", command_line=line)

        assert say("commit d0") == ""
        assert say('qemu-io d0 "read -P 2 1M 64k"') == ""
        assert say('qemu-io d0 "write -P 9 2M 64k"') == ""
        base = next(n for n in client("query-named-block-nodes") if n["file"].endswith("base.qcow2")
                    and n["drv"] == "qcow2")  # fmt: skip
        assert base["ro"]
        assert say("commit all") == ""
        client("quit")
        daemon.wait()
        assert b"Pattern" not in daemon.output
    with (chain / "expected.raw").open("r+b") as file:
        file.seek(2 << 20)
        file.write(b"\x09" * 65536)
    same(chain, "base.qcow2")
    same(chain, "top.qcow2")
    mapped = run("qemu-io", "-c", "map", chain / "top.qcow2", capture_output=True, text=True)
    assert "    allocated" not in mapped.stdout


def test_commit_that_cannot_be(chain):
    with DaemonProcess(chain, "--drive", "id=d0,file=base.qcow2,format=qcow2") as daemon:
        client = daemon.qmp()
        answer = client("human-monitor-command", command_line="commit d0")
        assert answer == "'commit' error for 'd0': Operation not supported\r\n"
        assert client("human-monitor-command", command_line="commit all") == ""
    with DaemonProcess(chain, "--drive", "id=d0,file=top.qcow2,format=qcow2,readonly=on") as daemon:
        answer = daemon.qmp()("human-monitor-command", command_line="commit d0")
        assert answer == "'commit' error for 'd0': Permission denied\r\n"
    same(chain, "top.qcow2")


def test_internal_snapshots(chain):
    with DaemonProcess(chain, *DRIVE) as daemon:
        client = daemon.qmp()

        def say(line):
            return client("human-monitor-command", command_line=line)

        assert say("snapshot_blkdev_internal d0 one") == ""
        assert "already exists" in say("snapshot_blkdev_internal d0 one")
        assert "one" in say("info snapshots") or "one" in say("info block -v d0")
        assert say("snapshot_delete_blkdev_internal d0 one") == ""
        assert say("snapshot_delete_blkdev_internal d0 one").startswith("Error: Snapshot with id")
    same(chain, "top.qcow2")
