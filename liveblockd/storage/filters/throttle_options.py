"""The limits of a ``throttle-group`` object as QMP has them, to and from those of the buckets.

Specification: qapi/block-core.json, ThrottleLimits; qapi/qom.json, ThrottleGroupProperties.

Pure. Errors: BlockError in QEMU's words.
"""

from __future__ import annotations

from typing import Any, Final

from liveblockd.errors import BlockError
from liveblockd.qapi import QapiModel
from liveblockd.storage.filters.buckets import KINDS, Limits, Rate, check

_MAX_LENGTH: Final = (1 << 32) - 1
_PARTS: Final = (("average", ""), ("burst", "-max"), ("burst_length", "-max-length"))


class ThrottleLimits(QapiModel):
    """Bytes and requests per second; ``-max`` the bursts, ``-max-length`` their seconds."""

    iops_total: int | None = None
    iops_total_max: int | None = None
    iops_total_max_length: int | None = None
    iops_read: int | None = None
    iops_read_max: int | None = None
    iops_read_max_length: int | None = None
    iops_write: int | None = None
    iops_write_max: int | None = None
    iops_write_max_length: int | None = None
    bps_total: int | None = None
    bps_total_max: int | None = None
    bps_total_max_length: int | None = None
    bps_read: int | None = None
    bps_read_max: int | None = None
    bps_read_max_length: int | None = None
    bps_write: int | None = None
    bps_write_max: int | None = None
    bps_write_max_length: int | None = None
    iops_size: int | None = None


def limits_of(group: Any) -> Limits:
    """Those of the options of a new object: ``limits``, and above it the ``x-`` members."""
    limits = Limits()
    if group.limits is not None:
        limits = changed(limits, group.limits)
    limits = changed(limits, group, "x-")
    check(limits)
    return limits


def changed(limits: Limits, given: Any, prefix: str = "") -> Limits:
    """``limits`` with the members that were given; whether they go together is for ``check``."""

    def member(name: str, current: int) -> int:
        value = getattr(given, (prefix + name).replace("-", "_"))
        if value is None:
            return current
        if prefix and value < 0:
            raise BlockError("Property values cannot be negative")
        if name.endswith("-length") and not 0 <= value <= _MAX_LENGTH:
            raise BlockError(f"{prefix}{name} value must be in the range [0, {_MAX_LENGTH}]")
        return int(value)

    rates = {}
    for kind in KINDS:
        rate = limits.rate(kind)
        parts = {part: member(kind + suffix, getattr(rate, part)) for part, suffix in _PARTS}
        rates[kind] = Rate(**parts)
    return Limits(rates, member("iops-size", limits.iops_size))


def to_members(limits: Limits) -> dict[str, int]:
    """ThrottleLimits, all members of it."""
    found = {
        kind + suffix: getattr(limits.rate(kind), part) for kind in KINDS for part, suffix in _PARTS
    }
    return found | {"iops-size": limits.iops_size}
