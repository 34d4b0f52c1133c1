"""The driver ``quorum``: several nodes with the same bytes, of which most are right.

Specification: qapi/block-core.json, BlockdevOptionsQuorum; qapi/block.json, QUORUM_FAILURE and
QUORUM_REPORT_BAD.

A write goes to all children and has succeeded when ``vote-threshold`` of them say so. A read asks
all and takes what most have, if those are enough; with ``rewrite-corrupted`` the others are put
right. ``fifo`` reads the first child that answers. ``blkverify`` is for two children that must not
differ: QEMU ends the process then, here the read gets EIO, for a daemon has other disks.

Runs on: the event loop. Invariants: a child is put right while no write touches the range, by what
the children hold then (``replicas``); children are those of ``children``, in its order.

Errors: OSError that most of the failed children gave; BlockError from ``open`` and for children
that cannot be added or removed.
"""

from __future__ import annotations

import enum
import logging
import os
from collections import Counter
from collections.abc import Sequence
from errno import EIO, ENOTSUP, EPERM
from typing import Any, Self

from liveblockd.errors import BlockError
from liveblockd.events import Publisher, QuorumFailure, QuorumReportBad
from liveblockd.storage.driver import BlockDriver, BlockIO, Buffer, Extent, Permission
from liveblockd.storage.filters.replicas import (
    Answer,
    Replicas,
    ask_all,
    first_difference,
    map_all,
    same,
)
from liveblockd.storage.options import BlockdevOptions, BlockdevRef
from liveblockd.storage.registry import Environment, register_driver

SECTOR = 512
_READERS = Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED

log = logging.getLogger(__name__)


class QuorumReadPattern(enum.StrEnum):
    """How many children are read."""

    QUORUM = "quorum"
    FIFO = "fifo"


class QuorumOptions(BlockdevOptions):
    """Members of ``blockdev-add``."""

    blkverify: bool | None = None
    children: list[BlockdevRef]
    vote_threshold: int
    rewrite_corrupted: bool | None = None
    read_pattern: QuorumReadPattern | None = None


@register_driver
class Quorum(BlockDriver):
    """No filter: what it gives is not what any one child has."""

    driver_name = "quorum"
    child_roles = ("children",)
    Options = QuorumOptions

    def __init__(
        self, options: QuorumOptions, children: dict[str, BlockIO], environment: Environment
    ) -> None:
        self.children = children
        self.read_only = bool(options.read_only)
        self._fifo = options.read_pattern is QuorumReadPattern.FIFO
        self._threshold = options.vote_threshold
        self._verify = bool(options.blkverify) and not self._fifo
        self._rewrite = bool(options.rewrite_corrupted) and not self._fifo
        self._next_child = len(children)
        self._replicas = Replicas()
        self._publisher: Publisher = environment.publisher
        self._name = environment.node_name

    @classmethod
    async def open(
        cls, options: QuorumOptions, children: dict[str, BlockIO], environment: Environment
    ) -> Self:
        """BlockError for options that do not go together, or children of several lengths."""
        if len({child.length for child in children.values()}) > 1:
            raise BlockError("Could not refresh total sector count: Input/output error", errno=EIO)
        return cls(options, children, environment)

    @classmethod
    def child_references(cls, options: BlockdevOptions) -> Sequence[tuple[str, Any]]:
        """``children.0`` and so on; BlockError, before any is opened, for bad options."""
        assert isinstance(options, QuorumOptions)
        _check(options)
        return [(f"children.{n}", given) for n, given in enumerate(options.children)]

    @classmethod
    def child_permissions(
        cls, options: BlockdevOptions, role: str, used: Permission, shared: Permission
    ) -> tuple[Permission, Permission]:
        """Nobody else writes to a child."""
        del role
        assert isinstance(options, QuorumOptions)
        fifo = options.read_pattern is QuorumReadPattern.FIFO
        if options.rewrite_corrupted and not fifo and not options.read_only:
            used |= Permission.WRITE
        return used, (shared | Permission.WRITE_UNCHANGED) & _READERS

    @property
    def _nodes(self) -> list[BlockIO]:
        return list(self.children.values())

    @property
    def length(self) -> int:
        """That of all children."""
        return self._nodes[0].length

    # -- children that come and go (x-blockdev-change)

    def new_child_role(self, child: BlockIO) -> str:
        """The role of one more child; BlockError if it cannot be."""
        if self._verify:
            raise BlockError("Cannot add a child to a quorum in blkverify mode")
        if child.length != self.length:
            raise BlockError(
                f"A child of {child.length} bytes cannot be added to a quorum of {self.length}"
            )
        role = f"children.{self._next_child}"
        self._next_child += 1
        return role

    def check_remove_child(self, role: str) -> None:
        """BlockError if the others could not reach the threshold."""
        if len(self.children) <= self._threshold:
            raise BlockError(
                f"The number of children cannot be lower than the vote threshold {self._threshold}"
            )
        if role == f"children.{self._next_child - 1}":
            self._next_child -= 1

    # -- guest I/O

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """What all children have at hand, if it is the same."""
        nodes = self._nodes
        first = nodes[0].read_nowait(offset, length)
        if first is None or self._fifo:
            return first
        for node in nodes[1:]:
            data = node.read_nowait(offset, length)
            if data is None or bytes(data) != bytes(first):
                return None
        return first

    async def read(self, offset: int, length: int) -> Buffer:
        """What most children have, or the first one that answers."""
        if self._fifo:
            return await self._read_first(offset, length)
        answers, agreed = await self._replicas.read(self._nodes, offset, length)
        self._report_errors("read", offset, length, answers)
        read = [answer for answer in answers if not isinstance(answer, OSError)]
        if len(read) < self._threshold:
            raise self._failed(offset, length, answers)
        if agreed:
            return read[0]
        if self._verify:
            at = first_difference(read[0], read[1])
            log.error(
                "quorum: offset=%d bytes=%d contents mismatch at offset %d",
                offset, length, offset + at,
            )  # fmt: skip
            raise OSError(EIO, os.strerror(EIO))
        return await self._vote(offset, length, answers)

    async def _read_first(self, offset: int, length: int) -> Buffer:
        for name, node in self._named():
            try:
                return await node.read(offset, length)
            except OSError as error:
                failure = error
                self._report_bad("read", offset, length, name, error)
        raise failure

    async def _vote(self, offset: int, length: int, answers: Sequence[Answer]) -> bytes:
        votes = Counter(a for a in answers if not isinstance(a, OSError))
        # Of equal numbers the version that was seen last, as in QEMU.
        winner = max(reversed(votes), key=lambda data: votes[data])
        if votes[winner] < self._threshold:
            self._report_failure(offset, length)
            raise OSError(EIO, os.strerror(EIO))
        for (name, _), answer in zip(self._named(), answers, strict=True):
            if not isinstance(answer, OSError) and answer != winner:
                self._report_bad("read", offset, length, name, None)
        if self._rewrite and not self.read_only:
            await self._put_right(offset, length)
        return winner

    async def _put_right(self, offset: int, length: int) -> None:
        """Errors are none of the read's."""
        async with self._replicas.alone(offset, length):
            nodes = self._nodes
            found = await ask_all([node.read(offset, length) for node in nodes])
            answers: list[Answer] = [a if isinstance(a, OSError) else bytes(a) for a in found]
            if same(answers):
                return
            votes = Counter(a for a in answers if not isinstance(a, OSError))
            winner, count = votes.most_common(1)[0]
            if count < self._threshold:
                return
            bad = [
                node
                for node, answer in zip(nodes, answers, strict=True)
                if not isinstance(answer, OSError) and answer != winner
            ]
            await ask_all([node.write(offset, winner) for node in bad])

    async def write(self, offset: int, data: Buffer) -> None:
        """To all children."""
        self._check_writable()
        length = len(data)
        await self._change(offset, length, [n.write(offset, data) for n in self._nodes])

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, fast_only: bool = False
    ) -> None:
        """To all children."""
        self._check_writable()
        requests = [
            node.write_zeroes(offset, length, may_unmap=may_unmap, fast_only=fast_only)
            for node in self._nodes
        ]
        await self._change(offset, length, requests, fast_only=fast_only)

    async def _change(
        self, offset: int, length: int, requests: Sequence[Any], *, fast_only: bool = False
    ) -> None:
        answers = await self._replicas.change(offset, length, requests)
        if fast_only and any(a is not None and a.errno == ENOTSUP for a in answers):
            raise OSError(ENOTSUP, os.strerror(ENOTSUP))
        self._report_errors("write", offset, length, answers)
        if sum(answer is None for answer in answers) < self._threshold:
            raise self._failed(offset, length, answers)

    async def flush(self) -> None:
        """All children; enough of them must have done it."""
        answers = await ask_all([node.flush() for node in self._nodes])
        self._report_errors("flush", 0, 0, answers)
        if sum(answer is None for answer in answers) < self._threshold:
            raise _most_common(answers)

    async def map(self, offset: int, length: int) -> list[Extent]:
        """Zeros where all children say zeros; the rest only ``read`` can give."""
        return await map_all(self._nodes, offset, length)

    def _check_writable(self) -> None:
        if self.read_only:
            raise OSError(EPERM, os.strerror(EPERM))

    # -- reports

    def _named(self) -> list[tuple[str, BlockIO]]:
        return [(getattr(node, "name", role), node) for role, node in self.children.items()]

    def _report_errors(
        self, kind: str, offset: int, length: int, answers: Sequence[Answer | None]
    ) -> None:
        for (name, _), answer in zip(self._named(), answers, strict=True):
            if isinstance(answer, OSError):
                self._report_bad(kind, offset, length, name, answer)

    def _report_bad(
        self, kind: str, offset: int, length: int, name: str, error: OSError | None
    ) -> None:
        first, count = _sectors(offset, length)
        reason = None if error is None else error.strerror or str(error)
        self._publisher.publish(
            QuorumReportBad(
                type=kind, error=reason, node_name=name, sector_num=first, sectors_count=count
            )
        )

    def _report_failure(self, offset: int, length: int) -> None:
        first, count = _sectors(offset, length)
        self._publisher.publish(
            QuorumFailure(reference=self._name, sector_num=first, sectors_count=count)
        )

    def _failed(self, offset: int, length: int, answers: Sequence[Answer | None]) -> OSError:
        self._report_failure(offset, length)
        return _most_common(answers)


def _check(options: QuorumOptions) -> None:
    count = len(options.children)
    if count < 1:
        raise BlockError("Number of provided children must be 1 or more")
    if options.vote_threshold < 1:
        raise BlockError("Parameter 'vote-threshold' expects a value >= 1")
    if options.vote_threshold > count:
        raise BlockError("threshold may not exceed children count")
    if options.read_pattern is QuorumReadPattern.FIFO:
        return
    if options.blkverify and (count != 2 or options.vote_threshold != 2):
        raise BlockError(
            "blkverify=on can only be set if there are exactly two files and vote-threshold is 2"
        )
    if options.rewrite_corrupted and options.blkverify:
        raise BlockError("rewrite-corrupted=on cannot be used with blkverify=on")


def _sectors(offset: int, length: int) -> tuple[int, int]:
    first = offset // SECTOR
    return first, -(-(offset + length) // SECTOR) - first


def _most_common(answers: Sequence[Answer | None]) -> OSError:
    errors = [answer for answer in answers if isinstance(answer, OSError)]
    count = Counter(error.errno for error in errors)
    return max(reversed(errors), key=lambda error: count[error.errno])
