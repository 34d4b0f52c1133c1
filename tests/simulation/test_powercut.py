"""Power cuts on simulated disks: nothing corrupt, nothing lost; and what would be noticed."""

import random
from typing import Any

import pytest

from liveblockd.formats.qcow2 import new_tables
from tests.simulation import virtual
from tests.simulation.copy_mutants import FIRST_SEED
from tests.simulation.course import Course, Plan
from tests.simulation.crash import Replay
from tests.simulation.crashed import Crashed
from tests.simulation.disks import CHOSEN, Entry, Machine, SimulatedDisk
from tests.simulation.forms import KINDS
from tests.simulation.judging import Figures, judge, judge_at
from tests.simulation.machine import run_machine
from tests.simulation.mutants import MUTANTS, PLANS, planted
from tests.simulation.powercut import run_seed


def assert_nothing_lost(figures: Figures) -> None:
    assert not figures.found, "\n".join(str(found) for found in figures.found[:5])


@pytest.mark.parametrize("first", range(0, 24, 4))
def test_random_machines(first: int) -> None:
    figures = Figures()
    for seed in range(first, first + 4):
        figures.add(run_seed(seed, 25))
    assert figures.cuts == 100
    assert figures.kills and figures.leaking, "the cuts came where nothing was going on"
    assert_nothing_lost(figures)


def test_several_drives_at_once() -> None:
    """In one daemon, each with its chain, guest, jobs, bitmaps and snapshots; each is judged."""
    figures = Figures()
    for seed, drives in ((200, 2), (201, 3)):
        course = run_machine(Plan(seed, drives=drives, large=False))
        writing = {entry.medium for entry in course.log if entry.kind == "begin"}
        assert writing == {~drive for drive in range(drives)}
        figures.add(judge(course, 15))
    assert figures.cuts == 30
    assert_nothing_lost(figures)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image(kind: str) -> None:
    if kind == "encrypt":
        pytest.importorskip("cryptography")
    figures = Figures()
    for seed in range(40, 44):
        figures.add(run_seed(seed, 15, kind=kind))
    assert_nothing_lost(figures)


def test_tables_that_workers_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data that is scattered over many spans: batches make the tables of an empty overlay."""
    made = 0
    publish = new_tables.TableMaker._publish

    def counted(maker: new_tables.TableMaker, *args: Any) -> None:
        nonlocal made
        made -= maker.made
        publish(maker, *args)
        made += maker.made

    monkeypatch.setattr(new_tables.TableMaker, "_publish", counted)
    figures = Figures()
    for seed in range(90, 98):
        steps = ("snapshot", "stream", "snapshot", "stream")
        figures.add(run_seed(seed, 40, wide=True, depth=2, steps=steps, faults=seed % 4 == 3))
    assert made > 80
    assert_nothing_lost(figures)


def test_clusters_that_are_copied_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guests write into new overlays, while these are merged too; copies that are cut short."""
    done = {True: 0, False: 0}
    copy = SimulatedDisk.copy_nowait

    def counted(disk: SimulatedDisk, *arguments: Any) -> bool:
        result = copy(disk, *arguments)
        done[result] += 1
        return result

    monkeypatch.setattr(SimulatedDisk, "copy_nowait", counted)
    figures = Figures()
    for seed in range(CHOSEN + 1, CHOSEN + 22, 3):
        steps = ("snapshot", "rest", "snapshot", "rest", "snapshot", "stream", "rest")
        plan = {"kind": "compression", "cluster_size": 4096, "depth": 2, "faults": False}
        figures.add(run_seed(seed, 12, steps=steps, **plan))
    assert done[True] > 10 and done[False] > 10, done
    assert_nothing_lost(figures)


def test_snapshots_read_as_they_did() -> None:
    """Internal snapshots taken, applied, deleted; versions and refcounts changed."""
    figures = Figures()
    for seed in range(50, 58):
        steps = ("internal_apply", "amend", "internal", "internal_apply", "internal_gone")
        figures.add(run_seed(seed, 15, steps=steps, faults=False))
    assert figures.snapshots > 60
    assert_nothing_lost(figures)


def test_no_flush_succeeds_any_more_where_a_snapshot_switches_the_header() -> None:
    """The disk may have either header: both are sound, so that no image is marked corrupt."""
    assert_nothing_lost(run_seed(10106, 40))


@pytest.mark.parametrize("seed", [610050, 610082])
def test_a_raw_image_is_durable_once_it_is_closed(seed: int) -> None:
    """A guest on the raw copy that it was mirrored to; a drive that is closed and opened again.

    What would be noticed: ``test_defect_is_noticed[closed-without-flush]``.
    """
    assert_nothing_lost(run_seed(seed, 60, drives=3))


def test_guests_go_over_to_mirrors() -> None:
    """Cuts while they copy, at READY, around the switch: to qcow2 and raw, in both copy modes."""
    figures, switches = Figures(), 0
    for seed in range(90, 98):
        mode = ("background", "write-blocking")[seed % 2]
        course = run_machine(
            Plan(seed, steps=("mirror", "rest", "mirror"), copy_mode=mode, large=False)
        )
        found = [n for n, entry in enumerate(course.log) if entry.kind == "switch"]
        switches += len(found)
        around = sorted({p for end in found for p in range(end - 8, end + 16, 2)})
        positions = [p for p in around if 0 <= p <= len(course.log)]
        figures.add(judge_at(course, iter(positions), kill=None))
        figures.add(judge(course, 12))
    assert switches > 5
    assert_nothing_lost(figures)


def test_copies_on_the_disks_own_images_and_without_a_flush() -> None:
    """sync=none, sync=top, two jobs in one chain, and targets that cannot be flushed."""
    figures = Figures()
    for seed in range(4):
        steps = ("mirror_none", "backup_top", "several", "unflushable", "backup_top")
        figures.add(run_seed(seed, 20, steps=steps, large=False, depth=3))
    assert figures.backups > 10
    assert_nothing_lost(figures)


def test_backups_are_of_one_instant_or_unfinished() -> None:
    """Full ones and increments, cancelled ones among them, with internal snapshots and restarts."""
    figures = Figures()
    for seed in range(120, 128):
        steps = ("backup", "increment", "restart", "increment", "rest", "restart", "increment")
        figures.add(run_seed(seed, 20, steps=steps, large=False))
    assert figures.backups > 100
    assert figures.bitmaps > 4
    assert_nothing_lost(figures)


def test_encrypted_images_change_their_version() -> None:
    """In version 2 their zeros are data: encrypted, in the disk and in its internal snapshots."""
    pytest.importorskip("cryptography")
    figures = Figures()
    for seed in range(80, 88):
        steps = ("internal", "amend", "internal", "amend", "restart", "amend")
        figures.add(
            run_seed(
                seed, 15, kind="encrypt", cluster_size=4096, depth=2, steps=steps, faults=False
            )
        )
    assert figures.snapshots > 60
    assert_nothing_lost(figures)


def test_leaks_given_back_to_an_image_in_use() -> None:
    """Cuts in the middle of it: nothing that is used is ever free."""
    figures = Figures()
    for seed in range(60, 68):
        steps = ("check", "internal", "check", "stream", "check")
        figures.add(run_seed(seed, 25, steps=steps, faults=seed % 4 == 3))
    assert_nothing_lost(figures)


def completions(course: Course) -> list[int]:
    """Where BLOCK_JOB_COMPLETED was published."""
    return [n for n, entry in enumerate(course.log) if entry.kind == "note"]


def kills_after_completed(seed: int) -> Figures:
    course = run_machine(
        Plan(seed, depth=2 + seed % 3, steps=("stream",), faults=False, large=False)
    )
    found = completions(course)
    positions = [p for end in found for p in range(end, end + 9) if p <= len(course.log)]
    return judge_at(course, iter(positions), kill=True)


def cuts_around_end(seed: int, each: int = 2) -> Figures:
    steps = ("stream",) if seed % 3 else ("stream_to_base",)
    course = run_machine(Plan(seed, depth=2 + seed % 3, steps=steps, faults=False, large=False))
    found = completions(course)
    around = sorted({p for end in found for p in range(end - 30, end + 15)})
    positions = [p for p in around if 0 <= p <= len(course.log)]
    return judge_at(course, iter(positions), kill=False, each=each)


def test_kill_right_after_completed_loses_nothing() -> None:
    """SIGKILL right after BLOCK_JOB_COMPLETED: the page cache survives, nothing else does."""
    figures = Figures()
    for seed in range(500, 512):
        figures.add(kills_after_completed(seed))
    assert figures.cuts == figures.kills > 60
    assert_nothing_lost(figures)


def test_power_cut_around_end_of_stream_reads_no_zeros() -> None:
    figures = Figures()
    for seed in range(600, 608):
        figures.add(cuts_around_end(seed))
    assert figures.cuts > 300
    assert_nothing_lost(figures)


def test_both_would_notice_a_header_that_is_early() -> None:
    with planted("header-before-commit"):
        assert any(kills_after_completed(seed).lost for seed in range(500, 512))
        assert any(cuts_around_end(seed).lost for seed in range(600, 608))


@pytest.mark.parametrize("name", MUTANTS)
def test_defect_is_noticed(name: str) -> None:
    plan = PLANS.get(name, {})
    first = FIRST_SEED.get(name, 0)
    with planted(name):
        for seed in range(first, first + 40):
            try:
                found = run_seed(seed, 40, **plan).found
            except BaseExceptionGroup as group:  # the guest itself read wrong bytes
                if group.subgroup(AssertionError) is not None:
                    return
                continue
            if found:
                return
    pytest.fail("no cut showed it")


def test_refcount_table_grows() -> None:
    figures = Figures()
    moved = 0
    for seed in (3, 5):
        course = run_machine(
            Plan(seed, large=True, depth=2, steps=("rest", "resize"), faults=False)
        )
        top = course.names[course.top]
        headers = [e.data for e in course.log if e.medium == top and e.data and e.offset == 0]
        moved += any(header[48:56] != course.initial[top][48:56] for header in headers)
        figures.add(judge(course, 40))
    assert moved, "the refcount table stayed where it was"
    assert_nothing_lost(figures)


def test_one_seed_one_course() -> None:
    for plan in (Plan(5), Plan(204, drives=2, large=False)):
        first, second = run_machine(plan), run_machine(plan)
        assert first.log == second.log
        assert str(judge(first, 10)) == str(judge(second, 10))


# -- the instruments themselves


def replay(*log: Entry) -> Replay:
    found = Replay(list(log), [bytes(2048)])
    found.advance(len(log))
    return found


def states(found: Replay) -> set[bytes]:
    rng = random.Random(1)
    return {found.power_cut(found.choose(rng), rng)[0].tobytes()[:1024] for _ in range(200)}


A, B, Z = b"a" * 512, b"b" * 512, bytes(512)


def test_what_a_cut_may_leave() -> None:
    write = Entry("write", 0, 1, 0, A + B)
    torn = {x + y for x in (Z, A) for y in (Z, B)}
    assert states(replay(write)) == torn
    assert states(replay(write, Entry("end", 0, 1))) == torn
    # A flush covers what had ended before it began, once it has ended.
    late = (write, Entry("flush", 0, 2), Entry("end", 0, 1), Entry("flushed", 0, 2))
    assert states(replay(*late)) == torn
    begun = (write, Entry("end", 0, 1), Entry("flush", 0, 2))
    assert states(replay(*begun)) == torn
    assert states(replay(*begun, Entry("flushed", 0, 2))) == {A + B}
    assert states(replay(*begun, Entry("unflushed", 0, 2))) == torn
    # A later write may be there without the earlier one.
    assert B + Z in states(replay(Entry("write", 0, 1, 512, A), Entry("write", 0, 2, 0, B)))


def test_a_failed_write_is_gone_once_a_later_one_is_durable() -> None:
    log = (
        Entry("write", 0, 1, 0, A + A),
        Entry("fail", 0, 1),
        Entry("write", 0, 2, 0, B),
        Entry("end", 0, 2),
        Entry("flush", 0, 3),
        Entry("flushed", 0, 3),
    )
    assert states(replay(*log)) == {B + Z, B + A}


def test_a_kill_leaves_the_page_cache() -> None:
    log = (Entry("write", 0, 1, 0, A), Entry("write", 0, 2, 0, B))
    assert replay(*log).kill()[0].tobytes()[:1024] == B + Z


def test_a_flush_that_failed_fails_again() -> None:
    async def main() -> None:
        machine = Machine(1)
        disk = SimulatedDisk(machine.add("x"))
        machine.quiet = False
        machine.faults = {"flush": 1.0}
        with pytest.raises(OSError, match="injected"):
            await disk.flush()
        machine.faults = {}
        with pytest.raises(OSError, match="injected"):
            await disk.flush()
        machine.close()

    virtual.run(main())


def test_crashed_notices_damage() -> None:
    """What it must see in an image, one thing at a time."""
    course = run_machine(Plan(3, depth=1, cluster_size=4096, steps=("rest",), faults=False))
    good = Replay(course.log, course.initial)
    good.advance(len(course.log))
    content = good.kill()[0]
    image = Crashed(content)
    assert not image.errors
    index, entries = next(iter(image.tables.items()))
    place = (int(image.l1[index]) & 0x00FFFFFFFFFFFE00) + 8 * int(entries.nonzero()[0][0])
    changed = content.copy()
    changed[place + 5] ^= 0x40  # another host cluster
    assert Crashed(changed).errors
    changed = content.copy()
    changed[place] ^= 0x80  # COPIED
    assert Crashed(changed).errors
    changed = content.copy()
    block = int.from_bytes(changed[image.table_offset : image.table_offset + 8].tobytes(), "big")
    changed[block : block + 64] = 0
    assert Crashed(changed).errors


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_machines() -> None:
    figures = Figures()
    for seed in range(10_000, 10_150):
        figures.add(run_seed(seed, 100))
    assert_nothing_lost(figures)
