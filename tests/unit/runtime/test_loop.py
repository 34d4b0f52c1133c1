import asyncio
import sys

import pytest

from liveblockd.errors import ConfigError
from liveblockd.runtime import loop
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
