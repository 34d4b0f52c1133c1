"""The interface that every block driver offers: protocol, format and filter alike.

A driver is one layer of a backing chain or one protocol below it. Callers hold a *node* of the
graph, which offers the same methods (``BlockIO``) and hands them to its driver, so a qcow2 image
does not know whether its ``file`` child is a host file, a raw window or a filter.

Rules that all drivers keep:

* ``x_nowait()`` answers now or returns None/False and has then done nothing; ``x()`` is its
  coroutine twin and the only one that may wait. A None is never an error: the caller calls the
  twin. An I/O error of either is an ``OSError`` with an errno.
* ``begin_write()`` stands between the two: True when it has taken a write, and calls ``done`` once
  when that has ended, perhaps before it returns; False when it has done nothing. No coroutine, no
  task. A memoryview is copied if it is needed later, other buffers must not change till the end.
* Offsets and lengths are bytes. Requests lie inside ``[0, length)``: who takes requests from
  outside (an export, QMP) has checked that. Format drivers grow their ``file`` child by writing
  past its end.
* A buffer given to ``write`` must not change until the call has returned. A buffer that a read
  returned belongs to the caller and is never changed afterwards.
* Everything is called on the event loop. Workers get self-contained jobs only.

Which errors escape: ``OSError`` (I/O), ``BlockError`` from ``open`` and from the management calls.
"""

# Signatures are what this module is for: the defaults use few of their arguments, or do nothing.
# ruff: noqa: ARG002, ARG003, B027, D102

from __future__ import annotations

import abc
import enum
import os
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from errno import ENOTSUP
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeAlias

from liveblockd.errors import BlockError

if TYPE_CHECKING:
    from liveblockd.storage.cells import Cells, Survey
    from liveblockd.storage.flatmap import FlatMap
    from liveblockd.storage.options import BlockdevOptions
    from liveblockd.storage.registry import Environment
    from liveblockd.storage.snapshot_info import SnapshotInfo

Buffer: TypeAlias = bytes | bytearray | memoryview
#: called on the loop when a write that ``begin_write`` took has ended, with its error
Done: TypeAlias = Callable[[OSError | None], None]


class Permission(enum.IntFlag):
    """What a user of a node does with it, or lets others do; the numbers are those of the locks."""

    NONE = 0
    CONSISTENT_READ = 1
    WRITE = 2
    WRITE_UNCHANGED = 4
    RESIZE = 8
    ALL = 15


class ExtentKind(enum.IntEnum):
    """What one layer says of a range; how NBD and the jobs see it follows from the chain."""

    UNALLOCATED = 0  # this layer has nothing: look into the backing node, or zeros without one
    ZERO = 1  # this layer says: reads as zeros
    DATA = 2  # bytes at host_offset of the ``file`` child (of a protocol driver: of itself)
    COMPRESSED = 3  # data that only ``read`` can give
    MARKED = 4  # the same; what is shown of it is neither data nor zeros (``x-dirty-bitmap``)


class Extent(NamedTuple):
    """A run of guest bytes with one answer; runs follow each other without a gap."""

    length: int  # bytes
    kind: ExtentKind
    host_offset: int = -1  # bytes; of DATA only


class StoredBitmap(NamedTuple):
    """A dirty bitmap as an image keeps it; ``granularity`` in bytes."""

    name: str
    granularity: int
    #: writes are recorded from the first one on
    enabled: bool
    #: it was in use when its user ended: there are no bits
    inconsistent: bool
    #: (offset, bytes) of bytes of the bitmap; bit n is bit n % 8 of byte n // 8, the rest is 0
    pieces: tuple[tuple[int, bytes], ...] = ()


class BlockIO(Protocol):
    """What can be done with a node or a driver by those above it."""

    @property
    def length(self) -> int:
        """Size that can be read, in bytes (of an image: the virtual size)."""

    def read_nowait(self, offset: int, length: int) -> Buffer | None: ...
    def write_nowait(self, offset: int, data: Buffer) -> bool: ...
    def read_many_nowait(self, offsets: Sequence[int], length: int) -> list[Buffer]: ...
    def write_many_nowait(self, offsets: Sequence[int], parts: Sequence[Buffer]) -> int: ...
    def copy_nowait(self, offset: int, source: Source, inside: int, data: Buffer) -> bool: ...
    def begin_write(self, offset: int, data: Buffer, done: Done) -> bool: ...
    async def read(self, offset: int, length: int) -> Buffer: ...
    async def write(self, offset: int, data: Buffer) -> None: ...
    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, fast_only: bool = False
    ) -> None: ...
    async def discard(self, offset: int, length: int) -> None: ...
    async def flush(self) -> None: ...
    async def map(self, offset: int, length: int) -> list[Extent]: ...
    async def truncate(self, length: int) -> None: ...
    def host_file(self) -> HostFile | None: ...


class HostFile(Protocol):
    """A file of the host below a driver, for jobs that a worker does with its descriptor alone."""

    @property
    def fd(self) -> int: ...
    @property
    def direct(self) -> bool:
        """Opened with O_DIRECT: buffers, offsets and lengths must be aligned."""

    @property
    def read_flags(self) -> int | None: ...  # of a read that waits for no disk; None: not known
    @property
    def in_memory(self) -> bool: ...  # and on no disk: nothing waits here


class Source(NamedTuple):
    """Bytes of a host file that a guest sees at ``offset``; offsets and length in bytes."""

    offset: int
    length: int
    file: HostFile
    source_offset: int


class Packed(NamedTuple):
    """Adjacent clusters of a disk that lie compressed in a host file."""

    file: HostFile
    #: (host offset, length) of each, bytes; the data may end before that
    places: list[tuple[int, int]]
    cluster_size: int
    #: on a worker: fills an array of bytes with clusters, whose (start, length) in another one
    #: follow; raises OSError
    unpack: Callable[[Any, Any, Sequence[tuple[int, int]]], None]


class MapWatcher(Protocol):
    """Who keeps what a driver said of its layer (``flatmap``)."""

    def remapped(self, offset: int, length: int) -> None:
        """``cells`` of the range has changed; this is the same step of the loop."""

    def restructured(self) -> None:
        """The driver has another length, other children or other tables altogether."""


#: a context in which no request of any user is in flight; left within milliseconds
Quiesced: TypeAlias = Callable[[], AbstractAsyncContextManager[None]]


class LiveCheck(Protocol):
    """A check of an image in use; ``done`` and ``total`` are bytes of its tables."""

    done: int
    total: int

    @property
    def result(self) -> CheckCounts:
        """What was found up to now; final after ``scan``."""

    def scan(self) -> AsyncGenerator[int]:
        """Do it in pieces of milliseconds; bytes of tables looked at. OSError, BlockError."""


class CheckCounts(Protocol):
    """Members of ImageCheck (qapi/block-core.json)."""

    corruptions: int
    leaks: int
    check_errors: int
    leaks_fixed: int
    image_end_offset: int
    total_clusters: int
    allocated_clusters: int
    fragmented_clusters: int
    compressed_clusters: int
    messages: list[str]


class BlockDriver(abc.ABC):
    """Base of all drivers; a subclass is registered by its module (``formats/README.md``).

    Class members that a subclass sets:

    ``driver_name``  the ``driver`` of blockdev-add
    ``is_format``    reads its data from a ``file`` child and may have a backing node
    ``is_filter``    passes through: chain walks look behind it
    ``child_roles``  names of the options that are children, in QEMU's order (``file``, ``backing``)
    ``filtered``     of a filter: the role of the child that chain walks go on with

    Instance members: ``children`` holds the nodes below by role; graph surgery may replace an entry
    while the driver is quiesced (no request in flight), e.g. ``children["backing"]``.
    """

    driver_name: ClassVar[str]
    is_format: ClassVar[bool] = False
    is_filter: ClassVar[bool] = False
    child_roles: ClassVar[tuple[str, ...]] = ()
    filtered: ClassVar[str] = "file"
    #: requests may wait here for somebody else: ``drain_begin`` lets them go
    holds_requests: ClassVar[bool] = False
    #: options of its own that ``change_options`` takes
    changeable: ClassVar[frozenset[str]] = frozenset()

    children: dict[str, BlockIO]
    read_only: bool
    #: another process may be changing what this reads
    inactive: bool = False

    #: granularity of allocation in bytes, None where there is none (raw, file)
    cluster_size: int | None = None
    #: bytes that requests to this driver must be aligned to (O_DIRECT, encryption); else 1
    request_alignment: int = 1

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """Size that can be read, in bytes."""

    # -- guest I/O

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """The bytes if no wait is needed for them, else None."""
        return None

    def write_nowait(self, offset: int, data: Buffer) -> bool:
        """Write if that needs no wait; whether it was done, whole."""
        return False

    def read_many_nowait(self, offsets: Sequence[int], length: int) -> list[Buffer]:
        """``read_nowait`` of ranges of one length: of the first ones, as far as it is simple."""
        return []

    def write_many_nowait(self, offsets: Sequence[int], parts: Sequence[Buffer]) -> int:
        """``write_nowait`` of parts of one length, in their order: how many are done, whole."""
        return 0

    def copy_nowait(self, offset: int, source: Source, inside: int, data: Buffer) -> bool:
        """``source`` to ``offset``, with ``data`` at ``inside``; whether it was done, whole."""
        return False

    def begin_write(self, offset: int, data: Buffer, done: Done) -> bool:
        """Whether the write was begun, see above; whoever needs a coroutine for it refuses."""
        return False

    @abc.abstractmethod
    async def read(self, offset: int, length: int) -> Buffer:
        """Exactly ``length`` bytes; raises OSError."""

    @abc.abstractmethod
    async def write(self, offset: int, data: Buffer) -> None:
        """Store ``data``; durable only after ``flush``. Raises OSError (EPERM when read-only)."""

    @abc.abstractmethod
    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, fast_only: bool = False
    ) -> None:
        """Make the range read as zeros, cheaply where the driver can.

        ``may_unmap`` allows to give the space back; with ``fast_only`` it raises
        OSError(ENOTSUP), having done nothing, where only writing zeros would do.
        """

    async def discard(self, offset: int, length: int) -> None:
        """Give space back where possible; what is read afterwards is the old bytes or zeros."""

    @abc.abstractmethod
    async def flush(self) -> None:
        """Return when every write that completed before the call is durable."""

    async def map(self, offset: int, length: int) -> list[Extent]:
        """Extents of this layer alone for a non-empty prefix of the range, adjacent ones merged.

        The driver may stop early (the end of an L2 table, a bound on the number of extents).
        """
        return [Extent(length, ExtentKind.DATA, offset)]

    # -- as a layer of a chain that is read through one flat map (``storage/flatmap.py``)
    #: the map of what lies below this image, of formats with a backing node
    below: FlatMap | None = None
    _map_watchers: tuple[MapWatcher, ...] = ()

    def layer(self) -> tuple[BlockIO, BlockDriver] | None:
        """The node and driver that answer for this one; None: ask this one."""
        return self, self

    @property
    def cell_unit(self) -> tuple[int, int] | None:
        """(log2 of the bytes of a cell, bytes that one table is for).

        None: this driver cannot say where its bytes lie, and has nothing below that a map could
        show; the members below are not for it.
        """
        return None

    @property
    def data_node(self) -> BlockIO:
        """What DATA cells refer to."""
        return self.children["file"]

    async def cells(self, offset: int, length: int, bits: int) -> Cells | None:
        """What this layer alone says of a range, in cells of 2^``bits`` bytes; None: nothing.

        The array is the caller's. Changes that come after the call has begun are told to the
        watchers, and may be in the answer or not. Raises OSError.
        """
        raise NotImplementedError

    def cells_now(self, offset: int, length: int, bits: int) -> Cells | None:
        """The same if that needs no wait, zeros for nothing; else None."""
        raise NotImplementedError

    async def survey(
        self, offset: int, length: int, bits: int, tables: int, most: int
    ) -> Survey | None:
        """As ``cells``, from a cell's begin on, as far as ``tables`` and ``most`` cells go.

        Tables are read by the batch and not kept. What changes meanwhile may be in it or not. None:
        this is not for such a layer, or ``cells`` has more to say.
        """
        return None

    async def packed(self, offset: int, length: int) -> Packed | None:
        """How to unpack a range that begins with a cluster; None: not all of it is compressed."""
        return None

    def next_table(self, offset: int) -> int:
        """The first offset from ``offset`` on where this layer may say anything."""
        return offset

    async def read_host(self, host_offset: int, length: int) -> Buffer:
        """Bytes of ``data_node``, where a DATA cell was seen in this step of the loop."""
        raise NotImplementedError

    def watch(self, watcher: MapWatcher) -> None:
        """Tell ``watcher`` of changes."""
        self._map_watchers += (watcher,)

    def unwatch(self, watcher: MapWatcher) -> None:
        """No longer."""
        self._map_watchers = tuple(w for w in self._map_watchers if w is not watcher)

    def remapped(self, offset: int, length: int) -> None:
        """Say that ``cells`` of the range has changed; without an await after the change."""
        for watcher in self._map_watchers:
            watcher.remapped(offset, length)

    def restructured(self) -> None:
        """Say that children, length or all tables have changed; without an await after it."""
        if self.below is not None:
            self.below.reset()
        for watcher in self._map_watchers:
            watcher.restructured()

    # -- management

    async def truncate(self, length: int) -> None:
        """Grow or shrink to ``length`` bytes; new bytes read as zeros. Durable on return."""
        raise BlockError("Image format driver does not support resize")

    async def close(self) -> None:
        """Make durable what was written, and let go of resources; children are closed by the graph.

        Raises the OSError of the flush, and is closed all the same.
        """
        if not self.read_only:
            await self.flush()

    async def set_read_only(self, read_only: bool) -> None:
        """Change between read-write and read-only, flushing before; may raise BlockError."""
        self.read_only = read_only

    async def seal(self) -> None:
        """``set_read_only(True)`` where all that users have written is durable; BlockError."""
        await self.set_read_only(True)

    async def activate(self) -> None:
        """Keep nothing that another process may have changed; formats are opened again instead."""

    async def set_permissions(self, used: Permission, shared: Permission) -> None:
        """All that the users above need together, and what each of them lets others do.

        A protocol driver locks its image by that; the graph tells children itself. On BlockError
        (somebody else has the image) nothing has changed. Giving up permissions never fails.
        """

    def drain_begin(self) -> None:
        """Users wait for the end of their requests: hold back none until ``drain_end``; nests."""

    def drain_end(self) -> None:
        """As before ``drain_begin``."""

    def stop_waiting(self, silence: float | None = None) -> None:
        """Fail requests that wait for a lost server, or are unanswered so many seconds."""

    def silence(self) -> float:
        """Seconds for which a server has not answered what it was asked; to be asked often."""
        return 0.0

    def host_file(self) -> HostFile | None:
        """The host file whose offsets equal this driver's offsets, if there is one."""
        return None

    @property
    def encrypted(self) -> bool:
        """What the file holds is not what is read here."""
        return False

    def data_host_file(self) -> HostFile | None:
        """The host file to which the ``host_offset`` of DATA extents refers, if there is one."""
        file = self.children.get("file")
        return self.host_file() if file is None else file.host_file()

    @classmethod
    def child_references(cls, options: BlockdevOptions) -> Sequence[tuple[str, Any]]:
        """Role and BlockdevRef of each child that ``options`` give, the backing node left out."""
        found = ((role, getattr(options, role.replace("-", "_"), None)) for role in cls.child_roles)
        return [(role, given) for role, given in found if role != "backing" and given is not None]

    @classmethod
    def child_permissions(
        cls, options: BlockdevOptions, role: str, used: Permission, shared: Permission
    ) -> tuple[Permission, Permission]:
        """What this driver does with a child when its users need ``used`` and share ``shared``.

        For drivers that keep no metadata of their own in a child (raw, filters).
        """
        return used, shared

    @classmethod
    async def named_children(cls, children: Mapping[str, BlockIO]) -> dict[str, str]:
        """Children, beside the backing node, that the header names and nobody has given.

        Role to file name, as it is written there; ``children`` are open. Raises BlockError.
        """
        return {}

    def live_check(self, quiesced: Quiesced, *, fix_leaks: bool = False) -> LiveCheck:
        """A check of the image while it is used; ``fix_leaks``: unused clusters are given back.

        ``quiesced`` gives a context in which no request is in flight. Raises BlockError, OSError.
        """
        raise BlockError("This image format does not support checks", errno=ENOTSUP)

    # -- backing chain: formats with ``child_roles`` containing "backing" override these

    @property
    def backing_file(self) -> str | None:
        """The backing file string of the header, as it is written there; None without one."""
        return None

    @property
    def backing_format(self) -> str | None:
        """The backing format that the header states, or None."""
        return None

    async def change_backing_file(
        self, backing_file: str | None, backing_format: str | None
    ) -> None:
        """Rewrite the backing link of the header; all that makes it true is durable before it."""
        raise BlockError(f"{self.driver_name} has no backing file", errno=95)

    async def populate(self, offset: int, data: Buffer) -> None:
        """Store ``data`` of the backing chain *below* every guest write, past, present or to come.

        ``offset`` and length are multiples of ``cluster_size`` (the last cluster of the disk may
        be short). A cluster that this layer holds already, or that a guest write has claimed, is
        left alone. Clusters of ``data`` that are all zeros take no space. Never makes a guest write
        wait.
        """
        raise BlockError(f"{self.driver_name} cannot be streamed into", errno=95)

    async def populate_zeroes(self, offset: int, length: int) -> None:
        """As ``populate``, for a range that reads as zeros through the chain above the base."""
        raise BlockError(f"{self.driver_name} cannot be streamed into", errno=95)

    async def populate_from(
        self, offset: int, length: int, source: HostFile, source_offset: int
    ) -> None:
        """As ``populate``, for bytes that lie in a host file; a worker copies them directly."""
        raise BlockError(f"{self.driver_name} cannot be streamed into", errno=95)

    async def populate_packed(self, offset: int, length: int, packed: Packed) -> None:
        """As ``populate``; a worker unpacks what it stores."""
        raise OSError(ENOTSUP, os.strerror(ENOTSUP))

    @property
    def gathers(self) -> bool:
        """Whether ``populate_many`` makes small pieces as cheap as large ones."""
        return False

    async def populate_many(self, sources: Sequence[Source]) -> None:
        """``populate_from`` of several, which do not overlap; on an error some may be done."""
        for source in sources:
            await self.populate_from(*source)

    # -- persistent dirty bitmaps

    #: gives what to store when the image is closed or becomes read-only; set by who tracks writes.
    #: Without it what the image had stays marked as in use, for nobody knows what was written.
    bitmap_source: Callable[[], Sequence[StoredBitmap]] | None = None

    def stored_bitmaps(self) -> Sequence[StoredBitmap]:
        """The bitmaps that were found when the image was opened."""
        return ()

    def check_new_bitmap(self, name: str, granularity: int, others: int) -> None:
        """BlockError if a bitmap cannot be stored beside ``others`` more; errno 95: none ever."""
        raise BlockError("Operation not supported", errno=95)

    async def remove_bitmap(self, name: str) -> None:
        """Remove a stored bitmap, durable on return; nothing if there is none of that name."""

    # -- internal snapshots: who calls these has drained the node

    def list_snapshots(self) -> Sequence[SnapshotInfo]:
        """The internal snapshots, oldest first; BlockError(errno 95) where the format has none."""
        raise BlockError("Operation not supported", errno=95)

    async def create_snapshot(self, name: str, *, date_nsec: int, vm_clock_nsec: int = 0) -> None:
        """Keep the disk as it is now; ``date_nsec`` since the epoch. Durable on return."""
        raise BlockError("Operation not supported", errno=95)

    async def delete_snapshot(self, snapshot_id: str) -> None:
        """Forget a snapshot and give its space back. Durable on return."""
        raise BlockError("Operation not supported", errno=95)

    async def apply_snapshot(self, snapshot_id: str) -> None:
        """Make the disk what it was, size included; no user may be above. Durable on return."""
        raise BlockError("Operation not supported", errno=95)

    async def make_empty(self) -> None:
        """Hold nothing any more, so that the backing file shows. Durable on return."""
        raise BlockError("Operation not supported", errno=95)

    async def write_compressed(self, offset: int, data: Buffer) -> None:
        """As ``write``, compressed where the format can and it saves space.

        ``offset`` and length are multiples of ``cluster_size`` (the last cluster of the disk may be
        short), else OSError(EINVAL); OSError(ENOTSUP) where there is no compression.
        """
        raise OSError(ENOTSUP, os.strerror(ENOTSUP))

    def change_options(self, options: BlockdevOptions, environment: Environment) -> None:
        """Take new ``changeable`` options, no request in flight; BlockError changes nothing."""

    # -- description

    @property
    def virtual_size(self) -> int:
        """What query-named-block-nodes says; ``length`` rounded up to 512 (as QEMU does)."""
        return -(-self.length // 512) * 512

    def actual_size(self) -> int | None:
        """Bytes of host storage in use, where known."""
        return None

    @property
    def vm_state_offset(self) -> int | None:
        """Guest offset behind the disk where the state of a machine is kept, in bytes."""
        return None

    def dirty_flag(self) -> bool:
        """Whether the image is marked as not cleanly closed."""
        return False

    def format_specific(self) -> Mapping[str, Any] | None:
        """ImageInfoSpecific of qapi/block-core.json ({"type":..., "data":...}), or None."""
        return None

    def statistics(self) -> dict[str, int] | None:
        """Members of BlockStatsSpecific beside ``driver``; None without any."""
        return None

    def limits(self) -> dict[str, int]:
        """BlockLimitsInfo of qapi/block-core.json, under QMP names."""
        return {
            "request-alignment": self.request_alignment,
            "min-mem-alignment": 1,
            "opt-mem-alignment": 4096,
            "max-iov": 1024,
        }
