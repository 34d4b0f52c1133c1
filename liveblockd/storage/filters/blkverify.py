"""The driver ``blkverify``: what ``test`` reads must be what ``raw`` holds.

Specification: qapi/block-core.json, BlockdevOptionsBlkverify; QEMU docs/devel/testing/blkverify.

Writes go to both. A difference is logged in QEMU's words and answered with EIO; QEMU ends the
process, but a daemon has other disks.

Runs on: the event loop. Invariant: what is answered was the same in both.

Errors: those of the nodes; EIO for a difference.
"""

from __future__ import annotations

import logging
import os
from errno import EIO, EPERM

from liveblockd.storage.driver import BlockIO, Buffer, Done, Extent, Permission
from liveblockd.storage.filters.base import FilterDriver
from liveblockd.storage.filters.replicas import Replicas, ask_all, first_difference, map_all
from liveblockd.storage.options import BlockdevOptions, BlockdevRef
from liveblockd.storage.registry import register_driver

log = logging.getLogger(__name__)


class BlkverifyOptions(BlockdevOptions):
    """Members of ``blockdev-add``."""

    test: BlockdevRef
    raw: BlockdevRef


@register_driver
class Blkverify(FilterDriver):
    """A filter over ``raw``."""

    driver_name = "blkverify"
    child_roles = ("raw", "test")
    filtered = "raw"
    Options = BlkverifyOptions

    def __init__(self, children: dict[str, BlockIO], *, read_only: bool) -> None:
        super().__init__(children, read_only=read_only)
        self._replicas = Replicas()

    @classmethod
    def child_permissions(
        cls, options: BlockdevOptions, role: str, used: Permission, shared: Permission
    ) -> tuple[Permission, Permission]:
        """``test`` keeps its size, and grows when it is written."""
        del options
        if role != "test":
            return used, shared
        if used & Permission.WRITE:
            used |= Permission.RESIZE
        return used, shared & ~Permission.RESIZE

    @property
    def length(self) -> int:
        """That of the test."""
        return self.children["test"].length

    @property
    def _nodes(self) -> list[BlockIO]:
        return [self.children["test"], self.children["raw"]]

    def read_nowait(self, offset: int, length: int) -> Buffer | None:
        """Both, if they have it at hand and it is the same."""
        test, raw = (node.read_nowait(offset, length) for node in self._nodes)
        if test is None or raw is None or bytes(test) != bytes(raw):
            return None
        return test

    def write_nowait(self, offset: int, data: Buffer) -> bool:  # noqa: ARG002
        """Needs a coroutine."""
        return False

    def begin_write(self, offset: int, data: Buffer, done: Done) -> bool:  # noqa: ARG002
        """Needs a coroutine."""
        return False

    async def read(self, offset: int, length: int) -> Buffer:
        """Both."""
        (test, raw), agreed = await self._replicas.read(self._nodes, offset, length)
        self._compare("read", offset, length, test, raw)
        assert not isinstance(test, OSError) and not isinstance(raw, OSError)
        if not agreed:
            at = offset + first_difference(test, raw)
            self._mismatch("read", offset, length, f"contents mismatch at offset {at}")
        return test

    async def write(self, offset: int, data: Buffer) -> None:
        """Both."""
        self._check_writable()
        requests = [node.write(offset, data) for node in self._nodes]
        found = await self._replicas.change(offset, len(data), requests)
        self._compare("write", offset, len(data), *found)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, fast_only: bool = False
    ) -> None:
        """As a write of zeros: what is fast differs between the two."""
        del may_unmap, fast_only
        await self.write(offset, bytes(length))

    async def write_compressed(self, offset: int, data: Buffer) -> None:
        """As ``write``."""
        await self.write(offset, data)

    async def discard(self, offset: int, length: int) -> None:
        """Nothing: what is read afterwards may differ."""

    async def flush(self) -> None:
        """Both."""
        self._compare("flush", 0, 0, *await ask_all([node.flush() for node in self._nodes]))

    async def map(self, offset: int, length: int) -> list[Extent]:
        """Zeros where both say zeros; the rest only ``read`` can give."""
        return await map_all(self._nodes, offset, length)

    @property
    def sees_reads(self) -> bool:
        """They are compared."""
        return True

    def host_file(self) -> None:
        """None: what is done there would not be compared."""
        return

    def _check_writable(self) -> None:
        if self.read_only:
            raise OSError(EPERM, os.strerror(EPERM))

    def _compare(self, kind: str, offset: int, length: int, test: object, raw: object) -> None:
        """Raise the error of both, or EIO if only one has failed."""
        errors = [
            answer.errno or EIO if isinstance(answer, OSError) else 0 for answer in (test, raw)
        ]
        if errors[0] != errors[1]:
            what = f"return value mismatch {-errors[0]} != {-errors[1]}"
            self._mismatch(kind, offset, length, what)
        if isinstance(test, OSError):
            raise test

    def _mismatch(self, kind: str, offset: int, length: int, what: str) -> None:
        log.error("blkverify: %s offset=%d bytes=%d %s", kind, offset, length, what)
        raise OSError(EIO, os.strerror(EIO))
