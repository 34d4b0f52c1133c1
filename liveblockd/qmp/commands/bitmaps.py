"""Commands on dirty bitmaps (qapi/block-core.json).

Runs on the event loop. Errors: BlockError, OSError of removing a stored bitmap.
"""

from __future__ import annotations

from typing import Annotated

from liveblockd.graph import dirty
from liveblockd.qapi import Alternate, QapiModel, UInt32
from liveblockd.qmp.context import Context
from liveblockd.qmp.registry import command


class BlockDirtyBitmap(QapiModel):
    """A bitmap of a node."""

    node: str
    name: str


class BlockDirtyBitmapAdd(BlockDirtyBitmap):
    """Arguments of block-dirty-bitmap-add; ``granularity`` in bytes, default: a cluster."""

    granularity: UInt32 | None = None
    persistent: bool = False
    disabled: bool = False


BitmapSource = Annotated[str | BlockDirtyBitmap, Alternate("BlockDirtyBitmapOrStr")]


class BlockDirtyBitmapMerge(QapiModel):
    """Arguments of block-dirty-bitmap-merge; ``bitmaps`` without a node are those of ``node``."""

    node: str
    target: str
    bitmaps: list[BitmapSource]


class BlockDirtyBitmapSha256(QapiModel):
    """Return of x-debug-block-dirty-bitmap-sha256."""

    sha256: str


def sources(arguments: BlockDirtyBitmapMerge) -> list[tuple[str, str]]:
    """(node, bitmap) of what is to be merged."""
    return [
        (arguments.node, given) if isinstance(given, str) else (given.node, given.name)
        for given in arguments.bitmaps
    ]


@command("block-dirty-bitmap-add", args=BlockDirtyBitmapAdd)
async def block_dirty_bitmap_add(context: Context, arguments: BlockDirtyBitmapAdd) -> None:
    """Record writes from now on."""
    await dirty.add_between_writes(
        context.graph,
        arguments.node,
        arguments.name,
        granularity=arguments.granularity,
        persistent=arguments.persistent,
        enabled=not arguments.disabled,
    )


@command("block-dirty-bitmap-remove", args=BlockDirtyBitmap)
async def block_dirty_bitmap_remove(context: Context, arguments: BlockDirtyBitmap) -> None:
    """Forget a bitmap, in the image too."""
    await dirty.remove(context.graph, arguments.node, arguments.name)


@command("block-dirty-bitmap-clear", args=BlockDirtyBitmap)
async def block_dirty_bitmap_clear(context: Context, arguments: BlockDirtyBitmap) -> None:
    """All is clean."""
    dirty.clear(context.graph, arguments.node, arguments.name)


@command("block-dirty-bitmap-enable", args=BlockDirtyBitmap)
async def block_dirty_bitmap_enable(context: Context, arguments: BlockDirtyBitmap) -> None:
    """Record writes."""
    dirty.set_enabled(context.graph, arguments.node, arguments.name, True)


@command("block-dirty-bitmap-disable", args=BlockDirtyBitmap)
async def block_dirty_bitmap_disable(context: Context, arguments: BlockDirtyBitmap) -> None:
    """Record no writes."""
    dirty.set_enabled(context.graph, arguments.node, arguments.name, False)


@command("block-dirty-bitmap-merge", args=BlockDirtyBitmapMerge)
async def block_dirty_bitmap_merge(context: Context, arguments: BlockDirtyBitmapMerge) -> None:
    """Add the dirty areas of other bitmaps to one."""
    dirty.merge(context.graph, arguments.node, arguments.target, sources(arguments))


@command(
    "x-debug-block-dirty-bitmap-sha256",
    args=BlockDirtyBitmap,
    returns=BlockDirtyBitmapSha256,
    query=True,
    features=("unstable",),
)
async def debug_bitmap_sha256(
    context: Context, arguments: BlockDirtyBitmap
) -> BlockDirtyBitmapSha256:
    """Digest of the bits."""
    _, bitmap = dirty.find(context.graph, arguments.node, arguments.name)
    return BlockDirtyBitmapSha256(sha256=bitmap.sha256())
