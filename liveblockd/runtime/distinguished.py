"""The name of a certificate's owner, written as GnuTLS writes it: what QEMU's rules are about.

Specification: RFC 4514, in the order of the certificate. Pure; no errors escape: a name that has
unknown parts is written with those parts' long names, and values cannot pass for other parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

#: OpenSSL's long names, and GnuTLS's short ones where they differ
_SHORT: Final = {
    "commonName": "CN",
    "countryName": "C",
    "domainComponent": "DC",
    "emailAddress": "EMAIL",
    "localityName": "L",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "stateOrProvinceName": "ST",
    "streetAddress": "street",
    "surname": "surName",
    "userId": "UID",
}
_SPECIAL: Final = re.compile(r'([,+"\\<>;\0])')


def distinguished_name(subject: Iterable[Iterable[tuple[str, str]]]) -> str:
    """Of the ``subject`` that ``ssl.SSLSocket.getpeercert`` gives."""
    return ",".join(
        "+".join(f"{_SHORT.get(name, name)}={_escaped(value)}" for name, value in part)
        for part in subject
    )


def _escaped(value: str) -> str:
    escaped = _SPECIAL.sub(r"\\\1", value)
    if value[:1] in (" ", "#"):
        escaped = "\\" + escaped
    if len(value) > 1 and value.endswith(" "):
        escaped = escaped[:-1] + "\\ "
    return escaped
