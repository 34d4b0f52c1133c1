"""Opening a node: its children first, its permissions before its driver, its backing chain last.

Specification: qapi/block-core.json (BlockdevOptions); what children inherit follows QEMU.

* ``file`` children given inline follow the parent: read-only, cache, force-share.
* A backing node is read-only unless its options say otherwise. Without options the header of the
  image names it, and in turn its own: the chain is opened link by link, not recursively.
* The locks of a file are taken before its format driver sees it.

Runs on the event loop, under the graph's lock. Invariant: ``open`` either returns a node with all
that it needs, or has closed everything it opened, also when cancelled.

Errors: BlockError in QEMU's words.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from liveblockd.errors import BlockError
from liveblockd.formats.probe import PROBE_BYTES, probe_format
from liveblockd.graph import chain, filenames
from liveblockd.graph.node import Edge, Node
from liveblockd.graph.permissions import check_active_child
from liveblockd.qapi import parse
from liveblockd.runtime.unbroken import to_its_end
from liveblockd.storage.driver import BlockDriver, BlockIO
from liveblockd.storage.options import (
    BlockdevCacheOptions,
    BlockdevDetectZeroesOptions,
    BlockdevDiscardOptions,
    BlockdevOptions,
)
from liveblockd.storage.registry import find_driver

if TYPE_CHECKING:
    from liveblockd.graph.graph import Graph

#: options for the backing node that the header names; text values are those of a command line
BackingMembers: TypeAlias = Mapping[str, Any] | None

#: images in one chain; each costs a descriptor. Requests do not pass through them one by one.
MAX_DEPTH: Final = 1000
#: what an image without its file is answered with
NO_FILE: Final = 'A block device must be specified for "file"'
#: nodes that one image may bring with it: a ``json:`` name may hide a chain in a file child, which
#: may lead to the same image again, and every look at a format opens nodes
MAX_NODES: Final = 4 * MAX_DEPTH
#: nodes within nodes, through file children and backing options (not the links that headers name)
MAX_NESTING: Final = 64
PREFIX: Final = "Could not open backing file: "

log = logging.getLogger(__name__)

_NAME: Final = re.compile(r"[a-zA-Z][a-zA-Z0-9._-]*", re.ASCII)
_MAX_NAME: Final = 31  # bytes


def check_node_name(name: str) -> None:
    """BlockError unless it is well formed: a letter, then letters, digits, ``-``, ``.``, ``_``."""
    if not _NAME.fullmatch(name):
        raise BlockError(f"Invalid node-name: '{name}'")
    if len(name) > _MAX_NAME:
        raise BlockError("Node name too long")


def inherited(given: BlockdevOptions, parent: Node | None, role: str) -> BlockdevOptions:
    """The options in effect: what was given, and else what comes from the parent."""
    if parent is None:
        return given
    above = parent.options
    cache, upper = given.cache, above.cache
    direct = cache.direct if cache else None
    no_flush = cache.no_flush if cache else None
    found: dict[str, Any] = {
        "cache": BlockdevCacheOptions.model_construct(
            direct=direct if direct is not None else bool(upper and upper.direct),
            no_flush=no_flush if no_flush is not None else bool(upper and upper.no_flush),
        ),
        "force_share": given.force_share if given.force_share is not None else above.force_share,
    }
    backing = role == "backing"
    if given.read_only is None:
        found["read_only"] = True if backing else parent.read_only
    if given.auto_read_only is None and not backing:
        found["auto_read_only"] = above.auto_read_only
    if given.discard is None:
        # A format decides itself what it lets go of, so its file may always unmap.
        found["discard"] = above.discard if backing else BlockdevDiscardOptions.UNMAP
    return given.model_copy(update=found)


def check_depth(overlay: Node, backing: Node) -> None:
    """BlockError if the chain would have more than ``MAX_DEPTH`` images."""
    least = len(chain.chain(backing))
    above, layers = 0, {overlay}
    while layers:
        above += 1
        if above + least > MAX_DEPTH:
            raise ChainError(f"the backing chain is deeper than {MAX_DEPTH} images")
        # A target of a job may stand on the chain that the job's filter is a part of: each once.
        layers = {
            edge.parent
            for layer in layers
            for edge in layer.parents
            if isinstance(edge.parent, Node) and (edge.role == "backing" or edge.parent.is_filter)
        }


class _Budget:
    """How much one call of ``Graph.open`` may still do, looks at formats included."""

    def __init__(self) -> None:
        self.nodes = MAX_NODES
        self.nesting = 0

    def enter(self) -> None:
        """A node is opened within another; ``leave`` when that is done."""
        if self.nesting >= MAX_NESTING:
            raise ChainError(f"block nodes are nested more than {MAX_NESTING} deep")
        self.nesting += 1

    def leave(self) -> None:
        self.nesting -= 1

    def take_node(self) -> None:
        """One more node, whether it stays or not."""
        if not self.nodes:
            raise ChainError(f"the images refer to more than {MAX_NODES} block nodes")
        self.nodes -= 1


class Opener:
    """One call of ``Graph.open``: it remembers what it made, to undo it."""

    def __init__(self, graph: Graph, budget: _Budget | None = None) -> None:
        self.graph = graph
        self.made: list[Node] = []
        self._budget = budget or _Budget()

    async def open(
        self, options: BlockdevOptions, *, probed: bool, backing_members: BackingMembers
    ) -> Node:
        """The node, its children and its whole backing chain."""
        try:
            node = await self._open_with_chain(options, None, "", backing_members)
            node.probed = probed
            return node
        except BaseException:
            await to_its_end(self._undo())
            raise

    async def _undo(self) -> None:
        # Parents were made before their children, and a driver closes with its children in place.
        for node in self.made:
            if not node.opened:
                continue
            try:
                await node.driver.close()
            except (OSError, BlockError) as error:  # nothing was written through it yet
                log.info("closing node %s: %s", node.name, error)
            except Exception:  # a bug in one driver must not leave the others open
                log.exception("closing node %s", node.name)
        left: list[Node] = []
        for node in reversed(self.made):
            for edge in tuple(node.children.values()):
                self.graph.disconnect(edge)
                if edge.child not in self.made:
                    left.append(edge.child)
        for node in self.made:
            self.graph.nodes.pop(node.name, None)
        for child in left:
            await self.graph.refresh_permissions(child)

    async def _open_with_chain(
        self, options: BlockdevOptions, parent: Node | None, role: str, members: BackingMembers
    ) -> Node:
        """A node and its backing chain; the links that headers name are followed in a loop."""
        self._budget.enter()
        try:
            return await self._open_chain(options, parent, role, members)
        finally:
            self._budget.leave()

    async def _open_chain(
        self, options: BlockdevOptions, parent: Node | None, role: str, members: BackingMembers
    ) -> Node:
        top = node = await self._open_one(options, parent, role)
        links: list[tuple[Node, str, Node]] = []
        seen = [_identity(top)]
        try:
            while True:
                child = await self._explicit_backing(node, members)
                if child is not None or (written := self._implied(node, members)) is None:
                    break
                child_options, members = await self._implied_options(node, written, members)
                child = await self._open_one(child_options, node, "backing")
                if (identity := _identity(child)) is not None and identity in seen:
                    raise ChainError(f"the backing chain of '{_shown(top)}' has a loop")
                seen.append(identity)
                await self._connect(node, "backing", child)
                links.append((node, written, child))
                node = child
        except ChainError as error:
            raise BlockError(f"{PREFIX}{error.message}", errno=error.errno) from error
        except BlockError as error:
            raise BlockError(
                PREFIX * (len(links) + 1) + error.message, errno=error.errno
            ) from error
        known: filenames.Known = {}
        for above, written, below in reversed(links):
            above.implied_backing = (written, filenames.filename(below, known))
        return top

    async def _open_one(self, given: BlockdevOptions, parent: Node | None, role: str) -> Node:
        """A node with all its children but the backing node."""
        graph = self.graph
        self._budget.take_node()
        driver_class = find_driver(given.driver)
        options = inherited(given, parent, role)
        name = given.node_name
        if name is None:
            name = graph.generate_name()
        else:
            graph.check_new_name(name)
        if options.force_share and not options.read_only:
            raise BlockError("force-share=on can only be used with read-only images")
        if (
            options.detect_zeroes is BlockdevDetectZeroesOptions.UNMAP
            and options.discard is not BlockdevDiscardOptions.UNMAP
        ):
            raise BlockError(
                "setting detect-zeroes to unmap is not allowed "
                "without setting discard operation to unmap"
            )
        node = Node(name, driver_class, options, given=given, read_only=bool(options.read_only))
        node.inherits = parent is not None
        # What is opened as a part of an inactive node is inactive, whatever it says of itself.
        node.active = options.active is not False and (parent is None or parent.active)
        if parent is not None:
            check_active_child(node, role, parent)
        graph.nodes[name] = node
        self.made.append(node)
        for child_role, reference in driver_class.child_references(given):
            if isinstance(reference, str):
                child = graph.lookup_any(reference)
                check_active_child(child, child_role, node)
            else:
                child = await self._open_with_chain(reference, node, child_role, None)
            graph.connect(Edge(node, child_role, child))
        graph.nodes[name] = graph.nodes.pop(name)  # listed as QEMU does: after its children
        file = node.file
        if options.auto_read_only and file is not None and file.read_only:
            node.read_only = True
            node.change_options(read_only=True)
        await graph.refresh_permissions(node)
        await self._open_named_children(node)
        node.bind(await open_driver(graph, node))
        node.fell_back = node.read_only and not options.read_only
        await graph.refresh_permissions(node)
        return node

    async def _open_named_children(self, node: Node) -> None:
        """Those that the header of ``node`` names and the options do not give."""
        if not node.driver_class.is_format:
            return
        children = {role: edge.child for role, edge in node.children.items()}
        for role, written in (await node.driver_class.named_children(children)).items():
            self.graph.connect(Edge(node, role, await self._open_named(node, role, written)))
            await self.graph.refresh_permissions(node)

    async def _open_named(self, node: Node, role: str, written: str) -> Node:
        """The protocol node that the header of ``node`` names.

        A relative name is seen from the directory of the image. If there is no data file: as it is
        written, which is how QEMU takes it.
        """
        name = filenames.full_backing_filename(node, written)
        data_file = role == "data-file" and not filenames.has_protocol(written)
        if data_file and not os.path.exists(name):  # noqa: ASYNC240
            name = written
        options = parse(BlockdevOptions, filenames.protocol_options(name))
        return await self._open_with_chain(options, node, role, None)

    async def _connect(self, parent: Node, role: str, child: Node) -> None:
        check_depth(parent, child)
        edge = Edge(parent, role, child)
        self.graph.connect(edge)
        try:
            await self.graph.refresh_permissions(parent)
        except BaseException:
            self.graph.disconnect(edge)
            raise

    # -- the backing node

    async def _explicit_backing(self, node: Node, members: BackingMembers) -> Node | None:
        """Connect the backing node that the options give; None if they leave it to the header."""
        if not node.supports_backing or "backing" not in node.given.model_fields_set:
            return None
        reference = getattr(node.given, "backing", None)
        if not reference:  # null or the empty string
            return None
        if isinstance(reference, str):
            child = self.graph.lookup_any(reference)
            check_active_child(child, "backing", node)
        else:
            child = await self._open_with_chain(reference, node, "backing", members)
        await self._connect(node, "backing", child)
        return child

    def _implied(self, node: Node, members: BackingMembers) -> str | None:
        """The backing string that is to be followed; "" if the options alone say what to open."""
        if not node.supports_backing or "backing" in node.given.model_fields_set:
            return None
        return node.driver.backing_file or ("" if members and "file" in members else None)

    async def _implied_options(
        self, node: Node, written: str, members: BackingMembers
    ) -> tuple[BlockdevOptions, BackingMembers]:
        """The options of the backing node that the header names, and those of the one below it."""
        spec = dict(members or {})
        below = spec.get("backing")
        if isinstance(below, Mapping):
            del spec["backing"]
        else:
            below = None
        file = spec.get("file")
        if isinstance(file, str):
            spec["file"] = filenames.protocol_options(file)
        elif file is not None and ("filename" in file or file.get("driver", "file") != "file"):
            spec["file"] = {"driver": "file"} | dict(file)
        else:
            named = filenames.protocol_options(filenames.full_backing_filename(node, written))
            # json: describes the image as a whole, be it without its format
            if "driver" not in named or find_driver(str(named["driver"])).is_format:
                spec = named | spec
            else:
                spec["file"] = named | dict(file or {})
        if "driver" not in spec:
            stated = node.driver.backing_format if written else None
            if not stated and "file" not in spec:
                raise BlockError(NO_FILE)
            spec["driver"] = stated or await self.probe(spec["file"])
        driver = find_driver(spec["driver"])
        if not driver.is_format and not driver.is_filter and "file" in spec:
            # The header says "file" or the like: the protocol node is the image.
            own = {k: v for k, v in spec.items() if k not in ("file", "driver")}
            spec = dict(spec["file"]) | own
        return parse(BlockdevOptions, spec, keyval=True), below

    async def image_members(self, name: str, stated: str | None) -> tuple[dict[str, Any], bool]:
        """Members of blockdev-add for the image that a name stands for, and whether it was probed.

        ``stated``: its format, unless a json: name says it; None: look for it. Raises BlockError.
        """
        members = filenames.protocol_options(name)
        if "driver" in members and not find_driver(str(members["driver"])).is_format:
            if stated == members["driver"]:
                return members, False  # format=nbd and the like: the protocol node is the image
            if stated in ("file", "host_device") and not name.startswith("json:"):
                return {"driver": stated, "filename": name}, False  # whatever else it looks like
            members = {"file": members}
        probed = stated is None and "driver" not in members
        if "driver" not in members:
            if "file" not in members:
                raise BlockError("Must specify either driver or file")
            members["driver"] = stated or await self.probe(members["file"])
        return members, probed

    async def probe(self, file: Any) -> str:
        """The format that the first bytes of ``file`` (members of blockdev-add) suggest."""
        if isinstance(file, str):
            return await probe_node(self.graph.lookup_any(file))
        if not isinstance(file, Mapping):  # of a json: name
            raise BlockError("Invalid parameter type for 'file', expected: BlockdevRef")
        options = parse(BlockdevOptions, dict(file), keyval=True)
        if options.read_only is None:
            options = options.model_copy(update={"read_only": True})
        if options.node_name is not None:
            options = options.model_copy(update={"node_name": None})
        inner = Opener(self.graph, self._budget)
        try:
            node = await inner._open_with_chain(options, None, "", None)
            return await probe_node(node)
        finally:
            await to_its_end(inner._undo())


async def open_driver(graph: Graph, node: Node) -> BlockDriver:
    """The driver of ``node``, on the children that it has; BlockError."""
    children: dict[str, BlockIO] = {role: edge.child for role, edge in node.children.items()}
    environment = graph.environment_for(node, filenames.base_for_relative(node) or "")
    driver: BlockDriver = await node.driver_class.open(node.options, children, environment)  # type: ignore[attr-defined]
    return driver


async def probe_node(node: Node) -> str:
    """The name of the format that the first bytes of a protocol node suggest."""
    head = await node.read(0, min(PROBE_BYTES, node.length))
    return probe_format(bytes(head))


class ChainError(BlockError):
    """The chain as a whole is at fault: said once, not once a link."""


def _shown(node: Node) -> str:
    return filenames.base_for_relative(node) or node.name


def _identity(node: Node) -> str | None:
    """What file this is, to notice a loop."""
    name = filenames.base_for_relative(node)
    return None if name is None else os.path.realpath(name)
