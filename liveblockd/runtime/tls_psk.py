"""TLS by keys that both ends know already (``tls-creds-psk``).

Specification: RFC 4279, RFC 5489; QEMU's TLS setup (docs/system/tls) for ``keys.psk``, as
``psktool`` writes it: lines of a user's name, a colon and the key in hexadecimal digits. Python has
what it takes since 3.13.

Runs on the event loop, which it holds for the reading of a small file, on a server for every client
who comes. Invariant: nobody is let in by no key, or an empty one. TLS 1.2 alone: with 1.3, Python's
keys have no forward secrecy that the peer could not switch off. Errors: BlockError.
"""

from __future__ import annotations

import binascii
import logging
import ssl
from dataclasses import dataclass
from typing import Any, Final

from liveblockd.errors import BlockError
from liveblockd.runtime.tls import TlsCredentials, path_in
from liveblockd.runtime.tls_priority import Kind, apply_priority

log = logging.getLogger(__name__)

KEYS: Final = "keys.psk"
_DEFAULT_USER: Final = "qemu"


@dataclass(frozen=True, slots=True)
class PskFile:
    """What a ``tls-creds-psk`` object says."""

    directory: str | None
    server: bool
    #: of a client
    username: str | None = None
    #: as GnuTLS writes it
    priority: str | None = None


def load_psk(given: PskFile) -> TlsCredentials:
    """Look for the keys; BlockError when there are none, or this Python cannot use them."""
    if given.directory is None:
        raise BlockError("Missing 'dir' property value")
    if given.server and given.username is not None:
        raise BlockError("username should not be set when endpoint=server")
    path = path_in(given.directory, KEYS, needed=True)
    assert path is not None
    if not given.server:
        find_key(path, given.username or _DEFAULT_USER)
    if not (getattr(ssl, "HAS_PSK", False) and ssl.HAS_ECDH):
        raise BlockError("tls-creds-psk needs Python 3.13 or later; tls-creds-x509 does not")
    context = _context(path, given)
    return TlsCredentials(context, context, given.server)


def _context(path: str, given: PskFile) -> ssl.SSLContext:
    # Any: what only newer Pythons have
    context: Any
    if given.server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

        def key_of(identity: str | None) -> bytes:
            try:
                return find_key(path, identity or "")
            except BlockError as error:
                log.info("TLS: %s", error.message)
                return b""

        context.set_psk_server_callback(key_of)
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # there are no certificates: the key says who it is
        user = given.username or _DEFAULT_USER

        def own_key(_hint: str | None) -> tuple[str, bytes]:
            return user, find_key(path, user)

        context.set_psk_client_callback(own_key)
    apply_priority(context, given.priority, Kind.PSK)
    found: ssl.SSLContext = context
    return found


def find_key(path: str, user: str) -> bytes:
    """The key of ``user``; BlockError when there is none that can be used."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise BlockError.from_os_error(f"Cannot read PSK file {path}", error) from error
    for line in lines:
        name, colon, digits = line.partition(":")
        if colon and name == user and user:
            try:
                key = binascii.unhexlify(digits.strip())
            except (ValueError, binascii.Error):
                key = b""
            if not key:
                raise BlockError(f"The key of {user} in PSK file {path} is not hexadecimal")
            return key
    raise BlockError(f"Username {user} not found in PSK file {path}")
