import asyncio
import random

from liveblockd.storage.serialise import Serialiser


async def test_whole_blocks_pass_each_other():
    serialiser = Serialiser()
    first = await serialiser.enter(0, 10, exclusive=False)
    second = await asyncio.wait_for(serialiser.enter(5, 15, exclusive=False), 30)
    serialiser.leave(first)
    serialiser.leave(second)


async def test_a_cancelled_waiter_leaves_nothing_behind():
    serialiser = Serialiser()
    first = await serialiser.enter(0, 10, exclusive=True)
    waiting = asyncio.create_task(serialiser.enter(5, 15, exclusive=False))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    serialiser.leave(first)
    assert serialiser._inside == []
    serialiser.leave(await asyncio.wait_for(serialiser.enter(0, 20, exclusive=True), 30))


async def test_overlaps_with_an_exclusive_one_never_run_together():
    seed = 20240611
    choose = random.Random(seed)
    serialiser, inside, done = Serialiser(), [], 0

    async def request(start, end, exclusive, turns):
        nonlocal done
        section = await serialiser.enter(start, end, exclusive=exclusive)
        for s, e, x in inside:
            assert not (s < end and start < e and (x or exclusive)), seed
        inside.append((start, end, exclusive))
        for _ in range(turns):
            await asyncio.sleep(0)
        inside.remove((start, end, exclusive))
        serialiser.leave(section)
        done += 1

    requests = []
    for _ in range(300):
        start = choose.randrange(50)
        requests.append(
            request(
                start, start + 1 + choose.randrange(8), choose.random() < 0.4, choose.randrange(4)
            )
        )
    await asyncio.wait_for(asyncio.gather(*requests), 20)
    assert done == 300
