"""NBD over TLS: with QEMU's client and server, with ourselves, and with impostors."""

import contextlib
import json
import shutil
import socket
import ssl
import struct
import subprocess
import time

import pytest

from tests.support.daemon import DaemonProcess, QmpError

MIB = 1 << 20
UNIX = {"type": "unix", "path": "nbd.sock"}


def openssl(directory, *words):
    subprocess.run(["openssl", *words], cwd=directory, check=True, capture_output=True, timeout=60)


def authority(directory):
    directory.mkdir()
    openssl(directory, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
            "-nodes", "-keyout", "ca-key.pem", "-out", "ca-cert.pem", "-days", "2",
            "-subj", "/CN=ca", "-addext", "keyUsage=critical,keyCertSign,cRLSign")  # fmt: skip
    for end, usage in (("server", "serverAuth"), ("client", "clientAuth")):
        openssl(directory, "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
                "-nodes", "-keyout", f"{end}-key.pem", "-out", f"{end}.csr",
                "-subj", f"/CN={end}")  # fmt: skip
        (directory / "ext").write_text(
            "basicConstraints=CA:FALSE\nkeyUsage=digitalSignature\n"
            f"extendedKeyUsage={usage}\nsubjectAltName=DNS:disks.example\n"
        )
        openssl(directory, "x509", "-req", "-in", f"{end}.csr", "-CA", "ca-cert.pem",
                "-CAkey", "ca-key.pem", "-CAcreateserial", "-days", "2", "-extfile", "ext",
                "-out", f"{end}-cert.pem")  # fmt: skip
    return directory


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    place = tmp_path_factory.mktemp("keys")
    return authority(place / "good"), authority(place / "other")


@contextlib.contextmanager
def server(tmp_path, keys, objects=(), authz=None, **more):
    with DaemonProcess(tmp_path) as daemon:
        client = daemon.qmp()
        client("object-add", qom_type="tls-creds-x509", id="t", endpoint="server", dir=str(keys),
               **more)  # fmt: skip
        for members in objects:
            client("object-add", **members)
        (tmp_path / "disk.raw").write_bytes(b"\x07" * MIB)
        client("blockdev-add", driver="file", node_name="disk", filename="disk.raw")
        client("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}},
               tls_creds="t", **({"tls_authz": authz} if authz else {}))  # fmt: skip
        client("block-export-add", type="nbd", id="e", node_name="disk", writable=True)
        yield daemon, client


def qemu_io(tmp_path, keys, *commands):
    if shutil.which("qemu-io") is None:
        pytest.skip("qemu-io is not installed")
    words = [w for command in commands for w in ("-c", command)]
    creds = f"tls-creds-x509,id=t,endpoint=client,dir={keys}"
    image = ("driver=nbd,server.type=unix,server.path=nbd.sock,export=disk,tls-creds=t,"
             "tls-hostname=disks.example")  # fmt: skip
    return subprocess.run(
        ["qemu-io", "--object", creds, *words, "--image-opts", image],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_qemu_reads_and_writes(tmp_path, keys):
    with server(tmp_path, keys[0]):
        done = qemu_io(tmp_path, keys[0], "read -P 7 0 1M", "write -P 9 64k 512k", "flush",
                       "read -P 9 64k 512k")  # fmt: skip
        assert done.returncode == 0 and "Pattern" not in done.stdout, done
    assert (tmp_path / "disk.raw").read_bytes()[65536 : 65536 + 524288] == b"\x09" * 524288


def test_a_client_of_another_authority_is_refused(tmp_path, keys):
    with server(tmp_path, keys[0]) as (_, client):
        assert qemu_io(tmp_path, keys[1], "read 0 1M").returncode != 0
        assert client("query-block-exports")[0]["id"] == "e"
        assert qemu_io(tmp_path, keys[0], "read -P 7 0 1M").returncode == 0


def test_whether_the_client_needs_a_certificate(tmp_path, keys):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(keys[0] / "ca-cert.pem", bare)
    (tmp_path / "strict").mkdir()
    with server(tmp_path / "strict", keys[0]):
        assert qemu_io(tmp_path / "strict", bare, "read 0 1M").returncode != 0
    (tmp_path / "open").mkdir()
    with server(tmp_path / "open", keys[0], verify_peer=False):
        assert qemu_io(tmp_path / "open", bare, "read -P 7 0 1M").returncode == 0


def talk(tmp_path, data):
    """What the server says to flags and ``data``, until it closes or waits."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1)
        client.connect(str(tmp_path / "nbd.sock"))
        client.sendall(struct.pack(">I", 3) + data)
        found = b""
        with contextlib.suppress(TimeoutError):
            while part := client.recv(4096):
                found += part
        return found[18:]


def option(number, data=b""):
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def test_nothing_is_told_in_the_clear(tmp_path, keys):
    with server(tmp_path, keys[0]):
        for number in (3, 6, 7, 8, 10):  # LIST, INFO, GO, STRUCTURED_REPLY, SET_META_CONTEXT
            answer = talk(tmp_path, option(number, b"\0" * 8))
            assert struct.unpack(">QIII", answer[:20])[2] == 0x80000005, number
        assert talk(tmp_path, option(1, b"disk")) == b""


def test_what_follows_starttls_in_the_clear_ends_the_connection(tmp_path, keys):
    with server(tmp_path, keys[0]):
        assert len(talk(tmp_path, option(5))) == 20  # the answer, then it waits for a handshake
        assert talk(tmp_path, option(5) + option(3)) == b""


def nbd_node(client, **more):
    more = {"server": UNIX, "export": "disk"} | more
    client("blockdev-add", driver="nbd", node_name="remote", **more)


def test_a_node_over_tls(tmp_path, keys):
    (tmp_path / "there").mkdir()
    (tmp_path / "here").mkdir()
    path = {"type": "unix", "path": str(tmp_path / "there" / "nbd.sock")}
    with server(tmp_path / "there", keys[0]), DaemonProcess(tmp_path / "here") as daemon:
        client = daemon.qmp()
        for name, directory in (("t", keys[0]), ("o", keys[1])):
            client("object-add", qom_type="tls-creds-x509", id=name, endpoint="client",
                   dir=str(directory))  # fmt: skip
        for wrong in ({}, {"tls_creds": "o"}, {"tls_creds": "t", "tls_hostname": "elsewhere"},
                      {"tls_creds": "ghost"}):  # fmt: skip
            with pytest.raises(QmpError):
                nbd_node(client, server=path, **wrong)
        for right in ({}, {"tls_hostname": "disks.example"}):
            nbd_node(client, server=path, tls_creds="t", **right)
            client("blockdev-add", driver="file", node_name="copy", filename=make(tmp_path))
            client("blockdev-backup", job_id="b", device="remote", target="copy", sync="full")
            assert "error" not in client.wait("BLOCK_JOB_COMPLETED", device="b")["data"]
            client.wait("JOB_STATUS_CHANGE", id="b", status="null")
            client.events.clear()
            client("blockdev-del", node_name="copy")
            client("blockdev-del", node_name="remote")
            assert (tmp_path / "copy.raw").read_bytes() == b"\x07" * MIB


def test_a_node_of_the_daemon_without_tls(tmp_path):
    """The daemon has another event loop than the tests that make drivers themselves."""
    (tmp_path / "disk.raw").write_bytes(b"\x07" * MIB)
    with DaemonProcess(tmp_path) as daemon:
        client = daemon.qmp()
        client("blockdev-add", driver="file", node_name="disk", filename="disk.raw")
        client("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})
        client("block-export-add", type="nbd", id="e", node_name="disk", writable=True)
        nbd_node(client)
        client("blockdev-add", driver="file", node_name="copy", filename=make(tmp_path))
        client("blockdev-mirror", job_id="m", device="remote", target="copy", sync="full")
        client.wait("BLOCK_JOB_READY", device="m")
        client("block-job-cancel", device="m")
        client.wait("JOB_STATUS_CHANGE", id="m", status="null")
    assert (tmp_path / "copy.raw").read_bytes() == b"\x07" * MIB


def make(tmp_path):
    path = tmp_path / "copy.raw"
    path.write_bytes(bytes(MIB))
    return str(path)


def test_a_node_on_qemus_server(tmp_path, keys):
    if shutil.which("qemu-nbd") is None:
        pytest.skip("qemu-nbd is not installed")
    (tmp_path / "disk.raw").write_bytes(b"\x05" * MIB)
    creds = f"tls-creds-x509,id=t,endpoint=server,dir={keys[0]}"
    process = subprocess.Popen(
        ["qemu-nbd", "--object", creds, "--tls-creds", "t", "-t", "-x", "disk", "-f", "raw",
         "-k", str(tmp_path / "nbd.sock"), "disk.raw"], cwd=tmp_path,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 20
        while not (tmp_path / "nbd.sock").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with DaemonProcess(tmp_path) as daemon:
            client = daemon.qmp()
            client("object-add", qom_type="tls-creds-x509", id="t", endpoint="client",
                   dir=str(keys[0]))  # fmt: skip
            nbd_node(client, tls_creds="t", tls_hostname="disks.example")
            client("human-monitor-command", command_line='qemu-io remote "write -P 6 0 300k"')
            client("human-monitor-command", command_line='qemu-io remote "flush"')
            client("blockdev-del", node_name="remote")
    finally:
        process.terminate()
        process.wait(20)
    assert (tmp_path / "disk.raw").read_bytes() == b"\x06" * 307200 + b"\x05" * (MIB - 307200)


def test_credentials_that_cannot_be_used(tmp_path, keys):
    with DaemonProcess(tmp_path) as daemon:
        client = daemon.qmp()
        start = {"addr": {"type": "unix", "data": {"path": "nbd.sock"}}}

        def refused(text, name, **given):
            with pytest.raises(QmpError) as error:
                client(name, **given)
            assert str(error.value) == text

        x509 = {"qom_type": "tls-creds-x509", "id": "t", "endpoint": "server"}
        refused("Missing 'dir' property value", "object-add", **x509)
        refused("Unable to access credentials /nowhere/ca-cert.pem: No such file or directory",
                "object-add", **x509, dir="/nowhere")  # fmt: skip
        (tmp_path / "ca-cert.pem").write_text("no certificate")
        refused("Unable to access credentials ./server-cert.pem: No such file or directory",
                "object-add", **x509, dir=".")  # fmt: skip
        refused("Unable to import CA certificate list ./ca-cert.pem",
                "object-add", **x509 | {"endpoint": "client"}, dir=".")  # fmt: skip
        client("object-add", qom_type="secret", id="s", data="x")
        client("object-add", **x509 | {"endpoint": "client"}, dir=str(keys[0]))
        refused(
            "No TLS credentials with id 'ghost'", "nbd-server-start", **start, tls_creds="ghost"
        )
        refused("Object with id 's' is not TLS credentials", "nbd-server-start", **start,
                tls_creds="s")  # fmt: skip
        refused("Expected TLS credentials for a server endpoint", "nbd-server-start", **start,
                tls_creds="t")  # fmt: skip
        assert json.dumps(client("query-block-exports")) == "[]"


def test_who_may_connect(tmp_path, keys):
    """The name is the client's, ``CN=client``; what cannot be decided is denied."""
    path = tmp_path / "who.json"
    path.write_text(json.dumps({"rules": [{"match": "CN=nobody", "policy": "allow"}]}))
    objects = [
        {"qom_type": "authz-simple", "id": "right", "identity": "CN=client"},
        {"qom_type": "authz-simple", "id": "wrong", "identity": "CN=clien"},
        {"qom_type": "authz-list-file", "id": "file", "filename": str(path)},
        {"qom_type": "authz-list", "id": "list", "policy": "deny", "rules": [
            {"match": "CN=c", "policy": "deny", "format": "exact"},
            {"match": "CN=cli?nt*", "policy": "allow", "format": "glob"},
        ]},
        {"qom_type": "authz-list", "id": "other", "policy": "allow", "rules": [
            {"match": "CN=*t", "policy": "deny", "format": "glob"},
        ]},
    ]  # fmt: skip
    with server(tmp_path, keys[0], objects, "right") as (_, client):

        def connects(authz):
            client("nbd-server-stop")
            address = {"type": "unix", "data": {"path": "nbd.sock"}}
            client("nbd-server-start", addr=address, tls_creds="t", tls_authz=authz)
            client("block-export-add", type="nbd", id="e", node_name="disk", writable=True)
            return qemu_io(tmp_path, keys[0], "read -P 7 0 1M").returncode == 0

        assert qemu_io(tmp_path, keys[0], "read -P 7 0 1M").returncode == 0
        found = {n: connects(n) for n in ("right", "wrong", "list", "other", "ghost", "t", "file")}
        allowed = {name for name, there in found.items() if there}
        assert allowed == {"right", "list"}
        path.write_text(json.dumps({"rules": [{"match": "CN=client", "policy": "allow"}]}))
        assert qemu_io(tmp_path, keys[0], "read -P 7 0 1M").returncode == 0
        path.write_text("{")
        assert qemu_io(tmp_path, keys[0], "read -P 7 0 1M").returncode != 0
        client("nbd-server-stop")
        client("object-add", qom_type="tls-creds-x509", id="loose", endpoint="server",
               dir=str(keys[0]), verify_peer=False)  # fmt: skip
        for more in ({}, {"tls_creds": "loose"}):
            with pytest.raises(QmpError, match="'tls-authz' needs 'tls-creds'"):
                client("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}},
                       tls_authz="right", **more)  # fmt: skip


def test_a_client_that_says_goodbye_in_tls_leaves_no_word_in_the_log(tmp_path, keys):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(keys[0] / "ca-cert.pem")
    context.load_cert_chain(keys[0] / "client-cert.pem", keys[0] / "client-key.pem")
    with server(tmp_path, keys[0]) as (daemon, _):
        plain = socket.socket(socket.AF_UNIX)
        plain.settimeout(10)
        plain.connect(str(tmp_path / "nbd.sock"))
        plain.sendall(struct.pack(">I", 3) + option(5))
        head = b""
        while len(head) < 18 + 20:
            head += plain.recv(4096)
        with context.wrap_socket(plain, server_hostname="disks.example") as secure:
            secure.sendall(option(3))
            assert secure.recv(20)
            with contextlib.suppress(OSError):
                secure.unwrap()
        assert daemon.stop() == 0
    assert daemon.errors == b""


def test_an_option_in_the_last_packet_of_the_handshake(tmp_path, keys):
    """A client of TLS 1.3 may send it with its Finished; authorized or not, nothing is confused."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(keys[0] / "ca-cert.pem")
    context.load_cert_chain(keys[0] / "client-cert.pem", keys[0] / "client-key.pem")
    objects = [
        {"qom_type": "authz-simple", "id": n, "identity": f"CN={n}"} for n in ("client", "x")
    ]
    for authz in ("client", "x"):
        place = tmp_path / authz
        place.mkdir()
        with server(place, keys[0], objects, authz), socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(str(place / "nbd.sock"))
            client.sendall(struct.pack(">I", 3) + option(5))
            head = b""
            while len(head) < 18 + 20:
                head += client.recv(4096)
            came, goes = ssl.MemoryBIO(), ssl.MemoryBIO()
            secure = context.wrap_bio(came, goes, server_hostname="disks.example")
            while True:
                try:
                    secure.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    client.sendall(goes.read())
                    came.write(client.recv(65536))
            secure.write(option(3))
            client.sendall(goes.read())  # Finished and the option
            answer = b""
            while len(answer) < 40:
                try:
                    answer += secure.read(4096)
                except ssl.SSLWantReadError:
                    data = client.recv(65536)
                    if not data:
                        break
                    came.write(data)
                except (ssl.SSLError, OSError):
                    break
            assert (b"disk" in answer) is (authz == "client")


def test_keys_without_certificates(tmp_path):
    """With an older Python the object is refused, which tells what to do."""
    directory = tmp_path / "keys"
    directory.mkdir()
    (directory / "keys.psk").write_text("joe:" + "0f" * 32 + "\nmallory:" + "1e" * 32 + "\n")
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "keys.psk").write_text("joe:" + "2d" * 32 + "\n")
    (tmp_path / "disk.raw").write_bytes(b"\x07" * MIB)
    members = {"qom_type": "tls-creds-psk", "id": "t", "endpoint": "server", "dir": str(directory)}
    with DaemonProcess(tmp_path) as daemon:
        client = daemon.qmp()
        if not getattr(ssl, "HAS_PSK", False):
            with pytest.raises(QmpError, match="tls-creds-psk needs Python 3"):
                client("object-add", **members)
            return
        client("object-add", **members)
        client("blockdev-add", driver="file", node_name="disk", filename="disk.raw")
        client("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}},
               tls_creds="t")  # fmt: skip
        client("block-export-add", type="nbd", id="e", node_name="disk", writable=True)
        client("object-add", qom_type="tls-creds-psk", id="c", endpoint="client",
               dir=str(directory), username="joe")  # fmt: skip
        client("object-add", qom_type="tls-creds-psk", id="w", endpoint="client",
               dir=str(wrong), username="joe")  # fmt: skip
        here = {"type": "unix", "path": str(tmp_path / "nbd.sock")}
        with pytest.raises(QmpError):
            nbd_node(client, server=here, tls_creds="w")
        nbd_node(client, server=here, tls_creds="c")
        client("blockdev-del", node_name="remote")
        if shutil.which("qemu-io") is None:
            return
        for place, user, fine in ((directory, "mallory", True), (wrong, "joe", False)):
            done = subprocess.run(
                ["qemu-io", "--object",
                 f"tls-creds-psk,id=t,endpoint=client,dir={place},username={user}",
                 "-c", "read -P 7 0 1M", "--image-opts",
                 "driver=nbd,server.type=unix,server.path=nbd.sock,export=disk,tls-creds=t"],
                cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
            assert (done.returncode == 0 and "Pattern" not in done.stdout) is fine, done
