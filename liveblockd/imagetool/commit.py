"""``image commit``: what an image holds goes into its backing file, or one further below.

Runs on an event loop of its own. Options, words and exit status are those of ``qemu-img commit``.
The base is durable before anything is taken from the image: whenever a crash comes, what is read
through the image stays as it is. With ``-b`` the images between the two are worth nothing
afterwards, and the image is left as it was (``-d``).
"""

from __future__ import annotations

import argparse

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.image import Qcow2
from liveblockd.graph import chain
from liveblockd.graph.backend import Backend
from liveblockd.graph.node import Node
from liveblockd.imagetool.copying import Copy
from liveblockd.imagetool.images import Images, ToolError, check_cache_mode, reason, size_of
from liveblockd.imagetool.output import say
from liveblockd.imagetool.source import Source
from liveblockd.storage.driver import Permission


async def run(args: argparse.Namespace) -> int:
    """The command."""
    check_cache_mode(args.target_cache)
    rate = 0 if args.rate is None else size_of(args.rate, "rate limit")
    async with Images(args.objects) as images:
        node = await images.open(
            args.filename, args.format, writable=True, no_flush=args.target_cache == "unsafe"
        )
        base = _base(node, args)
        # Not a reader, for the graph: what the base is given is hidden by what has it above.
        image = await images.graph.attach(node, Permission.NONE, Permission.ALL, user="commit")
        try:
            copy = Copy(
                images.workers,
                Source([image], base=base),
                await _writer(images, node, base),
                sparse=4096,
                blank=False,
            )
            copy.show(args.progress, rate)
            await copy.run()
        except (BlockError, OSError) as error:
            raise ToolError(f"Block job failed: {reason(error)}") from error
        if args.base is None and not args.drop:
            try:
                await _empty(node)
            except (BlockError, OSError) as error:
                raise ToolError(f"Could not empty {args.filename}: {reason(error)}") from error
    say("Image committed.", quiet=args.quiet)
    return 0


def _base(node: Node, args: argparse.Namespace) -> Node:
    if args.base is None:
        base = chain.layer_below(node)
        if base is None:
            raise ToolError("Image does not have a backing file")
        return base
    base = chain.find_base_by_filename(node, args.base)
    if base is None:
        raise ToolError(f"Did not find '{args.base}' in the backing chain of '{args.filename}'")
    return base


async def _writer(images: Images, node: Node, base: Node) -> Backend:
    """A user that writes to the base, below the image; it is as long as the image then."""
    graph = images.graph
    chain.commit_through(chain.edges_between(node, base), True)
    await graph.set_read_only(base, False)
    await graph.refresh_permissions(node)
    writer = await images.use(base, writable=True)
    if base.length < node.length:
        await graph.grow(base, node.length)
    return writer


async def _empty(node: Node) -> None:
    if not isinstance(node.driver, Qcow2):
        raise OSError(95, "Operation not supported")
    await node.driver.make_empty()
