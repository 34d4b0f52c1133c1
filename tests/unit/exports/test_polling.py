"""When a look for the next request is worth it."""

from liveblockd.exports.polling import FIRST_RUN, HITS, MAX_DOUBLINGS, POLL_MAX, QUICK, Polling


def run(polling, gap, count, now=0):
    for _ in range(count):
        polling.answered(now)
        now += gap
        polling.arrived(now)
    return now


def test_after_a_run_of_quick_requests_only():
    polling = Polling()
    run(polling, QUICK - 1, FIRST_RUN - 1)
    assert not polling.worthwhile
    run(polling, QUICK - 1, 1)
    assert polling.worthwhile
    run(polling, QUICK, 1)
    assert not polling.worthwhile


def test_never_without_a_limit():
    polling = Polling(0)
    run(polling, 1, 1000)
    assert not polling.worthwhile


def test_looks_in_vain_become_rare():
    """A client that thinks for a little longer than a look takes: 1 look in some thousands."""
    polling, looks = Polling(), 0
    for _ in range(50_000):
        run(polling, POLL_MAX + 1, 1)
        if polling.worthwhile:
            looks += 1
            polling.missed()
    assert looks < MAX_DOUBLINGS + 50_000 // (FIRST_RUN << MAX_DOUBLINGS) + 2


def test_what_is_found_makes_up_for_misses():
    polling = Polling()
    for _ in range(5):
        polling.missed()
    run(polling, 1, FIRST_RUN << 4)
    assert not polling.worthwhile
    run(polling, 1, FIRST_RUN << 5)
    assert polling.worthwhile
    for _ in range(5 * HITS):
        polling.found()
    polling.missed()
    run(polling, 1, FIRST_RUN << 1)
    assert polling.worthwhile


def test_somebody_else_ends_the_run():
    polling = Polling()
    run(polling, 1, FIRST_RUN)
    polling.interrupted()
    assert not polling.worthwhile
