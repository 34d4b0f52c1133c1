"""Which status of a job may follow which, and which verb it obeys in which (qapi/job.json).

Two tables and the error that a verb out of turn is answered with. Pure.

Invariants: ``null`` is the only end; every status but ``null`` leads there. Errors that escape:
``BlockError`` from ``check_verb``; a wrong transition is an AssertionError, never a reply.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from liveblockd.errors import BlockError


class JobStatus(enum.StrEnum):
    """Where a job stands in its life."""

    UNDEFINED = "undefined"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    STANDBY = "standby"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


class JobVerb(enum.StrEnum):
    """What a client may ask of a job."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    SET_SPEED = "set-speed"
    COMPLETE = "complete"
    FINALIZE = "finalize"
    DISMISS = "dismiss"
    CHANGE = "change"


_S = JobStatus

#: status -> what it may turn into
NEXT: Final[Mapping[JobStatus, frozenset[JobStatus]]] = MappingProxyType(
    {
        _S.UNDEFINED: frozenset({_S.CREATED}),
        _S.CREATED: frozenset({_S.RUNNING, _S.ABORTING, _S.NULL}),
        _S.RUNNING: frozenset({_S.PAUSED, _S.READY, _S.WAITING, _S.ABORTING}),
        # A paused job is woken before anything else becomes of it, also when it is cancelled.
        _S.PAUSED: frozenset({_S.RUNNING}),
        _S.READY: frozenset({_S.STANDBY, _S.WAITING, _S.ABORTING}),
        _S.STANDBY: frozenset({_S.READY}),
        _S.WAITING: frozenset({_S.PENDING, _S.ABORTING}),
        _S.PENDING: frozenset({_S.CONCLUDED, _S.ABORTING}),
        _S.ABORTING: frozenset({_S.CONCLUDED}),
        _S.CONCLUDED: frozenset({_S.NULL}),
        _S.NULL: frozenset(),
    }
)

_ALIVE: Final = frozenset({_S.CREATED, _S.RUNNING, _S.PAUSED, _S.READY, _S.STANDBY})

#: verb -> in which status it is obeyed
OBEYED: Final[Mapping[JobVerb, frozenset[JobStatus]]] = MappingProxyType(
    {
        JobVerb.CANCEL: _ALIVE | {_S.WAITING, _S.PENDING},
        JobVerb.PAUSE: _ALIVE,
        JobVerb.RESUME: _ALIVE,
        JobVerb.SET_SPEED: _ALIVE,
        JobVerb.COMPLETE: frozenset({_S.READY}),
        JobVerb.FINALIZE: frozenset({_S.PENDING}),
        JobVerb.DISMISS: frozenset({_S.CONCLUDED}),
        JobVerb.CHANGE: _ALIVE,
    }
)


def may_become(old: JobStatus, new: JobStatus) -> bool:
    """Whether ``new`` may follow ``old``."""
    return new in NEXT[old]


def check_verb(job_id: str, status: JobStatus, verb: JobVerb) -> None:
    """Raise BlockError unless a job in ``status`` obeys ``verb``."""
    if status not in OBEYED[verb]:
        raise BlockError(f"Job '{job_id}' in state '{status}' cannot accept command verb '{verb}'")
