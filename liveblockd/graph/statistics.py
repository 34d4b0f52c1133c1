"""Counters of one user of a node, for query-blockstats (qapi/block-core.json, BlockDeviceStats).

Pure. Operations, bytes and errors are counted; times in nanoseconds, of requests that had to wait
only: one answered from memory takes no time worth a clock.
"""

from __future__ import annotations

from typing import Any, Final

_KINDS: Final = ("rd", "wr", "flush", "unmap")


class Statistics:
    """What ``Backend`` counts; plain attributes, for the request path adds to them."""

    rd_bytes: int
    rd_operations: int
    rd_total_time_ns: int
    rd_failed: int
    rd_invalid: int
    wr_bytes: int
    wr_operations: int
    wr_total_time_ns: int
    wr_failed: int
    wr_invalid: int
    flush_operations: int
    flush_total_time_ns: int
    flush_failed: int
    unmap_bytes: int
    unmap_operations: int
    unmap_total_time_ns: int
    unmap_failed: int
    unmap_invalid: int
    wr_highest_offset: int

    def __init__(self) -> None:
        for kind in _KINDS:
            for what in ("bytes", "operations", "total_time_ns", "failed", "invalid"):
                setattr(self, f"{kind}_{what}", 0)
        self.wr_highest_offset = 0

    def finished(self, kind: str, length: int, nanoseconds: int) -> None:
        """Count a request of ``length`` bytes that took so long."""
        setattr(self, f"{kind}_operations", getattr(self, f"{kind}_operations") + 1)
        setattr(self, f"{kind}_bytes", getattr(self, f"{kind}_bytes") + length)
        name = f"{kind}_total_time_ns"
        setattr(self, name, getattr(self, name) + nanoseconds)

    def to_qmp(self) -> dict[str, Any]:
        """BlockDeviceStats."""
        found: dict[str, Any] = {}
        for kind in (*_KINDS, "zone_append"):
            for what in ("operations", "total_time_ns"):
                found[f"{kind}_{what}"] = getattr(self, f"{kind}_{what}", 0)
            if kind != "flush":
                found[f"{kind}_bytes"] = getattr(self, f"{kind}_bytes", 0)
                found[f"{kind}_merged"] = 0
            found[f"failed_{kind}_operations"] = getattr(self, f"{kind}_failed", 0)
            found[f"invalid_{kind}_operations"] = getattr(self, f"{kind}_invalid", 0)
        found["wr_highest_offset"] = self.wr_highest_offset
        found.update({"account_invalid": True, "account_failed": True, "timed_stats": []})
        return found
