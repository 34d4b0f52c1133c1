"""While a job makes durable what it has done, the graph is everybody's: it may take minutes."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from liveblockd.errors import BlockError
from liveblockd.jobs import scheduler
from liveblockd.qmp import registry
from liveblockd.qmp.context import Context
from liveblockd.qmp.hmp import run_line
from liveblockd.storage.driver import Permission
from tests.simulation import images
from tests.simulation.bench import Bench
from tests.support.patience import until
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


async def with_slow_base():
    """A chain whose base is read-only and slow to be durable, and what commands run in."""
    bench = await usual()
    base = bench.graph.nodes["base"]
    await bench.graph.set_read_only(base, True)
    slow = Slow(base)
    context = Context(
        bench.graph, bench.scheduler, None, None, bench.publisher, on_quit=lambda reason: None
    )
    registry.load()
    return bench, base, slow, context


async def test_who_is_told_of_a_cancelled_job_may_have_its_name_and_nodes():
    """Its base is not durable yet; an id is free, and a node nobody's, with BLOCK_JOB_CANCELLED."""
    bench, base, slow, context = await with_slow_base()
    again = {"job-id": "j", "device": "top", "top-node": "mid", "base-node": "base", "speed": 1}
    async with asyncio.timeout(30):
        await registry.execute(context, "block-commit", again)
        await asyncio.sleep(0.01)
        await registry.execute(context, "block-job-cancel", {"device": "j", "force": True})
        await slow.began.wait()
        assert ("BLOCK_JOB_CANCELLED", "j") in [(n, d.get("device")) for n, d in bench.events]
        asking = asyncio.create_task(registry.execute(context, "block-commit", again))
        await asyncio.sleep(0.01)
        assert not asking.done()
        async with context.command_lock:
            pass  # others go on
        slow.may_end.set()
        await asking
        with pytest.raises(BlockError, match="Need a root block node"):
            await registry.execute(context, "block-commit", again)
        job = bench.scheduler.find("j")
        bench.scheduler.cancel(job, force=True)
        await bench.end(job)
    assert base.read_only
    await bench.close()


async def test_who_is_told_of_the_end_of_a_job_does_not_find_it_any_more():
    """As with QEMU, whatever of it is made durable later; what steers it does not wait for that."""
    bench, _, slow, context = await with_slow_base()

    async def ask(name, **arguments):
        return await registry.execute(context, name, arguments)

    start = {"device": "top", "top-node": "mid", "base-node": "base", "speed": 1}
    await ask("block-commit", **start, **{"job-id": "j"})
    await asyncio.sleep(0.01)
    assert len(await ask("query-jobs")) == len(await ask("query-block-jobs")) == 1
    await ask("block-job-cancel", device="j", force=True)
    async with asyncio.timeout(10):
        await slow.began.wait()
        assert bench.scheduler.letting_go and bench.events[-1][1]["status"] == "concluded"
        assert await ask("query-jobs") == await ask("query-block-jobs") == []
        for verb in ("cancel", "complete", "pause", "dismiss", "finalize"):
            with pytest.raises(BlockError, match=r"^Job not found$"):
                await ask(f"job-{verb}", id="j")
        with pytest.raises(BlockError, match=r"^Block job 'j' not found$") as refused:
            await ask("block-job-set-speed", device="j", speed=0)
        assert refused.value.error_class == "DeviceNotActive"
        assert await run_line(context, "block_job_pause j") == (
            "Error: Block job 'j' not found\r\n"
        )
        assert bench.scheduler.letting_go
        slow.may_end.set()
        await bench.end(bench.scheduler.find("j"))
    await bench.close()


async def test_a_job_that_is_to_be_dismissed_is_there_while_its_base_is_made_durable():
    bench, _, slow, context = await with_slow_base()
    job = await bench.commit("top", "j", top_node="mid", speed=1, auto_dismiss=False)
    await asyncio.sleep(0.01)
    bench.scheduler.cancel(job, force=True)
    async with asyncio.timeout(10):
        await slow.began.wait()
        (shown,) = await registry.execute(context, "query-jobs", {})
        assert shown.status == "concluded" and not bench.scheduler.letting_go
        slow.may_end.set()
        await registry.execute(context, "job-dismiss", {"id": "j"})
        assert await registry.execute(context, "query-jobs", {}) == []
    await bench.close()


async def test_an_active_commit_that_ends_without_a_switch_is_durable_when_it_says_so():
    """Guests go on meanwhile: the base is what the disk was at one moment."""
    bench, base, slow, context = await with_slow_base()
    job = await bench.commit("top", "j")
    async with asyncio.timeout(10):
        await until(lambda: job.ready)
        await registry.execute(context, "block-job-cancel", {"device": "j"})
        await slow.began.wait()
        await bench.graph.nodes["top"].write(0, b"g" * 512)
        assert not any(name == "BLOCK_JOB_COMPLETED" for name, _ in bench.events)
        slow.may_end.set()
        await bench.end(job)
    assert any(name == "BLOCK_JOB_COMPLETED" for name, _ in bench.events)
    assert base.read_only and bench.graph.nodes["top"].backing.name == "mid"
    await bench.close()


@pytest.mark.parametrize("through", ["monitor", "qmp"])
async def test_a_line_of_the_human_monitor_waits_as_well(through):
    """A job that one starts is called as its device."""
    bench, _, slow, context = await with_slow_base()

    async def run(line):
        if through == "monitor":
            return await run_line(context, line)
        given = {"command-line": line}
        return await registry.execute(context, "human-monitor-command", given)

    job = await bench.commit("top", "top", top_node="mid", speed=1)
    async with asyncio.timeout(30):
        await asyncio.sleep(0.01)
        assert await run("block_job_cancel -f top") == ""
        await slow.began.wait()
        asking = asyncio.create_task(run("block_stream top 1"))
        await asyncio.sleep(0.01)
        assert not asking.done()
        async with context.command_lock:
            pass  # others go on
        assert await run("info block-jobs") == "No active jobs\r\n", "it has told of its end"
        slow.may_end.set()
        assert await asking == ""
        assert bench.scheduler.find("top") is not job
        assert "in use" in await run("block_stream top 1"), "nothing to wait for"
        again = bench.scheduler.find("top")
        bench.scheduler.cancel(again, force=True)
        await bench.end(again)
    await bench.close()


async def test_a_flush_that_hangs_keeps_nobody_for_long(monkeypatch):
    monkeypatch.setattr(scheduler, "LET_GO", 0.02)
    bench = await usual()
    await bench.graph.set_read_only(bench.graph.nodes["base"], True)
    slow = Slow(bench.graph.nodes["base"])
    job = await bench.commit("top", "j", top_node="mid", speed=1)
    assert not await bench.scheduler.let_go_of_ended()
    await asyncio.sleep(0.01)
    bench.scheduler.cancel(job, force=True)
    async with asyncio.timeout(10):
        await slow.began.wait()
        assert await bench.scheduler.let_go_of_ended()
    assert job.status == "concluded"
    slow.may_end.set()
    await bench.end(job)
    await bench.close()


@pytest.mark.parametrize("between", ["nothing", "a writer", "a failed flush"])
async def test_a_base_that_is_durable_is_closed_without_a_flush(tmp_path, between):
    """Guests and other jobs wait meanwhile."""
    async with cancelled_commit(tmp_path) as (bench, base, job):
        slow, file, flushed = Slow(base), base.file.driver, []
        flush = file.flush

        async def noted():
            flushed.append(bench.graph.lock.locked())
            await flush()

        file.flush = base.file.flush = noted
        bench.scheduler.cancel(job, force=True)
        await slow.began.wait()
        if between == "a writer":
            await bench.graph.detach(await bench.graph.attach(base, Permission.WRITE_UNCHANGED))
        elif between == "a failed flush":
            slow.flush = failing
        slow.may_end.set()
        await bench.end(job)
        assert base.read_only and base.file.read_only
        assert any(flushed) is (between != "nothing")
        assert between == "a failed flush" or not all(flushed)


async def failing():
    raise OSError(5, "lost")


@asynccontextmanager
async def cancelled_commit(directory):
    """A commit of an image in the middle of a chain of qcow2, as slow as can be."""
    bench = Bench()
    backing = None
    for name in ("base", "mid", "top"):
        path = str(directory / f"{name}.qcow2")
        more = {} if backing is None else {"backing_file": backing, "backing_format": "qcow2"}
        await images.create(bench, path, size=1 << 20, cluster_size=4096, **more)
        backing = path
    top = await bench.open(
        driver="qcow2", node_name="top", file={"driver": "file", "filename": backing}
    )
    base = top.backing.backing
    await bench.graph.set_read_only(top.backing, False)
    for offset in range(0, 1 << 20, 1 << 16):
        await top.backing.write(offset, b"m" * 4096)
    await bench.graph.set_read_only(top.backing, True)
    assert base.read_only
    async with asyncio.timeout(30):
        job = await bench.commit("top", "j", top_node=top.backing.name, speed=4096)
        await asyncio.sleep(0.05)
        yield bench, base, job
    await bench.close()
