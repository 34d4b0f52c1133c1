"""The block graph of the daemon: which nodes there are, who uses them, and how they come and go.

Specification: qapi/block-core.json (blockdev-add, blockdev-del, block_resize).

Runs on the event loop. Invariants:

* Names are unique over nodes and drives. A node that nobody uses (no parent, not owned by the
  monitor, no job) is closed at once, parents before children.
* Permissions of all edges follow from the users at the top (``permissions``); a protocol node at
  the bottom holds the locks that belong to them before anything is written on their account.
* What changes the graph holds ``lock`` and, if requests can be under way, has drained the node.
* An operation that fails or is cancelled before its point of no return leaves all as it was.

Errors: BlockError in QEMU's words; OSError when flushing fails.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

from liveblockd.errors import BlockError
from liveblockd.events import BlockWriteThreshold, Publisher
from liveblockd.graph import chain, permissions
from liveblockd.graph.backend import Backend
from liveblockd.graph.lock import SurgeryLock
from liveblockd.graph.node import Edge, Node, Operation
from liveblockd.graph.opening import BackingMembers, Opener, check_node_name
from liveblockd.runtime.unbroken import to_its_end
from liveblockd.storage.driver import Permission
from liveblockd.storage.filters.throttle_group import ThrottleGroup
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import Environment

log = logging.getLogger(__name__)

#: bytes; the largest size QEMU knows, 2^63 - 1 rounded down to 1 GiB
MAX_LENGTH = 9223372035781033984
#: Python calls for a request: chains are read through a flat map, but a node that no map sees
#: through is asked, and asks what is below it. What is nested deeper than this gets EIO.
MAX_CALLS = 8000


class Graph:
    """One a daemon."""

    def __init__(self, environment: Environment) -> None:
        sys.setrecursionlimit(max(sys.getrecursionlimit(), MAX_CALLS))
        self.environment = environment
        self.publisher: Publisher = environment.publisher
        #: by name, oldest first
        self.nodes: dict[str, Node] = {}
        self.backends: list[Backend] = []
        #: the named backends by their id
        self.drives: dict[str, Backend] = {}
        #: of drives alone, by name; objects have others
        self.throttle_groups: dict[str, ThrottleGroup] = {}
        self.lock = SurgeryLock()
        #: nodes that a job has left writable, which become read-only soon; the call prevents that
        self.going_read_only: dict[Node, Callable[[], None]] = {}
        #: asked when requests are about to go on after a drain; what it returns is awaited first
        self.on_drained: Callable[[], Coroutine[Any, Any, None] | None] = lambda: None
        self._generated = 0
        self._failed_to_close = 0  # nodes, since the beginning

    # -- names

    def find(self, name: str) -> Node:
        """The node of that name; BlockError ``Failed to find node with node-name='x'``."""
        try:
            return self.nodes[name]
        except KeyError:
            raise BlockError(f"Failed to find node with node-name='{name}'", errno=2) from None

    def lookup(self, device: str | None, node_name: str | None) -> Node:
        """The node of a drive, or the node of a name; the drive goes first."""
        if device is not None and (drive := self.drives.get(device)) is not None:
            return drive.node
        if node_name is not None and (node := self.nodes.get(node_name)) is not None:
            return node
        raise BlockError(
            f"Cannot find device='{device or ''}' nor node-name='{node_name or ''}'", errno=2
        )

    def lookup_any(self, name: str) -> Node:
        """A drive or a node of that name, as most commands take ``device``."""
        return self.lookup(name, name)

    def lookup_root(self, name: str) -> Node:
        """As ``lookup_any``, of a node on which only drives and exports stand, and no job."""
        node = self.lookup_any(name)
        below = any(isinstance(e.parent, Node) or e.role != "root" for e in node.parents)
        if below or node.op_blockers:
            raise BlockError("Need a root block node")
        return node

    def generate_name(self) -> str:
        """A free ``#blockNNN``."""
        while True:
            name = f"#block{self._generated:03}"
            self._generated += 1
            if name not in self.nodes:
                return name

    def check_new_name(self, name: str) -> None:
        """BlockError if no node can be called that: not well formed, or taken."""
        check_node_name(name)
        if name in self.drives:
            raise BlockError(f"node-name={name} is conflicting with a device id")
        if name in self.nodes:
            raise BlockError(f"Duplicate nodes with node-name='{name}'")

    # -- nodes

    async def open(
        self,
        options: BlockdevOptions,
        *,
        monitor_owned: bool = True,
        probed: bool = False,
        backing_members: BackingMembers = None,
    ) -> Node:
        """Open a node with all that hangs on it (blockdev-add).

        The caller of an unowned node attaches to it, or calls ``unref``. ``backing_members`` are
        options for a backing node that is found by the header of the image. On an error
        everything that was opened is closed again.
        """
        if monitor_owned and options.node_name is None:
            raise BlockError("'node-name' must be specified for the root node")
        async with self.lock:
            node = await Opener(self).open(options, probed=probed, backing_members=backing_members)
            node.monitor_owned = monitor_owned
            return node

    async def delete(self, name: str) -> None:
        """blockdev-del: only a node that the monitor owns and nobody uses."""
        async with self.lock:
            node = self.find(name)
            if (node.job_filter and node.op_blockers) or any(
                isinstance(e.parent, Backend) and e.role == "root" for e in node.parents
            ):
                raise BlockError(f"Node {name} is in use", errno=16)
            node.check_operation(Operation.DELETE)
            if not node.monitor_owned:
                raise BlockError(f"Node {name} is not owned by the monitor")
            if node.parents:
                raise BlockError(f"Block device {name} is in use", errno=16)
            node.monitor_owned = False
            await self.unref(node)

    async def unref(self, node: Node) -> None:
        """Close ``node`` and what hangs on it, as far as nobody uses it.

        An error of closing cannot be undone and is logged: what a client was promised is durable
        was flushed when it was promised.
        """
        async with self.lock:
            await to_its_end(self._drop_unused([node]))

    async def _drop_unused(self, nodes: Iterable[Node]) -> None:
        pending = list(nodes)
        while pending:
            node = pending.pop()
            if node.used or self.nodes.get(node.name) is not node:
                continue
            del self.nodes[node.name]
            try:
                if node.opened:
                    await node.driver.close()
            except (OSError, BlockError) as error:
                log.error("closing node %s: %s", node.name, error)
                self._failed_to_close += 1
            except Exception:  # a bug in one driver must not leave the others open
                log.exception("closing node %s", node.name)
                self._failed_to_close += 1
            for edge in tuple(node.children.values()):
                child = edge.child
                self.disconnect(edge)
                pending.append(child)
                if child.used:
                    await self.refresh_permissions(child)

    async def close(self) -> int:
        """Flush and close all of it, top down; every node is tried, errors are logged.

        How many failed: of those, what was not flushed before may be lost.
        """
        before = self._failed_to_close
        async with self.lock:
            with self._nothing_held(self.backends):
                for backend in tuple(self.backends):
                    backend.quiesce()
                    await backend.idle()
            for backend in tuple(self.backends):
                await self.detach(backend)
            for node in self.nodes.values():
                node.monitor_owned = False
                node.op_blockers.clear()
            # Roots first; a node in use is closed with the last of its users.
            await self._drop_unused([n for n in self.nodes.values() if not n.parents])
            assert not self.nodes, self.nodes
        return self._failed_to_close - before

    # -- edges

    def connect(self, edge: Edge) -> None:
        """Put an edge of a node or backend in its place; its permissions are not looked at."""
        edge.child.parents.append(edge)
        if isinstance(edge.parent, Node):
            assert edge.role not in edge.parent.children
            edge.parent.children[edge.role] = edge
            if edge.parent.opened:
                edge.parent.driver.children[edge.role] = edge.child
                edge.parent.driver.restructured()

    def disconnect(self, edge: Edge) -> None:
        """Take an edge away."""
        edge.child.parents.remove(edge)
        if isinstance(edge.parent, Node):
            del edge.parent.children[edge.role]
            if edge.parent.opened:
                edge.parent.driver.children.pop(edge.role, None)
                edge.parent.driver.restructured()

    def redirect(self, edge: Edge, child: Node) -> None:
        """Let ``edge`` lead to ``child``; whoever stands above is quiesced."""
        edge.child.parents.remove(edge)
        edge.child = child
        child.parents.append(edge)
        if isinstance(edge.parent, Node):
            if edge.parent.opened:
                edge.parent.driver.children[edge.role] = child
                edge.parent.driver.restructured()
        else:
            edge.parent.rebind()

    async def refresh_permissions(self, *roots: Node) -> None:
        """Work out the permissions of all edges at and below ``roots``, and lock accordingly.

        BlockError for a conflict; then every edge and lock is as it was.
        """
        order = parents_first(roots)
        before = [(edge, edge.used, edge.shared) for node in order for edge in node.parents]
        locked: list[tuple[Node, tuple[Permission, Permission]]] = []
        try:
            for node in order:
                permissions.check(node)
                wanted = permissions.cumulative(node)
                for edge in node.children.values():
                    edge.used, edge.shared = permissions.of_child(edge, *wanted)
            # What is given up never fails, and may be what another node of ours waits for.
            changed = [n for n in order if n.opened and permissions.cumulative(n) != n.permissions]
            for node in changed:
                wanted = permissions.cumulative(node)
                locked.append((node, node.permissions))
                await node.driver.set_permissions(*wanted)
                node.permissions = wanted
                node.grants += bool(wanted[0] & permissions.WRITES)
        except BaseException:
            for edge, used, shared in before:
                edge.used, edge.shared = used, shared
            for node, held in reversed(locked):
                if node.permissions != held:
                    node.permissions = held
                    node.grants += bool(held[0] & permissions.WRITES)
                    await node.driver.set_permissions(*held)
            raise

    async def set_read_only(self, node: Node, read_only: bool, *, durable: bool = False) -> None:
        """Change ``node``, and the children that were opened as a part of it.

        Read-only: flushed before, locks given up after; ``durable``: all that its users have
        written is. BlockError or OSError: nothing changed. What cannot be is refused before a
        guest could notice.
        """
        if node.read_only == read_only:
            return
        async with self.lock:
            parts = [n for n in _own_parts(node) if n.read_only != read_only]
            if not read_only:
                if any(part.options.force_share for part in parts):
                    raise BlockError("force-share=on can only be used with read-only images")
                await self._set_read_only(node, parts, read_only)
                return
            for part in parts:
                permissions.check_no_writer(part, apart_from=parts)
            async with self.drained(node):
                await self._set_read_only(node, parts, read_only, durable=durable)

    async def reopen_for(self, node: Node, used: Permission) -> None:
        """Open ``node`` for writing if a user needs that and it was read-only of itself alone.

        An image on a file that nobody might write to then may be writable by now. BlockError.
        """
        if node.active and node.fell_back and used & permissions.WRITES:
            await self.set_read_only(node, False)

    async def _set_read_only(
        self, node: Node, parts: list[Node], read_only: bool, *, durable: bool = False
    ) -> None:
        done: list[Node] = []
        try:
            # Read-write from the bottom up, read-only from the top down.
            for part in parts if read_only else reversed(parts):
                if not read_only:
                    # The file has to be writable and locked before its format starts to write.
                    part.read_only = False
                    await self.refresh_permissions(part)
                if part.active:  # else when it becomes so
                    done.append(part)
                    driver = part.driver
                    await (driver.seal() if durable else driver.set_read_only(read_only))
                part.read_only = read_only
            await self.refresh_permissions(node)
        except BaseException:
            for part in reversed(done):
                if part.driver.read_only is read_only:
                    await part.driver.set_read_only(not read_only)
            for part in parts:
                part.read_only = not read_only
            await self.refresh_permissions(node)
            raise
        for part in parts:
            part.fell_back = False
            part.change_options(read_only=read_only)
        self.rebind_above(node)

    # -- users

    async def attach(
        self,
        node: Node,
        used: Permission = Permission.CONSISTENT_READ,
        shared: Permission = Permission.ALL,
        *,
        name: str = "",
        user: str | None = None,
        writethrough: bool = False,
        allow_inactive: bool = False,
    ) -> Backend:
        """A new user of ``node``; ``name`` makes it a drive, ``user`` is for messages.

        ``allow_inactive``: it may write, but can wait until the node is active.

        BlockError when its permissions conflict with those of others; then there is none.
        """
        async with self.lock:
            if name and (name in self.drives or name in self.nodes):
                raise BlockError(f"Device with id '{name}' already exists")
            await self.reopen_for(node, used)
            backend = Backend(self, node, name=name, user=user)
            backend.allow_inactive = allow_inactive
            backend.claim(used, shared)
            self.connect(backend.edge)
            try:
                await self.refresh_permissions(node)
            except BaseException:
                self.disconnect(backend.edge)
                raise
            backend.writethrough = writethrough
            backend.rebind()
            self.backends.append(backend)
            if name:
                self.drives[name] = backend
            return backend

    async def detach(self, backend: Backend) -> None:
        """End a user; it has no request in flight. Its node is closed if nobody else uses it."""
        async with self.lock:
            await to_its_end(self._detach(backend))

    async def _detach(self, backend: Backend) -> None:
        if backend not in self.backends:
            return
        backend.end()
        with self._nothing_held((backend,)):
            await backend.idle()
        self.backends.remove(backend)
        if self.drives.get(backend.name) is backend:
            del self.drives[backend.name]
        node = backend.node
        self.disconnect(backend.edge)
        if node.used:
            await self.refresh_permissions(node)
        else:
            await self._drop_unused([node])

    async def set_backend_permissions(
        self, backend: Backend, used: Permission, shared: Permission
    ) -> None:
        """Change what a user does; BlockError for a conflict, then nothing has changed."""
        async with self.lock:
            edge = backend.edge
            before = edge.used, edge.shared
            backend.claim(used, shared)
            try:
                await self.refresh_permissions(edge.child)
            except BaseException:
                edge.used, edge.shared = before
                raise
            backend.rebind()

    def users_above(self, node: Node) -> list[Backend]:
        """The backends whose tree includes ``node``."""
        found: dict[Backend, None] = {}
        seen: set[Node] = {node}
        pending = [node]
        while pending:
            for edge in pending.pop().parents:
                parent = edge.parent
                if isinstance(parent, Backend):
                    found[parent] = None
                elif parent not in seen:
                    seen.add(parent)
                    pending.append(parent)
        return list(found)

    def rebind_above(self, node: Node) -> None:
        """Tell the users above that size, permissions or options of ``node`` have changed."""
        for backend in self.users_above(node):
            backend.rebind()

    @asynccontextmanager
    async def drained(self, *nodes: Node) -> AsyncIterator[None]:
        """No request of any user above the nodes is in flight, and none starts, inside.

        Nests. A cancelled waiter lets the requests go on.
        """
        backends = list(dict.fromkeys(b for node in nodes for b in self.users_above(node)))
        for backend in backends:
            backend.quiesce()
        try:
            with self._nothing_held(backends):
                for backend in backends:
                    await backend.idle()
                yield
        finally:
            try:
                if (work := self.on_drained()) is not None:
                    await to_its_end(work)
            finally:
                for backend in backends:
                    backend.resume()

    @contextmanager
    def _nothing_held(self, backends: Iterable[Backend]) -> Iterator[None]:
        """Drivers that let requests wait (throttle) let those of these users go."""
        with self.nothing_held(*(backend.node for backend in backends)):
            yield

    @contextmanager
    def nothing_held(self, *nodes: Node) -> Iterator[None]:
        """Drivers that let requests wait let those go that come from ``nodes``."""
        holding = [
            node.driver
            for node in parents_first(nodes)
            if node.driver_class.holds_requests and node.opened
        ]
        for driver in holding:
            driver.drain_begin()
        try:
            yield
        finally:
            for driver in holding:
                driver.drain_end()

    def hold_up_nothing(self) -> None:
        """The daemon is to end: limits and breakpoints let go all requests, for good."""
        for backend in self.backends:
            backend.join(None)
        for node in self.nodes.values():
            if node.driver_class.holds_requests and node.opened:
                node.driver.drain_begin()

    def stop_waiting(self, *roots: Node) -> None:
        """Requests to nodes at and below ``roots`` that wait for a lost server fail now."""
        for node in parents_first(roots):
            if node.opened:
                node.driver.stop_waiting()

    def cut_off(self, node: Node, silence: float) -> None:
        """Nobody wants what is under way to ``node``: end it where a peer does not answer."""
        pending = [node]
        while pending:
            found = pending.pop()
            if found.opened:
                found.driver.stop_waiting(silence)
            pending += [e.child for role, e in found.children.items() if role != "backing"]

    # -- operations on one node

    async def resize(self, node: Node, size: int) -> None:
        """block_resize: durable on return; users see the new size at once."""
        if size < 0:
            raise BlockError("Parameter 'size' expects a >0 size")
        async with self.lock:
            node.check_operation(Operation.RESIZE)
            if size > MAX_LENGTH:
                raise BlockError(f"offset({size}) exceeds maximum({MAX_LENGTH})")
            for below in chain.stacked(node):
                for bitmap in below.bitmaps:
                    bitmap.check(read_only=below.read_only)
            user = await self.attach(node, Permission.RESIZE)
            try:
                async with self.drained(node):
                    await to_its_end(node.truncate(size))
            finally:
                await self.detach(user)

    async def grow(self, node: Node, size: int) -> None:
        """For a job that writes to ``node`` and may resize it; durable on return."""
        async with self.lock, self.drained(node):
            if size > node.driver.length:
                await to_its_end(node.truncate(size))

    def check_write_threshold(self, node: Node, end: int) -> None:
        """Publish BLOCK_WRITE_THRESHOLD, once, when a write ends beyond the threshold."""
        if node.write_threshold and end > node.write_threshold:
            threshold, node.write_threshold = node.write_threshold, 0
            self.publisher.publish(
                BlockWriteThreshold(
                    node_name=node.name,
                    amount_exceeded=end - threshold,
                    write_threshold=threshold,
                )
            )
            for edge in node.parents:
                if isinstance(edge.parent, Backend):
                    edge.parent.rebind()

    def environment_for(self, node: Node, filename: str) -> Environment:
        """What the driver of ``node`` is given."""
        return replace(
            self.environment,
            node_name=node.name,
            filename=filename,
            find_node=self.nodes.get,
            inactive=not node.active,
        )


def parents_first(roots: Iterable[Node]) -> list[Node]:
    """All nodes at and below ``roots``, each after all of its parents among them."""
    done: dict[Node, None] = {}
    # Explicit, since a chain may be deeper than Python's stack likes.
    stack: list[tuple[Node, bool]] = [(root, False) for root in roots]
    entered: set[Node] = set()
    while stack:
        node, left = stack.pop()
        if left:
            done[node] = None
        elif node not in entered:
            entered.add(node)
            stack.append((node, True))
            stack.extend((edge.child, False) for edge in node.children.values())
    return list(reversed(done))


def _own_parts(node: Node) -> list[Node]:
    """``node`` and the children below it that follow its read-only state, parents first."""
    found = [node]
    for part in found:
        for role, edge in part.children.items():
            child = edge.child
            follows = child.inherits and child.given.read_only is None
            if role != "backing" and (follows or child.fell_back):
                found.append(child)
    return found
