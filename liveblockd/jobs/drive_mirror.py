"""drive-mirror: a mirror to an image that is created, or only opened, by its file name.

Specification: qapi/block-core.json (DriveMirror). Runs on the event loop, under ``graph.lock``.

While the job runs the target has no backing node: what it lacks is the source's affair. At the end
it gets the one that its header names, which is the source's own where that is the same file.
Invariant: a start that fails leaves no file that was not there before. Errors: BlockError.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

from liveblockd.errors import BlockError
from liveblockd.graph import chain, filenames
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Node, Operation
from liveblockd.graph.opening import Opener
from liveblockd.graph.snapshot import NewImageMode
from liveblockd.jobs.mirror_job import Mirror, MirrorParameters, MirrorSyncMode, not_supported
from liveblockd.jobs.mirror_start import (
    check_granularity,
    check_replaces,
    launch,
    make_mirror,
)
from liveblockd.jobs.new_target import NewTarget, open_target, remove_target
from liveblockd.jobs.scheduler import Scheduler
from liveblockd.jobs.starting import start_job
from liveblockd.qapi import parse
from liveblockd.runtime.unbroken import to_its_end
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import drivers


@dataclass(frozen=True, slots=True)
class DriveMirrorParameters:
    """What the client asked for; ``mirror.target`` is a file name."""

    mirror: MirrorParameters
    image_format: str | None = None
    node_name: str | None = None
    mode: NewImageMode = NewImageMode.ABSOLUTE_PATHS


async def start_drive_mirror(
    graph: Graph,
    scheduler: Scheduler,
    parameters: DriveMirrorParameters,
    console: Callable[[str], None],
) -> Mirror:
    """Create and open the target, and start; ``console`` takes the line ``Formatting ...``."""
    return await start_job(scheduler, _set_up(graph, scheduler, parameters, console))


async def _set_up(
    graph: Graph,
    scheduler: Scheduler,
    parameters: DriveMirrorParameters,
    console: Callable[[str], None],
) -> Mirror:
    async with graph.lock:
        mirror = parameters.mirror
        source = graph.lookup_root(mirror.device)
        below = chain.layer_below(source)
        sync = mirror.sync
        if below is None and sync is MirrorSyncMode.TOP:
            sync = MirrorSyncMode.FULL
        _check(graph, scheduler, parameters, source)
        stands_on = {MirrorSyncMode.NONE: source, MirrorSyncMode.TOP: below}.get(sync)
        discard = source.options.discard
        new = NewTarget(
            mirror.target,
            parameters.image_format,
            parameters.mode,
            node_name=parameters.node_name,
            discard=None if discard is None else str(discard),
        )
        found = await open_target(
            graph, source, new, backing=stands_on, open_backing=False, console=console
        )
        target = found.node
        opened = [target]
        try:
            if parameters.mode is NewImageMode.EXISTING:
                stands_on = await _named_backing(graph, source, target)
                if stands_on is not None:
                    opened.append(stands_on)
            job = make_mirror(replace(mirror, target=target.name, sync=sync), graph, source, target)
            job.new_backing = (stands_on,)
            job.backing_to_come = stands_on is not None
            if stands_on is not None:
                job.held.block(stands_on)
            return await launch(job, scheduler)
        except BaseException:
            for node in opened:
                await graph.unref(node)
            if found.made:
                await to_its_end(remove_target(graph, new))
            raise


def _check(
    graph: Graph, scheduler: Scheduler, parameters: DriveMirrorParameters, source: Node
) -> None:
    """What can be known before a file is made."""
    mirror, image_format = parameters.mirror, parameters.image_format
    source.check_operation(Operation.MIRROR_SOURCE)
    if image_format is not None and image_format not in drivers():
        raise BlockError(f"Unknown file format '{image_format}'")
    if mirror.replaces is not None:
        if parameters.node_name is None:
            raise BlockError(
                "a node-name must be provided when replacing a named node of the graph"
            )
        check_replaces(graph, source, mirror.replaces)
    if parameters.node_name is not None:
        graph.check_new_name(parameters.node_name)
    if mirror.sync in (MirrorSyncMode.INCREMENTAL, MirrorSyncMode.BITMAP):
        raise not_supported(mirror.sync)
    check_granularity(mirror.granularity, source)
    scheduler.check_id(mirror.job_id)


async def _named_backing(graph: Graph, source: Node, target: Node) -> Node | None:
    """What the header of an existing target names: a node of the source's chain, or a new one."""
    written = target.driver.backing_file
    if not written:
        return None
    name = filenames.full_backing_filename(target, written)
    for node in chain.chain(source):
        if _is_called(node, name):
            return node
    try:
        members, _ = await Opener(graph).image_members(name, target.driver.backing_format)
        options = parse(BlockdevOptions, members | {"read-only": True})
        return await graph.open(options, monitor_owned=False)
    except BlockError as error:
        raise BlockError(
            f"Could not open backing file: {error.message}", errno=error.errno
        ) from error


def _is_called(node: Node, name: str) -> bool:
    plain = filenames.exact_filename(node)
    return plain is not None and os.path.realpath(plain) == os.path.realpath(name)
