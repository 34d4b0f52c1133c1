"""What a driver says of an internal snapshot of its image.

Specification: qapi/block-core.json, SnapshotInfo. Pure.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class SnapshotInfo(NamedTuple):
    """An internal snapshot, as SnapshotInfo of qapi/block-core.json has it."""

    id: str
    name: str
    vm_state_size: int  # bytes
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    #: instructions executed, None where that is not known
    icount: int | None
    #: bytes
    disk_size: int

    def to_qmp(self) -> dict[str, Any]:
        """SnapshotInfo."""
        info: dict[str, Any] = {
            "id": self.id,
            "name": self.name,
            "vm-state-size": self.vm_state_size,
            "date-sec": self.date_sec,
            "date-nsec": self.date_nsec,
            "vm-clock-sec": self.vm_clock_nsec // 1_000_000_000,
            "vm-clock-nsec": self.vm_clock_nsec % 1_000_000_000,
        }
        if self.icount is not None:
            info["icount"] = self.icount
        return info
