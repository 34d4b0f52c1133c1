"""How much a job copies at a time: as much as takes some milliseconds.

A chunk costs the loop the time of a few requests of guests, and a worker that copies from host file
to host file is the faster the more it gets. But a pause, a cancel and a guest's write to the same
place wait for it.

Pure: seconds are arguments. No errors escape.
"""

from __future__ import annotations

from typing import Final

MIB: Final = 1 << 20

LEAST: Final = 2 * MIB
FIRST: Final = 4 * MIB
MOST: Final = 32 * MIB
#: seconds that a chunk takes, waiting for those before it included
SOON: Final = 0.02
LATE: Final = 0.05


class ChunkSize:
    """Of one job while no guest is served; ``size`` in bytes."""

    def __init__(self) -> None:
        self.size = FIRST

    def took(self, length: int, seconds: float) -> None:
        """So many bytes were copied in that time."""
        if seconds > LATE:
            self.size = max(LEAST, self.size // 2)
        elif seconds < SOON and length >= self.size:
            self.size = min(MOST, self.size * 2)
