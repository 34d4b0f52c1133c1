"""Nodes, backing chains and who uses them."""

#: drivers that need the graph to do their work; the import registers them
GRAPH_DRIVERS = (
    "liveblockd.graph.copy_before_write",
    "liveblockd.graph.copy_on_read",
    "liveblockd.graph.snapshot_access",
)
