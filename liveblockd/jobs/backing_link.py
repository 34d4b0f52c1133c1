"""What the header of an overlay is to say of the image that is going to be below it.

Specification: qapi/block-core.json (``backing-file``, ``backing-mask-protocol``). Pure but for the
names of nodes; raises nothing.
"""

from __future__ import annotations

import os

from liveblockd.errors import BlockError
from liveblockd.graph import filenames
from liveblockd.graph.node import Node


def backing_string(overlay: Node, base: Node) -> str:
    """The name of the base, as long as it leads there.

    The name is one that the daemon can open from its own directory; the header is read from
    the directory of the image. Where these differ the absolute name is written.
    """
    name = base.filename
    plain = filenames.exact_filename(base)
    if name != plain or name.startswith("/") or filenames.has_protocol(name):
        return name
    try:
        seen = filenames.full_backing_filename(overlay, name)
    except BlockError:
        seen = ""
    return name if os.path.normpath(seen) == os.path.normpath(name) else os.path.abspath(name)


def backing_format(base: Node, *, mask_protocol: bool) -> str:
    """The driver of the base; with ``mask_protocol`` a protocol's is called raw."""
    if mask_protocol and not base.driver_class.is_format:
        return "raw"
    return base.driver_class.driver_name
