"""Image formats: drivers that find their bytes in a ``file`` child."""

from __future__ import annotations

import importlib

#: format drivers, imported by ``load_formats``; the import registers them
FORMAT_MODULES = (
    "liveblockd.formats.raw",
    "liveblockd.formats.foreign",
    "liveblockd.formats.luks_image",
    "liveblockd.formats.qcow",
    "liveblockd.formats.qcow2.image",
)


def load_formats() -> None:
    """Make the formats of this package known to ``storage.registry``."""
    for module in FORMAT_MODULES:
        importlib.import_module(module)
