"""How the composition root puts the parts of the daemon together."""

import asyncio

from liveblockd.daemon.core import Daemon
from liveblockd.daemon.process import Background
from liveblockd.qmp.session import Session


async def test_servers_and_workers_know_of_one_demand():
    daemon = Daemon("liveblockd", None, Background())
    daemon._make_parts()
    demand = daemon._workers.demand
    assert daemon._context.demand is demand
    assert daemon._exports.nbd_server.demand is demand
    assert daemon._workers.copies.demand is demand


async def test_what_monitors_ask_for_is_counted():
    daemon = Daemon("liveblockd", None, Background())
    daemon._make_parts()
    session = Session(daemon._context)
    session._outgoing = asyncio.Queue()
    for name in ("qmp_capabilities", "query-block-jobs", "query-block-jobs"):
        await session._on_message({"execute": name})
    assert session._outgoing.qsize() == 3
    assert daemon._context.demand.monitors.requests == 3
