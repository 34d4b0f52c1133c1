"""Changes of an image in use that are no guest's: what the job ``amend`` does.

Specification: qapi/block-core.json, BlockdevAmendOptions. Runs on the event loop.
Invariant: the node stays while it is amended; what was done of it is durable, and a cancel comes
after it. Errors: BlockError in QEMU's words; OSError.
"""

from __future__ import annotations

from typing import Final, Protocol, cast

from liveblockd.errors import BlockError
from liveblockd.formats.luks_slots import LuksAmendment
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Node

_BLOCKER: Final = "block device is in use by block job: amend"


class Encrypted(Protocol):
    """Drivers whose passphrases can be changed."""

    async def amend_encryption(
        self, passphrase: bytes, amendment: LuksAmendment, *, force: bool = False
    ) -> None:
        """Durable on return."""


def check_amendable(node: Node, encryption: str) -> None:
    """BlockError unless the image has encryption of that format, which can be changed."""
    if not node.driver.encrypted:
        raise BlockError("image is not encrypted, can't amend")
    specific = (node.driver.format_specific() or {}).get("data", {})
    has = specific.get("encrypt", {}).get("format", node.driver_class.driver_name)
    if encryption != "luks":
        raise BlockError("Amend can't be used to change the qcow2 encryption format")
    if has != "luks":
        raise BlockError("Only LUKS encryption options can be amended for qcow2 with amend command")


async def amend_encryption(
    graph: Graph,
    node: Node,
    amendment: LuksAmendment,
    *,
    secret: str | None = None,
    force: bool = False,
) -> None:
    """``secret``: the object whose passphrase opens the image; without one, that of the node."""
    async with graph.lock:
        if graph.nodes.get(node.name) is not node:
            raise BlockError(f"Node '{node.name}' is gone", errno=2)
        node.op_blockers.append(_BLOCKER)
    try:
        passphrase = graph.environment.secret(secret or _secret_of(node))
        driver = cast(Encrypted, node.driver)
        await driver.amend_encryption(passphrase, amendment, force=force)
    finally:
        node.op_blockers.remove(_BLOCKER)
        await graph.unref(node)


def _secret_of(node: Node) -> str:
    options = node.options
    encrypt = getattr(options, "encrypt", None) or {}
    name = getattr(options, "key_secret", None) or encrypt.get("key-secret")
    if name is None:
        raise BlockError("Parameter 'secret' is required")
    return str(name)
