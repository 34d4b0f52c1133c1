"""The QMP wire as clients see it: a real process, real sockets, clients that behave badly."""

from __future__ import annotations

import asyncio
import json
import os
import select
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecuteError, QMPClient

from tests.support.warm import begin

ROOT = Path(__file__).parents[2]
DAEMON = [sys.executable, "-m", "tests.support.qmp_daemon"]
TIMEOUT = 20.0
NEGOTIATE = b'{"execute": "qmp_capabilities"}'


class Process:
    """The test daemon, and its socket."""

    def __init__(self, loop: str, directory: Path) -> None:
        self.path = str(directory / "qmp.sock")
        self._loop = loop
        self._errors = directory / "stderr"
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(
        self, chardev: str | None = None, monitor: str = "m", **kwargs: Any
    ) -> subprocess.Popen[bytes]:
        chardev = chardev or f"socket,id=m,path={self.path},server=on,wait=off"
        command = [*DAEMON, f"--{self._loop}", "--chardev", chardev, "--monitor", monitor]
        with self._errors.open("ab") as errors:
            process = begin(command, cwd=ROOT, stderr=errors, **kwargs)
        self._processes.append(process)
        return process

    def failed(self, process: subprocess.Popen[bytes]) -> str:
        """What a daemon that must not start says."""
        assert process.wait(TIMEOUT) != 0
        return self._errors.read_text()

    def client(self) -> Client:
        deadline = time.monotonic() + TIMEOUT
        while True:
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.connect(self.path)
                return Client(sock)
            except OSError:
                sock.close()
                assert time.monotonic() < deadline, "nobody listens"
                time.sleep(0.02)

    def end(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise


class Client:
    """A raw client; negotiates unless told otherwise."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(TIMEOUT)
        self.sock = sock
        self.greeting: dict[str, Any] = {}
        self._file = sock.makefile("rb")

    def read(self) -> Any:
        line = self._file.readline()
        assert line.endswith(b"\r\n"), line
        return json.loads(line)

    def at_end(self) -> bool:
        try:
            return self._file.readline() == b""
        except ConnectionError:
            return True

    def negotiate(self) -> Client:
        self.greeting = self.read()
        assert self.ask(NEGOTIATE) == {"return": {}}
        return self

    def ask(self, request: bytes) -> Any:
        """Send, and take the reply; events in between are passed over."""
        self.sock.sendall(request)
        while "event" in (message := self.read()):
            pass
        return message

    def run(self, name: str, **arguments: Any) -> Any:
        return self.ask(json.dumps({"execute": name, "arguments": arguments}).encode())


@pytest.fixture(params=["asyncio", "uvloop"])
def process(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Process]:
    found = Process(request.param, tmp_path)
    yield found
    found.end()


@pytest.fixture
def daemon(process: Process) -> Process:
    process.start()
    return process


def resident(pid: int) -> int:
    """Bytes of memory."""
    text = Path(f"/proc/{pid}/statm").read_text()
    return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE")


# -- what is on the wire


def test_greeting_and_version(daemon: Process) -> None:
    client = daemon.client().negotiate()
    version = client.greeting["QMP"]["version"]
    assert {type(version["qemu"][k]) for k in ("major", "minor", "micro")} == {int}
    assert version["package"].startswith("liveblockd-")
    assert client.greeting["QMP"]["capabilities"] == ["oob"]
    assert client.run("query-version")["return"] == version


def test_input_before_the_greeting_is_read_and_byte_by_byte(daemon: Process) -> None:
    client = daemon.client()
    for byte in NEGOTIATE + b"\r\n" + b"{'execute': 'query-version', 'id': 'slow'}":
        client.sock.sendall(bytes((byte,)))
    assert "QMP" in client.read()
    assert client.read() == {"return": {}}
    assert client.read()["id"] == "slow"


def test_any_number_of_clients(daemon: Process) -> None:
    clients = [daemon.client().negotiate() for _ in range(40)]
    for number, client in enumerate(clients):
        client.sock.sendall(b'{"execute": "query-commands", "id": %d}' % number)
    for number, client in enumerate(clients):
        assert client.read()["id"] == number


def test_a_command_of_one_client_does_not_hold_up_the_queries_of_another(daemon: Process) -> None:
    slow, quick = daemon.client().negotiate(), daemon.client().negotiate()
    slow.sock.sendall(b'{"execute": "x-test-wait", "arguments": {"ms": 1500}}')
    time.sleep(0.1)
    assert "return" in quick.run("query-version")
    assert not select.select([slow.sock], [], [], 0)[0]
    assert "return" in slow.read()


def test_events_come_after_the_negotiation_only_and_in_order(daemon: Process) -> None:
    first, silent = daemon.client().negotiate(), daemon.client()
    assert "QMP" in silent.read()
    first.sock.sendall(b'{"execute": "x-test-announce", "arguments": {"times": 3}, "id": 1}')
    got = [first.read() for _ in range(4)]
    assert [m.get("event") for m in got] == ["JOB_STATUS_CHANGE"] * 3 + [None]
    assert abs(got[0]["timestamp"]["seconds"] - time.time()) < 10
    assert 0 <= got[0]["timestamp"]["microseconds"] < 10**6
    assert got[0]["data"] == {"id": "j", "status": "created"}
    assert silent.ask(NEGOTIATE) == {"return": {}}
    first.run("x-test-announce", times=1)
    assert silent.read()["event"] == "JOB_STATUS_CHANGE"


def test_errors_of_commands_do_not_end_the_session(daemon: Process) -> None:
    client = daemon.client().negotiate()
    no_space = client.run("x-test-fail", how="OSError")["error"]
    assert no_space == {"class": "GenericError", "desc": "No space left on device"}
    assert "KeyError" in client.run("x-test-fail", how="KeyError")["error"]["desc"]
    assert client.run("x-test-wait", ms=0) == {"return": {}}  # and the lock is free


def test_schema_is_complete(daemon: Process) -> None:
    client = daemon.client().negotiate()
    entities = client.run("query-qmp-schema")["return"]
    names = [entity["name"] for entity in entities]
    assert len(set(names)) == len(names)
    commands = {e["name"] for e in entities if e["meta-type"] == "command"}
    assert commands == {c["name"] for c in client.run("query-commands")["return"]}


def test_a_big_command(daemon: Process) -> None:
    client = daemon.client().negotiate()
    request = {
        "execute": "query-version",
        "id": {"k" * 10 + str(i): ["é", i] for i in range(20_000)},
    }
    reply = client.ask(json.dumps(request).encode())
    assert reply["id"] == request["id"]


# -- clients that behave badly


def test_a_client_that_sends_but_does_not_read(daemon: Process) -> None:
    process = daemon._processes[0]
    client, other = daemon.client().negotiate(), daemon.client().negotiate()
    before = resident(process.pid)
    request = b'{"execute": "query-commands", "id": "%06d"}\n'
    client.sock.setblocking(False)
    sent, data = 0, b""
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline and sent < 60_000:
        data = data or b"".join(request % i for i in range(sent, sent + 500))
        try:
            data = data[client.sock.send(data) :]
        except BlockingIOError:
            time.sleep(0.05)
            continue
        sent += 0 if data else 500
    assert sent < 60_000, "the daemon took all input though nobody read its output"
    assert resident(process.pid) - before < 64 << 20
    assert "return" in other.run("query-version")
    client.sock.settimeout(TIMEOUT)
    for number in range(sent):
        assert client.read()["id"] == f"{number:06}"


def test_a_client_that_never_reads_its_events_is_dropped(daemon: Process) -> None:
    process = daemon._processes[0]
    deaf, other = daemon.client().negotiate(), daemon.client().negotiate()
    before = resident(process.pid)
    for _ in range(80):
        other.run("x-test-announce", times=10, size=100_000)
    assert resident(process.pid) - before < 160 << 20
    deaf.sock.settimeout(TIMEOUT)
    got = 0
    try:
        while data := deaf.sock.recv(1 << 20):
            got += len(data)
    except ConnectionError:
        pass
    assert got < 8_000_000  # what the socket held; then the end
    assert "return" in other.run("query-version")


def test_a_client_that_vanishes_does_not_stop_its_command(daemon: Process) -> None:
    watcher = daemon.client().negotiate()
    for _ in range(3):
        client = daemon.client().negotiate()
        client.sock.sendall(
            b'{"execute": "x-test-wait", "arguments": {"ms": 200, "announce": true}}'
        )
        time.sleep(0.05)
        client._file.close()
        client.sock.close()
    for _ in range(3):  # each came to its end, one after the other
        assert watcher.read()["data"]["id"] == "waited"
    assert "return" in watcher.run("query-version")


def test_many_clients_that_vanish_leave_nothing(daemon: Process) -> None:
    process = daemon._processes[0]
    daemon.client().negotiate()
    for number in range(200):
        client = daemon.client()
        if number % 2:
            client.sock.sendall(NEGOTIATE + b'{"execute": "query-commands"}' * 5)
        client._file.close()
        client.sock.close()
    last = daemon.client().negotiate()
    assert "return" in last.run("query-version")
    deadline = time.monotonic() + TIMEOUT
    while len(os.listdir(f"/proc/{process.pid}/fd")) > 25 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(os.listdir(f"/proc/{process.pid}/fd")) <= 25


def test_a_client_that_ends_its_input_gets_its_replies(daemon: Process) -> None:
    client = daemon.client()
    client.sock.sendall(NEGOTIATE + b'{"execute": "query-commands"}' * 50)
    client.sock.shutdown(socket.SHUT_WR)
    assert "QMP" in client.read()
    assert [client.read() for _ in range(51)][-1]["return"]
    assert client.at_end()


# -- real clients


async def test_qemu_qmp_client(daemon: Process) -> None:
    await asyncio.to_thread(daemon.client)
    qmp = QMPClient("test")
    await qmp.connect(daemon.path)
    with qmp.listener("JOB_STATUS_CHANGE") as listener:
        assert "qemu" in await qmp.execute("query-version")  # type: ignore[operator]
        await qmp.execute("x-test-announce", {"times": 2})
        event = await asyncio.wait_for(listener.get(), TIMEOUT)
        assert event["data"] == {"id": "j", "status": "created"}
    with pytest.raises(ExecuteError, match="has not been found"):
        await qmp.execute("no-such-command")
    await qmp.disconnect()


def test_qmp_shell(daemon: Process) -> None:
    shell = Path(sys.executable).with_name("qmp-shell")
    if not shell.exists():
        pytest.skip("qmp-shell is not installed")
    daemon.client()
    done = subprocess.run(
        [str(shell), daemon.path],
        input=b"query-version\nx-test-wait ms=1\n",
        capture_output=True,
        timeout=TIMEOUT,
        check=False,
        env={**os.environ, "HOME": str(Path(daemon.path).parent)},
    )
    assert b'"package": "liveblockd-' in done.stdout, done
    assert b'{"return": {}}' in done.stdout


def test_socat(daemon: Process) -> None:
    socat = shutil.which("socat")
    if socat is None:
        pytest.skip("socat is not installed")
    daemon.client()
    done = subprocess.run(
        [socat, f"-t{TIMEOUT}", "-", f"UNIX-CONNECT:{daemon.path}"],
        input=NEGOTIATE + b"\n" + b'{"execute": "query-name"}\n',
        capture_output=True,
        timeout=TIMEOUT,
        check=True,
    )
    assert done.stdout.count(b'{"return": {}}\r\n') == 2


# -- where clients come from


def test_quit_answers_closes_and_removes_the_socket(process: Process) -> None:
    started = process.start()
    client, other = process.client().negotiate(), process.client().negotiate()
    client.sock.sendall(b'{"execute": "quit", "id": 1}{"execute": "query-version", "id": 2}')
    assert client.read() == {"return": {}, "id": 1}
    assert client.at_end()
    assert other.at_end()
    assert started.wait(TIMEOUT) == 0
    assert not os.path.exists(process.path)


def test_quit_with_a_client_that_does_not_read(process: Process) -> None:
    started = process.start()
    deaf, client = process.client().negotiate(), process.client().negotiate()
    client.run("x-test-announce", times=100, size=100_000)
    assert deaf.sock.fileno() >= 0
    client.sock.sendall(b'{"execute": "quit"}')
    assert started.wait(TIMEOUT) == 0


def test_a_command_under_way_is_answered_before_the_end(process: Process) -> None:
    started = process.start()
    client = process.client().negotiate()
    client.sock.sendall(  # in one piece: when one is answered, the other one is under way
        b'{"execute": "query-version"}'
        b'{"execute": "x-test-wait", "arguments": {"ms": 400}, "id": "w"}'
    )
    assert "return" in client.read()
    time.sleep(0.1)
    started.terminate()
    assert client.read() == {"return": {}, "id": "w"}
    assert client.at_end()
    assert started.wait(TIMEOUT) == 0


def test_stale_socket_is_replaced_and_a_live_one_is_not(process: Process) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(process.path)
    first = process.start()
    process.client().negotiate()
    second = process.start()
    errors = process.failed(second)
    assert "Failed to bind socket to" in errors
    assert "Address already in use" in errors
    assert first.poll() is None
    process.client().negotiate()  # the first one's socket is still there


def test_a_file_in_the_way_is_kept(process: Process) -> None:
    Path(process.path).write_text("precious")
    started = process.start()
    errors = process.failed(started)
    assert "Address already in use" in errors
    assert Path(process.path).read_text() == "precious"


def test_a_socket_that_is_no_longer_ours_is_kept(process: Process) -> None:
    started = process.start()
    process.client()
    os.unlink(process.path)
    with socket.socket(socket.AF_UNIX) as another:
        another.bind(process.path)
        started.terminate()
        assert started.wait(TIMEOUT) == 0
        assert os.path.exists(process.path)


def test_long_path_and_permissions(process: Process, tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 100) / ("e" * 100)
    directory.mkdir(parents=True)
    path = directory / "qmp.sock"
    started = process.start(f"socket,id=m,path={path},server=on,wait=off,mode=600")
    deadline = time.monotonic() + TIMEOUT
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    fd = os.open(directory, os.O_PATH)
    process.path = f"/proc/self/fd/{fd}/qmp.sock"
    process.client().negotiate()
    os.close(fd)
    started.terminate()
    assert started.wait(TIMEOUT) == 0
    assert not path.exists()


@pytest.mark.parametrize("listening", [True, False])
def test_inherited_descriptor(process: Process, listening: bool) -> None:
    if listening:
        ours = socket.socket(socket.AF_UNIX)
        ours.bind(process.path)
        ours.listen()
        process.start(
            f"socket,id=m,fd={ours.fileno()},server=on,wait=off", pass_fds=[ours.fileno()]
        )
        process.client().negotiate()
        process.client().negotiate()
        ours.close()
        return
    ours, theirs = socket.socketpair()
    process.start(f"socket,id=m,fd={theirs.fileno()}", pass_fds=[theirs.fileno()])
    theirs.close()
    assert "return" in Client(ours).negotiate().run("query-version")


def test_descriptor_that_is_no_socket(process: Process) -> None:
    started = process.start("socket,id=m,fd=0", stdin=subprocess.DEVNULL)
    errors = process.failed(started)
    assert "File descriptor '0'" in errors


def test_outgoing_connection_and_reconnect(process: Process) -> None:
    started = process.start(f"socket,id=m,path={process.path},reconnect=0.1")
    time.sleep(0.3)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(process.path)
        listener.listen()
        listener.settimeout(TIMEOUT)
        for _ in range(2):
            connection, _ = listener.accept()
            client = Client(connection).negotiate()
            assert "return" in client.run("query-version")
            client._file.close()
            connection.close()
    assert started.poll() is None


def test_outgoing_connection_that_fails(process: Process) -> None:
    started = process.start(f"socket,id=m,path={process.path}")
    errors = process.failed(started)
    assert f"Failed to connect to '{process.path}': No such file" in errors


def test_tcp(process: Process) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process.start(f"socket,id=m,host=127.0.0.1,port={port},server=on,wait=off")
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            connection = socket.create_connection(("127.0.0.1", port), TIMEOUT)
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert "return" in Client(connection).negotiate().run("query-version")


def test_wait_for_the_first_client(process: Process) -> None:
    started = process.start(f"socket,id=m,path={process.path},server=on")
    process.client().negotiate()
    assert started.poll() is None


STDIO = NEGOTIATE + b'{"execute": "query-name", "id": 1}{"execute": "quit"}\n'


def test_stdio_pipes(process: Process) -> None:
    started = process.start("stdio,id=m", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    out, _ = started.communicate(STDIO, timeout=TIMEOUT)
    assert started.returncode == 0
    assert [*map(json.loads, out.splitlines())][1:] == [
        {"return": {}},
        {"return": {}, "id": 1},
        {"return": {}},
    ]


def test_stdio_files(process: Process, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(STDIO)
    with (tmp_path / "in").open("rb") as stdin, (tmp_path / "out").open("wb") as stdout:
        started = process.start("stdio,id=m", stdin=stdin, stdout=stdout)
        assert started.wait(TIMEOUT) == 0
    assert len((tmp_path / "out").read_bytes().splitlines()) == 4


def test_pretty(process: Process) -> None:
    process.start(monitor="chardev=m,pretty=on")
    client = process.client()
    client.sock.sendall(NEGOTIATE)
    text = b""
    while not text.endswith(b'}\r\n{\r\n    "return": {\r\n    }\r\n}\r\n'):
        text += client.sock.recv(1)
    assert text.startswith(b'{\r\n    "QMP": {\r\n        "version": {\r\n')


def test_nothing_is_logged_about_clients_that_come_and_go(process: Process) -> None:
    started = process.start()
    for number in range(30):
        client = process.client()
        client.sock.sendall(NEGOTIATE[:number])
        client._file.close()
        client.sock.close()
    process.client().negotiate()
    started.terminate()
    assert started.wait(TIMEOUT) == 0
    assert process._errors.read_text() == ""
