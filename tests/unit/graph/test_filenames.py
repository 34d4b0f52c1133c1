"""Names of nodes with lists of options."""

import json

from liveblockd.daemon.drivers import load_all_drivers
from liveblockd.graph import filenames
from liveblockd.qapi import parse
from liveblockd.storage.options import BlockdevOptions

load_all_drivers()

IMAGE = {"driver": "null-co", "size": 512}


async def test_the_name_of_a_node_gives_it_again(world):
    rules = [{"event": "read_aio", "errno": 28}, {"event": "none", "once": True}]
    given = {"driver": "blkdebug", "image": IMAGE, "inject-error": rules}
    node = await world.add(node_name="d", **{**given, "take-child-perms": ["write"]})
    shown = json.loads(node.filename.removeprefix("json:"))
    assert shown == {
        "driver": "blkdebug",
        "image": IMAGE,
        "inject-error.0.event": "read_aio",
        "inject-error.0.errno": 28,
        "inject-error.1.event": "none",
        "inject-error.1.once": True,
    }
    again = filenames.protocol_options(node.filename)
    assert again == given
    assert parse(BlockdevOptions, again, keyval=True).inject_error[0].errno == 28


async def test_a_quorum_by_its_children(world):
    given = {"driver": "quorum", "children": [IMAGE, IMAGE], "vote-threshold": 2}
    node = await world.add(**{"node_name": "q", **given})
    assert json.loads(node.filename.removeprefix("json:")) == given
    assert filenames.protocol_options(node.filename) == given


async def test_blkdebug_without_rules_has_a_plain_name(world):
    node = await world.add(node_name="d", driver="blkdebug", image={"driver": "null-co"})
    assert node.filename == "blkdebug::null-co://"
