"""How a block-commit comes to run: what it is asked for, what it must not disturb, what it takes.

Specification: qapi/block-core.json (block-commit). Runs on the event loop, under ``graph.lock``.

Invariant: a start that fails leaves the graph as it was. Errors: BlockError, in QEMU's words.
"""

from __future__ import annotations

from typing import NamedTuple

from liveblockd.errors import BlockError, ErrorClass
from liveblockd.graph import chain
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Node, Operation
from liveblockd.graph.permissions import cumulative
from liveblockd.jobs.commit import Commit, CommitParameters
from liveblockd.jobs.commit_active import CommitActive
from liveblockd.jobs.commit_hold import nodes_between
from liveblockd.jobs.job import Job
from liveblockd.jobs.scheduler import Scheduler
from liveblockd.jobs.starting import start_job
from liveblockd.storage.driver import Permission


class Range(NamedTuple):
    """What is committed where."""

    device: Node
    top: Node
    base: Node
    #: guests write to ``top``, or may: it stays in step until the job is completed
    active: bool


async def start_commit(graph: Graph, scheduler: Scheduler, parameters: CommitParameters) -> Job:
    """Check and start a commit; a client that goes away meanwhile does not stop it halfway."""
    return await start_job(scheduler, _set_up(graph, scheduler, parameters))


async def _set_up(graph: Graph, scheduler: Scheduler, parameters: CommitParameters) -> Job:
    async with graph.lock:
        found = find_range(graph, parameters)
        if found.active:
            return await _launch_active(graph, scheduler, parameters, found)
        job = Commit(parameters, graph, found.device, found.top, found.base)
        scheduler.create(job)
        try:
            await job.take()
        except BaseException:
            try:
                await job.release()
                await job.hold.unblock()
            finally:
                scheduler.refuse(job)
            raise
    return job


async def _launch_active(
    graph: Graph, scheduler: Scheduler, parameters: CommitParameters, found: Range
) -> Job:
    # An id that cannot be is found before anything is touched; a speed, when the job is there.
    scheduler.check_id(parameters.job_id)
    job = CommitActive(parameters, graph, found.top, found.base)
    try:
        await job.cover()
        scheduler.create(job)
        try:
            await job.take()
        except BaseException:
            scheduler.refuse(job)
            raise
    except BaseException:
        await job.release()
        await job.hold.unblock()
        raise
    return job


def find_range(graph: Graph, parameters: CommitParameters) -> Range:
    """What ``parameters`` name, checked as QEMU does."""
    device = find_root(graph, parameters.device)
    device.check_operation(Operation.COMMIT_SOURCE)
    top = _find_top(graph, parameters, device)
    base = _find_base(graph, parameters, top)
    for node in nodes_between(top, base):
        node.check_operation(Operation.COMMIT_TARGET)
    if top is base:
        raise BlockError("cannot commit an image into itself")
    is_device = chain.skip_filters(top) is chain.skip_filters(device)
    active = is_device or bool(cumulative(top)[0] & Permission.WRITE)
    if not active:
        overlay = chain.overlay_of(device, top)
        assert overlay is not None
        overlay.check_operation(Operation.COMMIT_TARGET)
        if chain.skip_filters(top) is chain.skip_filters(base):
            raise BlockError("Invalid files for merge: top and base are the same")
    elif parameters.backing_file is not None:
        why = "is the active layer" if is_device else "has a writer on it"
        raise BlockError(f"'backing-file' specified, but 'top' {why}")
    return Range(device, top, base, active)


def find_root(graph: Graph, device: str) -> Node:
    """A drive's node or a node that no other has below it, and no job works from."""
    if device not in graph.drives and device not in graph.nodes:
        message = f"Device '{device}' not found"
        raise BlockError(message, error_class=ErrorClass.DEVICE_NOT_FOUND)
    return graph.lookup_root(device)


def _find_top(graph: Graph, parameters: CommitParameters, device: Node) -> Node:
    if parameters.top_node is not None and parameters.top is not None:
        raise BlockError("'top-node' and 'top' are mutually exclusive")
    if parameters.top_node is not None:
        return _in_chain(graph, parameters.top_node, device)
    if parameters.top is None or parameters.top == device.filename:
        return device
    found = chain.find_base_by_filename(device, parameters.top)
    if found is None:
        raise BlockError(f"Top image file {parameters.top} not found")
    return found


def _find_base(graph: Graph, parameters: CommitParameters, top: Node) -> Node:
    if parameters.base_node is not None and parameters.base is not None:
        raise BlockError("'base-node' and 'base' are mutually exclusive")
    if parameters.base_node is not None:
        return _in_chain(graph, parameters.base_node, top)
    if parameters.base is None:
        return chain.chain(top)[-1]
    found = chain.find_base_by_filename(top, parameters.base)
    if found is None:
        raise BlockError(f"Can't find '{parameters.base}' in the backing chain")
    return found


def _in_chain(graph: Graph, name: str, top: Node) -> Node:
    node = graph.lookup(None, name)
    if node is not top and all(edge.child is not node for edge in chain.edges_between(top, None)):
        raise BlockError(f"'{name}' is not in this backing file chain")
    return node
