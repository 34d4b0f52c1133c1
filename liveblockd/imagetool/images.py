"""Opens images for one command, with the graph and the engine of the daemon, and the locks of QEMU.

Runs on an event loop of its own. Invariants: whatever was opened is flushed, closed and unlocked
when ``Images`` ends, also after an error. Errors: ``BlockError`` and ``OSError``, worded as
qemu-img does; ``ToolError`` carries an exit status of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Final, Self

from liveblockd.errors import BlockError, ConfigError
from liveblockd.events import Publisher
from liveblockd.graph import filenames
from liveblockd.graph.backend import Backend
from liveblockd.graph.graph import Graph
from liveblockd.graph.node import Node
from liveblockd.graph.opening import NO_FILE, Opener
from liveblockd.imagetool.output import warn
from liveblockd.keyval import nest, parse_keyval, parse_opts
from liveblockd.qapi import parse, parse_size
from liveblockd.qmp.commands.objects import ObjectOptions, ObjectRegistry
from liveblockd.runtime.workers import WorkerPool
from liveblockd.storage.driver import Permission
from liveblockd.storage.options import BlockdevOptions
from liveblockd.storage.registry import Environment, find_driver


class OptionText(str):
    """With ``--image-opts``: no file name, but ``driver=...,file.filename=...``."""

    __slots__ = ()


class ToolError(Exception):
    """One line for stderr and the exit status."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.message = message
        self.status = status


def reason(error: BlockError | OSError) -> str:
    """The words of an error."""
    if isinstance(error, BlockError):
        notes = getattr(error, "__notes__", [])
        return "\n".join([error.message, *notes])
    return error.strerror or str(error)


def size_of(text: str, what: str = "image size") -> int:
    """Bytes of ``64k``, ``1.5G``; ToolError."""
    size = parse_size(text)
    if size is None or size >= 1 << 63:
        raise ToolError(
            f"Invalid {what} specified. You may use k, M, G, T, P or E suffixes for\n"
            "kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes."
        )
    return size


_CACHE_MODES: Final = ("none", "off", "writeback", "writethrough", "directsync", "unsafe")


def check_cache_mode(mode: str | None, what: str = "cache") -> None:
    """ToolError for ``-t`` and ``-T`` with a mode that is none."""
    if mode is not None and mode not in _CACHE_MODES:
        raise ToolError(f"Invalid {what} option: {mode}")


def _given(filename: str) -> dict[str, Any]:
    """Members of blockdev-add that a name or the text of options stands for; BlockError."""
    if not isinstance(filename, OptionText):
        return filenames.protocol_options(filename)
    try:
        found: dict[str, Any] = nest(parse_opts(filename, "file"))
    except ConfigError as error:
        raise BlockError(str(error)) from None
    found = filenames.with_drivers(found)
    file = found.get("file")
    if isinstance(file, Mapping):
        found["file"] = {"driver": "file"} | dict(file)
    elif file is not None:
        raise BlockError(f"Cannot find device='{file}' nor node-name='{file}'")
    elif "driver" not in found or find_driver(str(found["driver"])).is_format:
        raise BlockError(NO_FILE)
    return found


def _not_opened(filename: str, error: BlockError | OSError) -> ToolError:
    text = reason(error)
    if isinstance(filename, OptionText):  # the words of QEMU's option strings, not of QMP
        text = re.sub(
            r"^Parameter '(.*)' is unexpected$",
            rf"Block format '{_driver_of(filename)}' does not support the option '\1'",
            text,
        )
    return ToolError(f"Could not open '{filename}': {text}")


def _driver_of(text: OptionText) -> str:
    return parse_opts(text, "file").get("driver", "raw")


class Images:
    """The images of one command; an async context manager."""

    def __init__(self, objects: Sequence[str] = ()) -> None:
        """``objects``: texts of ``--object``. Raises BlockError, ConfigError."""
        registry = ObjectRegistry()
        for text in objects:
            members = parse_keyval(text, "qom-type")
            registry.add(parse(ObjectOptions, members, keyval=True))
        self.workers = WorkerPool()
        self.graph = Graph(
            Environment(
                workers=self.workers,
                publisher=Publisher(),
                secret=registry.secret,
                throttle_group=registry.throttle_group,
            )
        )
        self._count = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            failed = await self.graph.close()
        finally:
            self.workers.close()
        if failed and kind is None:  # the log has said which
            raise ToolError("what was written may be lost")

    async def format_of(self, filename: str, *, force_share: bool = False) -> str:
        """The format that an image seems to have; ToolError when it cannot be read."""
        try:
            found = _given(filename)
            driver = str(found.get("driver", ""))
            if driver and (isinstance(filename, OptionText) or find_driver(driver).is_format):
                return driver
            whole = isinstance(filename, OptionText) or not driver
            file = found.get("file") if whole else found
            if file is None:
                raise BlockError(NO_FILE)
            if isinstance(file, Mapping):
                file = dict(file) | {"read-only": True, "force-share": force_share}
            return await Opener(self.graph).probe(file)
        except (BlockError, OSError) as error:
            raise _not_opened(filename, error) from error

    async def open(
        self,
        filename: str,
        image_format: str | None = None,
        *,
        writable: bool = False,
        backing: bool = True,
        force_share: bool = False,
        no_flush: bool = False,
        secrets: Mapping[str, str] | None = None,
    ) -> Node:
        """The node of an image, with its chain if ``backing``; ToolError.

        ``secrets``: options like ``encrypt.key-secret`` that unlock it.
        """
        probed = False
        if image_format is None:
            image_format = await self.format_of(filename, force_share=force_share)
            stated = _given(filename).get("driver")
            probed = image_format == "raw" and not (stated and find_driver(stated).is_format)
        try:
            members = self._members(
                filename, image_format, writable, backing=backing, force_share=force_share
            )
            members["cache"] = {"no-flush": no_flush}
            for name, secret in (secrets or {}).items():
                outer, _, inner = name.rpartition(".")
                (members.setdefault(outer, {}) if outer else members)[inner] = secret
            options = parse(BlockdevOptions, members, keyval=isinstance(filename, OptionText))
            node = await self.graph.open(options, probed=probed)
        except (BlockError, OSError) as error:
            raise _not_opened(filename, error) from error
        if probed and writable:
            warn(
                f"WARNING: nobody said the format of '{filename}', and it was taken for raw.\n"
                "         Writes to its first blocks that look like another format are refused.\n"
                "         Say -f raw to lift that."
            )
        return node

    async def look_at(
        self, filename: str, image_format: str | None = None, *, force_share: bool = False
    ) -> Node:
        """An image alone, to see what it says of itself: it is not unlocked. ToolError."""
        with self._inspecting():
            node = await self.open(filename, image_format, backing=False, force_share=force_share)
        node.without_chain = True
        return node

    @contextmanager
    def _inspecting(self) -> Iterator[None]:
        before = self.graph.environment
        self.graph.environment = replace(before, no_io=True)
        try:
            yield
        finally:
            self.graph.environment = before

    def _members(
        self, filename: str, image_format: str, writable: bool, *, backing: bool, force_share: bool
    ) -> dict[str, Any]:
        try:
            driver = find_driver(image_format)
        except BlockError:
            raise BlockError(f"Unknown driver '{image_format}'") from None
        self._count += 1
        members: dict[str, Any] = {
            "node-name": f"image{self._count}",
            "read-only": not writable,
            "force-share": force_share,
        }
        found = _given(filename)
        if isinstance(filename, OptionText):
            found.setdefault("driver", image_format)
            found.setdefault("discard", "unmap")
            members |= found
        elif "driver" not in found:  # json: without the format
            return {"driver": image_format} | found | members
        elif find_driver(str(found["driver"])).is_format or not driver.is_format:
            return found | members
        else:
            members |= {"driver": image_format, "file": found, "discard": "unmap"}
        if not backing and "backing" in driver.child_roles:
            members["backing"] = None
        return members

    async def open_file(
        self, filename: str, *, writable: bool = False, force_share: bool = False
    ) -> Node:
        """The protocol node alone, locked as a format above it would; ToolError."""
        self._count += 1
        members: dict[str, Any] = {
            "node-name": f"image{self._count}",
            "read-only": not writable,
            "force-share": force_share,
        }
        try:
            found = _given(filename)
            file = found.get("file", found)
            if not isinstance(file, Mapping):
                raise BlockError(NO_FILE)
            members |= file
            node = await self.graph.open(parse(BlockdevOptions, members))
            await self.use(node, writable=writable, exclusive=not force_share)
        except (BlockError, OSError) as error:
            raise _not_opened(filename, error) from error
        return node

    async def close(self, node: Node) -> None:
        """Flush and close a node and end its users."""
        for backend in tuple(self.graph.backends):
            if backend.node is node:
                await self.graph.detach(backend)
        await self.graph.delete(node.name)

    async def use(self, node: Node, *, writable: bool = False, exclusive: bool = False) -> Backend:
        """A user of ``node``; ``exclusive``: nobody else changes it. Raises BlockError."""
        used = Permission.CONSISTENT_READ
        if writable:
            used |= Permission.WRITE | Permission.RESIZE
        shared = Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED
        if not exclusive:
            shared = Permission.ALL
        return await self.graph.attach(node, used, shared, user=f"image '{node.filename}'")
