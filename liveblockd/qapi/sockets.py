"""Socket addresses of commands and options.

Specification: qapi/sockets.json: ``SocketAddress`` is flat (command line, blockdev-add),
``SocketAddressLegacy`` wraps its members in ``data`` (``nbd-server-start``).

Pure. Errors: BlockError in QEMU's words from ``parse``.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import ClassVar, Final, TypeAlias

from liveblockd.qapi import QapiModel, UInt16, UInt32

Models: TypeAlias = Mapping[str, type[QapiModel]]


class SocketAddressType(enum.StrEnum):
    """Families of addresses."""

    INET = "inet"
    UNIX = "unix"
    VSOCK = "vsock"
    FD = "fd"


class InetSocketAddress(QapiModel):
    """Host and port, IPv4 or IPv6."""

    host: str
    port: str
    numeric: bool = False
    to: UInt16 | None = None  # last port to try
    ipv4: bool | None = None
    ipv6: bool | None = None
    keep_alive: bool = False
    keep_alive_count: UInt32 | None = None
    keep_alive_idle: UInt32 | None = None  # seconds
    keep_alive_interval: UInt32 | None = None  # seconds
    mptcp: bool = False


class UnixSocketAddress(QapiModel):
    """A path, or a name in the abstract namespace."""

    path: str
    abstract: bool = False
    tight: bool = True


class VsockSocketAddress(QapiModel):
    """A port of a virtual machine; not served here."""

    cid: str
    port: str


class FdSocketAddress(QapiModel):
    """A listening socket the daemon was started with, by number."""

    str_: str


class SocketAddress(QapiModel):
    """The flat union."""

    qapi_tag: ClassVar[str] = "type"

    type: SocketAddressType

    @classmethod
    def qapi_variants(cls) -> Models:
        """Families by name."""
        return _FLAT

    def plain(self) -> PlainAddress:
        """The members of the family alone."""
        raise NotImplementedError


class _FlatInet(SocketAddress, InetSocketAddress):
    def plain(self) -> PlainAddress:
        return self


class _FlatUnix(SocketAddress, UnixSocketAddress):
    def plain(self) -> PlainAddress:
        return self


class _FlatVsock(SocketAddress, VsockSocketAddress):
    def plain(self) -> PlainAddress:
        return self


class _FlatFd(SocketAddress, FdSocketAddress):
    def plain(self) -> PlainAddress:
        return self


_FLAT: Final[Models] = {
    "inet": _FlatInet,
    "unix": _FlatUnix,
    "vsock": _FlatVsock,
    "fd": _FlatFd,
}


class SocketAddressLegacy(QapiModel):
    """The union with ``data``."""

    qapi_tag: ClassVar[str] = "type"

    type: SocketAddressType

    @classmethod
    def qapi_variants(cls) -> Models:
        """Families by name."""
        return _WRAPPED

    def plain(self) -> PlainAddress:
        """The members of the family."""
        raise NotImplementedError


class _WrappedInet(SocketAddressLegacy):
    data: InetSocketAddress

    def plain(self) -> PlainAddress:
        return self.data


class _WrappedUnix(SocketAddressLegacy):
    data: UnixSocketAddress

    def plain(self) -> PlainAddress:
        return self.data


class _WrappedVsock(SocketAddressLegacy):
    data: VsockSocketAddress

    def plain(self) -> PlainAddress:
        return self.data


class _WrappedFd(SocketAddressLegacy):
    data: FdSocketAddress

    def plain(self) -> PlainAddress:
        return self.data


_WRAPPED: Final[Models] = {
    "inet": _WrappedInet,
    "unix": _WrappedUnix,
    "vsock": _WrappedVsock,
    "fd": _WrappedFd,
}

PlainAddress = InetSocketAddress | UnixSocketAddress | VsockSocketAddress | FdSocketAddress
