"""What LUKS images say of their header, as models: for query-qmp-schema and for tests.

Specification: qapi/crypto.json (QCryptoBlockInfoLUKS and what it holds). Offsets are bytes.

Pure. Errors: none.
"""

from __future__ import annotations

import enum

from liveblockd.qapi import QapiModel


class QCryptoCipherAlgo(enum.StrEnum):
    """Ciphers that a header may name; this daemon has those of AES."""

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
    """How a sector gets its initialisation vector."""

    PLAIN = "plain"
    PLAIN64 = "plain64"
    ESSIV = "essiv"


class QCryptoHashAlgo(enum.StrEnum):
    """Hashes that a header may name."""

    MD5 = "md5"
    SHA1 = "sha1"
    SHA224 = "sha224"
    SHA256 = "sha256"
    SHA384 = "sha384"
    SHA512 = "sha512"
    RIPEMD160 = "ripemd160"
    SM3 = "sm3"


class QCryptoBlockInfoLUKSSlot(QapiModel):
    """A key slot."""

    active: bool
    iters: int | None = None
    stripes: int | None = None
    key_offset: int


class QCryptoBlockInfoLUKS(QapiModel):
    """The header."""

    cipher_alg: QCryptoCipherAlgo
    cipher_mode: QCryptoCipherMode
    ivgen_alg: QCryptoIVGenAlgo
    ivgen_hash_alg: QCryptoHashAlgo | None = None
    hash_alg: QCryptoHashAlgo
    detached_header: bool
    payload_offset: int
    master_key_iters: int
    uuid: str
    slots: list[QCryptoBlockInfoLUKSSlot]
