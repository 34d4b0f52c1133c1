"""Walks, and which layer answers for which bytes: against a slow model that asks byte by byte."""

import random

import pytest

from liveblockd.errors import BlockError
from liveblockd.graph import chain, surgery
from liveblockd.storage.driver import ExtentKind
from tests.unit.graph.layer import CLUSTER, IMAGES


async def three(world):
    world.image("base", backing=None)
    world.image("mid", backing="base")
    world.image("top", backing="mid")
    top = await world.layer("top", "top")
    return top, top.backing, top.backing.backing


async def test_walks(world):
    top, mid, base = await three(world)
    assert chain.chain(top) == [top, mid, base]
    assert chain.is_above(top, base) and not chain.is_above(base, top)
    assert chain.overlay_of(top, base) is mid and chain.overlay_of(top, top) is None
    assert surgery.layers_between(top, base) == [mid]
    assert surgery.layers_between(top, None) == [mid, base]
    assert [e.child for e in chain.edges_between(top, base)] == [mid, base]
    above = await surgery.insert_filter(world.graph, mid)
    assert top.backing is above and top.driver.children["backing"] is above
    assert chain.chain(top) == [top, mid, base]
    assert chain.layer_below(top) is mid and chain.overlay_of(top, mid) is top
    assert [e.child for e in chain.edges_between(top, base)] == [above, mid, base]
    await surgery.remove_filter(world.graph, above)
    assert top.backing is mid


async def test_base_by_filename(world):
    world.image("/dir/base")
    world.image("/dir/top", backing="base")
    top = await world.layer("top", "/dir/top")
    for name in ("base", "/dir/base"):
        assert chain.find_base_by_filename(top, name) is top.backing
    for name in ("top", "/dir/top", "other", "/base", ""):
        assert chain.find_base_by_filename(top, name) is None


async def test_base_by_a_name_that_leads_there(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("images", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "images/base").touch()
    (tmp_path / "other/link").symlink_to("../images/base")
    world.image("images/base")
    world.image("images/top", backing="base")
    top = await world.layer("top", "images/top")
    names = ("base", "images/base", "./base", "../images/base", "../other/link",
             f"{tmp_path}/images/base", f"{tmp_path}/other/link")  # fmt: skip
    for name in names:
        assert chain.find_base_by_filename(top, name) is top.backing, name
    for name in ("other/link", f"{tmp_path}/base", f"{tmp_path}/images/top", f"file:{tmp_path}/b"):
        assert chain.find_base_by_filename(top, name) is None, name


async def test_freeze(world):
    top, mid, base = await three(world)
    edges = chain.freeze(top, base)
    for node, new in ((top, base), (top, None), (mid, None)):
        with pytest.raises(BlockError) as info:
            await surgery.replace_backing(world.graph, node, new)
        below = node.backing.name
        assert info.value.message == (
            f"Cannot change frozen 'backing' link from '{node.name}' to '{below}'"
        )
    with pytest.raises(BlockError):
        chain.freeze(mid, None)
    assert base.children == {} or "backing" not in base.children
    chain.unfreeze(edges)
    chain.unfreeze(edges)
    await surgery.replace_backing(world.graph, top, base)
    assert top.backing is base and mid.name not in world.graph.nodes


def expected(images, base_depth, offset):
    """(kind, depth) of one byte, asked of the layers one after the other."""
    names = list(images)[1:base_depth]
    for depth, name in enumerate(names, 1):
        image = IMAGES[name]
        if offset >= image.length:
            has_base = base_depth < len(images)
            return (ExtentKind.ZERO, depth) if has_base else (ExtentKind.UNALLOCATED, 0)
        cluster = image.clusters.get(offset // CLUSTER)
        if cluster is not None:
            return (ExtentKind.DATA if any(cluster) else ExtentKind.ZERO), depth
    return ExtentKind.UNALLOCATED, 0


@pytest.mark.parametrize("seed", range(20))
async def test_allocated_above_against_a_model(world, seed):
    rng = random.Random(seed)
    depth = rng.randint(2, 5)
    images = {}
    for i in range(depth):
        images[f"l{i}"] = world.image(
            f"l{i}",
            rng.choice([16, 16, rng.randint(1, 20)]) * CLUSTER - rng.choice([0, 512]),
            backing=f"l{i + 1}" if i + 1 < depth else None,
        )
        for index in range(16):
            if rng.random() < 0.4:
                images[f"l{i}"].clusters[index] = bytes([rng.choice([0, i + 1])]) * CLUSTER
    images["l0"].length = 16 * CLUSTER
    top = await world.layer("top", "l0")
    layers = chain.chain(top)
    base_depth = rng.randint(1, depth)
    base = layers[base_depth] if base_depth < depth else None
    offset = rng.randrange(0, 15 * CLUSTER, 512)
    length = rng.randrange(512, 16 * CLUSTER - offset + 1, 512)
    position = offset
    for run in await chain.allocated_above(top, base, offset, length):
        for at in range(position, position + run.length, 512):
            assert (run.kind, run.depth) == expected(images, base_depth, at), f"{seed=} {at=}"
        if run.kind is ExtentKind.DATA:
            assert run.host_offset == position + (1 << 20)
            assert run.layer is layers[run.depth]
        position += run.length
    assert position == offset + length


async def test_read_through_layers_of_other_sizes(world):
    world.image("base", 20 * CLUSTER, c0=1, c5=1, c19=1)
    world.image("mid", 4 * CLUSTER, backing="base", c1=2)
    world.image("top", 16 * CLUSTER, backing="mid", c15=3)
    user = await world.graph.attach(await world.layer("top", "top"))
    data = bytes(user.read_nowait(0, 16 * CLUSTER))
    assert [data[i * CLUSTER] for i in range(16)] == [1, 2] + [0] * 13 + [3]
