"""``reopen`` of ``qemu-io``: other options for a disk in use, those not named stay.

Specification: qapi/block-core.json (blockdev-reopen), which does the work. Runs on the event loop.
Invariant: on an error everything is as it was. ``IoRefusedError`` escapes, in qemu-io's words.
"""

from __future__ import annotations

from typing import Final

from liveblockd.errors import BlockError, ConfigError
from liveblockd.graph.drives import CACHE_MODES, CacheMode, with_plain_sizes
from liveblockd.graph.node import Node
from liveblockd.graph.reopen import reopen as reopen_nodes
from liveblockd.keyval import nest, parse_opts
from liveblockd.qapi import members, parse
from liveblockd.qmp.hmp.io_text import IoRefusedError, Usage, Words
from liveblockd.qmp.hmp.qemu_io import Disk, io_command
from liveblockd.storage.driver import Permission
from liveblockd.storage.options import BlockdevOptions, option_models

_WRITES: Final = Permission.WRITE | Permission.WRITE_UNCHANGED | Permission.RESIZE
_USAGE: Final = Usage(
    "c:o:rw", "", 0, -1, "change options; read-only (-r) or writable (-w), cache mode, -o key=value"
)


def _refused(message: str) -> IoRefusedError:
    return IoRefusedError(f"qemu-io: {message}")


def _fixed(option: str) -> IoRefusedError:
    return _refused(f"Cannot change the option '{option}'")


@io_command("reopen", _USAGE)
async def reopen(disk: Disk, words: Words) -> None:
    """Without an option nothing is changed."""
    mode = _cache_mode(words)
    if words.has("r") and words.has("w"):
        raise _refused("Only one -r/-w option may be given")
    if words.words:
        raise IoRefusedError(_USAGE.line("reopen"))
    flat = _flat(words)
    if (words.has("r") or words.has("w")) and "read-only" in flat:
        raise _refused("Cannot set both -r/-w and 'read-only'")
    if mode is not None and any(key.startswith("cache.") for key in flat):
        raise _refused("Cannot set both -c and the cache options")
    graph = disk.monitor.context.graph
    edge, used = disk.backend.edge, disk.backend.edge.used
    async with graph.lock:
        try:
            writeback = _writeback(disk, mode)
            if words.has("r"):  # the drive itself stops writing; others who do stand against it
                edge.used &= ~_WRITES
            if flat or words.has("r") or words.has("w"):
                await reopen_nodes(graph, [_wanted(disk.node, flat, words)])
            if words.has("w") and not disk.own:
                edge.used |= Permission.WRITE
            await graph.refresh_permissions(disk.backend.node)
        except BaseException as error:
            edge.used = used
            if not isinstance(error, BlockError | OSError):
                raise
            message = error.message if isinstance(error, BlockError) else error.strerror
            raise _refused(str(message)) from None
        if writeback is not None:
            disk.backend.writethrough = not writeback
        disk.backend.rebind()


def _cache_mode(words: Words) -> tuple[bool, bool, bool] | None:
    if not words.has("c"):
        return None
    text = words.options["c"]
    try:
        return CACHE_MODES[CacheMode(text)]
    except ValueError:
        raise _refused(f"Invalid cache option: {text}") from None


def _writeback(disk: Disk, mode: tuple[bool, bool, bool] | None) -> bool | None:
    """What the drive is to do; how the host caches was settled when the file was opened."""
    if mode is None:
        return None
    direct, no_flush, writeback = mode
    options = disk.node.options
    if direct != options.cache_direct:
        raise _fixed("cache.direct")
    if no_flush != options.cache_no_flush:
        raise _fixed("cache.no-flush")
    return writeback


def _flat(words: Words) -> dict[str, str]:
    if not words.has("o"):
        return {}
    try:
        return parse_opts(words.options["o"])
    except ConfigError as error:
        raise _refused(str(error)) from None


def _wanted(node: Node, flat: dict[str, str], words: Words) -> BlockdevOptions:
    """The options that ``node`` has, with those of the line. IoRefusedError, BlockError."""
    driver = node.driver_class.driver_name
    known = {member.name: member.attribute for member in members(option_models[driver])}
    children = {role: edge.child.name for role, edge in node.children.items() if role in known}
    constant = {"driver": driver, "node-name": node.name}
    for key, value in flat.items():
        first, _, rest = key.partition(".")
        if first not in known or value != constant.get(first, value):
            raise _fixed(key)
        if first in children and rest:  # of a child, which has a name of its own
            raise _fixed(rest)
    try:
        values = {"driver": driver} | children | with_plain_sizes(nest(flat))
        given = parse(BlockdevOptions, values, keyval=True)
    except ConfigError as error:
        raise _refused(str(error)) from None
    named = {known[key.partition(".")[0]] for key in flat}
    changed = {attribute: getattr(given, attribute) for attribute in named}
    changed.setdefault("read_only", words.has("r") or (node.read_only and not words.has("w")))
    if "backing" in children:
        changed.setdefault("backing", children["backing"])
    return node.given.model_copy(update={"node_name": node.name, **changed})
