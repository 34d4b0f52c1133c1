"""What blockdev-add opens, what children inherit, and that a failure leaves nothing behind."""

import pytest

from liveblockd.errors import BlockError
from liveblockd.graph.opening import MAX_DEPTH
from liveblockd.storage.driver import Permission
from tests.unit.graph import layer


async def refused(awaitable):
    with pytest.raises(BlockError) as info:
        await awaitable
    return info.value.message


async def test_names(world):
    world.image("a")
    one = {"driver": "named", "filename": "a"}
    assert await refused(world.add(**one)) == "'node-name' must be specified for the root node"
    for bad in ("9lives", "", "has space", "ä", "a\n"):
        assert await refused(world.add(**one, node_name=bad)) == f"Invalid node-name: '{bad}'"
    assert await refused(world.add(**one, node_name="n" * 32)) == "Node name too long"
    await world.add(**one, node_name="n" * 31)
    assert await refused(world.add(**one, node_name="n" * 31)) == (
        f"Duplicate nodes with node-name='{'n' * 31}'"
    )
    assert list(world.graph.nodes) == ["n" * 31]


async def test_implicit_chain(world):
    world.image("base")
    world.image("mid", backing="base")
    world.image("top", backing="mid")
    node = await world.layer("top", "top")
    layers = [node, node.backing, node.backing.backing]
    assert [n.filename for n in layers] == ["top", "mid", "base"]
    assert [n.read_only for n in layers] == [False, True, True]
    assert [n.file.read_only for n in layers] == [False, True, True]
    assert [n.name.startswith("#block") for n in layers] == [False, True, True]
    assert node.file.driver.held[0] & Permission.WRITE
    assert not node.backing.file.driver.held[0] & Permission.WRITE
    await world.graph.delete("top")
    assert not world.graph.nodes
    assert not any(layer.OPEN.values())


async def test_backing_given_overrides_the_header(world):
    world.image("base")
    world.image("other")
    world.image("top", backing="base")
    await world.layer("other", "other")
    node = await world.layer("t1", "top", backing="other", read_only=True)
    assert node.backing.name == "other"
    assert node.filename.startswith("json:{")
    assert '"backing": {"driver": "layer", "file": {"driver": "named"' in node.filename
    node = await world.layer("t2", "top", backing=None, read_only=True)
    assert node.backing is None
    assert '"backing": null' in node.filename
    node = await world.layer("t3", "top", backing="", read_only=True)
    assert node.backing is None
    inline = {"driver": "layer", "node-name": "b", "file": {"driver": "named", "filename": "base"}}
    node = await world.layer("t4", "top", backing=inline, read_only=True)
    assert node.backing.name == "b" and node.backing.read_only
    assert node.filename == "top"


@pytest.mark.parametrize("depth", [1, 2, 3])
async def test_failure_deep_in_the_chain_closes_everything(world, depth):
    for i in range(depth):
        world.image(f"l{i}", backing=f"l{i + 1}")
    message = await refused(world.layer("top", "l0"))
    prefix = "Could not open backing file: " * depth
    assert message == f"{prefix}Could not open 'l{depth}': No such file or directory"
    assert not world.graph.nodes
    assert not any(layer.OPEN.values())
    world.image(f"l{depth}")
    await world.layer("top", "l0")


async def test_failure_leaves_a_referenced_node_unlocked(world):
    world.image("a", backing="gone")
    file = await world.add(driver="named", filename="a", node_name="f")
    assert "gone" in await refused(world.add(driver="layer", node_name="x", file="f"))
    assert list(world.graph.nodes) == ["f"]
    assert file.parents == []
    assert file.driver.held == (Permission.NONE, Permission.ALL)


async def test_loops_and_depth_are_bounded(world):
    world.image("a", backing="b")
    world.image("b", backing="a")
    message = await refused(world.layer("x", "a", read_only=True))
    assert message == "Could not open backing file: the backing chain of 'a' has a loop"
    assert not world.graph.nodes
    for i in range(MAX_DEPTH + 1):
        world.image(f"d{i}", backing=f"d{i + 1}")
    assert f"deeper than {MAX_DEPTH}" in await refused(world.layer("x", "d0"))
    assert not world.graph.nodes
    world.image(f"d{MAX_DEPTH - 1}")
    node = await world.layer("x", "d0")
    assert len(world.graph.nodes) == 2 * MAX_DEPTH
    await world.graph.delete(node.name)
    assert not world.graph.nodes


async def test_relative_backing_names_start_at_the_overlay(world):
    world.image("/images/base")
    world.image("/images/top", backing="base")
    node = await world.layer("top", "/images/top")
    assert node.backing.filename == "/images/base"
    assert node.filename == "/images/top"


async def test_options_that_are_inherited(world):
    world.image("base")
    world.image("top", backing="base")
    node = await world.layer(
        "top", "top", cache={"no-flush": True}, discard="ignore", detect_zeroes="on"
    )
    for part in (node.file, node.backing, node.backing.file):
        assert part.options.cache_no_flush
        assert str(part.detect_zeroes) == "off"
    assert node.file.options.unmaps and not node.backing.options.unmaps
    assert await refused(world.layer("x", "base", detect_zeroes="unmap")) == (
        "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"
    )


async def test_two_users_of_a_file_conflict(world):
    world.image("a")
    await world.add(driver="named", filename="a", node_name="f")
    await world.add(driver="layer", node_name="x", file="f")
    assert await refused(world.add(driver="layer", node_name="y", file="f")) == (
        "Permission conflict on node 'f': permissions 'write, resize' are both required by "
        "node 'x' (uses node 'f' as 'file' child) and unshared by node 'y' "
        "(uses node 'f' as 'file' child)."
    )
    assert await refused(world.layer("z", "a")) == 'Failed to get "write" lock'
    assert await refused(world.layer("z", "a", read_only=True)) == (
        'Failed to get shared "write" lock'
    )
    await world.layer("z", "a", read_only=True, force_share=True)


async def test_writing_format_needs_a_writable_file(world):
    world.image("a")
    await world.add(driver="named", filename="a", node_name="f", read_only=True)
    assert await refused(world.add(driver="layer", node_name="x", file="f")) == (
        "Block node is read-only"
    )
    node = await world.add(driver="layer", node_name="x", file="f", auto_read_only=True)
    assert node.read_only


async def test_delete_in_qemus_words(world):
    world.image("a")
    world.image("b")
    await world.add(driver="named", filename="a", node_name="f")
    await world.add(driver="layer", node_name="x", file="f")
    inner = {"driver": "named", "filename": "b", "node-name": "inner"}
    await world.add(driver="layer", node_name="y", file=inner, backing="x")
    graph = world.graph
    assert await refused(graph.delete("no")) == "Failed to find node with node-name='no'"
    assert await refused(graph.delete("f")) == "Block device f is in use"
    assert await refused(graph.delete("inner")) == "Node inner is not owned by the monitor"
    assert await refused(graph.delete("x")) == (
        "Node 'x' is busy: node is used as backing hd of 'y'"
    )
    user = await graph.attach(graph.find("y"))
    assert await refused(graph.delete("y")) == "Node y is in use"
    await graph.detach(user)
    graph.find("y").op_blockers.append("block device is in use by block job: stream")
    assert "busy: block device is in use by block job" in await refused(graph.delete("y"))
    graph.find("y").op_blockers.clear()
    for name in ("y", "x", "f"):
        await graph.delete(name)
    assert not graph.nodes


async def test_locks_that_cannot_be_had_leave_all_as_it_was(world):
    """The first file gets its lock, the second does not: neither keeps anything."""
    for name in ("a", "b"):
        world.image(name)
    ours = [await world.layer(f"n{name}", name, read_only=True) for name in ("a", "b")]
    world.image("b", 512)
    reader = await world.layer("r", "b", read_only=True)

    def state():
        nodes = world.graph.nodes.values()
        edges = [(e.parent.name, e.role, e.used, e.shared) for n in nodes for e in n.parents]
        return edges, [(n.name, n.permissions) for n in nodes], [n.read_only for n in nodes]

    before = state()
    held = [d.held for drivers in layer.OPEN.values() for d in drivers]
    for node in ours:
        node.read_only = node.file.read_only = False
    assert await refused(world.graph.refresh_permissions(*ours)) == 'Failed to get "write" lock'
    for node in ours:
        node.read_only = node.file.read_only = True
    assert state() == before
    assert [d.held for drivers in layer.OPEN.values() for d in drivers] == held
    assert await refused(world.graph.set_read_only(ours[1], False)) == 'Failed to get "write" lock'
    assert state() == before and ours[1].driver.read_only and ours[1].file.driver.read_only
    await world.graph.delete(reader.name)
    await world.graph.set_read_only(ours[1], False)
    assert ours[1].file.driver.held[0] & Permission.WRITE
