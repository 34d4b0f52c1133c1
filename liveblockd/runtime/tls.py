"""TLS credentials of NBD servers and clients: certificates of a directory, as contexts of ``ssl``.

Specification: QEMU's TLS setup (docs/system/tls) for the names of the files; TLS itself is Python's
``ssl``. A context is made when the object is added, so that bad files are told then.

Runs on the event loop, which it holds for the reading of a few small files. Invariant: who asks
for ``verify_peer`` talks to nobody whose certificate the CA of the directory did not sign; nothing
older than TLS 1.2 is spoken (``tls_priority``). Errors: BlockError.
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass, replace
from typing import Final

from liveblockd.errors import BlockError
from liveblockd.runtime.tls_priority import Kind, apply_priority
from liveblockd.runtime.tls_sanity import OwnCertificate, check_certificates

CA: Final = "ca-cert.pem"
CRL: Final = "ca-crl.pem"


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """What a ``tls-creds-x509`` object says."""

    directory: str | None
    server: bool
    verify_peer: bool = True
    #: of an encrypted private key
    password: bytes | None = None
    #: as GnuTLS writes it; None: what Python does
    priority: str | None = None
    sanity_check: bool = True


@dataclass(frozen=True, slots=True)
class TlsCredentials:
    """One end of connections; ``context`` is ready for use."""

    context: ssl.SSLContext
    #: of a client whose server has no name, on a UNIX socket: any that the CA signed will do
    nameless: ssl.SSLContext
    server: bool

    def for_server(self) -> ssl.SSLContext:
        """The context of a server; BlockError in QEMU's words if it is not one."""
        if not self.server:
            raise BlockError("Expected TLS credentials for a server endpoint")
        return self.context

    def for_client(self, *, named: bool) -> ssl.SSLContext:
        """The context of a client; ``named``: the server has to be who it is called."""
        if self.server:
            raise BlockError("Expected TLS credentials for a client endpoint")
        return self.context if named else self.nameless


def load_credentials(files: TlsFiles) -> TlsCredentials:
    """Read the files; BlockError when one is missing or cannot be used."""
    if files.directory is None:
        raise BlockError("Missing 'dir' property value")
    context = _load(files, files.directory)
    nameless = _load(replace(files, sanity_check=False), files.directory)
    nameless.check_hostname = False
    return TlsCredentials(context, nameless, files.server)


def _load(files: TlsFiles, directory: str) -> ssl.SSLContext:
    if files.server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_REQUIRED if files.verify_peer else ssl.CERT_NONE
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if not files.verify_peer:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
    apply_priority(context, files.priority, Kind.X509)
    end = "server" if files.server else "client"
    authority = path_in(directory, CA, needed=True)
    certificate = path_in(directory, f"{end}-cert.pem", needed=files.server)
    key = path_in(directory, f"{end}-key.pem", needed=files.server)
    revoked = path_in(directory, CRL, needed=False)
    try:
        context.load_verify_locations(authority)
    except (ssl.SSLError, OSError):
        raise BlockError(f"Unable to import CA certificate list {authority}") from None
    if revoked is not None:
        try:
            context.load_verify_locations(revoked)
        except (ssl.SSLError, OSError):
            raise BlockError(f"Unable to import CRL {revoked}") from None
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    own = None
    if certificate is not None and key is not None:
        own = OwnCertificate(certificate, key, files.password)
        try:
            own.load(context)
        except (ssl.SSLError, OSError):
            raise BlockError(f"Unable to import {end} certificate {certificate}") from None
    if files.sanity_check:
        assert authority is not None
        check_certificates(authority, own, server=files.server)
    return context


def path_in(directory: str, name: str, *, needed: bool) -> str | None:
    """Of a file of credentials; None when there is none, BlockError when it is ``needed``."""
    path = os.path.join(directory, name)
    try:
        os.stat(path)
    except OSError as error:
        if needed or not isinstance(error, FileNotFoundError):
            raise BlockError.from_os_error(f"Unable to access credentials {path}", error) from error
        return None
    return path
