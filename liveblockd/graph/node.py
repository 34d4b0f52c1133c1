"""A node of the block graph, and the edges that say who uses it.

QEMU's docs/interop/live-block-operations and qapi/block-core.json use the same words: a *node* is
one driver opened with its options; an *edge* leads from its parent (a node, or the ``Backend`` of
an export, drive or job) to it under a *role* (``file``, ``backing``, ``root``).

Runs on the event loop. Invariants: ``edge in edge.child.parents`` and, for an edge of a node,
``edge.parent.children[edge.role] is edge`` and ``edge.parent.driver.children[edge.role] is
edge.child``; surgery alone changes them. A node offers the ``BlockIO`` of its driver by bound
methods.

Errors: BlockError from ``check_operation``; OSError from the I/O.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from liveblockd.errors import BlockError
from liveblockd.graph import filenames
from liveblockd.graph.bitmaps import DirtyBitmap
from liveblockd.storage.driver import (
    BlockDriver,
    BlockIO,
    Buffer,
    Done,
    Extent,
    HostFile,
    Permission,
    Source,
    StoredBitmap,
)
from liveblockd.storage.options import BlockdevDetectZeroesOptions, BlockdevOptions

if TYPE_CHECKING:
    from liveblockd.graph.backend import Backend


class Operation(enum.StrEnum):
    """What can be refused because of an op blocker; the value is for messages of our own."""

    DELETE = "delete"
    SNAPSHOT = "snapshot"
    INTERNAL_SNAPSHOT = "internal snapshot"
    RESIZE = "resize"
    STREAM = "stream"
    COMMIT_SOURCE = "commit source"
    COMMIT_TARGET = "commit target"
    MIRROR_SOURCE = "mirror source"
    MIRROR_TARGET = "mirror target"
    BACKUP_SOURCE = "backup source"
    BACKUP_TARGET = "backup target"
    CHANGE = "change"


#: what may be done to a node although it is the backing node of another
_ALLOWED_ON_BACKING = frozenset(
    (
        Operation.STREAM,
        Operation.COMMIT_TARGET,
        Operation.BACKUP_SOURCE,
        Operation.BACKUP_TARGET,
    )
)


_HANDED_ON = (
    "read_nowait",
    "write_nowait",
    "read_many_nowait",
    "write_many_nowait",
    "copy_nowait",
    "begin_write",
    "read",
    "write",
    "flush",
    "map",
    "host_file",
)


class Edge:
    """``parent`` uses ``child`` as its ``role``, does ``used`` and lets others do ``shared``."""

    __slots__ = ("child", "committed", "frozen", "outlived", "parent", "role", "shared", "used")

    def __init__(self, parent: Node | Backend, role: str, child: Node) -> None:
        self.parent = parent
        self.role = role
        self.child = child
        #: how many jobs need this link to stay as it is
        self.frozen = 0
        #: how many jobs write below this link what is read above it already
        self.committed = 0
        #: a backup is over whose target is still read by others, through the disk that is written
        self.outlived = False
        self.used = Permission.NONE
        self.shared = Permission.ALL

    def check_not_frozen(self) -> None:
        """BlockError in QEMU's words when a job needs this link."""
        if self.frozen:
            raise BlockError(
                f"Cannot change frozen '{self.role}' link from "
                f"'{self.parent.name}' to '{self.child.name}'",
                errno=1,
            )

    def check_movable(self) -> None:
        """The same in the words for a user that is to stand on another node."""
        if self.frozen:
            raise BlockError(f"Cannot change '{self.role}' link to '{self.child.name}'", errno=1)

    def __repr__(self) -> str:
        return f"<Edge {self.parent.name!r} -{self.role}-> {self.child.name!r}>"


class Node:
    """One driver with its place in the graph."""

    driver: BlockDriver

    def __init__(
        self,
        name: str,
        driver_class: type[BlockDriver],
        options: BlockdevOptions,
        *,
        given: BlockdevOptions | None = None,
        read_only: bool = False,
    ) -> None:
        self.name = name
        self.driver_class = driver_class
        #: with what was inherited from the parent
        self.options = options
        #: read-only since it could not be opened for writing, which auto-read-only allows
        self.fell_back = False
        #: as they were given, for the file name that is shown
        self.given = options if given is None else given
        self.read_only = read_only
        self.monitor_owned = False
        #: False: another process may have the image and change it (``activation``)
        self.active = True
        #: opened as a part of its parent: follows its parent's read-only and cache options
        self.inherits = False
        #: raw because nobody said the format: guards its first sector
        self.probed = False
        self.children: dict[str, Edge] = {}
        self.parents: list[Edge] = []
        #: why the node must stay and be left alone, one reason a job
        self.op_blockers: list[str] = []
        #: put in by a job; shown as in use
        self.job_filter = False
        #: the client who started that job gave it no name, and should see what is below instead
        self.implicit = False
        #: it gets a copy in whole clusters that nobody reads yet: its backing node may come late
        self.awaits_backing = False
        #: (backing string of the header, file name of the node it led to)
        self.implied_backing: tuple[str, str] | None = None
        #: opened without its chain by who does not read it: its name is what it would be with it
        self.without_chain = False
        self.permissions = (Permission.NONE, Permission.ALL)
        #: how often its users, together, were given the right to write, or another such right
        self.grants = 0
        self.write_threshold = 0
        #: newest first; what jobs track for themselves has no name
        self.bitmaps: list[DirtyBitmap] = []
        self._unmaps = options.unmaps

    def bind(self, driver: BlockDriver) -> None:
        """Take the opened driver; its methods become the node's."""
        self.driver = driver
        if self.active:  # else its image is only read, for now
            self.read_only = driver.read_only
        self._hand_on()
        driver.bitmap_source = self._bitmaps_to_store
        if self.active:
            self.load_bitmaps()

    def load_bitmaps(self) -> None:
        """Track what the image says is to be tracked."""
        driver = self.driver
        for stored in driver.stored_bitmaps():
            bitmap = DirtyBitmap(driver.length, stored.granularity, name=stored.name)
            bitmap.persistent = True
            bitmap.inconsistent = stored.inconsistent
            bitmap.enabled = stored.enabled and not stored.inconsistent
            bitmap.load(stored.pieces)
            self.add_bitmap(bitmap)

    def _hand_on(self) -> None:
        # Instead of the methods below: a request passes here without a call of its own.
        for name in _HANDED_ON:
            setattr(self, name, getattr(self.driver, name))
        if self.bitmaps:
            self.write_nowait = self._record_write_nowait  # type: ignore[method-assign]
            self.begin_write = self._record_begun  # type: ignore[method-assign]
            self.write = self._record_write  # type: ignore[method-assign]
            for name in ("copy_nowait", "write_many_nowait", "host_file"):
                del self.__dict__[name]

    # -- dirty bitmaps

    def add_bitmap(self, bitmap: DirtyBitmap) -> None:
        """Record writes in ``bitmap`` from now on; call ``Graph.rebind_above`` afterwards."""
        self.bitmaps.insert(0, bitmap)
        self._hand_on()

    def remove_bitmap(self, bitmap: DirtyBitmap) -> None:
        """No longer."""
        self.bitmaps.remove(bitmap)
        self._hand_on()

    def find_bitmap(self, name: str) -> DirtyBitmap | None:
        """The bitmap of that name; those without one are not found."""
        return next((b for b in self.bitmaps if name and b.name == name), None)

    def record(self, offset: int, length: int) -> None:
        """A write has ended, well or not."""
        for bitmap in self.bitmaps:
            if offset + length > bitmap.size and bitmap.name:
                # A format makes its file longer by writing past the end.
                bitmap.resize(max(bitmap.size, self.driver.length))
            bitmap.record(offset, length)

    def _bitmaps_to_store(self) -> list[StoredBitmap]:
        return [
            StoredBitmap(b.name, b.granularity, b.enabled, b.inconsistent, ((0, b.dump()),))
            for b in reversed(self.bitmaps)
            if b.persistent
        ]

    def _record_write_nowait(self, offset: int, data: Buffer) -> bool:
        if not self.driver.write_nowait(offset, data):
            return False
        self.record(offset, len(data))
        return True

    def _record_begun(self, offset: int, data: Buffer, done: Done) -> bool:
        length = len(data)

        def ended(error: OSError | None) -> None:
            self.record(offset, length)
            done(error)

        return self.driver.begin_write(offset, data, ended)

    async def _record_write(self, offset: int, data: Buffer) -> None:
        try:
            await self.driver.write(offset, data)
        finally:
            self.record(offset, len(data))

    @property
    def opened(self) -> bool:
        """Whether there is a driver already."""
        return "driver" in self.__dict__

    @property
    def length(self) -> int:
        """Bytes that can be read."""
        return self.driver.length

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """As the driver's."""
        return self.driver.read_nowait(offset, length)

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        """As the driver's."""
        return self.driver.write_nowait(offset, data)

    def read_many_nowait(self, offsets: Sequence[int], length: int) -> list[Buffer]:
        """As the driver's."""
        return self.driver.read_many_nowait(offsets, length)

    def write_many_nowait(self, offsets: Sequence[int], parts: Sequence[Buffer]) -> int:  # noqa: ARG002
        """As the driver's, unless bitmaps record what is written."""
        return 0

    def copy_nowait(self, offset: int, source: Source, inside: int, data: Buffer) -> bool:  # noqa: ARG002
        """As the driver's, unless bitmaps record what is written."""
        return False

    def begin_write(self, offset: int, data: Buffer, done: Done) -> bool:
        """As the driver's."""
        return self.driver.begin_write(offset, data, done)

    async def read(self, offset: int, length: int) -> Buffer:
        """As the driver's."""
        return await self.driver.read(offset, length)

    async def write(self, offset: int, data: Buffer) -> None:
        """As the driver's."""
        await self.driver.write(offset, data)

    async def flush(self) -> None:
        """As the driver's."""
        await self.driver.flush()

    async def map(self, offset: int, length: int) -> list[Extent]:
        """As the driver's."""
        return await self.driver.map(offset, length)

    async def truncate(self, length: int) -> None:
        """As the driver's; what is written to new bytes is recorded, below a filter as well."""
        await self.driver.truncate(length)
        for bitmap in self.bitmaps:
            bitmap.resize(self.driver.length)

    def host_file(self) -> HostFile | None:
        """As the driver's; None where clients have asked which parts of the file are written to.

        A format on it, or a job, would write by the descriptor, past this node.
        """
        if not self.driver_class.is_format and any(bitmap.name for bitmap in self.bitmaps):
            return None
        return self.driver.host_file()

    def layer(self) -> tuple[BlockIO, BlockDriver] | None:
        """This node, or the one that a filter of a job hands everything on to."""
        return self.driver.layer() if self.is_filter else (self, self.driver)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, fast_only: bool = False
    ) -> None:
        """As the driver's; without ``discard=unmap`` the space is kept."""
        try:
            await self.driver.write_zeroes(
                offset, length, may_unmap=may_unmap and self._unmaps, fast_only=fast_only
            )
        finally:
            self.record(offset, length)

    async def write_compressed(self, offset: int, data: Buffer) -> None:
        """As the driver's."""
        try:
            await self.driver.write_compressed(offset, data)
        finally:
            self.record(offset, len(data))

    async def discard(self, offset: int, length: int) -> None:
        """As the driver's; nothing without ``discard=unmap``."""
        if self._unmaps:
            try:
                await self.driver.discard(offset, length)
            finally:
                self.record(offset, length)

    # -- place in the graph

    @property
    def backing(self) -> Node | None:
        """The backing node; a filter may stand in between (see ``chain``)."""
        edge = None if self.is_filter else self.children.get("backing")
        return None if edge is None else edge.child

    @property
    def asked_for(self) -> Node:
        """This node, or what a filter that no client named stands for."""
        node = self
        while node.implicit and (below := node.file) is not None:
            node = below
        return node

    @property
    def file(self) -> Node | None:
        """The node that holds the data of this one; of a filter: what it filters."""
        edge = self.children.get(self.driver_class.filtered if self.is_filter else "file")
        return None if edge is None else edge.child

    @property
    def is_filter(self) -> bool:
        """Whether chain walks look behind it."""
        return self.driver_class.is_filter

    @property
    def supports_backing(self) -> bool:
        """Whether the format knows backing files."""
        return "backing" in self.driver_class.child_roles

    @property
    def used(self) -> bool:
        """Whether it has to stay."""
        return bool(self.monitor_owned or self.parents or self.op_blockers)

    @property
    def filename(self) -> str:
        """As QEMU shows it: a plain name, or ``json:{...}``."""
        return filenames.filename(self)

    @property
    def detect_zeroes(self) -> BlockdevDetectZeroesOptions:
        """Whether written zeros are looked for."""
        return self.options.detect_zeroes or BlockdevDetectZeroesOptions.OFF

    def change_options(self, **members: Any) -> None:
        """Replace members of the options in effect."""
        self.options = self.options.model_copy(update=members)
        self._unmaps = self.options.unmaps

    # -- op blockers

    def op_blocker(self, operation: Operation) -> str | None:
        """Why ``operation`` cannot be done, or None."""
        if self.op_blockers:
            return self.op_blockers[0]
        if operation not in _ALLOWED_ON_BACKING:
            for edge in self.parents:
                if edge.role == "backing":
                    return f"node is used as backing hd of '{edge.parent.name}'"
        return None

    def check_operation(self, operation: Operation) -> None:
        """BlockError ``Node 'x' is busy: ...`` when it cannot be done."""
        if (reason := self.op_blocker(operation)) is not None:
            raise BlockError(f"Node '{self.name}' is busy: {reason}", errno=16)

    def check_active(self, permissions: str = "write") -> None:
        """BlockError in QEMU's words while the image may be another process's."""
        if not self.active:
            raise BlockError(f"Permission '{permissions}' unavailable on inactive node", errno=1)

    def __repr__(self) -> str:
        return f"<Node {self.name!r} {self.driver_class.driver_name}>"
