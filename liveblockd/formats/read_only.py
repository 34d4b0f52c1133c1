"""What formats that are only read have in common.

Runs on: the event loop. Invariants: nothing is ever written. Errors: ``OSError`` EPERM from writes,
``BlockError`` where somebody wants to open for writing.
"""

from __future__ import annotations

import os
from errno import ENOTSUP, EPERM
from typing import ClassVar

from liveblockd.errors import BlockError
from liveblockd.storage.driver import BlockDriver, Buffer
from liveblockd.storage.options import BlockdevOptions


class ReadOnlyFormat(BlockDriver):
    """Base of the formats that serve as backing files and as sources of copies."""

    is_format = True
    child_roles: ClassVar[tuple[str, ...]] = ("file",)
    read_only = True

    @classmethod
    def check_read_only(cls, options: BlockdevOptions) -> None:
        """BlockError unless the image is opened for reading."""
        if not options.read_only:
            raise cls._only_read()

    @classmethod
    def _only_read(cls) -> BlockError:
        return BlockError(
            f"Driver '{cls.driver_name}' can only be used for read-only devices", errno=ENOTSUP
        )

    async def write(self, offset: int, data: Buffer) -> None:
        """EPERM."""
        del offset, data
        raise OSError(EPERM, os.strerror(EPERM))

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool = False, fast_only: bool = False
    ) -> None:
        """EPERM."""
        del offset, length, may_unmap, fast_only
        raise OSError(EPERM, os.strerror(EPERM))

    async def discard(self, offset: int, length: int) -> None:
        """EPERM."""
        del offset, length
        raise OSError(EPERM, os.strerror(EPERM))

    async def flush(self) -> None:
        """There is nothing to flush."""

    async def set_read_only(self, read_only: bool) -> None:
        """Read-write is refused."""
        if not read_only:
            raise self._only_read()

    def actual_size(self) -> int | None:
        """Bytes of the file child in use."""
        file = self.children["file"]
        size = getattr(getattr(file, "driver", file), "actual_size", None)
        return None if size is None else size()
