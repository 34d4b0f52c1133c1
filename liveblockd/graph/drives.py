"""Drives: what QEMU's ``-drive`` opens, a named user of a node that follows its snapshots.

Specification: QEMU's manual (-drive) and the options of its block layer. The value is a set of
members, nested, in which everything not named here goes to the format driver (``file.locking``,
``l2-cache-size``, ``backing.file.filename``).

Runs on the event loop. Invariant: a drive either exists with all that it needs, or nothing of it.

Errors: BlockError in QEMU's words.
"""

from __future__ import annotations

import contextlib
import enum
import os
import sys
import tempfile
from collections.abc import Mapping
from typing import Any, Final

from liveblockd.errors import BlockError
from liveblockd.graph import drive_limits, filenames, snapshot, surgery
from liveblockd.graph.backend import Backend
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Node, Operation
from liveblockd.graph.opening import Opener
from liveblockd.qapi import QapiModel, parse, parse_size
from liveblockd.storage.driver import Permission
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import find_driver


class DriveInterface(enum.StrEnum):
    """What a guest would see; here it gives a drive without ``id`` its name."""

    NONE = "none"
    IDE = "ide"
    SCSI = "scsi"
    FLOPPY = "floppy"
    PFLASH = "pflash"
    MTD = "mtd"
    SD = "sd"
    VIRTIO = "virtio"
    XEN = "xen"


class DriveMedia(enum.StrEnum):
    """A cdrom is read-only."""

    DISK = "disk"
    CDROM = "cdrom"


class CacheMode(enum.StrEnum):
    """Names of what is in ``CACHE_MODES``."""

    NONE = "none"
    OFF = "off"
    WRITEBACK = "writeback"
    WRITETHROUGH = "writethrough"
    DIRECTSYNC = "directsync"
    UNSAFE = "unsafe"


#: (direct, no-flush, writeback)
CACHE_MODES: Final = {
    CacheMode.NONE: (True, False, True),
    CacheMode.OFF: (True, False, True),
    CacheMode.WRITEBACK: (False, False, True),
    CacheMode.WRITETHROUGH: (False, False, False),
    CacheMode.DIRECTSYNC: (True, False, False),
    CacheMode.UNSAFE: (False, True, True),
}


#: members that have suffixes in ``-drive``, and are numbers in blockdev-add
_SIZES: Final = frozenset(
    (
        "cache-size", "l2-cache-size", "l2-cache-entry-size", "offset", "refcount-cache-size",
        "size",
    )
)  # fmt: skip


class DriveDiscard(enum.StrEnum):
    """``on`` and ``off`` are other names of ``unmap`` and ``ignore``."""

    IGNORE = "ignore"
    OFF = "off"
    UNMAP = "unmap"
    ON = "on"


class DriveOptions(QapiModel):
    """The members that are not the format driver's; made by ``split``."""

    id: str | None = None
    if_: DriveInterface = DriveInterface.IDE
    index: int | None = None
    bus: int | None = None
    unit: int | None = None
    media: DriveMedia = DriveMedia.DISK
    node_name: str | None = None
    format: str | None = None
    driver: str | None = None
    file: Any = None
    cache: Any = None
    aio: str | None = None
    discard: DriveDiscard | None = None
    detect_zeroes: str | None = None
    read_only: bool | None = None
    readonly: bool | None = None
    auto_read_only: bool | None = None
    force_share: bool | None = None
    snapshot: bool = False
    copy_on_read: bool = False
    werror: str | None = None
    rerror: str | None = None
    serial: str | None = None
    #: as ``drive_limits.take_throttling`` found it
    limits: Any = None
    #: the rest: of the format driver
    members: dict[str, Any] | None = None

    @classmethod
    def split(cls, value: Mapping[str, Any], *, keyval: bool = True) -> DriveOptions:
        """From all members of ``--drive``; BlockError for a wrong value."""
        known: dict[str, Any] = {}
        rest = dict(value)
        limits = drive_limits.take_throttling(rest, keyval=keyval)
        for name in _NAMES & rest.keys():
            known[name] = rest.pop(name)
        found = parse(cls, known | {"members": rest}, keyval=keyval)
        return found.model_copy(update={"limits": limits})


_NAMES: Final = frozenset(
    name.rstrip("_").replace("_", "-")
    for name in DriveOptions.model_fields
    if name not in ("members", "limits")
)


async def open_drive(graph: Graph, options: DriveOptions) -> Backend:
    """Open an image and make a drive of it, named by ``id`` or as QEMU names it.

    A raw image whose format nobody stated is warned of on stderr, and guarded.
    """
    async with graph.lock:
        name = _drive_name(graph, options)
        if name in graph.drives:
            raise BlockError(f"Duplicate ID '{name}' for drive")
        if name in graph.nodes:
            raise BlockError(f"Device name '{name}' conflicts with an existing node name")
        _check_supported(options)
        members, writethrough = _node_members(options)
        node, read_only = await _open_node(graph, options, members)
        used = Permission.CONSISTENT_READ
        if not read_only:
            # QEMU's drives take the rights of the guest device that is to use them.
            used |= Permission.WRITE
        try:
            drive = await graph.attach(
                node, used, name=name, user=f"block device '{name}'", writethrough=writethrough
            )
        except BaseException:
            await graph.unref(node)
            raise
        if options.limits is not None:
            drive_limits.limit(graph, drive, *options.limits)
        drive.copy_on_read = options.copy_on_read
        drive.rebind()
        return drive


def _check_supported(options: DriveOptions) -> None:
    if options.file is None and "file" not in (options.members or {}):
        raise BlockError("A drive needs a file")
    for name, value in (("werror", options.werror), ("rerror", options.rerror)):
        # There is no guest that could be stopped.
        if value not in (None, "report", "enospc", "ignore", "stop"):
            raise BlockError(f"'{value}' invalid {name[0]}rror action"[:60])


# -- names


def _drive_name(graph: Graph, options: DriveOptions) -> str:
    if options.id is not None:
        if not options.id or not options.id[0].isalpha() or not options.id.isascii():
            raise BlockError(f"Parameter 'id' expects an identifier, not '{options.id}'")
        return options.id
    if options.index is not None:
        name = _numbered(options, options.index)
        if name in graph.drives:
            raise BlockError(f"drive with index={options.index} exists")
        return name
    number = 0
    while (name := _numbered(options, number)) in graph.drives or _other_media(
        graph, options, number
    ):
        number += 1
    return name


def _other_media(graph: Graph, options: DriveOptions, number: int) -> bool:
    media = DriveMedia.DISK if options.media is DriveMedia.CDROM else DriveMedia.CDROM
    return _numbered(options.model_copy(update={"media": media}), number) in graph.drives


def _numbered(options: DriveOptions, number: int) -> str:
    kind = options.if_
    media = "cd" if options.media is DriveMedia.CDROM else "hd"
    if kind is DriveInterface.IDE:
        return f"ide{number // 2}-{media}{number % 2}"
    if kind is DriveInterface.SCSI:
        return f"scsi{number // 7}-{media}{number % 7}"
    return f"{kind}{number}"


# -- options


def _node_members(options: DriveOptions) -> tuple[dict[str, Any], bool]:
    """Members of blockdev-add for the format node, without driver, file and backing."""
    members = with_plain_sizes(options.members or {})
    direct, no_flush, writeback = CACHE_MODES[CacheMode.WRITEBACK]
    if isinstance(options.cache, str):
        try:
            direct, no_flush, writeback = CACHE_MODES[CacheMode(options.cache)]
        except ValueError:
            raise BlockError("invalid cache option") from None
    elif isinstance(options.cache, Mapping):
        cache = parse(_CacheMembers, dict(options.cache), keyval=True)
        direct, no_flush, writeback = cache.direct, cache.no_flush, cache.writeback
    elif options.cache is not None:
        raise BlockError("invalid cache option")
    members["cache"] = {"direct": direct, "no-flush": no_flush}
    if options.node_name is not None:
        members["node-name"] = options.node_name
    if options.discard is not None:
        unmap = options.discard in (DriveDiscard.UNMAP, DriveDiscard.ON)
        members["discard"] = "unmap" if unmap else "ignore"
    if options.detect_zeroes is not None:
        members["detect-zeroes"] = options.detect_zeroes
    if options.force_share is not None:
        members["force-share"] = options.force_share
    if options.auto_read_only is not None:
        members["auto-read-only"] = options.auto_read_only
    read_only = options.read_only if options.read_only is not None else options.readonly
    members["read-only"] = bool(read_only) or options.media is DriveMedia.CDROM
    return members, not writeback


def with_plain_sizes(members: Mapping[str, Any]) -> dict[str, Any]:
    """``l2-cache-size=1M`` as a number of bytes, which blockdev-add wants. BlockError."""
    plain: dict[str, Any] = {}
    for name, value in members.items():
        if isinstance(value, Mapping):
            value = with_plain_sizes(value)
        elif name in _SIZES and isinstance(value, str):
            size = parse_size(value)
            if size is None:
                raise BlockError(f"Parameter '{name}' expects a non-negative number below 2^64")
            value = str(size)
        plain[name] = value
    return plain


class _CacheMembers(QapiModel):
    direct: bool = False
    no_flush: bool = False
    writeback: bool = True


async def _open_node(
    graph: Graph, options: DriveOptions, members: dict[str, Any]
) -> tuple[Node, bool]:
    """The node of the drive, and whether it is for reading only."""
    read_only = bool(members["read-only"])
    if options.snapshot:
        members["read-only"] = True
    backing = members.get("backing")
    partial = isinstance(backing, Mapping) and "driver" not in backing
    if partial:
        del members["backing"]
    elif isinstance(backing, Mapping):
        members["backing"] = _complete(backing)
    members["file"] = _file_members(options)
    driver, probed = options.driver or options.format, False
    if driver is None:
        file = members["file"]
        if isinstance(file, Mapping) and (
            "driver" not in file or find_driver(str(file["driver"])).is_format
        ):
            # json: describes the image as a whole, be it without its format
            members = {**file, **{k: v for k, v in members.items() if k != "file"}}
            driver, file = members.get("driver"), members.get("file")
            if driver is None and file is None:
                raise BlockError("Must specify either driver or file")
        if driver is None:
            driver = await Opener(graph).probe(file)
            probed = driver == "raw"
    members["driver"] = driver
    find_driver(driver)
    if not find_driver(driver).is_format and not find_driver(driver).is_filter:
        # format=file: the protocol node itself
        file = members.pop("file")
        members = {**file, **members} if isinstance(file, Mapping) else members
    parsed = parse(BlockdevOptions, members, keyval=True)
    node = await graph.open(
        parsed,
        monitor_owned=False,
        probed=probed,
        backing_members=backing if partial and isinstance(backing, Mapping) else None,
    )
    if probed and not node.read_only:
        print(  # noqa: T201
            f"WARNING: nobody said the format of '{node.filename}', and it was taken for raw.\n"
            "         Writes to its first blocks that look like another format are refused.\n"
            "         Say format=raw to lift that.",
            file=sys.stderr,
            flush=True,
        )
    if options.snapshot:
        node = await _temporary_overlay(graph, node)
        read_only = False
    return node, read_only or node.read_only


def _file_members(options: DriveOptions) -> Any:
    """The ``file`` member: an object, or the name of a node."""
    file = options.file
    if isinstance(file, Mapping):
        found = dict(file)
        if "filename" in found and "driver" not in found:
            found = filenames.protocol_options(str(found.pop("filename"))) | found
        found.setdefault("driver", "file")
    else:
        if not isinstance(file, str):
            raise BlockError("Invalid parameter type for 'file', expected: string")
        found = filenames.protocol_options(file)
    if options.aio is not None and found.get("driver") in ("file", "host_device"):
        found.setdefault("aio", options.aio)
    return found


def _complete(members: Mapping[str, Any]) -> dict[str, Any]:
    """Nested backing options with a format each, and ``file`` for the files that lack a driver."""
    found = dict(members)
    file = found.get("file")
    if isinstance(file, Mapping):
        found["file"] = {"driver": "file"} | dict(file)
    below = found.get("backing")
    if isinstance(below, Mapping) and "driver" in below:
        found["backing"] = _complete(below)
    return found


async def _temporary_overlay(graph: Graph, node: Node) -> Node:
    """``snapshot=on``: what is written goes to a file without a name and is lost in the end."""
    directory = os.environ.get("TMPDIR", "/var/tmp")
    fd, path = tempfile.mkstemp(prefix="vl.", dir=directory)
    os.close(fd)
    try:
        await snapshot.create_overlay(graph, node, path, _unsaid)
        overlay = await graph.open(
            parse(
                BlockdevOptions,
                {
                    "driver": "qcow2",
                    "file": {"driver": "file", "filename": path},
                    "backing": None,
                    "cache": {"direct": False, "no-flush": True},
                    "discard": "unmap",
                },
            ),
            monitor_owned=False,
        )
        overlay.implied_backing = (overlay.driver.backing_file or "", node.filename)
        try:
            await surgery.append_overlay(graph, node, overlay)
        except BaseException:
            await graph.unref(overlay)
            raise
    except BaseException:
        await graph.unref(node)
        raise
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
    return overlay


def _unsaid(line: str) -> None:
    """A temporary image is nobody's business."""


async def delete_drive(graph: Graph, name: str) -> None:
    """drive_del: no request goes on, and the image is closed if nobody else uses it."""
    async with graph.lock:
        drive = graph.drives.get(name)
        if drive is None:
            raise BlockError(f"Device '{name}' not found")
        drive.node.check_operation(Operation.DELETE)
        await graph.detach(drive)
