"""Character devices: where monitors listen (QEMU qapi/char.json and the ``-chardev`` option).

A chardev is only a place; what speaks there is a monitor (``qmp/server.py``). They are kept in
``ChardevRegistry`` (``context.parts["chardevs"]``), which ``--chardev`` fills.

Runs on the event loop; BlockError escapes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from liveblockd.errors import BlockError
from liveblockd.qapi import QapiModel, parse
from liveblockd.qmp.context import Context
from liveblockd.qmp.registry import command

_ID: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")


class ChardevOptions(QapiModel):
    """``--chardev``; the members are those of QEMU's flat option."""

    qapi_tag: ClassVar[str] = "backend"
    backend: str
    id: str

    @classmethod
    def qapi_variants(cls) -> Mapping[str, type[QapiModel]]:
        """The backends there are."""
        return _BACKENDS

    @property
    def filename(self) -> str:
        """As query-chardev shows it."""
        return self.backend

    def check(self) -> None:
        """BlockError if the members do not go together."""


class SocketChardev(ChardevOptions):
    """A UNIX socket, a TCP port or an inherited descriptor; connecting unless ``server``."""

    path: str | None = None
    abstract: bool = False
    tight: bool = True
    host: str = ""
    port: str | None = None
    to: int | None = None
    ipv4: bool | None = None
    ipv6: bool | None = None
    fd: str | None = None
    server: bool = False
    wait: bool | None = None
    reconnect: int | None = None  # seconds between attempts to connect; 0: none
    reconnect_ms: int | None = None
    nodelay: bool = True
    delay: bool = False
    telnet: bool = False
    websocket: bool = False
    tls_creds: str | None = None
    mux: bool = False

    @property
    def waits(self) -> bool:
        """Whether the start waits for the first client, which is QEMU's default for servers."""
        return self.server and self.wait is not False

    @property
    def filename(self) -> str:
        """As query-chardev shows it."""
        server = ",server=on" if self.server else ""
        if self.fd is not None:
            return f"fd:{self.fd}{server}"
        if self.path is not None:
            return f"unix:{self.path}{server}"
        return f"tcp:{self.host}:{self.port}{server}"


class StdioChardev(ChardevOptions):
    """Standard input and output."""

    signal: bool = True
    mux: bool = False


class NullChardev(ChardevOptions):
    """Nobody."""

    mux: bool = False


#: bytes of a ring buffer by default, and at most
RING_SIZE: Final = 65536
LARGEST_RING: Final = 64 << 20


class RingbufChardev(ChardevOptions):
    """Bytes that clients write and read themselves; ``size`` in bytes, a power of two."""

    size: int | None = None
    mux: bool = False

    @property
    def filename(self) -> str:
        """As query-chardev shows it."""
        return "ringbuf"

    @property
    def ring_size(self) -> int:
        """Bytes."""
        return RING_SIZE if self.size is None else self.size

    def check(self) -> None:
        """The size is one."""
        if self.ring_size <= 0 or self.ring_size & (self.ring_size - 1):
            raise BlockError("size of ringbuf chardev must be power of two")
        if self.ring_size > LARGEST_RING:
            raise BlockError(f"size of ringbuf chardev must be at most {LARGEST_RING}")


class Ring:
    """The last ``size`` bytes that were written and not read."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._data = bytearray()

    def write(self, data: bytes) -> None:
        """Append, and forget the oldest where it is too much."""
        self._data += data
        del self._data[: max(0, len(self._data) - self._size)]

    def read(self, length: int) -> bytes:
        """Take up to so many bytes away."""
        found = bytes(self._data[:length])
        del self._data[:length]
        return found


_BACKENDS: Final[Mapping[str, type[QapiModel]]] = {
    "socket": SocketChardev,
    "stdio": StdioChardev,
    "null": NullChardev,
    "ringbuf": RingbufChardev,
    "memory": RingbufChardev,
}


def parse_chardev(value: Mapping[str, Any], *, keyval: bool = True) -> ChardevOptions:
    """The options of one chardev, checked; raises BlockError in QEMU's words."""
    backend = value.get("backend")
    if backend is not None and backend not in _BACKENDS:
        raise BlockError(f"'{backend}' is not a valid char driver name")
    if "id" not in value:
        raise BlockError("chardev: no id specified")
    options = parse(ChardevOptions, dict(value), keyval=keyval)
    if not _ID.fullmatch(options.id):
        raise BlockError("Parameter 'id' expects an identifier")
    options.check()
    if isinstance(options, SocketChardev):
        _check_socket(options)
    return options


def _check_socket(options: SocketChardev) -> None:
    given = [options.path is not None, options.port is not None, options.fd is not None]
    if sum(given) != 1:
        raise BlockError("A socket has one of 'path', 'host' with 'port', and 'fd'")
    for name, refused in (
        ("telnet", options.telnet),
        ("websocket", options.websocket),
        ("tls-creds", options.tls_creds is not None),
        ("mux", options.mux),
    ):
        if refused:
            raise BlockError(f"Parameter '{name}' is not supported for a monitor")
    if options.wait is not None and not options.server and options.fd is None:
        raise BlockError("'wait' option is incompatible with socket in client connect mode")
    if options.server and (options.reconnect or options.reconnect_ms):
        raise BlockError("'reconnect' option is incompatible with socket in server listen mode")
    if options.reconnect is not None and options.reconnect_ms is not None:
        raise BlockError("'reconnect' and 'reconnect-ms' are mutually exclusive")
    for name, number in (("reconnect", options.reconnect), ("reconnect-ms", options.reconnect_ms)):
        if number is not None and number < 0:
            raise BlockError(f"Parameter '{name}' expects a non-negative value")


@dataclass(slots=True)
class Chardev:
    """One chardev; ``is_open`` tells whether somebody is at the other end."""

    options: ChardevOptions
    where: str = ""  # its option, for messages
    used: bool = False
    is_open: Callable[[], bool] = field(default=lambda: False)
    #: of a ring buffer
    ring: Ring | None = None


class ChardevRegistry:
    """The chardevs of the daemon by id, in the order they were added."""

    def __init__(self) -> None:
        self.chardevs: dict[str, Chardev] = {}

    def add(self, options: ChardevOptions, where: str = "") -> Chardev:
        """A new chardev, which the option ``where`` asked for."""
        if options.id in self.chardevs:
            raise BlockError(f"Chardev with id '{options.id}' already exists")
        chardev = self.chardevs[options.id] = Chardev(options, where)
        if isinstance(options, RingbufChardev):
            chardev.ring = Ring(options.ring_size)
        return chardev

    def find(self, name: str) -> Chardev:
        """The chardev of that name."""
        chardev = self.chardevs.get(name)
        if chardev is None:
            raise BlockError(f"Chardev '{name}' not found")
        return chardev

    def ring(self, name: str) -> Ring:
        """The ring buffer of that name."""
        chardev = self.chardevs.get(name)
        if chardev is None:
            raise BlockError(f"Device '{name}' not found")
        if chardev.ring is None:
            raise BlockError(f"{name} is not a ringbuf device")
        return chardev.ring

    def take(self, name: str) -> Chardev:
        """The chardev for a monitor, which nobody else has."""
        chardev = self.chardevs.get(name)
        if chardev is None:
            raise BlockError(f'chardev "{name}" not found')
        if chardev.used:
            raise BlockError(f"Device '{name}' is in use")
        if chardev.ring is not None:
            raise BlockError(f"Device '{name}' is a ring buffer: no monitor can be there")
        chardev.used = True
        return chardev


def chardev_registry(context: Context) -> ChardevRegistry:
    """The registry of this daemon."""
    found = context.parts.setdefault("chardevs", ChardevRegistry())
    assert isinstance(found, ChardevRegistry)
    return found


class ChardevInfo(QapiModel):
    """What query-chardev tells of one."""

    label: str
    filename: str
    frontend_open: bool


class ChardevBackendInfo(QapiModel):
    """A kind of chardev."""

    name: str


@command("query-chardev", returns=list[ChardevInfo], query=True)
async def query_chardev(context: Context, arguments: object) -> list[ChardevInfo]:  # noqa: ARG001
    """All chardevs, newest first as QEMU lists them."""
    chardevs = reversed(chardev_registry(context).chardevs.values())
    return [
        ChardevInfo(
            label=chardev.options.id,
            filename=("" if chardev.is_open() or not isinstance(chardev.options, SocketChardev)
                      else "disconnected:") + chardev.options.filename,
            frontend_open=chardev.used,
        )
        for chardev in chardevs
    ]  # fmt: skip


@command("query-chardev-backends", returns=list[ChardevBackendInfo], query=True)
async def query_chardev_backends(
    context: Context,  # noqa: ARG001
    arguments: object,  # noqa: ARG001
) -> list[ChardevBackendInfo]:
    """The kinds there are."""
    return [ChardevBackendInfo(name=name) for name in _BACKENDS]
