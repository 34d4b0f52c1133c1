"""What the daemon does by its journal of jobs: opens drives where they were last, resumes jobs.

Specification: docs/job-journal.md. Runs on the event loop.

Invariant: where a drive is now is durable before a guest's first write goes there. Errors:
BlockError from the constructor and ``open_drive``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Coroutine
from typing import Any

from liveblockd.errors import BlockError
from liveblockd.graph import chain, filenames
from liveblockd.graph.backend import Backend
from liveblockd.graph.drives import DriveOptions, open_drive
from liveblockd.graph.node import Node
from liveblockd.jobs.history import DriveRecord, Image
from liveblockd.jobs.journal import Journal, image_of
from liveblockd.jobs.resuming import RESUMABLE, resume
from liveblockd.qmp.context import Context

log = logging.getLogger(__name__)


class JobJournal:
    """The journal ``path``, attached to the parts of the daemon."""

    def __init__(self, context: Context, path: str, *, resumes: bool) -> None:
        if "journal" in context.parts:
            raise BlockError("There is a journal of jobs already")
        self._context = context
        self._resumes = resumes
        #: what each drive was opened on, and the layer that the journal knows
        self._drives: dict[Backend, tuple[Image, Node]] = {}
        self._journal = Journal.open(path, context.workers)
        context.parts["journal"] = self._journal
        self._journal.attend(context.scheduler)
        self._journal.on_drive = self._has
        context.graph.on_drained = self._moved

    async def open_drive(self, options: DriveOptions) -> None:
        """Open a drive, on the image on which its guest was last."""
        file = options.file
        graph = self._context.graph
        if not isinstance(file, str) or options.snapshot or options.id is None:
            await open_drive(graph, options)
            return
        last = self._journal.drive(options.id)
        elsewhere = last is not None and _place(last.opened.file) == _place(file)
        if last is not None and elsewhere:
            _check_unchanged(options.id, last, self._journal.path)
            log.warning(
                "drive '%s' was last on '%s', and is opened there and not on '%s' (%s)",
                options.id, last.active.file, file, self._journal.path,
            )  # fmt: skip
            changes = {"file": last.active.file, "format": last.active.format, "driver": None}
            options = options.model_copy(update=changes)
        drive = await open_drive(graph, options)
        layer = chain.skip_filters(drive.node)
        if layer is None or image_of(layer).file.startswith("json:"):
            return  # nobody can say whether another text means the same
        opened = last.opened if last is not None and elsewhere else image_of(layer)
        self._drives[drive] = opened, layer
        if last is not None and not elsewhere:
            # Somebody decided otherwise; what was known of it is worth nothing.
            self._journal.drive_moved(drive.name, opened, layer)

    def _has(self, layer: Node) -> bool:
        return any(known is layer for _, known in self._drives.values())

    def _moved(self) -> Coroutine[Any, Any, None] | None:
        """Write down drives that are elsewhere now; what is to be awaited for that."""
        moved = False
        for drive, (opened, known) in list(self._drives.items()):
            if self._context.graph.drives.get(drive.name) is not drive:
                del self._drives[drive]
                continue
            layer = chain.skip_filters(drive.node)
            if layer is None or layer is known:
                continue
            self._drives[drive] = opened, layer
            try:
                self._journal.drive_moved(drive.name, opened, layer)
            except Exception:  # the switch has been made
                log.exception("the journal of jobs: drive %s", drive.name)
            moved = True
        return self._journal.synced() if moved else None

    async def resume_jobs(self) -> None:
        """Let go on what the last daemon was at, as far as its images are as they were."""
        if not self._resumes:
            return
        graph, scheduler = self._context.graph, self._context.scheduler
        for record in self._journal.history.under_way():
            try:
                went_on = await resume(graph, scheduler, record, self._journal)
            except (BlockError, OSError) as error:
                log.warning(
                    "job '%s' (%s) was under way and is not resumed: %s",
                    record.id, record.type, error,
                )  # fmt: skip
                if record.type not in RESUMABLE:
                    self._journal.give_up(record.id, "interrupted", str(error))
            else:
                how = "goes on" if went_on else "had come to its end"
                log.warning("job '%s' (%s) was under way and %s", record.id, record.type, how)


def _place(name: str) -> object:
    """What is the same for names that lead to the same file or export."""
    try:
        members = filenames.protocol_options(name)
    except BlockError:
        return name
    while isinstance(inner := members.get("file"), dict):
        members = inner
    if members.get("driver") in ("file", "host_device") and "filename" in members:
        return os.path.realpath(members["filename"])
    return members


def _check_unchanged(name: str, last: DriveRecord, journal: str) -> None:
    """BlockError if either file is not the one that the journal knows: somebody has to decide."""
    for image in (last.opened, last.active):
        try:
            inode = os.stat(image.file).st_ino
        except OSError:
            continue  # opening it tells, if it is needed
        if image.inode and inode != image.inode:
            raise BlockError(
                f"Drive '{name}' was last on '{last.active.file}', but '{image.file}' is another "
                f"file now: name the image that is right, or remove '{journal}'"
            )
