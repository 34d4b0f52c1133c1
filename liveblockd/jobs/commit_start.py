"""How a block-commit comes to run: what it is asked for, what it must not disturb, what it takes.

Specification: qapi/block-core.json (block-commit). Runs on the event loop, under ``graph.lock``.

Invariant: a start that fails leaves the graph as it was. Errors: BlockError, in QEMU's words.
"""

from __future__ import annotations

from typing import NamedTuple

from liveblockd.errors import BlockError, ErrorClass
from liveblockd.graph import chain, surgery
from liveblockd.graph.filter import CommitTop
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Node, Operation
from liveblockd.graph.permissions import cumulative
from liveblockd.jobs.commit import Commit, CommitParameters
from liveblockd.jobs.job import Job
from liveblockd.jobs.scheduler import Scheduler
from liveblockd.jobs.starting import start_job
from liveblockd.jobs.user import JobUser
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
            raise BlockError("Committing the active image is not supported yet")
        job = Commit(parameters, graph, found.device, found.top, found.base)
        scheduler.create(job)
        try:
            await _take(job)
        except BaseException:
            try:
                await job.release()
                await job.unblock()
            finally:
                scheduler.refuse(job)
            raise
    return job


def find_range(graph: Graph, parameters: CommitParameters) -> Range:
    """What ``parameters`` name, checked as QEMU does."""
    device = find_root(graph, parameters.device)
    device.check_operation(Operation.COMMIT_SOURCE)
    top = _find_top(graph, parameters, device)
    base = _find_base(graph, parameters, top)
    for node in _between(top, base):
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
    try:
        node = graph.lookup(device, device)
    except BlockError:
        message = f"Device '{device}' not found"
        raise BlockError(message, error_class=ErrorClass.DEVICE_NOT_FOUND) from None
    if any(isinstance(edge.parent, Node) or edge.role != "root" for edge in node.parents):
        raise BlockError("Need a root block node")
    return node


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


def _between(top: Node, base: Node) -> list[Node]:
    """All nodes from ``top`` down to ``base``, filters too."""
    return [top, *(edge.child for edge in chain.edges_between(top, base))]


async def _take(job: Commit) -> None:
    """Cover the top, freeze, block, and stand on the nodes; the caller undoes what was done."""
    graph, top, base = job.graph, job.top, job.base
    await _stand(job, job.device, Permission.NONE, Permission.ALL, "main node")
    job.block(job.device)
    if base.read_only:
        await graph.set_read_only(base, False)
        job.made_writable = True
    job.filter = await surgery.insert_filter(
        graph, top, job.parameters.filter_node_name, kind=CommitTop, read_only=True
    )
    edges = chain.freeze(top, base)
    job.frozen = edges
    job.committed = list(edges)
    chain.commit_through(edges, True)
    await graph.refresh_permissions(job.filter)
    unshared = Permission.CONSISTENT_READ | Permission.RESIZE
    for node in _between(top, base)[:-1]:
        user = await _stand(
            job, node, Permission.NONE, Permission.ALL & ~unshared, "intermediate node"
        )
        job.reader = job.reader or user
        job.block(node)
    job.block(base)
    used = Permission.CONSISTENT_READ | Permission.WRITE
    if base.length < top.length:
        used |= Permission.RESIZE
    shared = Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED
    job.writer = await _stand(job, base, used, shared, "root")


async def _stand(
    job: Commit, node: Node, used: Permission, shared: Permission, role: str
) -> JobUser:
    name = None if role == "root" else f"commit job '{job.id}'"
    user = await JobUser.attach(job.graph, node, used, shared, role=role, user=name)
    job.users.append(user)
    return user
