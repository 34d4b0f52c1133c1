"""What LUKS images say of their header, as models: for query-qmp-schema and for tests.

Specification: qapi/crypto.json (QCryptoBlockInfoLUKS and what it holds). Offsets are bytes.

Pure. Errors: none.
"""

from __future__ import annotations

from liveblockd.formats.luks_new import (
    QCryptoCipherAlgo,
    QCryptoCipherMode,
    QCryptoHashAlgo,
    QCryptoIVGenAlgo,
)
from liveblockd.qapi import QapiModel


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
