"""Character devices made by commands: ``null`` and ring buffers (qapi/char.json).

A monitor is only ever where the command line put it; what can be added later is what a client
writes to and reads from itself. Other backends are refused by name.

Runs on the event loop; BlockError escapes.
"""

from __future__ import annotations

import base64
import binascii
import enum
from collections.abc import Mapping
from typing import ClassVar, Final, Literal, TypeAlias

from liveblockd.errors import BlockError
from liveblockd.qapi import QapiModel
from liveblockd.qmp.commands.chardev import (
    ChardevOptions,
    ChardevRegistry,
    NullChardev,
    RingbufChardev,
    chardev_registry,
)
from liveblockd.qmp.context import Context
from liveblockd.qmp.registry import command

Models: TypeAlias = Mapping[str, type[QapiModel]]


class ChardevCommon(QapiModel):
    """Members of every backend; there is no log."""

    logfile: str | None = None
    logappend: bool | None = None
    logtimestamp: bool | None = None


class ChardevRingbuf(ChardevCommon):
    """``size`` in bytes, a power of two."""

    size: int | None = None


class ChardevBackend(QapiModel):
    """What a chardev is, as a union with ``data``."""

    qapi_tag: ClassVar[str] = "type"
    type: str

    @classmethod
    def qapi_variants(cls) -> Models:
        """Those that can be added."""
        return _VARIANTS

    def options(self, name: str) -> ChardevOptions:
        """As ``--chardev`` gives them."""
        raise NotImplementedError


class _Null(ChardevBackend):
    data: ChardevCommon

    def options(self, name: str) -> ChardevOptions:
        return NullChardev(backend="null", id=name)


class _Ringbuf(ChardevBackend):
    data: ChardevRingbuf

    def options(self, name: str) -> ChardevOptions:
        return RingbufChardev(backend=self.type, id=name, size=self.data.size)


_VARIANTS: Final[Models] = {
    "null": _Null,
    "ringbuf": _Ringbuf,
    "memory": _Ringbuf,
}


class ChardevAdd(QapiModel):
    """Arguments of chardev-add and chardev-change."""

    id: str
    backend: ChardevBackend


class ChardevReturn(QapiModel):
    """``pty`` is the name of one; there are none."""

    pty: str | None = None


class ChardevId(QapiModel):
    """Which one."""

    id: str


class DataFormat(enum.StrEnum):
    """How bytes are written in JSON."""

    UTF8 = "utf8"
    BASE64 = "base64"


class RingbufWrite(QapiModel):
    """Arguments of ringbuf-write."""

    device: str
    data: str
    format: DataFormat = DataFormat.UTF8


class RingbufRead(QapiModel):
    """Arguments of ringbuf-read; ``size`` in bytes."""

    device: str
    size: int
    format: DataFormat = DataFormat.UTF8


@command("chardev-add", args=ChardevAdd, returns=ChardevReturn)
async def chardev_add(context: Context, arguments: ChardevAdd) -> ChardevReturn:
    """A new one, which nobody uses."""
    registry = chardev_registry(context)
    if arguments.id in registry.chardevs:
        raise BlockError(f"Chardev with id '{arguments.id}' already exists")
    _make(registry, arguments, "add")
    return ChardevReturn()


@command("chardev-change", args=ChardevAdd, returns=ChardevReturn)
async def chardev_change(context: Context, arguments: ChardevAdd) -> ChardevReturn:
    """Another one in place of one that nobody uses."""
    registry = chardev_registry(context)
    chardev = registry.chardevs.get(arguments.id)
    if chardev is None:
        raise BlockError(f"Chardev '{arguments.id}' does not exist")
    if chardev.used:
        raise BlockError("Chardev user does not support chardev hotswap")
    _make(registry, arguments, "change")
    return ChardevReturn()


def _make(registry: ChardevRegistry, arguments: ChardevAdd, verb: Literal["add", "change"]) -> None:
    name = arguments.id
    options = arguments.backend.options(name)
    try:
        options.check()
    except BlockError as error:
        raise BlockError(f"Failed to add chardev '{name}': {error.message}") from error
    if verb == "change":
        del registry.chardevs[name]
    registry.add(options)


@command("chardev-remove", args=ChardevId)
async def chardev_remove(context: Context, arguments: ChardevId) -> None:
    """Forget one that nobody uses."""
    registry = chardev_registry(context)
    chardev = registry.find(arguments.id)
    if chardev.used:
        raise BlockError(f"Chardev '{arguments.id}' is busy")
    del registry.chardevs[arguments.id]


@command("chardev-send-break", args=ChardevId)
async def chardev_send_break(context: Context, arguments: ChardevId) -> None:
    """No backend of ours has a break: nothing happens, as in QEMU."""
    chardev_registry(context).find(arguments.id)


@command("ringbuf-write", args=RingbufWrite)
async def ringbuf_write(context: Context, arguments: RingbufWrite) -> None:
    """Append; what is too much pushes out the oldest."""
    ring = chardev_registry(context).ring(arguments.device)
    if arguments.format is DataFormat.UTF8:
        ring.write(arguments.data.encode("utf-8", "surrogatepass"))
        return
    try:
        ring.write(base64.b64decode(arguments.data, validate=True))
    except binascii.Error:
        raise BlockError("Base64 data contains invalid characters") from None


@command("ringbuf-read", args=RingbufRead, returns=str)
async def ringbuf_read(context: Context, arguments: RingbufRead) -> str:
    """Take up to ``size`` bytes away, the oldest first."""
    ring = chardev_registry(context).ring(arguments.device)
    if arguments.size <= 0:
        raise BlockError("size must be greater than zero")
    data = ring.read(arguments.size)
    if arguments.format is DataFormat.BASE64:
        return base64.b64encode(data).decode()
    return data.decode("utf-8", "replace")
