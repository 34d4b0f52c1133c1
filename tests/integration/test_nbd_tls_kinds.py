"""TLS credentials of QEMU with QEMU at the other end: anonymous ones, priorities, sanity checks."""

import contextlib
import shutil
import ssl
import subprocess

import pytest

from tests.integration.test_nbd_tls import authority, keys, nbd_node, openssl  # noqa: F401
from tests.support.daemon import DaemonProcess, QmpError
from tests.support.nbd_peer import server
from tests.support.qcow2_images import needs

MIB = 1 << 20
UNIX = {"type": "unix", "data": {"path": "nbd.sock"}}


@contextlib.contextmanager
def our_server(tmp_path, **creds):
    with DaemonProcess(tmp_path) as daemon:
        client = daemon.qmp()
        client("object-add", id="t", endpoint="server", **creds)
        (tmp_path / "disk.raw").write_bytes(b"\x07" * MIB)
        client("blockdev-add", driver="file", node_name="disk", filename="disk.raw")
        client("nbd-server-start", addr=UNIX, tls_creds="t")
        client("block-export-add", type="nbd", id="e", node_name="disk", writable=True)
        yield client


def qemu_io(tmp_path, creds, *commands):
    words = [w for command in commands for w in ("-c", command)]
    image = "driver=nbd,server.type=unix,server.path=nbd.sock,export=disk,tls-creds=c"
    done = subprocess.run(
        ["qemu-io", "--object", f"{creds},id=c,endpoint=client", *words, "--image-opts",
         f"{image},tls-hostname=disks.example"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode == 0 and "Pattern" not in done.stdout


def qemu_nbd(tmp_path, creds):
    (tmp_path / "disk.raw").write_bytes(b"\x07" * MIB)
    return server(
        tmp_path, "qemu-nbd", "-t", "-e", "4", "-k", tmp_path / "nbd.sock", "-f", "raw",
        "-x", "disk", "--object", f"{creds},id=t,endpoint=server", "--tls-creds", "t", "disk.raw",
    )  # fmt: skip


ANON = {"qom_type": "tls-creds-anon"}


@needs("qemu-io")
@pytest.mark.parametrize("own_group", [False, True])
def test_qemu_comes_to_an_anonymous_server(tmp_path, own_group):
    creds = dict(ANON)
    if own_group:
        if shutil.which("openssl") is None:
            pytest.skip("openssl is not installed")
        openssl(tmp_path, "genpkey", "-genparam", "-algorithm", "DH", "-pkeyopt",
                "group:ffdhe2048", "-out", "dh-params.pem")  # fmt: skip
        creds["dir"] = str(tmp_path)
    with our_server(tmp_path, **creds):
        assert qemu_io(tmp_path, "tls-creds-anon", "read -P 7 0 1M", "write -P 9 64k 512k",
                       "flush", "read -P 9 64k 512k")  # fmt: skip
    assert (tmp_path / "disk.raw").read_bytes()[65536 : 65536 + 524288] == b"\x09" * 524288


@needs("qemu-nbd")
def test_we_come_to_an_anonymous_server_of_qemu(tmp_path):
    with qemu_nbd(tmp_path, "tls-creds-anon"), DaemonProcess(tmp_path) as daemon:
        client = daemon.qmp()
        client("object-add", id="c", endpoint="client", **ANON)
        nbd_node(client, server={"type": "unix", "path": "nbd.sock"}, tls_creds="c")
        for command in ("write -P 6 64k 300k", "flush"):
            client("human-monitor-command", command_line=f'qemu-io remote "{command}"')
        client("blockdev-del", node_name="remote")
    assert (tmp_path / "disk.raw").read_bytes()[65536 : 65536 + 307200] == b"\x06" * 307200


def test_both_ends_ours_and_who_is_refused(tmp_path, keys):  # noqa: F811
    with our_server(tmp_path, **ANON) as client:
        with pytest.raises(QmpError):
            client("object-add", id="d", endpoint="server", dir=str(tmp_path / "none"),
                   qom_type="tls-creds-x509")  # fmt: skip
        client("object-add", id="c", endpoint="client", **ANON)
        client("object-add", id="x", endpoint="client", dir=str(keys[0]),
               qom_type="tls-creds-x509")  # fmt: skip
        here = {"type": "unix", "path": str(tmp_path / "nbd.sock")}
        with pytest.raises(QmpError):  # who wants a certificate gets none
            nbd_node(client, server=here, tls_creds="x")
        with pytest.raises(QmpError, match="Expected TLS credentials for a client endpoint"):
            nbd_node(client, server=here, tls_creds="t")
        nbd_node(client, server=here, tls_creds="c")
        client("blockdev-del", node_name="remote")
        client("nbd-server-stop")
        client("object-add", qom_type="authz-simple", id="a", identity="x")
        with pytest.raises(QmpError):  # nobody has a name here
            client("nbd-server-start", addr=UNIX, tls_creds="t", tls_authz="a")
        with pytest.raises(QmpError, match="Expected TLS credentials for a server endpoint"):
            client("nbd-server-start", addr=UNIX, tls_creds="c")


@needs("qemu-io")
@pytest.mark.parametrize(("ours", "theirs", "fine"), [
    ("NORMAL", "NORMAL", True),
    ("NORMAL:-VERS-TLS1.3", "NORMAL", True),
    ("NORMAL:-VERS-TLS1.3", "NORMAL:-VERS-TLS1.2", False),
    ("NORMAL:-VERS-ALL:+VERS-TLS1.3", "NORMAL:-VERS-TLS1.3", False),
    ("NORMAL:-VERS-ALL:+VERS-TLS1.3", "NORMAL", True),
    ("SECURE256", "NORMAL", True),
    ("SECURE256", "NORMAL:-VERS-TLS1.3:-CIPHER-ALL:+AES-128-GCM", False),
    ("NORMAL:-VERS-TLS1.3:-AES-128-GCM", "NORMAL:-CIPHER-ALL:+AES-128-GCM", False),
    ("NORMAL:-VERS-TLS1.3:-CIPHER-ALL:+AES-128-GCM", "SECURE256", False),
    ("NORMAL:-VERS-TLS1.3:-CIPHER-ALL:+AES-128-GCM", "NORMAL", True),
])  # fmt: skip
def test_priorities_mean_what_they_mean_to_qemu(tmp_path, keys, ours, theirs, fine):  # noqa: F811
    creds = {"qom_type": "tls-creds-x509", "dir": str(keys[0]), "priority": ours}
    with our_server(tmp_path, **creds):
        peer = f"tls-creds-x509,dir={keys[0]},priority={theirs}"
        assert qemu_io(tmp_path, peer, "read -P 7 0 1M") is fine


def test_a_priority_that_cannot_be(tmp_path, keys):  # noqa: F811
    with DaemonProcess(tmp_path) as daemon:
        client = daemon.qmp()
        for creds in ({"qom_type": "tls-creds-x509", "dir": str(keys[0])}, ANON):
            with pytest.raises(QmpError, match="Unable to set TLS session priority NONE"):
                client("object-add", id="t", priority="NONE", **creds)
        assert client("qom-list", path="/objects")[1:] == []


# -- sanity-check


def signed(directory, end, usage, *when):
    """A certificate of the authority in ``directory``; ``when``: options of openssl-ca."""
    openssl(directory, "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
            "-keyout", f"{end}-key.pem", "-out", f"{end}.csr", "-subj", f"/CN={end}")  # fmt: skip
    (directory / "index.txt").write_text("")
    (directory / "ca.conf").write_text(
        "[ca]\ndefault_ca=own\n[own]\ndatabase=index.txt\nnew_certs_dir=.\ndefault_md=sha256\n"
        "policy=any\nrand_serial=yes\nx509_extensions=ext\n[any]\ncommonName=supplied\n"
        f"[ext]\nbasicConstraints=CA:FALSE\nextendedKeyUsage={usage}\n"
        "keyUsage=digitalSignature\nsubjectAltName=DNS:disks.example\n"
    )
    openssl(directory, "ca", "-batch", "-config", "ca.conf", "-cert", "ca-cert.pem", "-keyfile",
            "ca-key.pem", "-in", f"{end}.csr", "-out", f"{end}-cert.pem", "-notext",
            *when)  # fmt: skip


PAST = ("-startdate", "20200101000000Z", "-enddate", "20200201000000Z")
FUTURE = ("-startdate", "20900101000000Z", "-enddate", "20910101000000Z")
GOOD = ("-days", "2")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    return authority(tmp_path_factory.mktemp("sanity") / "good")


@pytest.mark.parametrize("end", ["server", "client"])
@pytest.mark.parametrize(("what", "said"), [
    (GOOD, None),
    (PAST, "The {end} certificate {path} has expired"),
    (FUTURE, "The {end} certificate {path} is not yet active"),
    ("other purpose", None),
    ("purpose", "Certificate {path} purpose does not allow use with a TLS {end}"),
    ("stranger", "Our own certificate {path} failed validation against {authority}: "),
])  # fmt: skip
def test_certificates_of_no_use(tmp_path, place, keys, end, what, said):  # noqa: F811
    """As QEMU says it, and taken all the same without the check."""
    directory = tmp_path / "keys"
    shutil.copytree(place, directory)
    usage = {"server": "serverAuth", "client": "clientAuth"}
    other = usage["client" if end == "server" else "server"]
    if what == "purpose":
        signed(directory, end, f"critical,{other}", *GOOD)
    elif what == "other purpose":  # as a hint: GnuTLS does not mind
        signed(directory, end, other, *GOOD)
    elif what == "stranger":
        shutil.copy(keys[1] / f"{end}-cert.pem", directory)
        shutil.copy(keys[1] / f"{end}-key.pem", directory)
    else:
        signed(directory, end, usage[end], *what)
    members = {"qom_type": "tls-creds-x509", "endpoint": end, "dir": str(directory)}
    with DaemonProcess(tmp_path) as daemon:
        client = daemon.qmp()
        if said is None:
            client("object-add", id="t", **members)
        else:
            path, ca = directory / f"{end}-cert.pem", directory / "ca-cert.pem"
            said = said.format(path=path, authority=ca, end=end)
            with pytest.raises(QmpError) as caught:
                client("object-add", id="t", **members)
            assert str(caught.value).startswith(said)
        client("object-add", id="u", sanity_check=False, **members)
    if shutil.which("qemu-io") is None:
        return
    done = subprocess.run(
        ["qemu-io", "--object", f"tls-creds-x509,id=t,endpoint={end},dir={directory}",
         "-c", "quit", "-f", "raw", "null-co://"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (said or "") in done.stderr
    assert bool(done.stderr) is (said is not None)


def test_an_authority_that_has_expired(tmp_path, place):
    directory = tmp_path / "keys"
    directory.mkdir()
    shutil.copy(place / "ca-key.pem", directory)
    openssl(directory, "req", "-new", "-key", "ca-key.pem", "-subj", "/CN=ca", "-out", "ca.csr")
    (directory / "index.txt").write_text("")
    (directory / "ca.conf").write_text(
        "[ca]\ndefault_ca=own\n[own]\ndatabase=index.txt\nnew_certs_dir=.\ndefault_md=sha256\n"
        "policy=any\nrand_serial=yes\nx509_extensions=ext\n[any]\ncommonName=supplied\n"
        "[ext]\nbasicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign\n"
    )
    openssl(directory, "ca", "-batch", "-selfsign", "-config", "ca.conf", "-keyfile", "ca-key.pem",
            "-in", "ca.csr", "-out", "ca-cert.pem", "-notext", *PAST)  # fmt: skip
    with DaemonProcess(tmp_path) as daemon:
        client = daemon.qmp()
        members = {"qom_type": "tls-creds-x509", "endpoint": "client", "dir": str(directory)}
        with pytest.raises(QmpError, match=r"The CA certificate .*ca-cert.pem has expired"):
            client("object-add", id="t", **members)
        client("object-add", id="u", sanity_check=False, **members)


def test_ciphers_of_anonymous_ends_need_no_certificate():
    """What the whole kind stands on: this OpenSSL has them."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_ciphers("ADH+AESGCM:@SECLEVEL=0")
    assert [c for c in context.get_ciphers() if c["name"].startswith("ADH")]
