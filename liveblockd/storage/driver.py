"""The interface that every block driver offers: protocol, format and filter alike.

A driver is one layer of a backing chain or one protocol below it. Callers hold a *node* of the
graph, which offers the same methods (``BlockIO``) and hands them to its driver, so a qcow2 image
does not know whether its ``file`` child is a host file, a raw window or a filter.

Rules that all drivers keep (DESIGN, section 3):

* ``x_nowait()`` answers now or returns None/False and has then done nothing; ``x()`` is its
  coroutine twin and the only one that may wait. A None is never an error: the caller calls the
  twin. An I/O error of either is an ``OSError`` with an errno.
* Offsets and lengths are bytes. Requests lie inside ``[0, length)``: who takes requests from
  outside (an export, QMP) has checked that. Format drivers grow their ``file`` child by writing
  past its end.
* A buffer given to ``write`` must not change until the call has returned. A buffer that a read
  returned belongs to the caller and is never changed afterwards.
* Everything is called on the event loop. Workers get self-contained jobs only.

Which errors escape: ``OSError`` (I/O), ``BlockError`` from ``open`` and from the management calls.
"""

# The signatures are what this module is for: arguments that the defaults here do not use, and
# defaults that do nothing.
# ruff: noqa: ARG002, B027, D102

from __future__ import annotations

import abc
import enum
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias

from liveblockd.errors import BlockError

Buffer: TypeAlias = bytes | bytearray | memoryview


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


class Extent(NamedTuple):
    """A run of guest bytes with one answer; runs follow each other without a gap."""

    length: int  # bytes
    kind: ExtentKind
    host_offset: int = -1  # bytes; of DATA only


class BlockIO(Protocol):
    """What can be done with a node or a driver by those above it."""

    @property
    def length(self) -> int:
        """Size that can be read, in bytes (of an image: the virtual size)."""

    def read_nowait(self, offset: int, length: int) -> Buffer | None: ...
    def write_nowait(self, offset: int, data: Buffer) -> bool: ...
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


class BlockDriver(abc.ABC):
    """Base of all drivers; a subclass is registered by its module (``formats/README.md``).

    Class members that a subclass sets:

    ``driver_name``  the ``driver`` of blockdev-add
    ``is_format``    reads its data from a ``file`` child and may have a backing node
    ``is_filter``    passes through: chain walks look behind it
    ``child_roles``  names of the options that are children, in QEMU's order (``file``, ``backing``)

    Instance members: ``children`` holds the nodes below by role; graph surgery may replace an entry
    while the driver is quiesced (no request in flight), e.g. ``children["backing"]``.
    """

    driver_name: ClassVar[str]
    is_format: ClassVar[bool] = False
    is_filter: ClassVar[bool] = False
    child_roles: ClassVar[tuple[str, ...]] = ()

    children: dict[str, BlockIO]
    read_only: bool

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
        """Write if that needs no wait and no allocation; whether it was done, whole."""
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

        The driver may stop early where that is convenient (the end of an L2 table, a bound on the
        number of extents); the sum of the lengths tells how far the answer goes.
        """
        return [Extent(length, ExtentKind.DATA, offset)]

    # -- management

    async def truncate(self, length: int) -> None:
        """Grow or shrink to ``length`` bytes; new bytes read as zeros. Durable on return."""
        raise BlockError("Image format driver does not support resize")

    async def close(self) -> None:
        """Flush what is buffered here and let go of resources; children are closed by the graph."""

    async def set_read_only(self, read_only: bool) -> None:
        """Change between read-write and read-only, flushing before; may raise BlockError."""
        self.read_only = read_only

    async def set_permissions(self, used: Permission, shared: Permission) -> None:
        """All that the users above need together, and what each of them lets others do.

        A protocol driver locks its image by that (``storage/README.md``); a driver with children
        does nothing, for the graph tells the children itself. On BlockError (another process, or
        another node, has the image) nothing has changed. Giving up permissions never fails.
        """

    def host_file(self) -> HostFile | None:
        """The host file whose offsets equal this driver's offsets, if there is one."""
        return None

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

    # -- description

    @property
    def virtual_size(self) -> int:
        """What query-named-block-nodes says; ``length`` rounded up to 512 (as QEMU does)."""
        return -(-self.length // 512) * 512

    def actual_size(self) -> int | None:
        """Bytes of host storage in use, where known."""
        return None

    def dirty_flag(self) -> bool:
        """Whether the image is marked as not cleanly closed."""
        return False

    def format_specific(self) -> Mapping[str, Any] | None:
        """ImageInfoSpecific of qapi/block-core.json ({"type":..., "data":...}), or None."""
        return None

    def limits(self) -> dict[str, int]:
        """BlockLimitsInfo of qapi/block-core.json, under QMP names."""
        return {
            "request-alignment": self.request_alignment,
            "min-mem-alignment": 1,
            "opt-mem-alignment": 4096,
            "max-iov": 1024,
        }
