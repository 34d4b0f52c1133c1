"""The daemon as a process: start, wrong options, signals, the background, systemd."""

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from liveblockd.__main__ import main
from tests.support.daemon import DaemonProcess, QmpError, QmpSocket, nbd_write

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
needs_images = pytest.mark.skipif(
    not (shutil.which("qemu-img") and shutil.which("qemu-io")), reason="qemu-utils is not installed"
)


#: seconds after which what does not come is called missing: no verdict on how fast it comes
PATIENCE = 100


def run(tmp_path, *options, **more):
    return subprocess.run(
        [sys.executable, "-m", "liveblockd", *options],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
        env=ENVIRONMENT,
        **more,
    )


def monitor_of(daemon, path):
    """A client, as soon as the daemon listens."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return QmpSocket(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            assert daemon.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def chain(tmp_path):
    """base.qcow2 (4 MiB of 3) <- top.qcow2."""
    for command in (
        "qemu-img create -q -f qcow2 base.qcow2 4M",
        "qemu-io -f qcow2 -c 'write -P 3 0 4M' base.qcow2",
        "qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2",
    ):
        subprocess.run(command, shell=True, check=True, cwd=tmp_path, timeout=PATIENCE,
                       stdout=subprocess.DEVNULL)  # fmt: skip
    return tmp_path


TOP = "qcow2,node-name=top,file.driver=file,file.filename=top.qcow2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nosuch"], "unrecognized option '--nosuch'"),
        (["--blockdev", "file,node-name=f,filename=missing.qcow2"],
         "--blockdev file,node-name=f,filename=missing.qcow2: "
         "Could not open 'missing.qcow2': No such file or directory"),
        (["--blockdev", "null-co,size=1"],
         "--blockdev null-co,size=1: 'node-name' must be specified for the root node"),
        (["--blockdev", "null-co,node-name=n,size=1Q"],
         "--blockdev null-co,node-name=n,size=1Q: Parameter 'size' expects integer"),
        (["--blockdev", "null-co,node-name=n,bogus=1"],
         "--blockdev null-co,node-name=n,bogus=1: Parameter 'bogus' is unexpected"),
        (["--monitor", "chardev=zz"], '--monitor chardev=zz: chardev "zz" not found'),
        (["--chardev", "null,id=c", "--monitor", "c,mode=foo"],
         "--monitor c,mode=foo: Parameter 'mode' does not accept value 'foo'"),
        (["--chardev", "socket,id=c,path=no.sock", "--monitor", "c"],
         "--chardev socket,id=c,path=no.sock: "
         "Failed to connect to 'no.sock': No such file or directory"),
        (["--blockdev", "file,node-name=f,filename="],
         "--blockdev file,node-name=f,filename=: The 'file' block driver requires a file name"),
        (["--blockdev", "qcow2,node-name=q,file.driver=file,file.filename=x,cache.direct=maybe"],
         "--blockdev qcow2,node-name=q,file.driver=file,file.filename=x,cache.direct=maybe: "
         "Parameter 'cache.direct' expects 'on' or 'off'"),
        (["--nbd-server", "addr.type=unix,addr.path=n,max-connections=x"],
         "--nbd-server addr.type=unix,addr.path=n,max-connections=x: "
         "Parameter 'max-connections' expects integer"),
        (["--chardev", "bogus,id=c"],
         "--chardev bogus,id=c: 'bogus' is not a valid char driver name"),
        (["--object", "foo,id=x"],
         "--object foo,id=x: Parameter 'qom-type' does not accept value 'foo'"),
        (["--object", "iothread"], "--object iothread: Parameter 'id' is missing"),
        (["--export", "nbd,id=e,node-name=n"],
         "--export nbd,id=e,node-name=n: Cannot find device='' nor node-name='n'"),
        (["--nbd-server", "addr.type=unix"],
         "--nbd-server addr.type=unix: Parameter 'addr.path' is missing"),
        (["--pidfile", "/nonexistent/x"], "cannot create PID file: "
         "Could not create '/nonexistent/x': No such file or directory"),
        (["--config", "nosuch.toml"],
         "--config nosuch.toml: Could not open 'nosuch.toml': No such file or directory"),
        (["--qmp", "no/such/dir/q"],
         "--qmp no/such/dir/q: Failed to bind socket to no/such/dir/q: No such file or directory"),
        (["--qmp", "tcp:127.0.0.1:99999,server=on"],
         "--qmp tcp:127.0.0.1:99999,server=on: port 99999 is out of range"),
        (["--qmp", "tcp:127.0.0.1:65536"],
         "--qmp tcp:127.0.0.1:65536: port 65536 is out of range"),
        (["--nbd-server", "addr.type=fd,addr.str=systemd:nbd"],
         "--nbd-server addr.type=fd,addr.str=systemd:nbd: no socket was passed by systemd"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_wrong_options_end_with_one_line_and_status_1(
    tmp_path, monkeypatch, capsys, options, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["liveblockd", *options])
    assert main() == 1
    assert capsys.readouterr() == ("", f"liveblockd: {message}\n")
    assert os.listdir(tmp_path) == []


def test_a_client_that_does_not_read_delays_the_end_by_a_second_and_leaves_no_trace(tmp_path):
    with DaemonProcess(tmp_path, "--blockdev", "null-co,node-name=n") as daemon:
        deaf = daemon.qmp()
        deaf.socket.settimeout(0.5)
        with pytest.raises(TimeoutError):  # until neither side takes any more
            while True:
                deaf.socket.sendall(b'{"execute":"query-named-block-nodes"}' * 100)
        assert daemon.qmp()("query-version")["qemu"]
        assert daemon.stop() == 0  # never, if it waited for the client
    assert daemon.errors == b""


def test_a_failed_option_leaves_nothing_behind(tmp_path):
    done = run(tmp_path, "--nbd-server", "addr.type=unix,addr.path=n.sock", "--qmp", "q.sock",
               "--blockdev", "file,node-name=f,filename=missing")  # fmt: skip
    reason = "Could not open 'missing': No such file or directory"
    line = f"--blockdev file,node-name=f,filename=missing: {reason}"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"liveblockd: {line}\n")
    assert os.listdir(tmp_path) == []


def test_help_version_formats(tmp_path):
    assert run(tmp_path, "--help").stdout.startswith("Usage: liveblockd [options]\n")
    assert run(tmp_path, "-V").stdout.startswith("liveblockd version ")
    formats = run(tmp_path, "--drive", "format=help")
    assert formats.returncode == 0
    assert {"qcow2", "raw"} <= set(formats.stdout.removeprefix("Supported formats: ").split())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_it_cleanly(tmp_path, number):
    with DaemonProcess(tmp_path, "--nbd-server", "addr.type=unix,addr.path=n.sock") as daemon:
        assert daemon.pidfile.read_text() == f"{daemon.process.pid}\n"
        assert {"n.sock", "qmp.sock"} <= set(os.listdir(tmp_path))
        client = daemon.qmp()
        assert daemon.stop(number) == 0
        assert client.rest() == []
    assert daemon.errors == b""
    assert os.listdir(tmp_path) == []


@needs_images
def test_a_signal_cancels_jobs_and_removes_exports(chain):
    with DaemonProcess(chain, "--blockdev", TOP, "--nbd-server", "addr.type=unix,addr.path=n.sock",
                       "--export", "nbd,id=e,node-name=top,writable=on") as daemon:  # fmt: skip
        client = daemon.qmp()
        client("block-stream", device="top", job_id="s", speed=65536)
        daemon.process.send_signal(signal.SIGTERM)
        daemon.process.send_signal(signal.SIGTERM)  # a second one changes nothing
        assert daemon.wait() == 0
        events = [(e["event"], e["data"].get("status")) for e in client.rest()]
    assert daemon.errors == b""
    assert events[-5:] == [
        ("BLOCK_EXPORT_DELETED", None),
        ("JOB_STATUS_CHANGE", "aborting"),
        ("BLOCK_JOB_CANCELLED", None),
        ("JOB_STATUS_CHANGE", "concluded"),
        ("JOB_STATUS_CHANGE", "null"),
    ]
    subprocess.run(
        ["qemu-img", "check", "-q", "top.qcow2"], cwd=chain, check=True, timeout=PATIENCE
    )


@needs_images
def test_quit_is_answered_after_the_events(chain):
    with DaemonProcess(chain, "--blockdev", TOP) as daemon:
        client = daemon.qmp()
        client("block-stream", device="top", job_id="s", speed=65536)
        assert client("quit") == {}
        assert client.events[-1]["data"] == {"id": "s", "status": "null"}
        assert client.rest() == []
        assert daemon.wait() == 0
    assert sorted(os.listdir(chain)) == ["base.qcow2", "top.qcow2"]


@needs_images
def test_locks_are_gone_at_the_end_and_held_before(chain):
    write = ["qemu-io", "-f", "qcow2", "-c", "write 0 512", "top.qcow2"]
    with DaemonProcess(chain, "--blockdev", TOP) as daemon:
        refused = subprocess.run(
            write, cwd=chain, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        assert refused.returncode != 0 and "lock" in refused.stderr
        assert daemon.stop() == 0
    subprocess.run(write, cwd=chain, check=True, timeout=PATIENCE, stdout=subprocess.DEVNULL)


@needs_images
def test_a_lock_that_others_hold_is_told_with_the_image(chain):
    with DaemonProcess(chain, "--blockdev", TOP) as daemon:
        for image in ("top.qcow2", "base.qcow2"):
            done = run(chain, "--drive", f"file={image},id=second")
            lines = [
                f'liveblockd: --drive file={image},id=second: Failed to get "write" lock',
                f"Is another process using the image [{image}]?",
            ]
            assert (done.returncode, done.stderr.splitlines()) == (1, lines)
        assert daemon.stop() == 0


def test_it_opens_as_many_files_as_it_may_at_most(tmp_path):
    nodes = [f"null-co,node-name=n{number}" for number in range(40)]
    files = [f"file,node-name=f{number},filename=image" for number in range(40)]
    (tmp_path / "image").write_bytes(bytes(512))
    options = [
        word for value in (*nodes, *files) for word in ("--blockdev", f"{value},read-only=on")
    ]
    command = [sys.executable, "-m", "liveblockd", *options, "--qmp", "q.sock"]
    with subprocess.Popen(
        ["bash", "-c", 'ulimit -S -n 32 && exec "$@"', "bash", *command],
        cwd=tmp_path, env=ENVIRONMENT,
    ) as daemon:  # fmt: skip
        try:
            assert len(monitor_of(daemon, tmp_path / "q.sock")("query-named-block-nodes")) == 80
            daemon.terminate()
            assert daemon.wait(PATIENCE) == 0
        finally:
            daemon.kill()


@needs_images
def test_an_image_that_could_not_be_flushed_at_the_end_is_told_by_the_status(chain):
    blkdebug = "driver=blkdebug,node-name=below,image.driver=file,image.filename=top.qcow2"
    fault = "inject-error.0.event=flush_to_disk,inject-error.0.errno=5"
    for faults, status in ((f",{fault}", 1), ("", 0)):
        with DaemonProcess(
            chain, "--blockdev", f"{blkdebug}{faults}",
            "--blockdev", "qcow2,node-name=top,file=below",
            "--nbd-server", "addr.type=unix,addr.path=nbd.sock",
            "--export", "nbd,id=e,node-name=top,writable=on",
        ) as daemon:  # fmt: skip
            nbd_write(str(chain / "nbd.sock"), "top", 0, b"\x05" * 512)
            assert daemon.stop() == status
        assert (b"closing node top: " in daemon.errors) is bool(status)


@needs_images
def test_it_starts_and_ends_with_its_standard_streams_closed(chain):
    """An image that got the number of stderr would hold what a library says in its last moment."""
    command = f"exec '{sys.executable}' -m liveblockd --drive file=top.qcow2,id=d --qmp q.sock"
    with subprocess.Popen(
        f"{command} <&- >&- 2>&-", shell=True, cwd=chain, env=ENVIRONMENT
    ) as daemon:
        try:
            qmp = monitor_of(daemon, chain / "q.sock")
            qmp("blockdev-snapshot-sync", device="d", snapshot_file="new.qcow2")
            names = [os.readlink(f"/proc/{daemon.pid}/fd/{fd}") for fd in (0, 1, 2)]
            assert names == ["/dev/null"] * 3
            daemon.terminate()
            assert daemon.wait(PATIENCE) == 0
        finally:
            daemon.kill()


@needs_images
def test_who_does_not_read_what_it_prints_holds_up_nothing(chain):
    """``blockdev-snapshot-sync`` prints a line, as QEMU does; here into a pipe that is full."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(4096))
    os.set_blocking(writing, True)
    command = [sys.executable, "-m", "liveblockd", "--drive", "file=top.qcow2,id=d",
               "--qmp", "q.sock"]  # fmt: skip
    with subprocess.Popen(
        command, cwd=chain, env=ENVIRONMENT, stdout=writing, stderr=writing
    ) as daemon:
        try:
            qmp = monitor_of(daemon, chain / "q.sock")
            qmp("blockdev-snapshot-sync", device="d", snapshot_file="new.qcow2")
            assert qmp("query-block")[0]["inserted"]["file"].endswith("new.qcow2")
            daemon.terminate()
            assert daemon.wait(PATIENCE) == 0
        finally:
            daemon.kill()
            os.close(reading)
            os.close(writing)


@needs_images
def test_what_was_not_flushed_is_kept_and_the_image_is_closed(chain):
    options = ("--nbd-server", "addr.type=unix,addr.path=n.sock",
               "--export", "nbd,id=e,node-name=top,writable=on")  # fmt: skip
    with DaemonProcess(chain, "--blockdev", TOP, *options) as daemon:
        nbd_write(str(chain / "n.sock"), "top", 1 << 20, b"\7" * (1 << 20))
        assert daemon.stop() == 0
    read = ["qemu-io", "-r", "-f", "qcow2", "-c", "read -P 7 1M 1M", "top.qcow2"]
    done = subprocess.run(
        read, cwd=chain, capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert "Pattern verification failed" not in done.stdout
    # 0 says: neither errors nor leaked clusters
    subprocess.run(
        ["qemu-img", "check", "-q", "top.qcow2"], cwd=chain, check=True, timeout=PATIENCE
    )


@needs_images
@pytest.mark.parametrize("delay", [0.1, 0.2, 0.3, 0.4, 0.6])
def test_a_signal_during_the_start(chain, delay):
    daemon = DaemonProcess(chain, "--blockdev", TOP, "--nbd-server",
                           "addr.type=unix,addr.path=n.sock")  # fmt: skip
    time.sleep(delay)
    # before there is a handler nothing was made that would have to be undone
    assert daemon.stop() in (0, -signal.SIGTERM)
    assert sorted(os.listdir(chain)) == ["base.qcow2", "top.qcow2"]
    subprocess.run(
        ["qemu-img", "check", "-q", "top.qcow2"], cwd=chain, check=True, timeout=PATIENCE
    )


@needs_images
def test_drive(chain):
    with DaemonProcess(chain, "--drive", "file=top.qcow2,id=virtio0") as daemon:
        client = daemon.qmp()
        (drive,) = client("query-block")
        assert drive["device"] == "virtio0" and drive["inserted"]["file"] == "top.qcow2"
        client("block_stream", device="virtio0")
        client.wait("JOB_STATUS_CHANGE", id="virtio0", status="null")
        (drive,) = client("query-block")
        assert "backing_file" not in drive["inserted"]
        daemon.process.terminate()
        assert client.rest()[-1]["event"] == "SHUTDOWN"
    done = run(chain, "--drive", "file=nosuch.img,id=d")
    assert done.stderr == ("liveblockd: --drive file=nosuch.img,id=d: "
                           "Could not open 'nosuch.img': No such file or directory\n")  # fmt: skip


def test_background(tmp_path):
    done = run(tmp_path, "--daemonize", "--qmp", "q.sock", "--pidfile", "p")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pid = int((tmp_path / "p").read_text())  # everything is up when the parent returns
    assert os.getsid(pid) != os.getsid(0)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "q.sock"))
        assert b'"QMP"' in client.recv(1000)
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE
    while os.listdir(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_background_reports_a_failed_start(tmp_path):
    done = run(tmp_path, "--daemonize", "--pidfile", "p", "--blockdev", "null-co")
    assert done.returncode == 1
    assert done.stderr == ("liveblockd: --blockdev null-co: "
                           "'node-name' must be specified for the root node\n")  # fmt: skip
    assert os.listdir(tmp_path) == []


def test_systemd_is_told(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE)
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "100000"}
        with DaemonProcess(tmp_path, environment=environment, cold=True) as daemon:
            assert manager.recv(200).startswith(b"READY=1\nSTATUS=")
            assert [manager.recv(200) for _ in range(2)] == [b"WATCHDOG=1"] * 2
            assert daemon.stop() == 0
        said = []
        while not said or said[-1] == b"WATCHDOG=1":
            said.append(manager.recv(200))
        assert said[-1].startswith(b"STOPPING=1\n")


def test_inherited_sockets(tmp_path):
    """A connected one by its number, and one that listens as systemd passes it."""
    ours, theirs = socket.socketpair()
    with ours, theirs, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "l.sock"))
        listener.listen()
        connected = fcntl.fcntl(theirs, fcntl.F_DUPFD, 20)
        code = (
            "import os, sys; os.environ['LISTEN_PID'] = str(os.getpid()); "
            f"os.dup2({listener.fileno()}, 3); "
            "os.execv(sys.executable, [sys.executable, '-m', 'liveblockd', *sys.argv[1:]])"
        )
        options = (
            *("--chardev", f"socket,id=a,fd={connected}", "--monitor", "a"),
            *("--chardev", "socket,id=b,fd=systemd:qmp,server=on,wait=off", "--monitor", "b"),
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, *options],
            pass_fds=(connected, listener.fileno()),
            env={**ENVIRONMENT, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "qmp"},
            cwd=tmp_path,
        )
        os.close(connected)
        try:
            ours.settimeout(PATIENCE)
            assert b'"QMP"' in ours.recv(1000)
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(PATIENCE)
                client.connect(str(tmp_path / "l.sock"))
                assert b'"QMP"' in client.recv(1000)
        finally:
            process.terminate()
            assert process.wait(PATIENCE) == 0


def test_wait_on_holds_the_start_back(tmp_path):
    daemon = DaemonProcess(
        tmp_path, "--chardev", "socket,id=m,path=qmp.sock,server=on", "--monitor", "m")  # fmt: skip
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "qmp.sock").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.1)
    assert not daemon.pidfile.exists()
    client = daemon.qmp()
    with daemon:
        assert client("query-name") == {}
    # and a signal ends the wait
    daemon = DaemonProcess(
        tmp_path, "--chardev", "socket,id=m,path=qmp.sock,server=on", "--monitor", "m")  # fmt: skip
    while not (tmp_path / "qmp.sock").exists():
        time.sleep(0.01)
    assert daemon.stop() == 0
    assert os.listdir(tmp_path) == []


def test_stdio_monitor(tmp_path):
    with DaemonProcess(tmp_path, "--chardev", "stdio,id=m", "--monitor", "m,pretty=on") as daemon:
        daemon.process.stdin.write(b'{"execute": "qmp_capabilities"}{"execute": "quit"}')
        daemon.process.stdin.flush()
        assert daemon.wait() == 0
        assert daemon.output.count(b'"return": {\r\n    }') == 2


def test_configuration_file(tmp_path):
    (tmp_path / "c.toml").write_text(
        'qmp = ["q.sock"]\n[[blockdev]]\ndriver = "null-co"\nnode-name = "n"\nsize = 1048576\n'
        '[nbd-server]\naddr = { type = "unix", path = "n.sock" }\n'
        '[[export]]\ntype = "nbd"\nid = "e"\nnode-name = "n"\n'
    )
    with DaemonProcess(tmp_path, "--config", "c.toml") as daemon:
        assert daemon.qmp("q.sock")("query-block-exports")[0]["id"] == "e"
    (tmp_path / "d.toml").write_text('[[blockdev]]\ndriver = "null-co"\nsize = "x"\nnode-name="n"')
    done = run(tmp_path, "--config", "d.toml")
    assert done.stderr == ("liveblockd: d.toml: blockdev[0]: "
                           "Invalid parameter type for 'size', expected: integer\n")  # fmt: skip


def test_objects(tmp_path):
    with DaemonProcess(tmp_path, "--object", "throttle-group,id=g,x-bps-total=1048576") as daemon:
        client = daemon.qmp()
        with pytest.raises(QmpError, match="attempt to add duplicate property 'g'"):
            client("object-add", qom_type="throttle-group", id="g")
        assert client("qom-get", path="/objects/g", property="x-bps-total") == 1048576
        client("object-del", id="g")
        with pytest.raises(QmpError, match="object 'g' not found"):
            client("object-del", id="g")
        client("object-add", qom_type="secret", id="s", data="hidden")
        with pytest.raises(QmpError, match=r"Property 'secret\.data' not found"):
            client("qom-get", path="s", property="data")
