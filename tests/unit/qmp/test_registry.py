"""The table of commands: no name twice, unknown ones refused, one command at a time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from liveblockd.errors import BlockError, ErrorClass
from liveblockd.events import Publisher
from liveblockd.jobs.scheduler import Scheduler
from liveblockd.qapi import QapiModel
from liveblockd.qmp import registry
from liveblockd.qmp.context import Context
from liveblockd.qmp.registry import NoArguments


@pytest.fixture(autouse=True)
def own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_commands", {})


@pytest.fixture
def context() -> Context:
    nobody: Any = None
    return Context(
        nobody, Scheduler(Publisher()), nobody, nobody, Publisher(), on_quit=lambda reason: None
    )


class Number(QapiModel):
    number: int


async def test_a_command_gets_its_arguments(context: Context) -> None:
    @registry.command("double", args=Number, returns=int, aliases=("twice",))
    async def double(context: Context, arguments: Number) -> int:
        return arguments.number * 2

    assert await registry.execute(context, "double", {"number": 4}) == 8
    assert await registry.execute(context, "twice", {"number": 4}) == 8
    with pytest.raises(BlockError, match="Parameter 'number' is missing"):
        await registry.execute(context, "double", {})
    assert list(registry.commands()) == ["double", "twice"]


async def test_a_command_without_return_value_returns_an_empty_object(context: Context) -> None:
    @registry.command("nothing")
    async def nothing(context: Context, arguments: NoArguments) -> None: ...

    assert await registry.execute(context, "nothing", {}) == {}


@pytest.mark.parametrize("names", [("taken", ()), ("new", ("taken",))])
def test_a_name_is_given_once(names: tuple[str, tuple[str, ...]]) -> None:
    async def function(context: Context, arguments: NoArguments) -> None: ...

    registry.command("taken")(function)
    with pytest.raises(ValueError, match="taken is registered twice"):
        registry.command(names[0], aliases=names[1])(function)


async def test_unknown(context: Context) -> None:
    with pytest.raises(BlockError, match=r"^The command x has not been found$") as caught:
        await registry.execute(context, "x", {})
    assert caught.value.error_class is ErrorClass.COMMAND_NOT_FOUND


async def test_one_at_a_time_except_queries(context: Context) -> None:
    running: list[str] = []
    most = 0
    go_on = asyncio.Event()

    async def run(name: str) -> None:
        nonlocal most
        running.append(name)
        most = max(most, len(running))
        await go_on.wait()
        running.remove(name)

    @registry.command("change")
    async def change(context: Context, arguments: NoArguments) -> None:
        await run("change")

    @registry.command("look", query=True)
    async def look(context: Context, arguments: NoArguments) -> None:
        await run("look")

    names = ["change", "change", "look", "look"]
    tasks = [asyncio.create_task(registry.execute(context, name, {})) for name in names]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert sorted(running) == ["change", "look", "look"]
    go_on.set()
    await asyncio.gather(*tasks)
    assert most == 3


async def test_no_command_begins_while_the_daemon_ends(context: Context) -> None:
    @registry.command("change")
    async def change(context: Context, arguments: NoArguments) -> None:
        raise AssertionError

    async with context.command_lock:
        task = asyncio.create_task(registry.execute(context, "change", {}))
        await asyncio.sleep(0)
        context.quit()
    with pytest.raises(BlockError, match="shutting down"):
        await task


def test_quit_is_called_once(context: Context) -> None:
    reasons: list[str] = []
    context.on_quit = reasons.append
    context.quit("a")
    context.quit("b")
    assert reasons == ["a"]
    assert context.quitting


async def test_what_takes_long_is_done_beside_other_commands(context: Context) -> None:
    flushed, order = asyncio.Event(), []

    async def flush(context: Context, arguments: Number) -> None:
        order.append(f"flush {arguments.number}")
        await flushed.wait()

    @registry.command("close", args=Number, ahead=flush)
    async def close(context: Context, arguments: Number) -> None:
        order.append("close")

    @registry.command("other")
    async def other(context: Context, arguments: NoArguments) -> None:
        order.append("other")

    closing = asyncio.create_task(registry.execute(context, "close", {"number": 1}))
    await asyncio.sleep(0)
    await asyncio.wait_for(registry.execute(context, "other", {}), 10)
    flushed.set()
    await closing
    assert order == ["flush 1", "other", "close"]
