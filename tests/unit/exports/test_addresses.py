"""Socket addresses: how they are written, and what is listened on."""

import os
import socket
from pathlib import Path

import pytest

from liveblockd.errors import BlockError
from liveblockd.exports.addresses import listen
from liveblockd.qapi import parse
from liveblockd.qapi.sockets import (
    FdSocketAddress,
    InetSocketAddress,
    SocketAddress,
    SocketAddressLegacy,
    UnixSocketAddress,
    VsockSocketAddress,
)


def exists(path):
    return Path(path).exists()


def test_flat_and_wrapped():
    flat = parse(SocketAddress, {"type": "unix", "path": "p"})
    wrapped = parse(SocketAddressLegacy, {"type": "unix", "data": {"path": "p"}})
    assert flat.plain().path == wrapped.plain().path == "p"
    flat = parse(SocketAddress, {"type": "inet", "host": "h", "port": "1", "to": "9"}, keyval=True)
    assert (flat.plain().host, flat.plain().port, flat.plain().to) == ("h", "1", 9)
    wrapped = parse(SocketAddressLegacy, {"type": "fd", "data": {"str": "7"}})
    assert wrapped.plain().str_ == "7"
    wrapped = parse(SocketAddressLegacy, {"type": "vsock", "data": {"cid": "3", "port": "7"}})
    assert isinstance(wrapped.plain(), VsockSocketAddress)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"type": "bogus", "data": {}}, "Parameter 'type' does not accept value 'bogus'"),
        ({"type": "unix"}, "Parameter 'data' is missing"),
        ({"type": "unix", "data": {}}, "Parameter 'data.path' is missing"),
        ({"type": "unix", "data": {"path": "p"}, "path": "p"}, "Parameter 'path' is unexpected"),
        ({"data": {"path": "p"}}, "Parameter 'type' is missing"),
    ],
)
def test_wrapped_errors(value, message):
    with pytest.raises(BlockError) as error:
        parse(SocketAddressLegacy, value)
    assert error.value.message == message


async def test_unix(tmp_path):
    path = str(tmp_path / "s")
    listeners = await listen(UnixSocketAddress(path=path), 5)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
    listeners.close()
    assert not exists(path)


async def test_unix_stale_socket_is_replaced(tmp_path):
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    assert exists(path)
    listeners = await listen(UnixSocketAddress(path=path), 5)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
    listeners.close()


@pytest.mark.parametrize("backlog", [5, 0])
async def test_unix_socket_in_use_is_left_alone(tmp_path, backlog):
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as alive, socket.socket(socket.AF_UNIX) as waiting:
        alive.bind(path)
        alive.listen(backlog)
        waiting.connect(path)  # with no backlog its queue is full now
        with pytest.raises(BlockError, match="Address already in use"):
            await listen(UnixSocketAddress(path=path), 5)
        assert exists(path)


async def test_a_file_in_the_way_is_left_alone(tmp_path):
    path = tmp_path / "disk.raw"
    path.write_bytes(b"precious")
    with pytest.raises(BlockError, match="Failed to bind socket"):
        await listen(UnixSocketAddress(path=str(path)), 5)
    assert path.read_bytes() == b"precious"
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(BlockError, match="Failed to bind socket"):
        await listen(UnixSocketAddress(path=str(link)), 5)
    assert link.is_symlink() and path.read_bytes() == b"precious"


async def test_the_socket_of_somebody_else_is_not_removed(tmp_path):
    path = str(tmp_path / "s")
    listeners = await listen(UnixSocketAddress(path=path), 5)
    os.unlink(path)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        listeners.close()
        assert exists(path)


async def test_a_change_of_directory_does_not_matter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listeners = await listen(UnixSocketAddress(path="s"), 5)
    monkeypatch.chdir("/")
    listeners.close()
    assert not (tmp_path / "s").exists()


async def test_unix_errors(tmp_path):
    with pytest.raises(BlockError) as error:
        await listen(UnixSocketAddress(path="/nonexistent/x"), 5)
    expected = "Failed to bind socket to /nonexistent/x: No such file or directory"
    assert error.value.message == expected
    path = "x" * 108
    with pytest.raises(BlockError) as error:
        await listen(UnixSocketAddress(path=path), 5)
    assert error.value.message == f"UNIX socket path '{path}' is too long"


async def test_abstract(tmp_path):
    name = f"liveblockd-test-{os.getpid()}"
    listeners = await listen(UnixSocketAddress(path=name, abstract=True), 5)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"\0{name}")
    listeners.close()


async def test_inet():
    listeners = await listen(InetSocketAddress(host="127.0.0.1", port="0"), 5)
    port = listeners.sockets[0].getsockname()[1]
    with pytest.raises(BlockError) as error:
        await listen(InetSocketAddress(host="127.0.0.1", port=str(port)), 5)
    assert error.value.message == "Failed to bind socket: Address already in use"
    more = await listen(InetSocketAddress(host="127.0.0.1", port=str(port), to=port + 50), 5)
    assert port < more.sockets[0].getsockname()[1] <= port + 50
    with socket.create_connection(("127.0.0.1", port)):
        pass
    more.close()
    listeners.close()


async def test_inet_errors():
    with pytest.raises(BlockError, match=r"^address resolution failed for not-an-address:1: "):
        await listen(InetSocketAddress(host="not-an-address", port="1", numeric=True), 5)
    with pytest.raises(BlockError, match="out of range"):
        await listen(InetSocketAddress(host="127.0.0.1", port="99999"), 5)
    with pytest.raises(BlockError, match="Cannot assign requested address"):
        await listen(InetSocketAddress(host="192.0.2.1", port="1"), 5)


async def test_inherited_descriptor(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        with pytest.raises(BlockError, match="not a listening socket"):
            await listen(FdSocketAddress(str_=str(listener.fileno())), 5)
        listener.listen()
        for _ in range(2):
            listeners = await listen(FdSocketAddress(str_=str(listener.fileno())), 5)
            listeners.close()
        assert (tmp_path / "s").exists()
    for name in ("0x1", "abc", "", "99999", "9" * 40):
        with pytest.raises(BlockError, match="File descriptor"):
            await listen(FdSocketAddress(str_=name), 5)
    null = os.open(os.devnull, os.O_RDONLY)
    with pytest.raises(BlockError, match="not a socket"):
        await listen(FdSocketAddress(str_=str(null)), 5)
    os.close(null)


async def test_vsock_is_refused():
    with pytest.raises(BlockError, match="vsock"):
        await listen(VsockSocketAddress(cid="1", port="1"), 5)
