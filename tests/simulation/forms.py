"""What the images of a simulated machine are like, and how each of them is opened."""

from __future__ import annotations

import importlib.util
import random
import uuid
from typing import Any
from unittest import mock

from liveblockd.formats import luks
from liveblockd.formats.qcow2.compression import HAS_ZSTD

#: arguments of ``create_qcow2``; ``data_file`` and ``encrypt`` say that there is one, that it is
FORMATS: tuple[dict[str, Any], ...] = (
    {"cluster_size": 512},
    {"cluster_size": 512, "refcount_bits": 64},
    {"cluster_size": 512, "version": 2},
    {"cluster_size": 1024, "refcount_bits": 1},
    {"cluster_size": 2048, "refcount_bits": 2},
    {"cluster_size": 4096},
    {"cluster_size": 4096, "refcount_bits": 4},
    {"cluster_size": 4096, "version": 2},
    {"cluster_size": 4096, "lazy_refcounts": True},
    {"cluster_size": 4096, "refcount_bits": 32, "compression": "zstd"},
    {"cluster_size": 65536},
    {"cluster_size": 65536, "refcount_bits": 8},
    {"cluster_size": 16384, "extended_l2": True},
    {"cluster_size": 32768, "extended_l2": True, "refcount_bits": 64, "lazy_refcounts": True},
    {"cluster_size": 512, "data_file": True},
    {"cluster_size": 4096, "data_file": True},
    {"cluster_size": 4096, "data_file": True, "data_file_raw": True},
    {"cluster_size": 16384, "data_file": True, "extended_l2": True},
    {"cluster_size": 16384, "data_file": True, "data_file_raw": True, "extended_l2": True},
    {"cluster_size": 4096, "encrypt": True},
    {"cluster_size": 16384, "encrypt": True, "extended_l2": True},
)
#: by which a plan chooses: the word is true of a form
KINDS = ("extended_l2", "data_file", "data_file_raw", "encrypt", "lazy_refcounts", "compression")
SECRET, PASSPHRASE = "key0", b"open sesame"
#: of every encrypted image: AES-128 in XTS mode has two keys of 16 bytes
KEY = bytes(range(7, 39))


def choose(
    rng: random.Random, cluster_size: int | None = None, kind: str | None = None
) -> dict[str, Any]:
    """One of the forms, of a cluster size or a kind if that is given."""
    forms = [
        form
        for form in FORMATS
        if cluster_size in (None, form["cluster_size"])
        and (kind is None or kind in form)
        and (HAS_ZSTD or form.get("compression") != "zstd")
        and (importlib.util.find_spec("cryptography") or "encrypt" not in form)
    ]
    return dict(rng.choice(forms))


def secret(name: str) -> bytes:
    """As ``Environment.secret``."""
    assert name == SECRET
    return PASSPHRASE


def crypto_header(rng: random.Random) -> bytes:
    """A LUKS header that costs little: few iterations, one key slot that is there."""
    drawn = iter([KEY])

    def urandom(length: int) -> bytes:
        return next(drawn, None) or rng.randbytes(length)

    with (
        mock.patch.object(luks.os, "urandom", urandom),  # type: ignore[attr-defined]
        mock.patch.object(luks, "iterations_for", lambda *_: 10),
        mock.patch.object(uuid, "uuid4", lambda: uuid.UUID(int=rng.getrandbits(128))),
    ):
        header = luks.new_luks(PASSPHRASE, key_bytes=len(KEY))
    material = len(KEY) * luks.STRIPES
    return header[: 4096 + -(-material // 4096) * 4096]


def data_name(name: str) -> str:
    """Of the external data file of an image."""
    return name.removesuffix(".qcow2") + ".data"


def driver(form: dict[str, Any]) -> str:
    """Of an image of that form; ``raw`` is the only one that is no qcow2."""
    return "raw" if form.get("raw") else "qcow2"


def can_compress(form: dict[str, Any]) -> bool:
    """Whether there are compressed clusters in an image."""
    return not form.get("data_file") and not form.get("encrypt") and not form.get("raw")


def members(name: str, form: dict[str, Any]) -> dict[str, Any]:
    """Of blockdev-add, for an image of that form, but for the name of the node."""
    found: dict[str, Any] = {
        "driver": driver(form),
        "discard": "unmap",
        "file": {"driver": "simdisk", "filename": name},
    }
    if form.get("raw"):
        # What a discard leaves nobody has promised, and here the guest would see it.
        found["file"]["discard"] = "ignore"
    if form.get("data_file"):
        found["data-file"] = {"driver": "simdisk", "filename": data_name(name)}
    return found | unlocking(encrypted=bool(form.get("encrypt")))


def unlocking(*, encrypted: bool) -> dict[str, Any]:
    """The member that an encrypted image needs."""
    return {"encrypt": {"format": "luks", "key-secret": SECRET}} if encrypted else {}
