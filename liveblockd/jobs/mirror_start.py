"""How a mirror comes to run: what it is asked for, what it must not disturb, what it takes.

Specification: qapi/block-core.json (blockdev-mirror). Runs on the event loop, under ``graph.lock``.

Invariant: a start that fails leaves the graph as it was. Errors: BlockError, in QEMU's words.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from liveblockd.errors import BlockError
from liveblockd.graph import chain, surgery
from liveblockd.graph.bitmaps import default_granularity
from liveblockd.graph.graph import Graph
from liveblockd.graph.mirror_top import MirrorTop
from liveblockd.graph.node import Node, Operation
from liveblockd.jobs.mirror_job import (
    Mirror,
    MirrorParameters,
    MirrorSyncMode,
    can_replace,
    not_supported,
)
from liveblockd.jobs.mirror_options import DEFAULT_BUFFER, MirrorOptions
from liveblockd.jobs.scheduler import Scheduler
from liveblockd.jobs.starting import start_job
from liveblockd.jobs.user import JobUser
from liveblockd.storage.driver import Permission

LEAST_GRANULARITY: Final = 512
MOST_GRANULARITY: Final = 64 * 1024 * 1024


async def start_mirror(graph: Graph, scheduler: Scheduler, parameters: MirrorParameters) -> Mirror:
    """Check and start a mirror between two nodes; returns when it runs.

    A client that goes away meanwhile does not stop it halfway: then it runs.
    """
    return await start_job(scheduler, _set_up(graph, scheduler, parameters))


async def _set_up(graph: Graph, scheduler: Scheduler, parameters: MirrorParameters) -> Mirror:
    async with graph.lock:
        source = graph.lookup_root(parameters.device)
        target = graph.lookup_any(parameters.target)
        job = make_mirror(parameters, graph, source, target)
        return await launch(job, scheduler)


async def launch(job: Mirror, scheduler: Scheduler) -> Mirror:
    """Give ``job`` what it needs and make it known; holds the graph lock."""
    scheduler.check_id(job.id)
    try:
        await _cover(job)
        scheduler.create(job)
        try:
            await _attach(job)
        except BaseException:
            scheduler.refuse(job)
            raise
        await job.track()
    except BaseException:
        await job.release()
        await job.held.unblock()
        raise
    return job


def make_mirror(parameters: MirrorParameters, graph: Graph, source: Node, target: Node) -> Mirror:
    """The job, if nothing speaks against it; it has taken nothing yet."""
    sync = parameters.sync
    granularity = check_granularity(parameters.granularity, target)
    source.check_operation(Operation.MIRROR_SOURCE)
    target.check_operation(Operation.MIRROR_TARGET)
    below = chain.layer_below(source)
    if below is None and sync is MirrorSyncMode.TOP:
        sync = MirrorSyncMode.FULL
    if parameters.replaces is not None:
        check_replaces(graph, source, parameters.replaces)
    if sync not in (MirrorSyncMode.TOP, MirrorSyncMode.FULL, MirrorSyncMode.NONE):
        raise not_supported(sync)
    options = complete_options(parameters, granularity)
    if chain.skip_filters(source) is chain.skip_filters(target):
        raise BlockError("Can't mirror node into itself")
    return Mirror(
        parameters,
        options,
        graph,
        source,
        target,
        base=below if sync is MirrorSyncMode.TOP else None,
        nothing_yet=sync is MirrorSyncMode.NONE,
    )


def check_granularity(granularity: int | None, target: Node) -> int:
    """Bytes; 0 and None stand for the default."""
    if not granularity:
        return default_granularity(target.driver.cluster_size)
    if not LEAST_GRANULARITY <= granularity <= MOST_GRANULARITY:
        raise BlockError("Parameter 'granularity' expects a value in range [512B, 64MB]")
    if granularity & (granularity - 1):
        raise BlockError("Parameter 'granularity' expects a power of 2")
    return granularity


def complete_options(parameters: MirrorParameters, granularity: int) -> MirrorOptions:
    """The options of the core."""
    buf_size = parameters.buf_size
    if buf_size is not None and buf_size < 0:
        raise BlockError("Invalid parameter 'buf-size'")
    return replace(parameters.options, granularity=granularity, buf_size=buf_size or DEFAULT_BUFFER)


def check_replaces(graph: Graph, source: Node, name: str) -> Node:
    """The node to be replaced, of which nobody sees anything else than what ``source`` reads."""
    node = graph.find(name)
    node.check_operation(Operation.CHANGE)
    if not can_replace(source, node):
        raise BlockError(
            f"Cannot replace '{name}' by a node mirrored from '{source.name}', because it cannot "
            "be guaranteed that doing so would not lead to an abrupt change of visible data",
            errno=1,
        )
    return node


async def _cover(job: Mirror) -> None:
    """Block the nodes and put the filter above the source."""
    job.filter = await surgery.insert_filter(
        job.graph, job.source, name=job.parameters.filter_node_name, kind=MirrorTop
    )
    for node in (job.filter, job.source, job.target):
        job.held.block(node)


async def _attach(job: Mirror) -> None:
    """Stand on both nodes; BlockError if another user does not allow it."""
    read, write = Permission.CONSISTENT_READ, Permission.WRITE
    shared = Permission.ALL & ~Permission.RESIZE
    assert job.filter is not None
    job.source_user = await JobUser.attach(job.graph, job.filter, read, shared)
    job.target_user = await JobUser.attach(job.graph, job.target, write, Permission.WRITE_UNCHANGED)
    job.target.awaits_backing = job.whole_units and not job.new_backing
