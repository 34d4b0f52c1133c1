"""Names of NBD exports: ``nbd://HOST:PORT/EXPORT``, ``nbd+unix:///EXPORT?socket=PATH``, and older.

Specification: the NBD URI specification (doc/uri.md), QEMU's ``nbd:HOST:PORT:exportname=EXPORT``.

Pure. Errors: ValueError for a name that cannot be understood.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

DEFAULT_PORT: Final = "10809"
_EXPORT_NAME: Final = ":exportname="


def to_url(server: Mapping[str, Any], export: str | None) -> str | None:
    """The name as QEMU shows it; None for an address that has none."""
    path = f"/{export}" if export else ""
    match server.get("type"):
        case "unix":
            return f"nbd+unix://{path}?socket={server['path']}"
        case "inet":
            host = str(server["host"])
            shown = f"[{host}]" if ":" in host else host
            return f"nbd://{shown}:{server['port']}{path}"
    return None


def from_name(name: str) -> dict[str, Any]:
    """The members ``server`` and ``export`` of blockdev-add."""
    scheme, _, rest = name.partition(":")
    if scheme == "nbd" and not rest.startswith("//"):
        return _from_old(rest)
    if scheme not in ("nbd", "nbd+tcp", "nbd+unix"):
        raise ValueError(f"unknown scheme '{scheme}'")
    parts = urlsplit(name)
    export = unquote(parts.path.removeprefix("/"))
    found: dict[str, Any]
    if scheme == "nbd+unix":
        sockets = parse_qs(parts.query).get("socket", [])
        if parts.netloc or len(sockets) != 1:
            raise ValueError("nbd+unix: takes a socket and no host")
        found = {"server": {"type": "unix", "path": sockets[0]}}
    else:
        if parts.query or not parts.hostname:
            raise ValueError("nbd: takes a host and no query")
        port = str(parts.port or DEFAULT_PORT)
        found = {"server": {"type": "inet", "host": parts.hostname, "port": port}}
    return found | ({"export": export} if export else {})


def _from_old(rest: str) -> dict[str, Any]:
    address, found_name, export = rest.partition(_EXPORT_NAME)
    kind, _, path = address.partition(":")
    found: dict[str, Any]
    if kind == "unix":
        found = {"server": {"type": "unix", "path": path}}
    else:
        host, _, port = address.rpartition(":")
        if not host or not port:
            raise ValueError("no host and port")
        host = host.removeprefix("[").removesuffix("]")
        found = {"server": {"type": "inet", "host": host, "port": port}}
    return found | ({"export": export} if found_name else {})
