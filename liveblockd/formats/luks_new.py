"""What a new LUKS header is to be, and the header.

Specification: qapi/crypto.json, QCryptoBlockCreateOptionsLUKS. Runs on: the event loop; a worker
derives the keys. Errors: ``BlockError`` for what no header can have.
"""

from __future__ import annotations

import enum
from typing import Final

from liveblockd.errors import BlockError
from liveblockd.formats.luks import new_luks
from liveblockd.qapi import Int64, QapiModel
from liveblockd.storage.registry import Environment

#: milliseconds that it takes to open the image, as QEMU
DEFAULT_ITER_TIME: Final = 2000


class QCryptoCipherAlgo(enum.StrEnum):
    """Ciphers; not all of them are known here."""

    AES_128 = "aes-128"
    AES_192 = "aes-192"
    AES_256 = "aes-256"
    DES = "des"
    TRIPLE_DES = "3des"
    CAST5_128 = "cast5-128"
    SERPENT_128 = "serpent-128"
    SERPENT_192 = "serpent-192"
    SERPENT_256 = "serpent-256"
    TWOFISH_128 = "twofish-128"
    TWOFISH_192 = "twofish-192"
    TWOFISH_256 = "twofish-256"
    SM4 = "sm4"


class QCryptoCipherMode(enum.StrEnum):
    """How blocks are chained."""

    ECB = "ecb"
    CBC = "cbc"
    XTS = "xts"
    CTR = "ctr"


class QCryptoIVGenAlgo(enum.StrEnum):
    """Where the first vector comes from."""

    PLAIN = "plain"
    PLAIN64 = "plain64"
    ESSIV = "essiv"


class QCryptoHashAlgo(enum.StrEnum):
    """Hashes."""

    MD5 = "md5"
    SHA1 = "sha1"
    SHA224 = "sha224"
    SHA256 = "sha256"
    SHA384 = "sha384"
    SHA512 = "sha512"
    RIPEMD160 = "ripemd160"
    SM3 = "sm3"


class LuksCreateOptions(QapiModel):
    """Members of a new header; ``iter-time`` in milliseconds."""

    key_secret: str | None = None
    cipher_alg: QCryptoCipherAlgo | None = None
    cipher_mode: QCryptoCipherMode | None = None
    ivgen_alg: QCryptoIVGenAlgo | None = None
    ivgen_hash_alg: QCryptoHashAlgo | None = None
    hash_alg: QCryptoHashAlgo | None = None
    iter_time: Int64 | None = None


_KEY_BYTES: Final = {
    QCryptoCipherAlgo.AES_128: 16,
    QCryptoCipherAlgo.AES_192: 24,
    QCryptoCipherAlgo.AES_256: 32,
}


async def new_luks_header(
    options: LuksCreateOptions, environment: Environment, *, prefix: str = ""
) -> bytes:
    """A header with one passphrase and a random key; ``prefix`` of names, for messages."""
    if options.key_secret is None:
        raise BlockError(f"Parameter '{prefix}key-secret' is required for cipher")
    passphrase = environment.secret(options.key_secret)
    cipher = options.cipher_alg or QCryptoCipherAlgo.AES_256
    mode = options.cipher_mode or QCryptoCipherMode.XTS
    vectors = str(options.ivgen_alg or QCryptoIVGenAlgo.PLAIN64)
    hash_name = options.hash_alg or QCryptoHashAlgo.SHA256
    if vectors == QCryptoIVGenAlgo.ESSIV:
        vectors += f":{options.ivgen_hash_alg or QCryptoHashAlgo.SHA256}"
    known_mode = mode in (QCryptoCipherMode.XTS, QCryptoCipherMode.CBC)
    if cipher not in _KEY_BYTES or not known_mode:
        raise BlockError(f"Algorithm '{cipher}' with mode '{mode}' is not supported", errno=95)
    if QCryptoHashAlgo.SM3 in (hash_name, options.ivgen_hash_alg):
        raise BlockError("Hash algorithm 'sm3' is not supported", errno=95)
    key_bytes = _KEY_BYTES[cipher] * (2 if mode is QCryptoCipherMode.XTS else 1)
    iter_time = DEFAULT_ITER_TIME if options.iter_time is None else options.iter_time

    def make() -> bytes:
        return new_luks(
            passphrase,
            cipher=str(cipher).partition("-")[0],
            mode=f"{mode}-{vectors}",
            hash_name=str(hash_name),
            key_bytes=key_bytes,
            iter_time=iter_time,
        )

    return await environment.workers.run(make)
