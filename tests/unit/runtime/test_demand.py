import os

import pytest

from liveblockd.runtime.demand import WINDOW, Arrivals, Demand


def test_a_request_is_recent_for_a_while():
    guests = Arrivals()
    assert not guests.is_recent(5.0)
    guests.requests += 1
    assert guests.is_recent(10.0)
    assert guests.is_recent(10.0 + WINDOW * 0.9)
    assert not guests.is_recent(10.0 + WINDOW * 1.1)
    guests.requests += 3
    assert guests.is_recent(20.0)


@pytest.mark.parametrize(
    ("processors", "wanted", "for_guests", "for_monitors"),
    [(1, 3, 1, 1), (2, 3, 1, 2), (3, 3, 2, 3), (4, 3, 3, 3), (16, 3, 3, 3), (2, 1, 1, 1)],
)
def test_copies_leave_processors_to_who_is_served(processors, wanted, for_guests, for_monitors):
    demand = Demand(processors)
    assert demand.width(wanted, 1.0) == wanted
    demand.guests.requests += 1
    demand.monitors.requests += 1
    assert demand.width(wanted, 1.0) == for_guests
    demand.monitors.requests += 1
    assert demand.width(wanted, 2.0) == for_monitors
    assert demand.width(wanted, 3.0) == wanted


def test_the_processors_are_those_of_the_process():
    assert Demand().processors == len(os.sched_getaffinity(0))


async def test_a_guest_is_served_for_a_while():
    demand = Demand(2)
    demand.monitors.requests += 1
    assert not demand.is_served()
    demand.guests.requests += 1
    assert demand.is_served()
