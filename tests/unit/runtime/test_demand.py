import os

import pytest

from liveblockd.runtime.demand import WINDOW, Demand


def test_a_request_is_recent_for_a_while():
    demand = Demand(2)
    assert not demand.is_recent(5.0)
    demand.requests += 1
    assert demand.is_recent(10.0)
    assert demand.is_recent(10.0 + WINDOW * 0.9)
    assert not demand.is_recent(10.0 + WINDOW * 1.1)
    demand.requests += 3
    assert demand.is_recent(20.0)


@pytest.mark.parametrize(
    ("processors", "wanted", "busy"),
    [(1, 3, 1), (2, 3, 1), (3, 3, 2), (4, 3, 3), (16, 3, 3), (2, 1, 1)],
)
def test_a_processor_is_left_free_while_somebody_asks(processors, wanted, busy):
    demand = Demand(processors)
    assert demand.width(wanted, 1.0) == wanted
    demand.requests += 1
    assert demand.width(wanted, 1.0) == busy
    assert demand.width(wanted, 2.0) == wanted


def test_the_processors_are_those_of_the_process():
    assert Demand().processors == len(os.sched_getaffinity(0))
