"""Short time slices, as the kernel tells of them; in processes of their own, which keep them."""

import os
import platform
import subprocess
import sys
import textwrap

import pytest

from liveblockd.runtime import slices


def told(program):
    """The words that a program prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return done.stdout.split()


def kernel():
    return tuple(int(part) for part in platform.release().split(".")[:2])


def needs_slices():
    if os.sched_getscheduler(0) not in (os.SCHED_OTHER, os.SCHED_BATCH):
        pytest.skip("these tests run with a policy without slices")
    if kernel() < (6, 12) or not slices.slice_of_thread():
        pytest.skip("the kernel knows no slices of threads")


def test_the_loop_and_its_workers_have_short_slices():
    needs_slices()
    found = told("""
        import os
        from liveblockd.runtime import loop, slices
        from liveblockd.runtime.workers import WorkerPool
        async def main():
            pool = WorkerPool()
            print(slices.slice_of_thread(), await pool.run(slices.slice_of_thread))
            print(await pool.copies.run(slices.slice_of_thread))
            pool.close()
        os.nice(3)
        loop.run(main())
        print(os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0))
    """)
    expected = str(os.getpriority(os.PRIO_PROCESS, 0) + 3)
    assert found[:2] == [str(slices.SLICE)] * 2
    assert found[2] == str(slices.COPY_SLICE)
    assert found[3:] == [min(expected, "19", key=int), str(os.sched_getscheduler(0))]


def test_another_policy_is_left_alone():
    found = told("""
        import os
        from liveblockd.runtime import slices
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        print(slices.ask_for_slices(slices.SLICE), slices.slice_of_thread())
        print(os.sched_getscheduler(0))
    """)
    assert found == ["False", "0", str(os.SCHED_IDLE)]


def test_where_the_kernel_refuses_all_stays(monkeypatch):
    monkeypatch.setattr(slices, "_call", lambda *_: -1)
    assert not slices.ask_for_slices(slices.SLICE)
    assert slices.slice_of_thread() == 0
    monkeypatch.setattr(slices, "_NUMBERS", None)
    assert not slices.ask_for_slices(slices.SLICE)
