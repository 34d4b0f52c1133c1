"""QMP commands of the NBD server and of block exports.

Specification: qapi/block-export.json; QEMU's deprecated nbd-server-add and nbd-server-remove too.

Runs on the loop. Errors: ``BlockError``.
"""

from __future__ import annotations

from pydantic import Field

from liveblockd.errors import BlockError
from liveblockd.exports.export import load
from liveblockd.exports.nbd_server import DEFAULT_HANDSHAKE_SECONDS, DEFAULT_MAX_CONNECTIONS
from liveblockd.exports.options import BlockExportOptions, BlockExportRemoveMode
from liveblockd.qapi import QapiModel, UInt32, parse
from liveblockd.qapi.sockets import SocketAddress, SocketAddressLegacy
from liveblockd.qmp.commands.objects import object_registry
from liveblockd.qmp.context import Context
from liveblockd.qmp.registry import NoArguments, command

load()


class NbdServerOptions(QapiModel):
    """``--nbd-server`` of the command line: a flat address."""

    handshake_max_seconds: UInt32 = DEFAULT_HANDSHAKE_SECONDS
    tls_creds: str | None = None
    tls_authz: str | None = None
    max_connections: UInt32 = DEFAULT_MAX_CONNECTIONS
    addr: SocketAddress


class NbdServerStart(QapiModel):
    """``nbd-server-start``: the address wraps its members in ``data``."""

    handshake_max_seconds: UInt32 = DEFAULT_HANDSHAKE_SECONDS
    tls_creds: str | None = None
    tls_authz: str | None = None
    max_connections: UInt32 = DEFAULT_MAX_CONNECTIONS
    addr: SocketAddressLegacy


class NbdServerAdd(QapiModel):
    """``nbd-server-add``."""

    name: str | None = None
    description: str | None = None
    device: str
    writable: bool = False
    bitmap: str | None = None


class NbdServerRemove(QapiModel):
    """``nbd-server-remove``; ``name`` is an export id."""

    name: str
    mode: BlockExportRemoveMode = BlockExportRemoveMode.SAFE


class BlockExportDel(QapiModel):
    """``block-export-del``."""

    id: str
    mode: BlockExportRemoveMode = BlockExportRemoveMode.SAFE


class BlockExportInfo(QapiModel):
    """An element of what ``query-block-exports`` returns."""

    id: str
    type: str
    node_name: str
    shutting_down: bool = Field(default=...)


async def start_nbd_server(context: Context, options: NbdServerOptions | NbdServerStart) -> None:
    """Start the server for a command or for the command line."""
    server = context.exports.nbd_server
    if server.running:
        raise BlockError("NBD server already running")
    tls = None
    if options.tls_creds is not None:
        tls = object_registry(context).tls_server(options.tls_creds)
    authorized = None
    if options.tls_authz is not None:
        authorized = object_registry(context).authorizer(options.tls_authz)
    await server.start(
        options.addr.plain(),
        max_connections=options.max_connections,
        handshake_seconds=options.handshake_max_seconds,
        tls=tls,
        tls_authz=authorized,
    )


@command("nbd-server-start", args=NbdServerStart)
async def nbd_server_start(context: Context, arguments: NbdServerStart) -> None:
    """Listen for NBD clients."""
    await start_nbd_server(context, arguments)


@command("nbd-server-stop")
async def nbd_server_stop(context: Context, _arguments: NoArguments) -> None:
    """Stop listening, disconnect the clients, remove the NBD exports."""
    await context.exports.stop_nbd_server()


@command("nbd-server-add", args=NbdServerAdd, features=("deprecated",))
async def nbd_server_add(context: Context, arguments: NbdServerAdd) -> None:
    """``block-export-add`` of old; the export's id is its name, ``device`` may be a drive."""
    node = context.graph.lookup(arguments.device, arguments.device)
    # of old, asking to write to a read-only node gave a read-only export
    options = {
        "type": "nbd",
        "id": arguments.device if arguments.name is None else arguments.name,
        "node-name": node.name,
        "name": arguments.device if arguments.name is None else arguments.name,
        "writable": arguments.writable and not node.read_only,
    }
    if arguments.description is not None:
        options["description"] = arguments.description
    if arguments.bitmap is not None:
        options["bitmaps"] = [arguments.bitmap]
    await add_export(context, parse(BlockExportOptions, options))


@command("nbd-server-remove", args=NbdServerRemove, features=("deprecated",))
async def nbd_server_remove(context: Context, arguments: NbdServerRemove) -> None:
    """``block-export-del`` of old."""
    export = context.exports.find(arguments.name)
    if export.type_name != "nbd":
        raise BlockError(f"Block export '{arguments.name}' is not an NBD export")
    await context.exports.remove(arguments.name, hard=arguments.mode is BlockExportRemoveMode.HARD)


async def add_export(context: Context, options: BlockExportOptions) -> None:
    """Add an export for a command or for the command line."""
    await context.exports.add(options, poll_ns=object_registry(context).poll_ns)


@command("block-export-add", args=BlockExportOptions)
async def block_export_add(context: Context, arguments: BlockExportOptions) -> None:
    """Offer a node to clients."""
    await add_export(context, arguments)


@command("block-export-del", args=BlockExportDel)
async def block_export_del(context: Context, arguments: BlockExportDel) -> None:
    """Remove an export; with mode safe only if no client is connected."""
    await context.exports.remove(arguments.id, hard=arguments.mode is BlockExportRemoveMode.HARD)


@command("query-block-exports", returns=list[BlockExportInfo], query=True)
async def query_block_exports(context: Context, _arguments: NoArguments) -> list[dict[str, object]]:
    """All exports, those shutting down too."""
    return [
        {
            "id": export.id,
            "type": export.type_name,
            "node-name": export.backend.node.name,
            "shutting-down": export.shutting_down,
        }
        for export in context.exports.exports.values()
    ]
