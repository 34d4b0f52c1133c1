"""Who may do what with a node: what its users need, and what each lets the others do.

QEMU's permission system (the texts are those of its messages): every edge has permissions *used*
and permissions *shared*. Two edges of one node conflict when one uses what the other does not
share. What a node does with its children follows from its driver, its read-only state and its own
users. A protocol node at the bottom turns the sum into locks on the file (``storage/README.md``).

Invariant: a backing node lets nobody write to it, whoever uses the overlay: QEMU is laxer here,
but written base data would show through the overlay. Two exceptions: a commit, whose writes are
hidden by the layer they come from, marks the links above its base (``Edge.committed``), and lets
nobody read through them but by its filter; after a commit of the active image they stay marked. And
an overlay that is the target of copy-before-write gets the base's data before they are lost: until
somebody uses it, and while that filter is there, others may write to the base.

Pure. Errors: BlockError with QEMU's words for a conflict or a write to a read-only node.
"""

from __future__ import annotations

from collections.abc import Collection

from liveblockd.errors import BlockError
from liveblockd.graph import chain
from liveblockd.graph.node import Edge, Node
from liveblockd.storage.driver import Permission

_NAMES = (
    (Permission.CONSISTENT_READ, "consistent read"),
    (Permission.WRITE, "write"),
    (Permission.WRITE_UNCHANGED, "write unchanged"),
    (Permission.RESIZE, "resize"),
)
_CHANGES = Permission.WRITE | Permission.RESIZE
WRITES = _CHANGES | Permission.WRITE_UNCHANGED


def describe(permissions: Permission) -> str:
    """``write, resize``."""
    return ", ".join(name for bit, name in _NAMES if permissions & bit)


def names(permissions: Permission) -> list[str]:
    """BlockPermission values of QAPI."""
    return [name.replace(" ", "-") for bit, name in _NAMES if permissions & bit]


def cumulative(node: Node) -> tuple[Permission, Permission]:
    """What all users of ``node`` need together, and what all of them share."""
    used, shared = Permission.NONE, Permission.ALL
    for edge in node.parents:
        used |= edge.used
        shared &= edge.shared
    return used, shared


def of_child(edge: Edge, used: Permission, shared: Permission) -> tuple[Permission, Permission]:
    """What a node, whose users need ``used`` and share ``shared``, does by its ``edge``."""
    parent, role, child = edge.parent, edge.role, edge.child
    assert isinstance(parent, Node)
    if not parent.active:
        # Another process may write: what is read here is what there was.
        used &= Permission.CONSISTENT_READ
        return used | Permission.CONSISTENT_READ if is_storage(parent) else used, Permission.ALL
    if role == "backing" and not parent.is_filter:
        used &= Permission.CONSISTENT_READ
        shared = Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED
        if edge.outlived or not parent.parents or _is_kept(parent, child):
            shared |= Permission.WRITE
    elif is_storage(parent):
        used |= Permission.CONSISTENT_READ
        if not parent.read_only:
            used |= _CHANGES
        else:
            used &= ~(_CHANGES | Permission.WRITE_UNCHANGED)
        shared &= ~_CHANGES
    else:
        used, shared = parent.driver_class.child_permissions(parent.options, role, used, shared)
    if edge.committed and not used & Permission.CONSISTENT_READ:
        shared |= _CHANGES
    if child.options.force_share:
        shared = Permission.ALL
    return used, shared


class InactiveChildError(BlockError):
    """An inactive node cannot be a part of an active one."""


def check_active_child(child: Node, role: str, parent: Node) -> None:
    """InactiveChildError: an active node makes free use of its children."""
    if parent.active and not child.active:
        raise InactiveChildError(
            f"Inactive '{child.name}' can't be a {role} child of active '{parent.name}'", errno=1
        )


def _is_kept(overlay: Node, backing: Node) -> bool:
    """Whether what a guest writes to ``backing`` is copied to ``overlay`` before it is lost there.

    So it is while ``overlay`` is the target of a ``copy-before-write`` node above ``backing``.
    """
    below = chain.skip_filters(backing)
    return any(
        edge.role == "target"
        and isinstance(edge.parent, Node)
        and edge.parent.driver_class.driver_name == "copy-before-write"
        and chain.skip_filters(edge.parent) is below
        for edge in overlay.parents
    )


def is_storage(parent: Node) -> bool:
    """Whether it keeps metadata in its file child; raw and filters do not."""
    return parent.driver_class.is_format and parent.driver_class.driver_name != "raw"


def check_no_writer(node: Node, *, apart_from: Collection[Node] = ()) -> None:
    """BlockError when a user of ``node`` writes: it cannot become read-only."""
    for edge in node.parents:
        if edge.parent not in apart_from and edge.used & WRITES:
            raise BlockError(
                f"Read-only block node '{node.name}' cannot support read-write users", errno=1
            )


def check(node: Node) -> None:
    """BlockError when two users of ``node`` conflict, or one writes to it though read-only."""
    edges = node.parents
    for edge in edges:
        if node.read_only and edge.used & WRITES:
            raise BlockError("Block node is read-only", errno=1)
    for edge in edges:
        for other in edges:
            if other is not edge and (conflict := edge.used & ~other.shared):
                raise BlockError(
                    f"Permission conflict on node '{node.name}': permissions "
                    f"'{describe(conflict)}' are both required by {_describe(edge)} "
                    f"and unshared by {_describe(other)}.",
                    errno=1,
                )


def _describe(edge: Edge) -> str:
    uses = f"(uses node '{edge.child.name}' as '{edge.role}' child)"
    if isinstance(edge.parent, Node):
        return f"node '{edge.parent.name}' {uses}"
    user = edge.parent.user
    if user is None:
        return f"an unnamed block device {uses}"
    return f"{user} {uses}"
