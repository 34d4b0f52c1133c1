"""What a client asks of a job on a part of a backing chain.

Specification: qapi/block-core.json (block-stream, block-commit). Pure; raises nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from liveblockd.jobs.job import BlockdevOnError


@dataclass(frozen=True, slots=True)
class ChainParameters:
    """The members that streams and commits share, as they can be written down and read again.

    ``speed`` in bytes per second, 0 for no limit.
    """

    job_id: str
    device: str
    base: str | None = None
    base_node: str | None = None
    backing_file: str | None = None
    backing_mask_protocol: bool = False
    speed: int = 0
    on_error: BlockdevOnError = BlockdevOnError.REPORT
    filter_node_name: str | None = None
    auto_finalize: bool = True
    auto_dismiss: bool = True
