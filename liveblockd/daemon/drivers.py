"""Which block drivers the daemon knows: every one that a module of storage and formats registers.

Runs on the main thread at the start. Nothing escapes but a ValueError for two drivers of one name.
"""

from __future__ import annotations

import importlib
import pkgutil

from liveblockd.graph import GRAPH_DRIVERS
from liveblockd.storage.registry import drivers, load_drivers


def load_all_drivers() -> None:
    """Import the protocol drivers, every module below ``formats``, and filters that know chains."""
    load_drivers()
    for name in GRAPH_DRIVERS:
        importlib.import_module(name)
    package = importlib.import_module("liveblockd.formats")
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)


def driver_names() -> list[str]:
    """All names for ``format=`` and ``driver=``, sorted."""
    load_all_drivers()
    return sorted(drivers())
