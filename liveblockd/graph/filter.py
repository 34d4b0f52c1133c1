"""The filter that a stream puts above its top: shown as ``copy-on-read``, passes all requests on.

QEMU's stream copies what guests read while it runs; ours copies below the guest's writes and needs
no help of the reads, so that this node is there for clients that look for it by its name only.

Runs on the event loop. Not registered: the driver of that name copies. Errors: those of the child.
"""

from __future__ import annotations

from liveblockd.storage.driver import BlockDriver, BlockIO
from liveblockd.storage.filters.base import FilterDriver


class CopyOnRead(FilterDriver):
    """Hands everything on to its ``file`` child, which graph surgery never replaces."""

    driver_name = "copy-on-read"

    def __init__(self, child: BlockIO, *, read_only: bool) -> None:
        super().__init__({"file": child}, read_only=read_only)
        # A node binds what it finds here: no call in between on the request path. Writes are looked
        # up each time: the child may get a dirty bitmap meanwhile.
        self.read_nowait = child.read_nowait  # type: ignore[method-assign]

    def layer(self) -> tuple[BlockIO, BlockDriver] | None:
        """As the child."""
        layer = getattr(self.child, "layer", None)
        return None if layer is None else layer()
