"""Drivers that stand between a user and a node: they pass requests on, and do one thing to them.

One module each; ``FILTER_MODULES`` is what ``storage.registry.load_drivers`` imports.
"""

FILTER_MODULES: tuple[str, ...] = ("liveblockd.storage.filters.throttle",)
