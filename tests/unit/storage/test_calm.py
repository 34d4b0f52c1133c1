"""Whether small writes go to the page cache from the loop: the rules, with figures as arguments."""

from liveblockd.storage import calm
from liveblockd.storage.calm import LONGEST_REST, LOOK_EVERY, REST, SLOW, SOON, Calm

MS = 1_000_000


def test_quick_writes_change_nothing():
    judge = Calm(lambda: False)
    for now in range(0, 1000 * MS, MS):
        assert judge.allows(now)
        judge.took(now, now + SLOW - 1)


def test_a_slow_write_rests_for_a_multiple_of_its_time_and_longer_when_it_happens_again():
    judge = Calm(lambda: False)
    now, rests = 0, []
    for _ in range(4):
        assert judge.allows(now)
        judge.took(now, now + 5 * MS)
        begun = now = now + 5 * MS
        while not judge.allows(now):
            now += MS
        rests.append((now - begun) // MS)
    assert rests == [5 * REST, 5 * REST * 4, 5 * REST * 16, 5 * REST * 64]


def test_a_slow_write_among_many_quick_ones_is_a_lost_processor():
    judge = Calm(lambda: False)
    for _ in range(5):
        for _ in range(SOON):
            judge.took(0, 0)
        judge.took(0, 5 * MS)
        assert not judge.allows(5 * MS + 5 * MS * REST - 1)
        assert judge.allows(5 * MS + 5 * MS * REST)


def test_no_rest_is_for_ever():
    judge = Calm(lambda: False)
    for _ in range(50):
        judge.took(0, 200 * MS)
    assert judge.allows(200 * MS + LONGEST_REST)


def test_much_that_is_dirty_stops_it_and_is_looked_at_rarely():
    looks = []
    judge = Calm(lambda: bool(looks.append(1)) or len(looks) == 2)
    assert judge.allows(0) and judge.allows(LOOK_EVERY - 1) and len(looks) == 1
    assert not judge.allows(LOOK_EVERY) and not judge.allows(2 * LOOK_EVERY - 1)
    assert len(looks) == 2
    assert judge.allows(2 * LOOK_EVERY) and len(looks) == 3


def test_the_figures_of_the_kernel(tmp_path, monkeypatch):
    def dirty(text):
        path = tmp_path / "vmstat"
        path.write_bytes(text)
        monkeypatch.setattr(calm, "VMSTAT", str(path))
        return calm.much_is_dirty()

    figures = b"nr_free 9\nnr_dirty %d\nnr_writeback %d\nnr_dirty_background_threshold 100\n"
    assert not dirty(figures % (50, 49))
    assert dirty(figures % (50, 50))
    assert dirty(b"nr_dirty 0\n"), "who does not know asks the workers"
    monkeypatch.setattr(calm, "VMSTAT", str(tmp_path / "nothing"))
    assert calm.much_is_dirty()
