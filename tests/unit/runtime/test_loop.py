import asyncio
import ctypes
import subprocess
import sys
import textwrap

import pytest

from liveblockd.errors import ConfigError
from liveblockd.runtime import loop, memory
from liveblockd.runtime.clock import SystemClock
from tests.support.clock import ManualClock


async def name_of_loop():
    return type(asyncio.get_running_loop()).__module__


@pytest.fixture(autouse=True)
def switch_interval():
    before = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before)


def test_the_choice(monkeypatch):
    assert loop.run(name_of_loop(), kind="asyncio").startswith("asyncio")
    assert loop.run(name_of_loop(), kind="uvloop").startswith("uvloop")
    monkeypatch.setenv(loop.LOOP_VARIABLE, "asyncio")
    assert loop.run(name_of_loop()).startswith("asyncio")
    assert sys.getswitchinterval() == pytest.approx(loop.SWITCH_INTERVAL)


def test_an_unknown_kind_is_one_line(monkeypatch):
    with pytest.raises(ConfigError, match="unknown event loop 'glib'"):
        loop.run(name_of_loop(), kind="glib")


def test_without_uvloop(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert loop.loop_factory("auto") is asyncio.new_event_loop
    with pytest.raises(ConfigError):
        loop.loop_factory("uvloop")


async def test_clocks():
    clock = SystemClock()
    before = clock.monotonic()
    await clock.sleep(0.01)
    assert clock.monotonic() - before >= 0.009
    assert clock.time() > 1.6e9

    manual, woken = ManualClock(), []

    async def sleeper(seconds):
        await manual.sleep(seconds)
        woken.append((seconds, manual.monotonic()))

    tasks = [asyncio.create_task(sleeper(s)) for s in (3, 1, 2)]
    await asyncio.sleep(0)
    await manual.advance(2.5)
    assert woken == [(1, 1001.0), (2, 1002.0)]
    await manual.advance(1)
    assert woken[-1] == (3, 1003.0)
    await asyncio.gather(*tasks)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="no glibc")
def test_buffers_of_large_requests_stay_in_the_process():
    """In a process of its own: page faults of 800 buffers that are touched and freed."""
    script = textwrap.dedent("""
        import resource, sys
        import numpy as np
        from liveblockd.runtime.memory import keep_freed_buffers
        if sys.argv[1] == "keep":
            assert keep_freed_buffers()
        for _ in range(100):
            for buffer in [np.empty(1 << 20, np.uint8) for _ in range(8)]:
                buffer[:] = 1
            del buffer
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    """)
    faults = {}
    for word in ("keep", "default"):
        done = subprocess.run(
            [sys.executable, "-c", script, word], capture_output=True, text=True, check=True
        )
        faults[word] = int(done.stdout)
    assert faults["keep"] * 5 < faults["default"], faults


def test_thresholds_of_the_environment_stay(monkeypatch):
    asked = []

    class Libc:
        class Mallopt:
            def __call__(self, number, value):
                asked.append(number)
                return 1

        mallopt = Mallopt()

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: Libc)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert memory.keep_freed_buffers()
    assert asked == [-3]
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())
    assert not memory.keep_freed_buffers()
