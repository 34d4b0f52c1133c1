"""``priority`` of TLS credentials: strings of GnuTLS, as far as ``ssl`` can do what they say.

Specification: GnuTLS manual, "Priority strings"; OpenSSL's openssl-ciphers for what comes out. A
keyword (``NORMAL``, ``SECURE256``) is followed by what is added (``+``) and taken away (``-``).

Pure but for the constants of ``ssl``. Invariants: nothing is allowed that the string forbids, and
what cannot be translated so is refused; TLS older than 1.2 is not spoken. TLS 1.3 has its own
ciphers, which Python cannot choose: who takes one away takes away TLS 1.3 as well, or is refused.

Errors: BlockError.
"""

from __future__ import annotations

import enum
import ssl
from dataclasses import dataclass, field
from typing import Final

from liveblockd.errors import BlockError


class Kind(enum.Enum):
    """Kinds of credentials, and the ciphers of OpenSSL that are for them."""

    X509 = "DEFAULT:!PSK:!SRP"
    #: first with forward secrecy
    PSK = "kECDHEPSK:kPSK"
    ANON = "ADH+AESGCM:ADH+AES:!SHA1:@SECLEVEL=0"


#: ciphers of GnuTLS, and how OpenSSL calls them in TLS 1.2
_CIPHERS: Final = {
    "AES-256-GCM": ("AESGCM+AES256",),
    "AES-128-GCM": ("AESGCM+AES128",),
    "CHACHA20-POLY1305": ("CHACHA20",),
    "AES-256-CCM": ("AESCCM+AES256", "AESCCM8+AES256"),
    "AES-128-CCM": ("AESCCM+AES128", "AESCCM8+AES128"),
    "AES-256-CBC": ("AES256+SHA1", "AES256+SHA256", "AES256+SHA384"),
    "AES-128-CBC": ("AES128+SHA1", "AES128+SHA256"),
}
#: those of TLS 1.3
_ALWAYS: Final = {"AES-256-GCM", "AES-128-GCM", "CHACHA20-POLY1305"}
_STRONG: Final = {name for name in _CIPHERS if "128" not in name}
_EXCHANGES: Final = {
    "RSA": ("kRSA",),
    "DHE-RSA": ("kDHE",),
    "ECDHE-RSA": ("kECDHE+aRSA",),
    "ECDHE-ECDSA": ("kECDHE+aECDSA",),
}
_MACS: Final = {"SHA1": ("SHA1",), "SHA256": ("SHA256",), "SHA384": ("SHA384",)}
_VERSIONS: Final = {"TLS1.2": ssl.TLSVersion.TLSv1_2, "TLS1.3": ssl.TLSVersion.TLSv1_3}
#: what each kind has anyway
_OWN: Final = {
    Kind.X509: {"CTYPE-X509", "CTYPE-X.509"},
    Kind.PSK: {"PSK", "DHE-PSK", "ECDHE-PSK"},
    Kind.ANON: {"ANON-DH"},
}
#: security levels of OpenSSL: 80, 112, 128, 192 and 256 bits
_PROFILES: Final = {"LOW": 1, "MEDIUM": 2, "HIGH": 3, "ULTRA": 4, "FUTURE": 5}


@dataclass
class _Wanted:
    """What is allowed, as far as the string has been read."""

    versions: set[str] = field(default_factory=lambda: set(_VERSIONS))
    allowed: set[str] = field(default_factory=lambda: {*_CIPHERS, *_EXCHANGES, *_MACS})
    options: ssl.Options = field(default_factory=lambda: ssl.Options(0))
    level: int | None = None


class _UnknownError(Exception):
    """The text says why."""


def apply_priority(context: ssl.SSLContext, priority: str | None, kind: Kind) -> None:
    """Let ``context`` speak what ``priority`` allows; None: TLS 1.2 and later, as Python does."""
    try:
        wanted = _Wanted() if priority is None else _read(priority, kind)
        if kind is not Kind.X509:
            wanted.versions &= {"TLS1.2"}
        if not wanted.versions:
            raise _UnknownError("no version of TLS is left")
        if "TLS1.3" in wanted.versions and not wanted.allowed >= _ALWAYS:
            raise _UnknownError("the ciphers of TLS 1.3 cannot be chosen, add -VERS-TLS1.3")
        versions = [_VERSIONS[name] for name in sorted(wanted.versions)]
        context.minimum_version, context.maximum_version = versions[0], versions[-1]
        context.options |= wanted.options
        if priority is not None or kind is not Kind.X509:
            _set_ciphers(context, wanted, kind)
    except _UnknownError as error:
        raise BlockError(f"Unable to set TLS session priority {priority}: {error}") from None


def _set_ciphers(context: ssl.SSLContext, wanted: _Wanted, kind: Kind) -> None:
    known = _CIPHERS | _MACS | (_EXCHANGES if kind is Kind.X509 else {})
    words = [kind.value]
    for name, ciphers in known.items():
        if name not in wanted.allowed:
            words += [f"!{cipher}" for cipher in ciphers]
    if wanted.level is not None:
        words.append(f"@SECLEVEL={wanted.level}")
    try:
        context.set_ciphers(":".join(words))
    except ssl.SSLError:
        raise _UnknownError("no cipher is left") from None


def _read(priority: str, kind: Kind) -> _Wanted:
    wanted = _Wanted()
    first, *rest = priority.split(":")
    if first in ("SECURE192", "SECURE256"):
        wanted.allowed -= {*_CIPHERS} - _STRONG
        wanted.versions = {"TLS1.2"}
    elif first == "PFS":
        wanted.allowed.discard("RSA")
    elif first not in ("NORMAL", "PERFORMANCE", "SECURE128") and not first.startswith("@"):
        raise _UnknownError(f"'{first}' is not supported here")
    for word in filter(None, rest):
        name = word[1:]
        if word[0] == "%":
            _take_option(wanted, name)
        elif word[0] in "+-!":
            _take(wanted, name, kind, add=word[0] == "+")
        else:
            raise _UnknownError(f"'{word}' is not supported here")
    return wanted


def _take(wanted: _Wanted, name: str, kind: Kind, *, add: bool) -> None:
    """One addition, or one thing that is taken away."""
    if name.startswith("VERS-"):
        _take_version(wanted, name.removeprefix("VERS-"), add=add)
        return
    groups = {"CIPHER-ALL": {*_CIPHERS}, "KX-ALL": {*_EXCHANGES}, "MAC-ALL": {*_MACS}}
    names = groups.get(name, {name})
    if names <= {*_CIPHERS, *_EXCHANGES, *_MACS}:
        wanted.allowed = wanted.allowed | names if add else wanted.allowed - names
    elif name in ("COMP-NULL", "AEAD") and add:
        pass
    elif add and name not in _OWN[kind]:
        raise _UnknownError(f"'+{name}' is not supported here")
    elif not add and (name in _OWN[kind] or name.startswith(("SIGN-", "GROUP-", "CURVE-", "AEAD"))):
        raise _UnknownError(f"'-{name}' is not supported here")
    # What else is taken away is not spoken here: 3DES, RC4, MD5, export ciphers and the like.


def _take_version(wanted: _Wanted, name: str, *, add: bool) -> None:
    if name in ("ALL", "TLS-ALL"):
        wanted.versions = set(_VERSIONS) if add else set()
    elif name in _VERSIONS:
        wanted.versions = wanted.versions | {name} if add else wanted.versions - {name}
    elif add:
        raise _UnknownError(f"{name} is not spoken here")


def _take_option(wanted: _Wanted, name: str) -> None:
    profile = name.removeprefix("PROFILE_")
    if name == "NO_TICKETS":
        wanted.options |= ssl.OP_NO_TICKET
    elif name == "SERVER_PRECEDENCE":
        wanted.options |= ssl.OP_CIPHER_SERVER_PREFERENCE
    elif name != profile and profile in _PROFILES:
        wanted.level = _PROFILES[profile]
    elif name not in ("SAFE_RENEGOTIATION", "COMPAT"):  # as it is, or nothing that is here
        raise _UnknownError(f"'%{name}' is not supported here")
