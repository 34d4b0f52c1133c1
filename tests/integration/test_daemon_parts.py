"""How the composition root puts the parts of the daemon together."""

from liveblockd.daemon.core import Daemon
from liveblockd.daemon.process import Background


async def test_servers_and_workers_know_of_one_demand():
    daemon = Daemon("liveblockd", None, Background())
    daemon._make_parts()
    demand = daemon._workers.demand
    assert daemon._context.demand is demand
    assert daemon._exports.nbd_server.demand is demand
    assert daemon._workers.copies.demand is demand
