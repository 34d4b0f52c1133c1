"""The target that a job opens by its file name, and makes if it is asked to.

Specification: qapi/block-core.json (DriveBackup, DriveMirror). Runs on the event loop, under
``graph.lock``. Invariant: a file that was made and cannot be used is removed; one that was there
stays. Errors: BlockError in QEMU's words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.create import create_qcow2
from liveblockd.graph import filenames
from liveblockd.graph.graph import Graph
from liveblockd.graph.new_file import new_file, remove_file
from liveblockd.graph.node import Node
from liveblockd.graph.opening import Opener
from liveblockd.graph.snapshot import MAX_BACKING_NAME, NewImageMode, backing_string
from liveblockd.qapi import parse
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import drivers, find_driver


@dataclass(frozen=True, slots=True)
class NewTarget:
    """What is asked for; without ``image_format`` that of the source, or what is found."""

    filename: str
    image_format: str | None = None
    mode: NewImageMode = NewImageMode.ABSOLUTE_PATHS
    node_name: str | None = None
    #: as blockdev-add has it; None: the default
    discard: str | None = "unmap"


@dataclass(frozen=True, slots=True)
class OpenedTarget:
    """``made``: there was no such file. Nobody owns the node yet."""

    node: Node
    made: bool


async def open_target(
    graph: Graph,
    source: Node,
    new: NewTarget,
    *,
    backing: Node | None,
    open_backing: bool = True,
    console: Callable[[str], None],
) -> OpenedTarget:
    """Make an image of the size of ``source`` (``mode``), with ``backing`` named, and open it.

    With ``open_backing`` its backing chain is opened too. ``console`` takes what QEMU prints.
    """
    existing = new.mode is NewImageMode.EXISTING
    image_format = new.image_format
    if image_format is None and not existing:
        image_format = source.driver_class.driver_name
    if image_format is not None and image_format not in drivers():
        raise BlockError(f"Unknown file format '{image_format}'")
    made = False
    if not existing:
        assert image_format is not None
        made = await _make(graph, source, new.filename, image_format, backing, console)
    try:
        members, probed = await Opener(graph).image_members(new.filename, image_format)
        image_format = str(members["driver"])
        members["read-only"] = False
        if new.node_name is not None:
            members["node-name"] = new.node_name
        if new.discard is not None:
            members["discard"] = new.discard
        if source.options.cache is not None:
            members["cache"] = source.options.cache.to_qmp()
        if not open_backing and "backing" in find_driver(image_format).child_roles:
            members["backing"] = None
        node = await graph.open(
            parse(BlockdevOptions, members),
            monitor_owned=False,
            probed=probed and image_format == "raw",
        )
    except BaseException:
        if made:
            await remove_target(graph, new)
        raise
    return OpenedTarget(node, made)


async def remove_target(graph: Graph, new: NewTarget) -> None:
    """Remove a file that was made."""
    await remove_file(graph, filenames.protocol_options(new.filename)["filename"])


async def _make(
    graph: Graph,
    source: Node,
    filename: str,
    image_format: str,
    backing: Node | None,
    console: Callable[[str], None],
) -> bool:
    size = source.driver.virtual_size
    name = None if backing is None else backing_string(backing, filename)
    if name is not None and "backing" not in drivers()[image_format].child_roles:
        raise BlockError(f"Backing file not supported for file format '{image_format}'")
    if backing is not None and filename == backing.filename:
        raise BlockError(
            "Error: Trying to create an image with the same filename as the backing file"
        )
    if name is not None and len(name.encode()) > MAX_BACKING_NAME:
        raise BlockError("Backing file name too long")
    if image_format not in ("raw", "qcow2"):
        raise BlockError(f"Format driver '{image_format}' does not support image creation")
    backing_format = None if backing is None else backing.driver_class.driver_name
    options = filenames.protocol_options(filename)
    if (driver := options.get("driver", "json")) != "file" or "filename" not in options:
        raise BlockError(f"Protocol driver '{driver}' does not support image creation")
    console(_formatting(filename, image_format, size, name, backing_format))
    try:
        async with new_file(graph, options["filename"], filename) as new:
            if image_format == "raw":
                await new.node.truncate(size)
            else:
                await create_qcow2(
                    new.node, size=size, backing_file=name, backing_format=backing_format
                )
            await new.node.flush()
    except OSError as error:
        raise BlockError.from_os_error(f"Could not create '{filename}'", error) from error
    return new.made


def _formatting(
    filename: str, image_format: str, size: int, backing: str | None, backing_format: str | None
) -> str:
    if image_format == "raw":
        return f"Formatting '{filename}', fmt=raw size={size}"
    named = f" backing_file={backing} backing_fmt={backing_format}" if backing is not None else ""
    return (
        f"Formatting '{filename}', fmt=qcow2 cluster_size=65536 extended_l2=off "
        f"compression_type=zlib size={size}{named} lazy_refcounts=off refcount_bits=16"
    )
