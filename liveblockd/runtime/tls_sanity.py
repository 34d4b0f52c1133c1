"""``sanity-check`` of certificates: whether a peer could ever accept them, before one comes.

Specification: RFC 5280; the texts are QEMU's (crypto/tlscredsx509). A handshake with ourselves, in
memory, in which the far end looks at our certificate as a peer would: dates, purpose, signature.

Runs on the event loop, for a few milliseconds. Errors: BlockError.
"""

from __future__ import annotations

import logging
import ssl
import time
from typing import Final, NamedTuple

from liveblockd.errors import BlockError

# X509_V_ERR_*
_NOT_YET_VALID: Final = 9
_EXPIRED: Final = 10
_PURPOSE: Final = 26
#: in DER: the object identifier 2.5.29.37, and TRUE for critical
_CRITICAL_USAGE: Final = b"\x06\x03\x55\x1d\x25\x01\x01\xff"

log = logging.getLogger(__name__)


class OwnCertificate(NamedTuple):
    """The files of one end."""

    certificate: str
    key: str
    password: bytes | None

    def load(self, context: ssl.SSLContext) -> None:
        """Let ``context`` show it; raises SSLError, OSError."""
        # A function: with a value that is None the terminal would be asked.
        context.load_cert_chain(self.certificate, self.key, lambda: self.password or b"")


def check_certificates(authority: str, own: OwnCertificate | None, *, server: bool) -> None:
    """Files that could be read; BlockError when they are of no use."""
    _check_authorities(authority)
    if own is None:
        return
    name, end = own.certificate, "server" if server else "client"
    try:
        _handshake(authority, own, server=server)
    except ssl.SSLCertVerificationError as error:
        if error.verify_code == _EXPIRED:
            raise BlockError(f"The {end} certificate {name} has expired") from None
        if error.verify_code == _NOT_YET_VALID:
            raise BlockError(f"The {end} certificate {name} is not yet active") from None
        if error.verify_code == _PURPOSE:
            purpose = f"Certificate {name} purpose does not allow use with a TLS {end}"
            if _insists_on_purpose(name):
                raise BlockError(purpose) from None
            log.warning("%s, which not all peers mind", purpose)
            return
        raise BlockError(
            f"Our own certificate {name} failed validation against {authority}: "
            f"{error.verify_message}"
        ) from None
    except ssl.SSLError as error:
        raise BlockError(f"Our own certificate {name} cannot be used: {error.reason}") from error


def _check_authorities(authority: str) -> None:
    """One that is valid now is enough: an old one may stand beside its successor."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(authority)
    found, now = context.get_ca_certs(), time.time()
    if not found:
        raise BlockError(f"The certificate {authority} basic constraints show CA:FALSE")
    if all(ssl.cert_time_to_seconds(str(one["notAfter"])) < now for one in found):
        raise BlockError(f"The CA certificate {authority} has expired")
    if all(ssl.cert_time_to_seconds(str(one["notBefore"])) > now for one in found):
        raise BlockError(f"The CA certificate {authority} is not yet active")


def _insists_on_purpose(certificate: str) -> bool:
    """Whether its extended key usage is a critical extension."""
    with open(certificate, encoding="ascii", errors="replace") as file:
        _, begin, rest = file.read().partition(ssl.PEM_HEADER)
    one, end, _ = rest.partition(ssl.PEM_FOOTER)
    return _CRITICAL_USAGE in ssl.PEM_cert_to_DER_cert(begin + one + end)


def _handshake(authority: str, own: OwnCertificate, *, server: bool) -> None:
    """Raises SSLError, of the end that looks at our certificate."""
    accepting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    connecting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    connecting.check_hostname = False
    own.load(accepting)  # a server has to have one, even where the client's is looked at
    if server:
        connecting.load_verify_locations(authority)
    else:
        connecting.verify_mode = ssl.CERT_NONE
        own.load(connecting)
        accepting.verify_mode = ssl.CERT_REQUIRED
        accepting.load_verify_locations(authority)
    one, other = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        connecting.wrap_bio(one, other, server_side=False),
        accepting.wrap_bio(other, one, server_side=True),
    ]
    for _ in range(20):  # round trips; a handshake takes two
        for end in tuple(ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            ends.remove(end)
        if not ends:
            return
