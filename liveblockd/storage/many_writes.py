"""Many writes to one host file with one system call.

Specification: io_submit(2); ``many_requests``.

Runs on: workers.

Invariants: on return all was stored (not made durable: that is a flush); on an error some of it may
have been. Nothing is under way any more.

Errors: ``OSError``, of the first write that fails.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from liveblockd.storage import hostcalls
from liveblockd.storage.many_requests import MOST, Integers, address_of, context


class Batch(NamedTuple):
    """Bytes for a file, one write's behind the other's; offsets and lengths in bytes.

    For O_DIRECT the data are aligned, and so are all offsets and lengths.
    """

    offsets: Integers
    lengths: Integers
    data: npt.NDArray[np.uint8]

    def writes(self) -> list[tuple[int, memoryview]]:
        """Each of them."""
        ends = np.cumsum(self.lengths)
        view = self.data.data
        return [
            (offset, view[start:end])
            for offset, start, end in zip(
                self.offsets.tolist(), (ends - self.lengths).tolist(), ends.tolist(), strict=True
            )
        ]


def write_many(fd: int, batch: Batch, *, alignment: int = 0) -> None:
    """All of them, in any order; ``alignment`` is that of O_DIRECT, 0 without."""
    done = _by_one_call(fd, batch)
    for number, (offset, data) in enumerate(batch.writes() if not done.all() else ()):
        if done[number]:
            pass
        elif alignment:
            hostcalls.write_aligned(fd, offset, data, alignment)
        else:
            hostcalls.write(fd, offset, data)


def _by_one_call(fd: int, batch: Batch) -> npt.NDArray[np.bool_]:
    """Which of them are stored whole."""
    count = len(batch.offsets)
    done = np.zeros(count, np.bool_)
    own = context()
    if own is None:
        return done
    starts = np.cumsum(batch.lengths) - batch.lengths
    addresses = (address_of(batch.data) + starts).astype(np.uint64)
    for first in range(0, count, MOST):
        part = slice(first, first + MOST)
        lengths = batch.lengths[part]
        stored = own.write(fd, batch.offsets[part], addresses[part], lengths)
        if stored is not None:
            done[part] = stored == lengths
    return done
