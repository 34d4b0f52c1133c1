"""Limits of drives: ``throttling.*`` of ``--drive``, and block_set_io_throttle.

Specification: qapi/block.json, BlockIOThrottle; QEMU's manual (-drive); QEMU docs/throttle.

The limits of a drive hold for requests of its own (``qemu-io``), and for exports that stand on its
node when they are made: those are its guests here. Jobs have a speed of their own. Drives of one
group share its limits, with each other and with the ``throttle`` nodes of an object of that name.

Runs on the event loop. Invariant: a drive without limits, and its guests, pay nothing for them.
Errors: BlockError in QEMU's words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from liveblockd.errors import BlockError
from liveblockd.graph.backend import Backend
from liveblockd.graph.graph import Graph
from liveblockd.qapi import members, parse
from liveblockd.storage.filters.buckets import KINDS, Limits, check
from liveblockd.storage.filters.throttle_group import ThrottleGroup
from liveblockd.storage.filters.throttle_options import ThrottleLimits, changed

_PREFIX: Final = "throttling."
_WAYS: Final = {"": "total", "_rd": "read", "_wr": "write"}


def old_name(kind: str) -> str:
    """``bps_rd`` for ``bps-read``: how the oldest options and commands call a limit."""
    unit, way = kind.split("-")
    return unit + next(old for old, new in _WAYS.items() if new == way)


#: of -drive: old name -> name in ThrottleLimits, or "group"
OLD_NAMES: Final = {
    **{old_name(kind): kind for kind in KINDS},
    **{f"{old_name(kind)}_max": f"{kind}-max" for kind in KINDS},
    "iops_size": "iops-size",
    "group": "group",
}


_MEMBERS: Final = frozenset(member.name for member in members(ThrottleLimits))


class DriveLimits(NamedTuple):
    """What a drive is opened with; without a ``group`` one of its own, of its name."""

    limits: Limits
    group: str | None


def take_throttling(drive: dict[str, Any], *, keyval: bool) -> DriveLimits:
    """Take those members of ``--drive`` that are limits out of ``drive``. BlockError."""
    given: dict[str, Any] = {}
    for name in list(drive):
        if name == "throttling" and isinstance(drive[name], Mapping):
            given.update(drive.pop(name))
        elif name.startswith(_PREFIX):
            given[name.removeprefix(_PREFIX)] = drive.pop(name)
        elif name in OLD_NAMES:
            given[OLD_NAMES[name]] = drive.pop(name)
    group = given.pop("group", None)
    if group is not None and not isinstance(group, str):
        raise BlockError("Invalid parameter type for 'throttling.group', expected: string")
    limits = changed(Limits(), parse(ThrottleLimits, _numbers(given, keyval=keyval)))
    check(limits)
    return DriveLimits(limits, group or None)


def _numbers(given: Mapping[str, Any], *, keyval: bool) -> dict[str, Any]:
    found = {}
    for name, value in given.items():
        if name not in _MEMBERS:
            raise BlockError(f"Parameter '{_PREFIX}{name}' is unexpected")
        found[name] = value
        if keyval and isinstance(value, str):
            try:
                found[name] = int(value, 0)
            except ValueError:
                raise BlockError(f"Parameter '{_PREFIX}{name}' expects a number") from None
    return found


def limit(graph: Graph, drive: Backend, limits: Limits, group: str | None = None) -> None:
    """Limit a drive and its guests; without any limits in ``limits`` it leaves its group."""
    if limits.unlimited:
        _join(graph, drive, None)
        return
    if drive.throttle is None or (group is not None and group != drive.throttle_name):
        _join(graph, drive, group or drive.name)
    assert drive.throttle is not None
    drive.throttle.group.configure(limits)


def take_guest(graph: Graph, guest: Backend) -> None:
    """An export was made: if its node is that of a drive, it reads and waits as the drive does."""
    for drive in graph.drives.values():
        if drive.node is guest.node:
            guest.guest_of = drive
            guest.join(None if drive.throttle is None else drive.throttle.group)
            guest.copy_on_read = drive.copy_on_read
            guest.rebind()
            return


def _join(graph: Graph, drive: Backend, name: str | None) -> None:
    group = None if name is None else _group(graph, name)
    drive.throttle_name = name or ""
    for backend in graph.backends:
        if backend is drive or backend.guest_of is drive:
            backend.join(group)
    for known in [n for n, found in graph.throttle_groups.items() if not found.members]:
        del graph.throttle_groups[known]


def _group(graph: Graph, name: str) -> ThrottleGroup:
    try:
        return graph.environment.throttle_group(name)  # of an object
    except BlockError:
        return graph.throttle_groups.setdefault(name, ThrottleGroup(Limits()))


def to_info(drive: Backend) -> dict[str, Any]:
    """The members of BlockDeviceInfo that tell of limits."""
    if drive.throttle is None:
        return {}
    limits = drive.throttle.group.limits
    info: dict[str, Any] = {"group": drive.throttle_name}
    for kind in KINDS:
        rate, name = limits.rate(kind), old_name(kind)
        info[name] = rate.average
        if rate.burst:
            info[f"{name}_max"] = rate.burst
            info[f"{name}_max_length"] = rate.burst_length
    if limits.iops_size:
        info["iops_size"] = limits.iops_size
    return info
