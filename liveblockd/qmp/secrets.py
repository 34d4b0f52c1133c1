"""What a ``secret`` object holds: its data or file, decoded and decrypted.

Specification: qapi/crypto.json, SecretProperties. Runs on: the event loop; a file of a few bytes is
read when the object is added. Errors: BlockError in QEMU's words.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from typing import Final, Protocol

from liveblockd.errors import BlockError

#: bytes that a secret may have
MAX_BYTES: Final = 1 << 20


class SecretOptions(Protocol):
    """The members of the object."""

    @property
    def format(self) -> str:
        """``raw`` or ``base64``."""

    keyid: str | None
    iv: str | None
    data: str | None
    file: str | None


def load_secret(options: SecretOptions, lookup: Callable[[str], bytes]) -> bytes:
    """The bytes; ``lookup`` gives those of the secret ``keyid``. Raises BlockError."""
    if options.data is not None and options.file is not None:
        raise BlockError("'file' and 'data' are mutually exclusive")
    if options.file is not None:
        try:
            with open(options.file, "rb") as file:
                found = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise BlockError(
                f"Unable to read {options.file}: {error.strerror}", errno=error.errno or 5
            ) from error
        if len(found) > MAX_BYTES:
            raise BlockError(f"The secret in '{options.file}' is too large")
    elif options.data is not None:
        found = options.data.encode("utf-8", "surrogateescape")
    else:
        raise BlockError("Must provide 'file' or 'data'")
    if options.format == "base64":
        found = _base64(found)
    if options.keyid is None:
        if options.iv is not None:
            raise BlockError("IV specified without key")
        return found
    return _decrypt(found, lookup(options.keyid), options.iv)


def _base64(data: bytes) -> bytes:
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except binascii.Error:
        raise BlockError("Base64 data is not valid") from None


def _decrypt(data: bytes, key: bytes, iv_text: str | None) -> bytes:
    """AES-256-CBC; the last byte says how many are padding."""
    if len(key) != 32:
        key = _base64(key)
    if len(key) != 32:
        raise BlockError("Key should be 32 bytes in length")
    if iv_text is None:
        raise BlockError("IV is required to decrypt secret")
    iv = _base64(iv_text.encode())
    if len(iv) != 16:
        raise BlockError(f"IV should be 16 bytes in length not {len(iv)}")
    try:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    except ImportError:
        raise BlockError(
            "Encrypted secrets need the Python module 'cryptography', which is not installed "
            "(pip install liveblockd[crypto])",
            errno=95,
        ) from None
    if not data or len(data) % 16:
        raise BlockError("The encrypted secret is not a multiple of 16 bytes long")
    plain: bytes = Cipher(algorithms.AES(key), modes.CBC(iv)).decryptor().update(data)
    padding = plain[-1]
    if not 0 < padding <= 16:
        raise BlockError(f"Incorrect number of padding bytes ({padding}) found on decrypted data")
    return plain[:-padding]
