"""What goes wrong in a chaos: requests to targets fail now and then, workers give copies up.

A target's file stands below ``blkdebug`` with a few rules, each of which lets one request fail that
touches its sector, or one flush, or all flushes. Guests never stand on such a one: mirrors to it
end without a switch.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from errno import EIO, ENOSPC
from typing import Any, TypeVar

from liveblockd.formats.qcow2 import gather, new_tables, populate
from liveblockd.runtime.workers import JobGroup, Lane
from tests.simulation.jitter import JitterPool

T = TypeVar("T")
SECTOR = 512
#: on-target-error and the like
POLICIES = ("report", "ignore", "stop", "enospc")


def inject(rng: random.Random, size: int) -> list[dict[str, Any]]:
    """Rules of ``blkdebug`` for an image of a disk of ``size`` bytes."""
    sectors = size // SECTOR + 256
    rules: list[dict[str, Any]] = []
    if rng.random() < 0.3:
        # One flush, or none succeeds.
        once = rng.random() < 0.5
        rules.append({"event": "none", "iotype": "flush", "errno": EIO, "once": once})
    return rules + [
        {
            "event": "none",
            "iotype": rng.choice(("write", "write", "write", "write-zeroes", "read")),
            "errno": rng.choice((EIO, ENOSPC)),
            "sector": -1 if rng.random() < 0.2 else rng.randrange(sectors),
            "once": True,
        }
        for _ in range(rng.randrange(1, 12))
    ]


def below_blkdebug(rng: random.Random, file: dict[str, Any], size: int) -> dict[str, Any]:
    """The member ``file`` of blockdev-add, with faults in between."""
    return {"driver": "blkdebug", "image": file, "inject-error": inject(rng, size)}


class FaultyPool(JitterPool):
    """Copies from descriptor to descriptor fail now and then, before or after they were made."""

    def __init__(self, rng: random.Random, worst: float, *, share: float) -> None:
        super().__init__(rng, worst)
        self.share = share
        self.injected = 0

    def _submit(
        self,
        fn: Callable[..., T],
        args: tuple[Any, ...],
        group: JobGroup | None,
        lane: Lane | None = None,
    ) -> asyncio.Future[T]:
        descriptors: set[int] = set()
        if fn is populate.clone_or_copy:
            descriptors = {args[0].source_fd, args[0].fd}
        many = fn in (gather.copy_segments, new_tables.copy_with_tables)  # closes nothing itself
        if not (many or descriptors) or self._rng.random() >= self.share:
            return super()._submit(fn, args, group, lane)
        self.injected += 1
        code, before = self._rng.choice((EIO, ENOSPC)), self._rng.random() < 0.5

        def fail() -> T:
            if not before:
                fn(*args)
            for descriptor in descriptors if before else ():
                os.close(descriptor)
            raise OSError(code, os.strerror(code))

        return super()._submit(fail, (), group, lane)
