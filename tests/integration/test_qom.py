"""Types and properties of objects, and iothreads of nodes, with the answers of QEMU's daemon."""

import pytest

from tests.support.daemon import DaemonProcess, QmpError


@pytest.fixture
def client(tmp_path):
    with DaemonProcess(
        tmp_path,
        *("--object", "iothread,id=io0", "--object", "secret,id=s0,data=abc"),
        *("--object", "throttle-group,id=g0,x-bps-total=1048576"),
        *("--blockdev", "null-co,node-name=n0,size=1048576"),
    ) as daemon:
        yield daemon.qmp()


def names(found):
    return {one["name"] for one in found}


def refused(client, name, **arguments):
    with pytest.raises(QmpError) as info:
        client(name, **arguments)
    return str(info.value)


def test_types(client):
    found = client("qom-list-types")
    assert {"name": "secret", "parent": "secret_common"} in found
    assert {"name": "container", "parent": "object"} in found
    assert not any("abstract" in one for one in found)
    everything = client("qom-list-types", abstract=True)
    assert {"abstract": True, "name": "object"} in everything
    assert {"abstract": True, "name": "user-creatable", "parent": "interface"} in everything
    assert names(client("qom-list-types", implements="authz")) == {
        "authz-list", "authz-list-file", "authz-simple"
    }  # fmt: skip
    creatable = names(client("qom-list-types", implements="user-creatable"))
    assert creatable == names(found) - {"container"}
    assert client("qom-list-types", implements="nope") == []


def test_properties(client):
    assert client("qom-list-properties", typename="authz-list-file") == [
        {"name": "type", "type": "string"},
        {"name": "filename", "type": "string"},
        {"name": "refresh", "type": "bool"},
    ]
    limits = client("qom-list-properties", typename="throttle-group")
    assert {"name": "limits", "type": "ThrottleLimits"} in limits
    assert {"name": "x-bps-total", "type": "int"} in limits
    assert limits == client("qom-list", path="/objects/g0")
    assert names(client("qom-list-properties", typename="tls-creds")) == {
        "type", "endpoint", "dir", "verify-peer", "priority"
    }  # fmt: skip
    assert names(client("qom-list-properties", typename="object")) == {"type"}
    assert refused(client, "qom-list-properties", typename="nope") == "Class 'nope' not found"
    expected = "Parameter 'typename' expects a QOM type"
    assert refused(client, "qom-list-properties", typename="user-creatable") == expected


def test_values(client):
    group, secret = client("qom-list-get", paths=["/objects/g0", "s0"])
    assert {"name": "x-bps-total", "type": "int", "value": 1048576} in group["properties"]
    assert {"name": "type", "type": "string", "value": "secret"} in secret["properties"]
    assert {"name": "data", "type": "string"} in secret["properties"]
    assert "abc" not in str(secret)
    (everything,) = client("qom-list-get", paths=["/objects"])
    assert {"name": "io0", "type": "child<iothread>"} in everything["properties"]
    assert refused(client, "qom-list-get", paths=["/objects/g0", "/x"]) == "Device '/x' not found"


def test_both_names_of_a_list_in_a_file(client, tmp_path):
    path = tmp_path / "who"
    path.write_text('{"policy": "deny"}')
    for number, kind in enumerate(("authz-list-file", "authz-listfile")):
        client("object-add", qom_type=kind, id=f"a{number}", filename=str(path))
        assert client("qom-get", path=f"a{number}", property="type") == "authz-list-file"


def test_iothread_of_a_node(client, tmp_path):
    name = "x-blockdev-set-iothread"
    for iothread in ("io0", None):
        assert client(name, node_name="n0", iothread=iothread) == {}
    expected = "Failed to find node with node-name='ghost'"
    assert refused(client, name, node_name="ghost", iothread="io0") == expected
    for other in ("zzz", "g0"):
        expected = f"Cannot find iothread {other}"
        assert refused(client, name, node_name="n0", iothread=other) == expected
    assert refused(client, name, node_name="n0") == "Parameter 'iothread' is missing"
    expected = "Invalid parameter type for 'iothread', expected: StrOrNull"
    assert refused(client, name, node_name="n0", iothread=5) == expected
    address = {"type": "unix", "data": {"path": str(tmp_path / "nbd")}}
    client("nbd-server-start", addr=address)
    client("block-export-add", type="nbd", id="e", node_name="n0")
    assert "use force=true" in refused(client, name, node_name="n0", iothread="io0")
    assert client(name, node_name="n0", iothread="io0", force=True) == {}
