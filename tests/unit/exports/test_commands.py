"""The QMP commands of exports, in the words of QEMU."""

import asyncio
from types import SimpleNamespace

import pytest

from liveblockd.errors import BlockError
from liveblockd.events import Publisher
from liveblockd.exports.export import register_export
from liveblockd.exports.nbd_export import NbdExport
from liveblockd.jobs.scheduler import Scheduler
from liveblockd.qmp import registry
from liveblockd.qmp.commands import exports as _commands
from liveblockd.qmp.commands.objects import Iothread, object_registry
from liveblockd.qmp.context import Context
from tests.support.memory import MemoryDriver
from tests.unit.exports.memory_export import MemoryBackend, new_registry
from tests.unit.exports.nbd_client import Client

assert _commands  # imported for its commands


class Qmp:
    def __init__(self, tmp_path):
        self.path = str(tmp_path / "nbd.sock")
        self.address = {"type": "unix", "data": {"path": self.path}}
        self.disk = MemoryBackend("disk", MemoryDriver(4096))
        read_only = MemoryBackend("ro", MemoryDriver(4096, read_only=True))
        publisher = Publisher()
        self.events = []
        publisher.subscribe(lambda e: self.events.append((e.name, e.data()["id"])))
        nodes = {"disk": self.disk, "ro": read_only}
        self.context = Context(
            graph=SimpleNamespace(lookup=lambda device, _: self.lookup(nodes, device)),
            scheduler=Scheduler(publisher),
            exports=new_registry(*nodes.values(), publisher=publisher),
            workers=None,
            publisher=publisher,
            on_quit=lambda _: None,
        )

    @staticmethod
    def lookup(nodes, name):
        if name not in nodes:
            raise BlockError(f"Cannot find device='{name}' nor node-name='{name}'")
        return SimpleNamespace(name=name, read_only=nodes[name].read_only)

    async def do(self, command, /, **arguments):
        arguments = {k.replace("_", "-"): v for k, v in arguments.items()}
        return await registry.execute(self.context, command, arguments)

    async def error(self, command, /, **arguments):
        with pytest.raises(BlockError) as error:
            await self.do(command, **arguments)
        assert error.value.error_class == "GenericError"
        return error.value.message

    async def add(self, export_id, node="disk", **members):
        return await self.do(
            "block-export-add", type="nbd", id=export_id, node_name=node, **members
        )

    async def add_error(self, export_id, node="disk", **members):
        return await self.error(
            "block-export-add", type="nbd", id=export_id, node_name=node, **members
        )

    async def exports(self):
        return [e["id"] for e in await self.do("query-block-exports")]


@pytest.fixture
async def qmp(tmp_path):
    qmp = Qmp(tmp_path)
    yield qmp
    await qmp.context.exports.close()


@pytest.fixture
async def started(qmp):
    assert await qmp.do("nbd-server-start", addr=qmp.address) == {}
    return qmp


async def test_no_server(qmp):
    assert await qmp.add_error("e0") == "NBD server not running"
    assert await qmp.error("nbd-server-stop") == "NBD server not running"
    assert await qmp.error("nbd-server-add", device="disk") == "NBD server not running"
    assert await qmp.do("query-block-exports") == []
    assert qmp.disk.released == 2  # nothing keeps the node


async def test_start(started):
    qmp = started
    assert await qmp.error("nbd-server-start", addr=qmp.address) == "NBD server already running"
    await qmp.do("nbd-server-stop")
    for name in ("max-connections", "handshake-max-seconds"):
        for value in (-1, 2**32):
            message = await qmp.error("nbd-server-start", addr=qmp.address, **{name: value})
            assert message == f"Parameter '{name}' expects uint32_t"
    tls = await qmp.error("nbd-server-start", addr=qmp.address, tls_creds="t0")
    assert tls == "No TLS credentials with id 't0'"
    assert "tls-authz" in await qmp.error("nbd-server-start", addr=qmp.address, tls_authz="a0")
    assert "vsock" in await qmp.error(
        "nbd-server-start", addr={"type": "vsock", "data": {"cid": "1", "port": "1"}}
    )
    await qmp.do("nbd-server-start", addr=qmp.address, max_connections=0)


async def test_add(started):
    qmp = started
    assert await qmp.add("e0") == {}
    assert await qmp.add_error("e0") == "Block export id 'e0' is already in use"
    assert await qmp.add_error("e1") == "NBD server already has export named 'disk'"
    message = await qmp.add_error("e2", "ro", name="third", writable=True)
    assert message == "Cannot export read-only node as writable"
    missing = "Cannot find device='' nor node-name='ghost'"
    assert await qmp.add_error("e2", "ghost", name="third") == missing
    for name in ("2e", "", "a b", "é", "a\n"):
        assert await qmp.add_error(name, name="x") == "Invalid block export id"
    long = "n" * 4097
    assert await qmp.add_error("e2", name=long) == f"export name '{long}' too long"
    message = await qmp.add_error("e2", name="n", description=long)
    assert message == f"description '{long}' too long"
    assert await qmp.add_error("e2", name="n", bitmaps=["b"]) == "Bitmap 'b' is not found"
    assert await qmp.add_error("e2", name="n", iothread="io") == 'iothread "io" not found'
    object_registry(qmp.context).add(Iothread(qom_type="iothread", id="io"))
    await qmp.add("e2", name="n", iothread="io")
    await qmp.add("e3", name="m", iothread=["io"], fixed_iothread=True, description="d")
    assert await qmp.exports() == ["e0", "e2", "e3"]
    shown = (await qmp.do("query-block-exports"))[0]
    expected = {"id": "e0", "type": "nbd", "node-name": "disk", "shutting-down": False}
    assert shown == expected
    qmp.disk.node.name = "overlay"  # a snapshot
    assert (await qmp.do("query-block-exports"))[0]["node-name"] == "overlay"
    assert not qmp.events


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"type": "tape", "id": "e", "node-name": "d"},
            "Parameter 'type' does not accept value 'tape'",
        ),
        ({"type": "nbd", "id": "e"}, "Parameter 'node-name' is missing"),
        ({"type": "nbd", "node-name": "d"}, "Parameter 'id' is missing"),
        ({"type": "nbd", "id": "e", "node-name": "d", "nope": 1}, "Parameter 'nope' is unexpected"),
        (
            {"type": "nbd", "id": "e", "node-name": "d", "iothread": 1},
            "Invalid parameter type for 'iothread', expected: BlockExportIothreads",
        ),
    ],
)
async def test_arguments(started, arguments, message):
    with pytest.raises(BlockError) as error:
        await registry.execute(started.context, "block-export-add", arguments)
    assert error.value.message == message


async def test_delete(started):
    qmp = started
    await qmp.add("e0", writable=True)
    async with Client.connected(qmp.path, "disk"):
        assert await qmp.error("block-export-del", id="e0") == "export 'e0' still in use"
        assert await qmp.error("nbd-server-remove", name="e0") == "export 'e0' still in use"
        assert not qmp.events
        await qmp.do("block-export-del", id="e0", mode="hard")
    assert qmp.events == [("BLOCK_EXPORT_DELETED", "e0")]
    assert await qmp.error("block-export-del", id="e0") == "Export 'e0' is not found"
    message = await qmp.error("block-export-del", id="e0", mode="soft")
    assert message == "Parameter 'mode' does not accept value 'soft'"
    await qmp.add("e0")
    await qmp.do("block-export-del", id="e0")
    assert qmp.disk.released == 2


async def test_nbd_server_add_and_remove(started):
    qmp = started
    await qmp.do("nbd-server-add", device="disk")
    assert await qmp.exports() == ["disk"]
    message = await qmp.error("nbd-server-add", device="disk")
    assert message == "Block export id 'disk' is already in use"
    missing = "Cannot find device='ghost' nor node-name='ghost'"
    assert await qmp.error("nbd-server-add", device="ghost") == missing
    assert await qmp.error("nbd-server-add", device="disk", name="n", bitmap="b") == (
        "Bitmap 'b' is not found"
    )
    await qmp.do("nbd-server-add", device="ro", name="two", writable=True, description="d")
    async with Client.connected(qmp.path, "two") as client:
        assert client.flags & 2  # read-only after all
    assert await qmp.error("nbd-server-remove", name="nope") == "Export 'nope' is not found"
    await asyncio.sleep(0.01)
    await qmp.do("nbd-server-remove", name="two")
    await qmp.do("nbd-server-remove", name="disk", mode="hard")
    assert [e for _, e in qmp.events] == ["two", "disk"]


async def test_stop_removes_all(started):
    qmp = started
    await qmp.add("e0")
    await qmp.add("e1", name="two")
    await qmp.do("nbd-server-stop")
    assert qmp.events == [("BLOCK_EXPORT_DELETED", "e0"), ("BLOCK_EXPORT_DELETED", "e1")]
    assert await qmp.do("query-block-exports") == []


def test_a_type_is_registered_once():
    with pytest.raises(ValueError, match="registered twice"):
        register_export(NbdExport)
