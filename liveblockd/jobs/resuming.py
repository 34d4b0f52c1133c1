"""A stream or a commit that was under way when the daemon ended goes on.

Specification: docs/job-journal.md. Runs on the event loop.

Both are begun anew with the images where they are now: what a stream has copied is in the top
image and is left alone, a commit copies again what reads the same. So nothing depends on how far
it had come, only on the chain: it must be, image by image, what the journal says. Only an active
commit must not have switched its guest over: that is known of drives, whose images are written down
before a guest goes on there.

Errors: BlockError, and nothing is begun.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from liveblockd.errors import BlockError
from liveblockd.graph import chain
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Node
from liveblockd.jobs.commit import CommitParameters
from liveblockd.jobs.commit_start import start_commit
from liveblockd.jobs.history import Image, JobRecord
from liveblockd.jobs.job import BlockdevOnError, JobType
from liveblockd.jobs.journal import Journal, image_of
from liveblockd.jobs.scheduler import Scheduler
from liveblockd.jobs.stream import StreamParameters
from liveblockd.jobs.stream_start import start_stream

RESUMABLE: Final = (JobType.STREAM, JobType.COMMIT)


async def resume(graph: Graph, scheduler: Scheduler, record: JobRecord, journal: Journal) -> bool:
    """Let the job go on; False if it had come to its end, which the journal then says."""
    if record.type not in RESUMABLE or not record.images:
        raise BlockError(f"A job of type '{record.type}' cannot be resumed: start it again")
    if any(not image.file for image in record.images) or (record.base and not record.base.file):
        raise BlockError("Its images have no names to find them by")
    layers = _find_chain(graph, record)
    if layers is None:
        journal.give_up(record.id, "completed")
        return False
    given = dict(record.parameters)
    given["on_error"] = BlockdevOnError(given.get("on_error", "report"))
    if record.type == JobType.STREAM:
        await _stream(graph, scheduler, record, layers, given)
    else:
        await _commit(graph, scheduler, record, layers, given, journal.on_drive)
    return True


async def _stream(
    graph: Graph, scheduler: Scheduler, record: JobRecord, layers: list[Node], given: dict[str, Any]
) -> None:
    bottom = layers[len(record.images) - 1].name
    parameters = StreamParameters(record.id, layers[0].name, bottom=bottom, **given)
    await start_stream(graph, scheduler, parameters)


async def _commit(
    graph: Graph,
    scheduler: Scheduler,
    record: JobRecord,
    layers: list[Node],
    given: dict[str, Any],
    on_drive: Callable[[Node], bool],
) -> None:
    top, base = layers[0], layers[len(record.images)]
    root = _root(top)
    if root is top and not on_drive(top):
        # It may have switched its guest over, just before the end, and the base be newer.
        raise BlockError(
            "A commit of an active image whose guest may be on the base already is not resumed: "
            "look which of the two the guest wrote last"
        )
    parameters = CommitParameters(
        record.id, root.name, top_node=top.name, base_node=base.name, **given
    )
    await start_commit(graph, scheduler, parameters)


def _root(node: Node) -> Node:
    """The highest node above it; where the chain forks, that of the first overlay."""
    top = node
    while above := [edge.parent for edge in node.parents if isinstance(edge.parent, Node)]:
        node = above[0]
    return top if chain.skip_filters(node) is top else node


def _find_chain(graph: Graph, record: JobRecord) -> list[Node] | None:
    """The layers from the top of the job down, as they were; None: the job was at its end."""
    tops = _opened(graph, record.images[0])
    if len(tops) > 1:
        raise BlockError(f"'{record.images[0].file}' is open more than once")
    if not tops:
        raise BlockError(f"'{record.images[0].file}' is not open")
    layers = chain.chain(tops[0])
    now = [image_of(layer) for layer in layers]
    count = len(record.images)
    if record.type == JobType.STREAM and _same(now[1:2], [record.base]) and count > 1:
        return None
    if not _same(now[:count], record.images) or not _same(now[count : count + 1], [record.base]):
        raise BlockError(f"The images below '{record.images[0].file}' are not what they were")
    return layers


def _same(now: list[Image], recorded: Any) -> bool:
    return now == [image for image in recorded if image is not None]


def _opened(graph: Graph, image: Image) -> list[Node]:
    """The layers that are this image."""
    wanted = (image.file, image.format)
    found = []
    for node in graph.nodes.values():
        layer = chain.skip_filters(node)
        if layer is node and node.driver_class.driver_name == image.format:
            now = image_of(node)
            if (now.file, now.format) == wanted:
                if now.inode != image.inode:
                    raise BlockError(f"'{image.file}' is another file than it was")
                found.append(node)
    return found
