"""While a job makes durable what it has done, the graph is everybody's: it may take minutes."""

import asyncio

import pytest

from tests.unit.jobs.test_stream import usual


class Slow:
    """Flushes of a node last until ``end``."""

    def __init__(self, node):
        self.node = node
        self.began = asyncio.Event()
        self.may_end = asyncio.Event()
        self.flush = node.driver.flush
        node.driver.flush = node.flush = self

    async def __call__(self):
        self.began.set()
        await self.may_end.wait()
        await self.flush()


@pytest.mark.parametrize("kind", ["stream", "commit", "stream within", "cancelled commit"])
async def test_a_slow_flush_holds_up_nobody(kind):
    bench = await usual()
    within = kind == "stream within"
    for name in ("mid", "base"):
        await bench.graph.set_read_only(bench.graph.nodes[name], True)
    slow = Slow(bench.graph.nodes["base" if "commit" in kind else "mid" if within else "top"])
    if "commit" in kind:
        job = await bench.commit("top", "j", top_node="mid", speed=1 if "cancel" in kind else 0)
    else:
        job = await bench.stream("mid" if within else "top", "j", speed=1 if within else 0)
    if job.speed:
        await asyncio.sleep(0.01)
        bench.scheduler.cancel(job, force=True)
    async with asyncio.timeout(10):
        await slow.began.wait()
        async with bench.graph.lock:
            pass
        await bench.open(driver="null-co", node_name="new")
        await bench.graph.delete("new")
    if job.speed:  # nobody was promised anything, and nobody waits for it
        assert job.status == "concluded"
        assert bench.events[-1][1]["status"] == "concluded"
    else:
        assert job.status == "pending"
    slow.may_end.set()
    await bench.end(job)
    assert slow.node.read_only is (kind != "stream")
    await bench.close()


async def test_a_base_that_goes_back_to_read_only_stays_for_the_next_commit():
    """The first is cancelled, and its base not durable yet, when the second one begins."""
    bench = await usual()
    top, base = bench.graph.nodes["top"], bench.graph.nodes["base"]
    await bench.graph.set_read_only(base, True)
    slow = Slow(base)
    first = await bench.commit("top", "first", speed=1)
    await asyncio.sleep(0.01)
    bench.scheduler.cancel(first, force=True)
    async with asyncio.timeout(10):
        await slow.began.wait()
        second = await bench.commit("top", "second", speed=1)
        slow.may_end.set()
        await bench.end(first)
        assert not base.read_only, "another job writes to it"
        bench.scheduler.cancel(second, force=True)
        await bench.end(second)
    assert base.read_only and top.backing.name == "mid"
    assert not bench.graph.going_read_only
    await bench.close()
