"""``image bitmap``: the persistent dirty bitmaps of an image; and their copies for ``convert``.

Runs on an event loop of its own. Options, words and exit status are those of ``qemu-img bitmap``.
Invariant: an action that fails ends the command; what was done before it stays, stored.
"""

from __future__ import annotations

import argparse

from liveblockd.errors import BlockError
from liveblockd.graph import dirty
from liveblockd.graph.bitmaps import DirtyBitmap
from liveblockd.graph.node import Node
from liveblockd.imagetool.images import Images, ToolError, reason, size_of


async def run(args: argparse.Namespace) -> int:
    """The command."""
    if not args.actions:
        raise ToolError(
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge"
        )
    names = [name for name, _ in args.actions]
    if args.granularity is not None and "add" not in names:
        raise ToolError("granularity only supported with --add")
    if args.source_format is not None and args.source_file is None:
        raise ToolError("-F only supported with -b")
    if args.source_file is not None and "merge" not in names:
        raise ToolError("Merge bitmap source file only supported with --merge")
    granularity = None
    if args.granularity is not None:
        granularity = size_of(args.granularity, "granularity")
    async with Images(args.objects) as images:
        node = await images.open(args.filename, args.format, writable=True, backing=False)
        source = node
        if args.source_file is not None:
            source = await images.open(args.source_file, args.source_format, backing=False)
        try:
            for name, argument in args.actions:
                try:
                    await _do(images, node, source, args.bitmap, name, argument, granularity)
                except (BlockError, OSError) as error:
                    raise ToolError(
                        f"Operation {name} on bitmap {args.bitmap} failed: {reason(error)}"
                    ) from error
        finally:
            await store(node)
    return 0


async def _do(
    images: Images,
    node: Node,
    source: Node,
    bitmap: str,
    name: str,
    argument: str | None,
    granularity: int | None,
) -> None:
    graph = images.graph
    if name == "add":
        dirty.add(graph, node.name, bitmap, granularity=granularity, persistent=True)
    elif name == "remove":
        await dirty.remove(graph, node.name, bitmap)
    elif name == "clear":
        dirty.clear(graph, node.name, bitmap)
    elif name == "merge":
        dirty.merge(graph, node.name, bitmap, [(source.name, str(argument))])
    else:
        dirty.set_enabled(graph, node.name, bitmap, name == "enable")


async def store(node: Node) -> None:
    """Write the bitmaps of a node to its image, durable on return; ToolError."""
    try:
        await node.driver.set_read_only(True)
    except (BlockError, OSError) as error:
        raise ToolError(f"Lost persistent bitmaps during inactivation: {reason(error)}") from error


def check_bitmaps(source: Node, *, skip_broken: bool) -> None:
    """ToolError unless all bitmaps of ``source`` can be copied, or may be skipped."""
    for bitmap in source.bitmaps:
        if bitmap.inconsistent and not skip_broken:
            raise ToolError(
                f"Cannot copy inconsistent bitmap '{bitmap.name}'\n"
                "Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove'"
            )


async def copy_bitmaps(images: Images, source: Node, target: Node) -> None:
    """The same bitmaps in ``target``, but for inconsistent ones; durable on return. ToolError."""
    for bitmap in reversed(source.bitmaps):
        if bitmap.inconsistent or not bitmap.persistent:
            continue
        try:
            dirty.add(
                images.graph,
                target.name,
                bitmap.name,
                granularity=bitmap.granularity,
                persistent=True,
                enabled=bitmap.enabled,
            )
            copy: DirtyBitmap | None = target.find_bitmap(bitmap.name)
            assert copy is not None
            copy.merge(bitmap)
        except (BlockError, OSError) as error:
            raise ToolError(f"Failed to populate bitmap {bitmap.name}: {reason(error)}") from error
    await store(target)
