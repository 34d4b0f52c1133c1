"""The tables against an independent list, written the other way round: what is *not* allowed."""

import pytest

from liveblockd.errors import BlockError
from liveblockd.jobs.transitions import NEXT, JobStatus, JobVerb, check_verb, may_become

# Rows: from; columns in the order of ORDER: 1 where the step is allowed.
ORDER = "undefined created running paused ready standby waiting pending aborting concluded null"
STEPS = """
undefined 0 1 0 0 0 0 0 0 0 0 0
created   0 0 1 0 0 0 0 0 1 0 1
running   0 0 0 1 1 0 1 0 1 0 0
paused    0 0 1 0 0 0 0 0 0 0 0
ready     0 0 0 0 0 1 1 0 1 0 0
standby   0 0 0 0 1 0 0 0 0 0 0
waiting   0 0 0 0 0 0 0 1 1 0 0
pending   0 0 0 0 0 0 0 0 1 1 0
aborting  0 0 0 0 0 0 0 0 0 1 0
concluded 0 0 0 0 0 0 0 0 0 0 1
null      0 0 0 0 0 0 0 0 0 0 0
"""
VERBS = """
cancel    0 1 1 1 1 1 1 1 0 0 0
pause     0 1 1 1 1 1 0 0 0 0 0
resume    0 1 1 1 1 1 0 0 0 0 0
set-speed 0 1 1 1 1 1 0 0 0 0 0
complete  0 0 0 0 1 0 0 0 0 0 0
finalize  0 0 0 0 0 0 0 1 0 0 0
dismiss   0 0 0 0 0 0 0 0 0 1 0
change    0 1 1 1 1 1 0 0 0 0 0
"""


def table(text):
    columns = ORDER.split()
    for line in text.split("\n"):
        if line:
            name, *flags = line.split()
            for column, flag in zip(columns, flags, strict=True):
                yield name, column, flag == "1"


@pytest.mark.parametrize(("old", "new", "allowed"), list(table(STEPS)))
def test_step(old, new, allowed):
    assert may_become(JobStatus(old), JobStatus(new)) is allowed


@pytest.mark.parametrize(("verb", "status", "obeyed"), list(table(VERBS)))
def test_verb(verb, status, obeyed):
    if obeyed:
        check_verb("s", JobStatus(status), JobVerb(verb))
        return
    with pytest.raises(BlockError) as caught:
        check_verb("s", JobStatus(status), JobVerb(verb))
    assert (
        caught.value.message == f"Job 's' in state '{status}' cannot accept command verb '{verb}'"
    )


def test_every_status_leads_to_null():
    reached = {JobStatus.NULL}
    while more := {s for s in JobStatus if NEXT[s] & reached} - reached:
        reached |= more
    assert reached == set(JobStatus)
