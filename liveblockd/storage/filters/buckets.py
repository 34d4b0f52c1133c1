"""Leaky buckets: how long a request has to wait so that rates of bytes and requests are kept.

Specification: QEMU docs/throttle and qapi/block-core.json, ThrottleLimits; the messages are QEMU's.

What was done is water in a bucket that leaks at the rate allowed. While it holds no more than it
can, the next request may go; so a request may be larger than the bucket, and pays afterwards.
Without a burst rate a bucket holds a tenth of a second; with one ``burst`` x ``burst_length``, and
when that is longer than a second a second bucket keeps the burst itself to its rate.

PURE: time is an argument, seconds that never go back. Errors: BlockError from ``check``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from liveblockd.errors import BlockError

MAX_VALUE: Final = 10**15
#: seconds of the allowed rate that can be done at once
_SMOOTH: Final = 0.1
#: in the order in which they are checked
KINDS: Final = ("bps-total", "bps-read", "bps-write", "iops-total", "iops-read", "iops-write")
_APPLY: Final = {
    False: ("bps-total", "iops-total", "bps-read", "iops-read"),
    True: ("bps-total", "iops-total", "bps-write", "iops-write"),
}


@dataclass(frozen=True, slots=True)
class Rate:
    """Bytes or requests a second; 0: unlimited. ``burst_length`` in seconds."""

    average: int = 0
    burst: int = 0
    burst_length: int = 1


@dataclass(frozen=True, slots=True)
class Limits:
    """What a group allows; ``iops_size`` in bytes: larger requests count as several."""

    rates: Mapping[str, Rate] = field(default_factory=dict)
    iops_size: int = 0

    def rate(self, kind: str) -> Rate:
        """That of one of ``KINDS``."""
        return self.rates.get(kind, Rate())

    @property
    def unlimited(self) -> bool:
        """Nothing ever waits."""
        return not any(rate.average for rate in self.rates.values())


def check(limits: Limits) -> None:
    """BlockError if the values do not go together."""
    for unit in ("bps", "iops"):
        total = limits.rate(f"{unit}-total")
        parts = [limits.rate(f"{unit}-read"), limits.rate(f"{unit}-write")]
        if (total.average and any(part.average for part in parts)) or (
            total.burst and any(part.burst for part in parts)
        ):
            raise BlockError(
                "bps/iops/max total values and read/write values cannot be used at the same time"
            )
    if limits.iops_size and not any(limits.rate(k).average for k in KINDS if k.startswith("iops")):
        raise BlockError("iops size requires an iops value to be set")
    for kind in KINDS:
        _check_rate(limits.rate(kind))


def _check_rate(rate: Rate) -> None:
    if not (0 <= rate.average <= MAX_VALUE and 0 <= rate.burst <= MAX_VALUE):
        raise BlockError(f"bps/iops/max values must be within [0, {MAX_VALUE}]")
    if not rate.burst_length:
        raise BlockError("the burst length cannot be 0")
    if rate.burst_length > 1 and not rate.burst:
        raise BlockError("burst length set without burst rate")
    if rate.burst and rate.burst_length > MAX_VALUE // rate.burst:
        raise BlockError("burst length too high for this burst rate")
    if rate.burst and not rate.average:
        raise BlockError("bps_max/iops_max require corresponding bps/iops values")
    if rate.burst and rate.burst < rate.average:
        raise BlockError("bps_max/iops_max cannot be lower than bps/iops")


class _Bucket:
    __slots__ = ("burst_level", "level", "rate", "size")

    def __init__(self, rate: Rate) -> None:
        self.rate = rate
        self.size = rate.burst * rate.burst_length if rate.burst else rate.average * _SMOOTH
        self.level = self.burst_level = 0.0

    def leak(self, seconds: float) -> None:
        self.level = max(0.0, self.level - self.rate.average * seconds)
        self.burst_level = max(0.0, self.burst_level - self.rate.burst * seconds)

    def add(self, amount: float) -> None:
        self.level += amount
        if self.rate.burst_length > 1:
            self.burst_level += amount

    def wait(self) -> float:
        """Seconds."""
        rate = self.rate
        if self.level > self.size:
            return (self.level - self.size) / rate.average
        if rate.burst_length > 1 and self.burst_level > rate.burst * _SMOOTH:
            return (self.burst_level - rate.burst * _SMOOTH) / rate.burst
        return 0.0


class Buckets:
    """The buckets of one group of disks."""

    def __init__(self, limits: Limits, now: float) -> None:
        self.limits = limits
        self.unlimited = limits.unlimited
        self._leaked = now
        self._iops_size = limits.iops_size
        found = {kind: _Bucket(limits.rate(kind)) for kind in KINDS}
        self._buckets = {
            is_write: [
                (kind.startswith("bps"), found[kind]) for kind in kinds if found[kind].rate.average
            ]
            for is_write, kinds in _APPLY.items()
        }
        self._all = list(found.values())

    def wait(self, is_write: bool, now: float) -> float:
        """Seconds until the next request of this direction may go; 0: at once."""
        if (gone := now - self._leaked) > 0:
            self._leaked = now
            for bucket in self._all:
                bucket.leak(gone)
        return max((bucket.wait() for _, bucket in self._buckets[is_write]), default=0.0)

    def account(self, is_write: bool, length: int) -> None:
        """A request of ``length`` bytes goes."""
        units = length / self._iops_size if 0 < self._iops_size < length else 1.0
        for counts_bytes, bucket in self._buckets[is_write]:
            bucket.add(length if counts_bytes else units)
