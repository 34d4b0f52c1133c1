"""What graph, jobs and exports announce, as values; ``qmp.session`` puts them on the wire.

An event class is named as QMP names the event and its fields as QMP names the members
(``_`` for ``-``); ``None`` means the member is left out. Sources: qapi/block-core.json,
qapi/job.json, qapi/block-export.json, qapi/run-state.json.

Pure. ``Publisher.publish`` calls its subscribers at once and in order, on the event loop:
the order of publishing is the order on the wire.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events."""

    name: ClassVar[str]

    def data(self) -> dict[str, object]:
        """The QMP ``data`` member: set fields under their QMP names."""
        pairs = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {k.rstrip("_").replace("_", "-"): v for k, v in pairs if v is not None}


@dataclass(frozen=True, slots=True)
class JobStatusChange(Event):
    """Every change of status of every job."""

    name: ClassVar[str] = "JOB_STATUS_CHANGE"
    id: str
    status: str


@dataclass(frozen=True, slots=True)
class BlockJobCompleted(Event):
    """A block job ended by itself; ``error`` is set when it failed."""

    name: ClassVar[str] = "BLOCK_JOB_COMPLETED"
    type: str
    device: str
    len: int
    offset: int
    speed: int
    error: str | None = None


@dataclass(frozen=True, slots=True)
class BlockJobCancelled(Event):
    """A block job ended because it was cancelled."""

    name: ClassVar[str] = "BLOCK_JOB_CANCELLED"
    type: str
    device: str
    len: int
    offset: int
    speed: int


@dataclass(frozen=True, slots=True)
class BlockJobReady(Event):
    """A mirror or active commit is in step with its source."""

    name: ClassVar[str] = "BLOCK_JOB_READY"
    type: str
    device: str
    len: int
    offset: int
    speed: int


@dataclass(frozen=True, slots=True)
class BlockJobPending(Event):
    """A job with auto-finalize=false waits for job-finalize."""

    name: ClassVar[str] = "BLOCK_JOB_PENDING"
    type: str
    id: str


@dataclass(frozen=True, slots=True)
class BlockJobError(Event):
    """A job met an I/O error (``operation`` read or write) and did ``action`` about it."""

    name: ClassVar[str] = "BLOCK_JOB_ERROR"
    device: str
    operation: str
    action: str


@dataclass(frozen=True, slots=True)
class BlockIoError(Event):
    """A request of a guest device (a drive) failed."""

    name: ClassVar[str] = "BLOCK_IO_ERROR"
    qom_path: str
    device: str
    operation: str
    action: str
    reason: str
    node_name: str | None = None
    nospace: bool | None = None


@dataclass(frozen=True, slots=True)
class BlockImageCorrupted(Event):
    """Metadata was found bad; if ``fatal`` the image takes no more writes."""

    name: ClassVar[str] = "BLOCK_IMAGE_CORRUPTED"
    device: str
    msg: str
    fatal: bool
    node_name: str | None = None
    offset: int | None = None
    size: int | None = None


@dataclass(frozen=True, slots=True)
class BlockWriteThreshold(Event):
    """A write went beyond what block-set-write-threshold said; offsets in bytes."""

    name: ClassVar[str] = "BLOCK_WRITE_THRESHOLD"
    node_name: str
    amount_exceeded: int
    write_threshold: int


@dataclass(frozen=True, slots=True)
class QuorumFailure(Event):
    """Too few children of a quorum agree, or work; ``reference`` is the node. Sectors of 512."""

    name: ClassVar[str] = "QUORUM_FAILURE"
    reference: str
    sector_num: int
    sectors_count: int


@dataclass(frozen=True, slots=True)
class QuorumReportBad(Event):
    """A child of a quorum failed a read, write or flush (``error``), or had other bytes."""

    name: ClassVar[str] = "QUORUM_REPORT_BAD"
    type: str
    node_name: str
    sector_num: int
    sectors_count: int
    error: str | None = None


@dataclass(frozen=True, slots=True)
class CheckCompleted(Event):
    """A job x-liveblock-check has looked at the whole image; counts as ImageCheck has them."""

    name: ClassVar[str] = "X_LIVEBLOCK_CHECK_COMPLETED"
    id: str
    node_name: str
    check_errors: int
    corruptions: int
    leaks: int
    leaks_fixed: int
    image_end_offset: int
    total_clusters: int
    allocated_clusters: int
    fragmented_clusters: int
    compressed_clusters: int
    #: the first lines that qemu-img would print
    messages: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BlockExportDeleted(Event):
    """An export is gone."""

    name: ClassVar[str] = "BLOCK_EXPORT_DELETED"
    id: str


@dataclass(frozen=True, slots=True)
class Shutdown(Event):
    """The daemon ends (``reason`` host-qmp-quit or host-signal)."""

    name: ClassVar[str] = "SHUTDOWN"
    guest: bool
    reason: str


class Publisher:
    """Hands every event to every subscriber, in the order of subscription."""

    def __init__(self) -> None:
        self._subscribers: list[Callable[[Event], None]] = []

    def subscribe(self, subscriber: Callable[[Event], None]) -> Callable[[], None]:
        """Call ``subscriber`` with each event from now on; returns the call that ends it."""
        self._subscribers.append(subscriber)
        return lambda: self._subscribers.remove(subscriber)

    def publish(self, event: Event) -> None:
        """Hand over ``event`` now; a subscriber must not raise."""
        for subscriber in tuple(self._subscribers):
            subscriber(event)
