"""How a mirror is to work.

Specification: qapi/block-core.json (blockdev-mirror, MirrorCopyMode). Pure.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from liveblockd.jobs.copying import KIB, MIB
from liveblockd.jobs.job import BlockdevOnError

DEFAULT_BUFFER: Final = 16 * MIB


class MirrorCopyMode(enum.StrEnum):
    """When a guest's write reaches the target (qapi/block-core.json)."""

    BACKGROUND = "background"
    WRITE_BLOCKING = "write-blocking"


@dataclass(frozen=True, slots=True)
class MirrorOptions:
    """How a mirror works; ``speed`` in bytes per second, sizes in bytes."""

    granularity: int = 64 * KIB
    buf_size: int = DEFAULT_BUFFER
    speed: int = 0
    on_source_error: BlockdevOnError = BlockdevOnError.REPORT
    on_target_error: BlockdevOnError = BlockdevOnError.REPORT
    unmap: bool = True
    copy_mode: MirrorCopyMode = MirrorCopyMode.BACKGROUND
    auto_finalize: bool = True
    auto_dismiss: bool = True
