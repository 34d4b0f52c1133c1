"""Drivers that stand between a user and a node: they pass requests on, and do one thing to them.

One module each; ``storage.registry.load_drivers`` imports those that are named here.
"""

FILTER_MODULES: tuple[str, ...] = (
    "liveblockd.storage.filters.blklogwrites",
    "liveblockd.storage.filters.blkverify",
    "liveblockd.storage.filters.compress",
    "liveblockd.storage.filters.preallocate",
    "liveblockd.storage.filters.quorum",
    "liveblockd.storage.filters.throttle",
)
