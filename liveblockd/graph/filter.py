"""The filters that jobs put into the graph: they pass all requests on, and are there to be seen.

``copy-on-read`` stands above the top of a stream. QEMU's stream copies what guests read while it
runs; ours copies below the guest's writes and needs no help of the reads. ``commit_top`` stands
above the top of a commit, and says that nothing above it needs what lies between top and base.

Runs on the event loop. Not registered: the driver copy-on-read of blockdev-add copies. Errors:
those of the child.
"""

from __future__ import annotations

from liveblockd.storage.driver import BlockDriver, BlockIO, Permission
from liveblockd.storage.filters.base import FilterDriver
from liveblockd.storage.options import BlockdevOptions


class JobFilter(FilterDriver):
    """Hands everything on to its child, which graph surgery never replaces."""

    #: how QEMU calls the link to the child
    link = "file"

    def __init__(self, child: BlockIO, *, read_only: bool) -> None:
        super().__init__({self.filtered: child}, read_only=read_only)
        # A node binds what it finds here: no call in between on the request path. Writes are looked
        # up each time: the child may get a dirty bitmap meanwhile.
        self.read_nowait = child.read_nowait  # type: ignore[method-assign]

    def layer(self) -> tuple[BlockIO, BlockDriver] | None:
        """As the child."""
        layer = getattr(self.child, "layer", None)
        return None if layer is None else layer()


class CopyOnRead(JobFilter):
    """Of a stream."""

    driver_name = "copy-on-read"


class CommitTop(JobFilter):
    """Of a commit: who reads through it does not ask that each layer below be whole by itself.

    What is read here never changes while the job runs; what a layer between top and base shows
    alone does, so that nobody else may need it: the job's own edges do not share reading.
    """

    driver_name = "commit_top"
    filtered = link = "backing"
    child_roles = ("backing",)

    def __init__(self, child: BlockIO, *, read_only: bool) -> None:
        super().__init__(child, read_only=read_only)
        below = self.driver_below
        self.cluster_size = None if below is None else below.cluster_size

    @classmethod
    def child_permissions(
        cls,
        options: BlockdevOptions,  # noqa: ARG003
        role: str,  # noqa: ARG003
        used: Permission,  # noqa: ARG003
        shared: Permission,  # noqa: ARG003
    ) -> tuple[Permission, Permission]:
        """Nothing is needed, everything is shared."""
        return Permission.NONE, Permission.ALL
