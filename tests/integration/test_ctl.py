"""liveblockctl and the examples against a running daemon."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.daemon import DaemonProcess
from tests.support.warm import begin, run

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
pytestmark = pytest.mark.skipif(
    not (shutil.which("qemu-img") and shutil.which("qemu-io")), reason="qemu-utils is not installed"
)


@pytest.fixture
def daemon(tmp_path):
    """A <- B <- C <- D of the first recipe, each with a piece of its own."""
    below = ""
    for index, name in enumerate("ABCD"):
        backing = ["-b", below, "-F", "qcow2"] if below else []
        for command in (
            ["qemu-img", "create", "-q", "-f", "qcow2", *backing, name, "8M"],
            ["qemu-io", "-f", "qcow2", "-c", f"write -P {index + 1} {index}M 2M", name],
        ):
            subprocess.run(command, check=True, cwd=tmp_path, timeout=20,
                           stdout=subprocess.DEVNULL)  # fmt: skip
        below = name
    shutil.copy(tmp_path / "D", tmp_path / "D.orig")
    with DaemonProcess(tmp_path, "--drive", "file=D,format=qcow2,id=virtio0,node-name=d") as daemon:
        yield daemon


def environment(bin_dir):
    """PATH with liveblockctl and qmp-shell of this Python, wherever it is installed."""
    bin_dir.mkdir(exist_ok=True)
    for name, module in (("liveblockctl", "liveblockd.ctl"), ("qmp-shell", "qemu.qmp.qmp_shell")):
        script = bin_dir / name
        script.write_text(
            f"#!{sys.executable}\nimport sys\nfrom {module} import main\nsys.exit(main())\n"
        )
        script.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{bin_dir}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HOME": str(bin_dir),
    }


def ctl(daemon, *words, status=0):
    done = run(
        [sys.executable, "-m", "liveblockd.ctl", "-s", "qmp.sock", *words],
        cwd=daemon.directory,
        timeout=30,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == status, done.stderr + done.stdout
    return done.stdout if status == 0 else done.stderr


def backing(daemon):
    (drive,) = daemon.qmp()("query-block")
    return drive["inserted"]["file"], drive["inserted"].get("backing_file")


def compare(daemon, image):
    daemon.stop()
    subprocess.run(["qemu-img", "compare", "-q", image, "D.orig"], cwd=daemon.directory,
                   check=True, timeout=20)  # fmt: skip
    subprocess.run(["qemu-img", "check", "-q", image], cwd=daemon.directory, check=True, timeout=20)


def test_merge_and_looking_around(daemon):
    assert "drives: 1, nodes: " in ctl(daemon, "status")
    assert json.loads(ctl(daemon, "--json", "status"))["jobs"] == []
    assert ctl(daemon, "drives").splitlines()[1].split()[:2] == ["virtio0", "d"]
    assert "d" in [line.split()[0] for line in ctl(daemon, "nodes").splitlines()[1:]]
    assert ctl(daemon, "jobs") == "No active jobs\n"
    assert ctl(daemon, "stream", "virtio0", "--base", "A", "--wait").startswith(
        "job virtio0 completed"
    )
    assert backing(daemon) == ("D", "A")
    compare(daemon, "D")


def test_a_job_is_steered(daemon):
    ctl(daemon, "stream", "virtio0", "--speed", "64k")
    assert "stream" in ctl(daemon, "jobs")
    ctl(daemon, "pause", "virtio0")
    ctl(daemon, "set-speed", "virtio0", "1M")
    ctl(daemon, "resume", "virtio0")
    ctl(daemon, "cancel", "virtio0")
    assert ctl(daemon, "cancel", "nosuch", status=1) == (
        "liveblockctl: Block job 'nosuch' not found\n"
    )
    assert ctl(daemon, "wait", "nosuch", status=1) == "liveblockctl: Job 'nosuch' not found\n"


def test_commit_of_images_below_and_of_the_active_one(daemon):
    said = ctl(daemon, "commit", "virtio0", "--base", "A", "--top", "C", "--wait")
    assert said.startswith("job virtio0 completed")
    assert backing(daemon) == ("D", "A")
    assert "is ready" in ctl(daemon, "commit", "virtio0", "--wait")
    client = daemon.qmp()
    client("block-job-cancel", device="virtio0")
    client.wait("JOB_STATUS_CHANGE", id="virtio0", status="null")
    assert ctl(daemon, "commit", "virtio0", "--pivot").startswith("job virtio0 completed")
    assert backing(daemon)[0] == "A"
    compare(daemon, "A")


def test_mirror_goes_over_or_leaves_a_copy(daemon):
    assert ctl(daemon, "mirror", "virtio0", "copy", "--copy").startswith("job virtio0 completed")
    assert backing(daemon)[0] == "D"
    same = ["qemu-img", "compare", "-U", "copy", "D.orig"]
    subprocess.run(same, cwd=daemon.directory, check=True, timeout=20)
    assert "completed" in ctl(daemon, "mirror", "virtio0", "new", "--pivot", "--job-id", "m")
    assert Path(backing(daemon)[0]).name == "new"
    ctl(daemon, "mirror", "virtio0", "x", "--pivot", "--copy", status=2)
    compare(daemon, "new")


def test_full_and_incremental_backup(daemon):
    bitmap = ("node=d", "name=b0")
    ctl(daemon, "qmp", "block-dirty-bitmap-add", *bitmap)
    assert "completed" in ctl(daemon, "backup", "virtio0", "full", "--wait", "--compress")
    ctl(daemon, "hmp", "qemu-io", "virtio0", '"write -P 7 6M 64k"')
    assert ctl(daemon, "create", "inc", "8M", "--backing", "full").endswith("created: 8.0 MiB\n")
    said = ctl(daemon, "backup", "virtio0", "inc", "--bitmap", "b0", "--existing", "--wait")
    assert said == "job virtio0 completed: 64.0 KiB\n"
    assert "Could not create" in ctl(daemon, "create", "no/such", "8M", status=1)
    assert json.loads(ctl(daemon, "qmp", "query-jobs")) == []
    assert [n for n in ctl(daemon, "nodes").split() if n.startswith("liveblockctl")] == []
    compare(daemon, "full")
    check = ["qemu-io", "-r", "-c", "read -P 7 6M 64k", "-c", "read -P 4 4M 64k", "inc"]
    read = subprocess.run(check, cwd=daemon.directory, check=True, timeout=20, capture_output=True)
    assert b"Pattern" not in read.stdout


def test_waiting_for_a_job_that_is_cancelled(daemon):
    with begin(
        [sys.executable, "-m", "liveblockd.ctl", "-s", "qmp.sock", "stream", "virtio0", "--speed",
         "64k", "--wait"], cwd=daemon.directory, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as waiting:  # fmt: skip
        client = daemon.qmp()
        client.wait("JOB_STATUS_CHANGE", id="virtio0", status="running")
        client("block-job-cancel", device="virtio0")
        assert waiting.wait(20) == 4
        assert waiting.stderr.read() == "liveblockctl: job virtio0 was cancelled\n"


def test_snapshot_export_resize_raw(daemon):
    ctl(daemon, "snapshot", "virtio0", "new.qcow2")
    assert backing(daemon)[0].endswith("new.qcow2")
    ctl(daemon, "export", "start", "n.sock")
    ctl(daemon, "export", "add", "virtio0", "--name", "disk")
    assert "virtio0" in ctl(daemon, "export", "list")
    ctl(daemon, "export", "del", "virtio0")
    ctl(daemon, "export", "stop")
    ctl(daemon, "resize", "virtio0", "16M")
    assert json.loads(ctl(daemon, "qmp", "query-block"))[0]["inserted"]["image"][
        "virtual-size"] == 16 << 20  # fmt: skip
    assert ctl(daemon, "hmp", "info", "block-jobs") == "No active jobs\n"
    assert ctl(daemon, "qmp", "nosuch", status=1) == (
        "liveblockctl: The command nosuch has not been found\n"
    )
    assert "'x'" in ctl(daemon, "qmp", "block_resize", "x=1", "size=1", status=1)


def test_exit_statuses(daemon):
    ctl(daemon, "-s", "nosuch.sock", "status", status=3)
    ctl(daemon, "nosuchverb", status=2)
    ctl(daemon, "stream", "virtio0", "--speed", "x", status=2)
    ctl(daemon, "snapshot", "d", "x.qcow2", status=2)
    ctl(daemon, "quit")
    assert daemon.wait() == 0


@pytest.mark.parametrize(
    ("shown", "error"),
    [("| true", ""), ("> /dev/full", "liveblockctl: cannot print: No space left on device\n")],
)
@pytest.mark.parametrize("words", ["status", "qmp query-qmp-schema", "--json drives"])
def test_what_cannot_be_printed(daemon, words, shown, error):
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c",
         f"'{sys.executable}' -m liveblockd.ctl -s qmp.sock {words} {shown}"],
        cwd=daemon.directory, timeout=60, check=False, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, error)


def test_events(daemon):
    with begin(
        [sys.executable, "-m", "liveblockd.ctl", "-s", "qmp.sock", "events", "BLOCK_JOB_COMPLETED",
         "--count", "1"], cwd=daemon.directory, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as events:  # fmt: skip
        client = daemon.qmp()
        while events.poll() is None:
            client("block-stream", device="virtio0", job_id="j")
            client.wait("JOB_STATUS_CHANGE", id="j", status="null")
            client.events.clear()
            try:
                events.wait(0.3)
            except subprocess.TimeoutExpired:
                continue
        assert json.loads(events.stdout.readline())["data"]["device"] == "j"
        assert events.returncode == 0


@pytest.mark.parametrize("script", ["live-merge.sh", "live-merge-qmp-shell.sh", "live_merge.py"])
def test_live_merge_example(daemon, tmp_path, script):
    subprocess.run([*_command(script), "qmp.sock", "virtio0", "A"], cwd=tmp_path, check=True,
                   timeout=60, env=environment(tmp_path / "bin"))  # fmt: skip
    assert backing(daemon) == ("D", "A")
    compare(daemon, "D")


@pytest.mark.parametrize("script", ["live-copy.sh", "live-copy-qmp-shell.sh", "live_copy.py"])
def test_live_copy_example(daemon, tmp_path, script):
    image = str(tmp_path / "disk.img")
    subprocess.run([*_command(script), "qmp.sock", "virtio0", image], cwd=tmp_path, check=True,
                   timeout=60, env=environment(tmp_path / "bin"))  # fmt: skip
    assert backing(daemon) == (image, None)
    compare(daemon, image)


@pytest.mark.parametrize(
    "script", ["live-merge.sh", "live-merge-qmp-shell.sh", "live_merge.py",
               "live-copy.sh", "live-copy-qmp-shell.sh", "live_copy.py"])  # fmt: skip
def test_examples_say_when_it_fails(daemon, tmp_path, script):
    done = subprocess.run(
        [*_command(script), "qmp.sock", "nosuch", "x"],
        cwd=tmp_path,
        timeout=60,
        env=environment(tmp_path / "bin"),
        capture_output=True,
        check=False,
    )
    assert done.returncode != 0


def _command(script):
    path = str(EXAMPLES / script)
    return [sys.executable, path] if script.endswith(".py") else [path]


def test_image_after_options_of_the_client(tmp_path):
    """People have ``liveblockctl -s SOCKET`` as an alias; the words of the tool stay its own."""
    for words in (["image"], ["-s", "nowhere.sock", "image"], ["--json", "image"]):
        command = [sys.executable, "-m", "liveblockd.ctl", *words]
        for rest in (["create", "-q", "-f", "qcow2", "x.qcow2", "1M"], ["check", "-q", "x.qcow2"]):
            assert not run([*command, *rest], cwd=tmp_path, timeout=60).returncode
        told = run([*command, "--help"], timeout=60)
        assert told.stdout.startswith("usage: liveblockctl image"), told
        assert "rebase" in told.stdout
