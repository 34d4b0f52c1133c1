"""Commands of the human monitor that move data, on real images; qemu-img judges what they leave."""

import json
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


class Disk:
    """A daemon with one drive; ``say`` runs a line of the human monitor."""

    def __init__(self, directory, daemon):
        self.directory, self.daemon, self.client = directory, daemon, daemon.qmp()

    def say(self, line):
        return self.client("human-monitor-command", command_line=line)

    def write(self, byte, offset):
        """Write 64 KiB through the drive, and have it expected."""
        assert self.say(f'qemu-io d0 "write -P {byte} {offset} 64k"') == ""
        with (self.directory / "expected.raw").open("r+b") as file:
            file.seek(offset)
            file.write(bytes([byte]) * 65536)

    def image(self):
        return self.client("query-block")[0]["inserted"]["file"]

    def end(self):
        self.client("quit")
        self.daemon.wait()
        assert b"Pattern" not in self.daemon.output


@pytest.fixture
def disk(chain):
    with DaemonProcess(chain, *DRIVE) as daemon:
        yield Disk(chain, daemon)


def create(directory, name, *options):
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, directory / name, SIZE)


def info(directory, image):
    words = ("qemu-img", "info", "--output=json", directory / image)
    return json.loads(run(*words, capture_output=True).stdout)


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
        (drive,) = client("query-block")
        assert [s["name"] for s in drive["inserted"]["image"]["snapshots"]] == ["one"]
        assert say("snapshot_delete_blkdev_internal d0 one") == ""
        assert say("snapshot_delete_blkdev_internal d0 one").startswith("Error: Snapshot with id")
    same(chain, "top.qcow2")


@pytest.mark.parametrize(
    ("flags", "name", "image_format"),
    [("-f ", "copy.qcow2", ""), ("", "copy.qcow2", " qcow2"), ("-f ", "copy.raw", " raw"),
     ("-n -f ", "there.qcow2", " qcow2"), ("-n ", "overlay.qcow2", " qcow2")],
)  # fmt: skip
def test_drive_mirror_goes_over_to_its_copy(disk, flags, name, image_format):
    create(disk.directory, "there.qcow2")
    run("qemu-io", "-c", "write -P 77 0 4M", disk.directory / "there.qcow2",
        stdout=subprocess.DEVNULL)  # fmt: skip
    create(disk.directory, "overlay.qcow2", "-b", disk.directory / "base.qcow2", "-F", "qcow2")
    assert disk.say(f"drive_mirror {flags}d0 {name}{image_format}") == ""
    disk.client.wait("BLOCK_JOB_READY", device="d0", type="mirror")
    assert "device d0" in disk.say("info block-jobs")
    assert disk.image().endswith("top.qcow2")
    disk.write(9, 2 << 20)
    assert disk.say("block_job_complete d0") == ""
    assert "error" not in disk.client.wait("BLOCK_JOB_COMPLETED", device="d0")["data"]
    disk.client.wait("JOB_STATUS_CHANGE", id="d0", status="null")
    assert disk.image().endswith(name)
    disk.write(10, 3 << 19)
    assert disk.say("info block-jobs") == "No active jobs\r\n"
    disk.end()
    if name.endswith("qcow2"):
        run("qemu-img", "check", "-q", disk.directory / name)
    run("qemu-img", "compare", disk.directory / name, disk.directory / "expected.raw",
        stdout=subprocess.DEVNULL)  # fmt: skip
    stands_on_base = "full-backing-filename" in info(disk.directory, name)
    assert stands_on_base is ("-f" not in flags)


def test_drive_mirror_that_is_cancelled_leaves_a_copy(disk):
    assert disk.say("drive_mirror -f d0 copy.qcow2") == ""
    disk.client.wait("BLOCK_JOB_READY", device="d0")
    disk.write(9, 2 << 20)
    assert disk.say("block_job_cancel d0") == ""
    disk.client.wait("BLOCK_JOB_COMPLETED", device="d0", type="mirror")
    assert disk.image().endswith("top.qcow2")
    same(disk.directory, "copy.qcow2")
    disk.end()
    same(disk.directory, "top.qcow2")


def test_drive_mirror_that_is_cancelled_by_force(disk):
    assert disk.say("drive_mirror -f d0 copy.qcow2") == ""
    disk.client.wait("BLOCK_JOB_READY", device="d0")
    assert disk.say("block_job_cancel -f d0") == ""
    disk.client.wait("BLOCK_JOB_CANCELLED", device="d0", type="mirror")
    disk.write(9, 2 << 20)
    disk.end()
    same(disk.directory, "top.qcow2")


@pytest.mark.parametrize(
    ("flags", "name", "image_format"),
    [("-f ", "copy.qcow2", ""), ("", "copy.qcow2", " qcow2"), ("-f ", "copy.raw", " raw"),
     ("-f -c ", "copy.qcow2", ""), ("-n -f ", "there.qcow2", " qcow2")],
)  # fmt: skip
def test_drive_backup(disk, flags, name, image_format):
    create(disk.directory, "there.qcow2")
    assert disk.say(f"drive_backup {flags}d0 {name}{image_format}") == ""
    assert disk.say('qemu-io d0 "write -P 44 3M 64k"') == ""  # the backup is of before
    ended = disk.client.wait("BLOCK_JOB_COMPLETED", device="d0", type="backup")
    assert "error" not in ended["data"]
    assert disk.image().endswith("top.qcow2")
    disk.end()
    if "raw" not in name:
        run("qemu-img", "check", "-q", disk.directory / name)
        assert ("full-backing-filename" in info(disk.directory, name)) is ("-f" not in flags)
    run("qemu-img", "compare", disk.directory / name, disk.directory / "expected.raw",
        stdout=subprocess.DEVNULL)  # fmt: skip
    if "-c" in flags:
        checked = run("qemu-img", "check", "--output=json", disk.directory / name,
                      capture_output=True)  # fmt: skip
        assert json.loads(checked.stdout)["compressed-clusters"] > 0


@pytest.mark.parametrize("command", ["drive_mirror", "drive_backup"])
def test_copies_that_cannot_be(disk, command):
    before = sorted(path.name for path in disk.directory.iterdir())
    for words, message in (
        ("nosuch copy.qcow2", "Cannot find device='nosuch' nor node-name='nosuch'"),
        ("-n d0 nosuch.qcow2", "Could not open 'nosuch.qcow2': No such file or directory"),
        ("-f d0 copy.x bogus", "Unknown file format 'bogus'"),
        ("-f d0 nosuch/copy.qcow2", "Could not create 'nosuch/copy.qcow2': No such file"),
        ("d0 copy.raw raw", "Backing file not supported for file format 'raw'"),
    ):
        answer = disk.say(f"{command} {words}")
        assert answer.startswith("Error: ") and message in answer, answer
    assert disk.say(f"{command} d0").startswith(f"{command}: filename expected\r\n")
    assert sorted(path.name for path in disk.directory.iterdir()) == before
    assert disk.say("info block-jobs") == "No active jobs\r\n"


def test_one_job_a_device(disk):
    assert disk.say("drive_mirror -f d0 copy.qcow2") == ""
    disk.client.wait("BLOCK_JOB_READY", device="d0")
    assert "Error: " in disk.say("drive_backup -f d0 other.qcow2")
    assert disk.say("block_job_cancel -f d0") == ""
    disk.client.wait("BLOCK_JOB_CANCELLED", device="d0")


@pytest.mark.parametrize("kind", ["drive-mirror", "drive-backup"])
def test_the_copy_is_free_although_the_job_is_still_shown(disk, kind):
    disk.client(kind, job_id="j", device="d0", target="copy.qcow2", sync="full", auto_dismiss=False)
    if kind == "drive-mirror":
        disk.client.wait("BLOCK_JOB_READY", device="j")
        disk.client("block-job-cancel", device="j")
    disk.client.wait("BLOCK_JOB_COMPLETED", device="j")
    same(disk.directory, "copy.qcow2")
    assert not any(node["file"].endswith("copy.qcow2")
                   for node in disk.client("query-named-block-nodes"))  # fmt: skip
    assert [job["status"] for job in disk.client("query-jobs")] == ["concluded"]
    disk.client("job-dismiss", id="j")
