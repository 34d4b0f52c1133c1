"""How a block-stream comes to run: what it is asked for, what it must not disturb, what it takes.

Specification: qapi/block-core.json (block-stream). Runs on the event loop, under ``graph.lock``.

Invariant: a start that fails leaves the graph as it was. Errors: BlockError, in QEMU's words.
"""

from __future__ import annotations

from errno import ENOTSUP

from liveblockd.errors import BlockError
from liveblockd.graph import chain, surgery
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Node, Operation
from liveblockd.jobs.scheduler import Scheduler
from liveblockd.jobs.starting import start_job
from liveblockd.jobs.stream import Stream, StreamParameters
from liveblockd.jobs.user import JobUser
from liveblockd.storage.driver import BlockDriver, Permission


async def start_stream(graph: Graph, scheduler: Scheduler, parameters: StreamParameters) -> Stream:
    """Check and start a stream; returns when it runs, or when it is over if nothing is to do.

    A client that goes away meanwhile does not stop it halfway: then it runs.
    """
    return await start_job(scheduler, _set_up(graph, scheduler, parameters))


async def _set_up(graph: Graph, scheduler: Scheduler, parameters: StreamParameters) -> Stream:
    async with graph.lock:
        top, bottom = find_range(graph, parameters)
        job = Stream(parameters, graph, top, bottom)
        if parameters.base_node is not None:
            job.stop = graph.lookup(None, parameters.base_node)
        elif parameters.base is not None:
            job.stop = job.base
        if not job.immediate and type(top.driver).populate is BlockDriver.populate:
            name = top.driver_class.driver_name
            raise BlockError(f"Node '{top.name}': {name} cannot be streamed into", errno=ENOTSUP)
        scheduler.check_id(job.id)
        if job.immediate and parameters.filter_node_name is not None:
            _check_filter_name(graph, parameters.filter_node_name)
        demand = graph.environment.workers.demand
        await demand.give_turn()  # each part takes half a millisecond the first time
        await _take(job)
        try:
            await demand.give_turn()
            scheduler.create(job)
            try:
                await _attach(job)
            except BaseException:
                scheduler.refuse(job)
                raise
        except BaseException:
            await job.release()
            await job.held.unblock()
            raise
    if not job.immediate:
        job.warn_of_snapshots()
    return job


def find_range(graph: Graph, parameters: StreamParameters) -> tuple[Node, Node]:
    """The node to copy into and the last layer to be copied; the same one if there is none."""
    _check_exclusive(parameters)
    device = graph.lookup(parameters.device, parameters.device)
    top = chain.skip_filters(device)
    assert top is not None
    stop = _find_base(graph, parameters, device, top)
    base = chain.skip_filters(stop)
    if parameters.bottom is not None:
        bottom = _find_bottom(graph, parameters.bottom, device)
        stop, base = bottom.backing, chain.layer_below(bottom)
    _check_free(device, stop)
    if base is top:
        raise BlockError(f"'{parameters.base_node}' is not in the backing chain of '{device.name}'")
    if parameters.bottom is None:
        layers = chain.chain(top)
        bottom = layers[layers.index(base) - 1] if base is not None else layers[-1]
    if base is None and parameters.backing_file is not None:
        raise BlockError("backing file specified, but streaming the entire chain")
    return top, bottom


def _check_exclusive(parameters: StreamParameters) -> None:
    given = {
        "base": parameters.base,
        "bottom": parameters.bottom,
        "base-node": parameters.base_node,
    }
    for one, other in (("base", "base-node"), ("base", "bottom"), ("bottom", "base-node")):
        if given[one] is not None and given[other] is not None:
            raise BlockError(f"'{one}' and '{other}' cannot be specified at the same time")


def _find_base(graph: Graph, parameters: StreamParameters, device: Node, top: Node) -> Node | None:
    if parameters.base is not None:
        found = chain.find_base_by_filename(top, parameters.base)
        if found is None:
            raise BlockError(f"Can't find '{parameters.base}' in the backing chain")
        return found
    if parameters.base_node is None:
        return None
    base = graph.lookup(None, parameters.base_node)
    if all(edge.child is not base for edge in chain.edges_between(device, None)):
        raise BlockError(f"Node '{base.name}' is not a backing image of '{device.name}'")
    return base  # may be ``top``, where the device is a filter of it


def _find_bottom(graph: Graph, name: str, device: Node) -> Node:
    bottom = graph.lookup(None, name)
    if bottom.is_filter:
        raise BlockError(f"Node '{name}' is a filter, use a non-filter node as 'bottom'")
    if not chain.is_above(device, bottom):
        raise BlockError(f"Node '{name}' is not in a chain starting from '{device.name}'")
    return bottom


def _check_free(device: Node, stop: Node | None) -> None:
    """No other job uses any node that takes part, down to above ``stop``; filters are asked too."""
    node: Node | None = device
    while node is not None and node is not stop:
        node.check_operation(Operation.STREAM)
        node = node.file if node.is_filter else node.backing


def _check_filter_name(graph: Graph, name: str) -> None:
    try:
        graph.check_new_name(name)
    except BlockError as error:
        raise BlockError(f"Could not create node: {error.message}") from error


async def _take(job: Stream) -> None:
    """Freeze, block and cover with the filter; undone when it fails."""
    top, bottom = job.top, job.bottom
    try:
        if not job.immediate:
            job.frozen = chain.freeze(top, bottom)
            await job.top_open.open()
            name = job.parameters.filter_node_name
            if name is not None:
                _check_filter_name(job.graph, name)
            with surgery.replacing():
                job.filter = await surgery.insert_filter(job.graph, top, name=name)
            job.held.block(job.filter)
        job.held.block(top)
        for layer in chain.chain(top)[1:]:
            if job.immediate:
                break
            job.held.block(layer)
            if layer is bottom:
                break
    except BaseException:
        await job.release()
        await job.held.unblock()
        raise


async def _attach(job: Stream) -> None:
    """Stand on the nodes as one of their users; BlockError if another one does not allow it."""
    used = Permission.NONE
    if not job.immediate:
        # What it reads must not change below it, as after a commit into a base in use.
        used = Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED
    shared = Permission.ALL & ~Permission.RESIZE
    job.user = await JobUser.attach(job.graph, job.top, used, shared)
