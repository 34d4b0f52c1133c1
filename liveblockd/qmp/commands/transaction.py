"""transaction (qapi/transaction.json).

Runs on the event loop. Errors: BlockError, OSError of the action that failed.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from liveblockd.errors import BlockError
from liveblockd.graph import actions, dirty
from liveblockd.graph.snapshot import NewImageMode, SnapshotRequest
from liveblockd.graph.transaction import Action, perform
from liveblockd.jobs.backup_start import create_backup, create_drive_backup
from liveblockd.jobs.job import Job
from liveblockd.jobs.scheduler import Transaction
from liveblockd.jobs.transaction import JobAction
from liveblockd.qapi import QapiModel
from liveblockd.qmp.commands.backup import BlockdevBackup, DriveBackup, new_target, parameters_of
from liveblockd.qmp.commands.bitmaps import (
    BlockDirtyBitmap,
    BlockDirtyBitmapAdd,
    BlockDirtyBitmapMerge,
    sources,
)
from liveblockd.qmp.commands.snapshots import (
    BlockdevSnapshot,
    BlockdevSnapshotInternal,
    BlockdevSnapshotSync,
)
from liveblockd.qmp.context import Context
from liveblockd.qmp.registry import command


class TransactionActionKind(enum.StrEnum):
    """What can be a part of a transaction."""

    ABORT = "abort"
    BLOCK_DIRTY_BITMAP_ADD = "block-dirty-bitmap-add"
    BLOCK_DIRTY_BITMAP_REMOVE = "block-dirty-bitmap-remove"
    BLOCK_DIRTY_BITMAP_CLEAR = "block-dirty-bitmap-clear"
    BLOCK_DIRTY_BITMAP_ENABLE = "block-dirty-bitmap-enable"
    BLOCK_DIRTY_BITMAP_DISABLE = "block-dirty-bitmap-disable"
    BLOCK_DIRTY_BITMAP_MERGE = "block-dirty-bitmap-merge"
    BLOCKDEV_BACKUP = "blockdev-backup"
    DRIVE_BACKUP = "drive-backup"
    BLOCKDEV_SNAPSHOT = "blockdev-snapshot"
    BLOCKDEV_SNAPSHOT_INTERNAL_SYNC = "blockdev-snapshot-internal-sync"
    BLOCKDEV_SNAPSHOT_SYNC = "blockdev-snapshot-sync"


_K = TransactionActionKind


class ActionCompletionMode(enum.StrEnum):
    """Whether jobs of a transaction succeed each for itself, or all or none of them."""

    INDIVIDUAL = "individual"
    GROUPED = "grouped"


class TransactionProperties(QapiModel):
    """What holds for the whole transaction."""

    completion_mode: ActionCompletionMode | None = None


class TransactionAction(QapiModel):
    """One action; ``data`` are the arguments of the command of that name."""

    qapi_tag: ClassVar[str] = "type"

    type_: TransactionActionKind

    @classmethod
    def qapi_variants(cls) -> Mapping[str, type[QapiModel]]:
        """The kinds."""
        return _wrappers


class AbortData(QapiModel):
    """Nothing."""


class AbortAction(TransactionAction):
    """abort."""

    data: AbortData


class BitmapAddAction(TransactionAction):
    """block-dirty-bitmap-add."""

    data: BlockDirtyBitmapAdd


class BitmapAction(TransactionAction):
    """block-dirty-bitmap-remove, -clear, -enable, -disable."""

    data: BlockDirtyBitmap


class BitmapMergeAction(TransactionAction):
    """block-dirty-bitmap-merge."""

    data: BlockDirtyBitmapMerge


class BackupAction(TransactionAction):
    """blockdev-backup."""

    data: BlockdevBackup


class DriveBackupAction(TransactionAction):
    """drive-backup."""

    data: DriveBackup


class SnapshotAction(TransactionAction):
    """blockdev-snapshot."""

    data: BlockdevSnapshot


class InternalSnapshotAction(TransactionAction):
    """blockdev-snapshot-internal-sync."""

    data: BlockdevSnapshotInternal


class SnapshotSyncAction(TransactionAction):
    """blockdev-snapshot-sync."""

    data: BlockdevSnapshotSync


class TransactionArguments(QapiModel):
    """Arguments of transaction."""

    actions: list[TransactionAction]
    properties: TransactionProperties | None = None


@dataclass(frozen=True, slots=True)
class _Kind:
    model: type[TransactionAction]
    #: its third argument is for those that start a job
    make: Callable[..., Action]
    #: whether it starts a job, which can be one of a group
    starts_job: bool = False


def _snapshot_sync(context: Context, data: BlockdevSnapshotSync) -> Action:
    request = SnapshotRequest(
        data.device,
        data.node_name,
        data.snapshot_file,
        data.snapshot_node_name,
        data.format or "qcow2",
        data.mode or NewImageMode.ABSOLUTE_PATHS,
    )
    return actions.SnapshotSync(context.graph, request, context.console)


def _backup(context: Context, data: BlockdevBackup, group: Transaction | None) -> Action:
    parameters = parameters_of(context, data, data.target)

    async def create(group: Transaction | None) -> Job:
        return await create_backup(context.graph, context.scheduler, parameters, group)

    return JobAction(context.scheduler, (data.device, data.target), create, group)


def _drive_backup(context: Context, data: DriveBackup, group: Transaction | None) -> Action:
    parameters, new = parameters_of(context, data, ""), new_target(data)

    async def create(group: Transaction | None) -> Job:
        return await create_drive_backup(
            context.graph, context.scheduler, parameters, new, context.console, group
        )

    return JobAction(context.scheduler, (data.device,), create, group)


def _add(context: Context, data: BlockDirtyBitmapAdd) -> Action:
    def step() -> dirty.Undo:
        return dirty.add(
            context.graph,
            data.node,
            data.name,
            granularity=data.granularity,
            persistent=data.persistent,
            enabled=not data.disabled,
        )

    return actions.BitmapAction(data.node, step)


def _clear(context: Context, data: BlockDirtyBitmap) -> Action:
    return actions.BitmapAction(data.node, lambda: dirty.clear(context.graph, data.node, data.name))


def _enable(enabled: bool) -> Callable[[Context, BlockDirtyBitmap], Action]:
    def make(context: Context, data: BlockDirtyBitmap) -> Action:
        return actions.BitmapAction(
            data.node, lambda: dirty.set_enabled(context.graph, data.node, data.name, enabled)
        )

    return make


def _merge(context: Context, data: BlockDirtyBitmapMerge) -> Action:
    return actions.BitmapAction(
        data.node, lambda: dirty.merge(context.graph, data.node, data.target, sources(data))
    )


_kinds: dict[TransactionActionKind, _Kind] = {
    _K.ABORT: _Kind(AbortAction, lambda _context, _data: actions.Abort()),
    _K.BLOCK_DIRTY_BITMAP_ADD: _Kind(BitmapAddAction, _add),
    _K.BLOCK_DIRTY_BITMAP_REMOVE: _Kind(
        BitmapAction,
        lambda context, data: actions.RemoveBitmap(context.graph, data.node, data.name),
    ),
    _K.BLOCK_DIRTY_BITMAP_CLEAR: _Kind(BitmapAction, _clear),
    _K.BLOCK_DIRTY_BITMAP_ENABLE: _Kind(BitmapAction, _enable(True)),
    _K.BLOCK_DIRTY_BITMAP_DISABLE: _Kind(BitmapAction, _enable(False)),
    _K.BLOCK_DIRTY_BITMAP_MERGE: _Kind(BitmapMergeAction, _merge),
    _K.BLOCKDEV_BACKUP: _Kind(BackupAction, _backup, starts_job=True),
    _K.DRIVE_BACKUP: _Kind(DriveBackupAction, _drive_backup, starts_job=True),
    _K.BLOCKDEV_SNAPSHOT: _Kind(
        SnapshotAction,
        lambda context, data: actions.Snapshot(context.graph, data.node, data.overlay),
    ),
    _K.BLOCKDEV_SNAPSHOT_INTERNAL_SYNC: _Kind(
        InternalSnapshotAction,
        lambda context, data: actions.InternalSnapshot(context.graph, data.device, data.name),
    ),
    _K.BLOCKDEV_SNAPSHOT_SYNC: _Kind(SnapshotSyncAction, _snapshot_sync),
}
_wrappers = {str(name): kind.model for name, kind in _kinds.items()}


@command("transaction", args=TransactionArguments)
async def transaction(context: Context, arguments: TransactionArguments) -> None:
    """Do all of the actions at one instant, or none."""
    properties = arguments.properties
    mode = properties.completion_mode if properties is not None else None
    group = Transaction() if mode is ActionCompletionMode.GROUPED else None
    if mode is ActionCompletionMode.GROUPED:
        for action in arguments.actions:
            if not _kinds[action.type_].starts_job:
                raise BlockError(
                    f"Action '{action.type_}' does not support transaction property "
                    f"completion-mode = {mode}"
                )
    steps = []
    for action in arguments.actions:
        kind = _kinds[action.type_]
        extra = (group,) if kind.starts_job else ()
        steps.append(kind.make(context, action.data, *extra))  # type: ignore[attr-defined]
    await perform(context.graph, steps)
