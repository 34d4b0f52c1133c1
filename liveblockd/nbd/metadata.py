"""Metadata contexts: which there are, which a query means, and extents of block status.

Specification: NBD doc/proto.md, "Metadata querying"; QEMU docs/interop/nbd.txt for
``qemu:allocation-depth`` (0 where no layer has data, 1 in the exported node, 2 in its backing node,
and so on) and ``qemu:dirty-bitmap:NAME`` (1 where dirty).

Pure. A run of block status is a tuple (length, zero, hole, depth), as an export's backend gives it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

from liveblockd.nbd.constants import MAX_EXTENTS, STATE_HOLE, STATE_ZERO

#: length in bytes, reads as zeros, takes no space, layer that has it (0: none, 1: the top)
Run: TypeAlias = tuple[int, bool, bool, int]
#: length in bytes, flags of the context
Extent: TypeAlias = tuple[int, int]


def matches(query: str, context: str, *, listing: bool) -> bool:
    """Whether ``query`` of a client means ``context``.

    A namespace alone (``base:``, ``qemu:``, ``qemu:dirty-bitmap:``) means all that is in it when
    contexts are listed, and nothing when they are selected.
    """
    if query == context:
        return True
    return listing and query.endswith(":") and context.startswith(query)


def selected(queries: Sequence[str], contexts: Sequence[str], *, listing: bool) -> list[str]:
    """The ``contexts`` that ``queries`` mean, in the order of ``contexts``, none twice.

    No query at all lists everything and selects nothing.
    """
    if not queries:
        return list(contexts) if listing else []
    return [c for c in contexts if any(matches(q, c, listing=listing) for q in queries)]


def allocation_extents(runs: Iterable[Run]) -> list[Extent]:
    """Extents of ``base:allocation``."""
    return merged(
        (length, (STATE_HOLE if hole else 0) | (STATE_ZERO if zero else 0))
        for length, zero, hole, _ in runs
    )


def depth_extents(runs: Iterable[Run]) -> list[Extent]:
    """Extents of ``qemu:allocation-depth``."""
    return merged((length, depth) for length, _, _, depth in runs)


def merged(extents: Iterable[Extent]) -> list[Extent]:
    """Neighbours with the same flags made one; at most MAX_EXTENTS, the rest is left off."""
    found: list[Extent] = []
    last = -1
    total = 0
    for length, flags in extents:
        if flags == last:
            total += length
            continue
        if total:
            if len(found) == MAX_EXTENTS:
                return found
            found.append((total, last))
        total, last = length, flags
    if total and len(found) < MAX_EXTENTS:
        found.append((total, last))
    return found


def clipped(extents: Sequence[Extent], length: int, *, one: bool = False) -> list[Extent]:
    """The part of ``extents`` that covers at most ``length`` bytes; ``one``: its first."""
    found: list[Extent] = []
    for run, flags in extents:
        if length <= 0:
            break
        found.append((min(run, length), flags))
        length -= run
        if one:
            break
    return found
