"""What a new image is to be: the options of ``create`` and ``convert`` (``-o``).

Runs on: pure. Names, order and words are those of ``qemu-img create``. Errors: ``ToolError`` for
options that cannot be; ``BlockError`` for values that no new image can have.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from liveblockd.errors import BlockError
from liveblockd.imagetool.images import ToolError
from liveblockd.keyval import split_commas
from liveblockd.qapi import parse_size
from liveblockd.storage.registry import find_driver

Value: TypeAlias = "str | int | bool"
Options: TypeAlias = dict[str, Value]


class Kind(enum.Enum):
    """What an option takes."""

    TEXT = enum.auto()
    FLAG = enum.auto()
    SIZE = enum.auto()
    NUMBER = enum.auto()


_FLAGS: Final = {
    **dict.fromkeys(("on", "yes", "true", "y"), True),
    **dict.fromkeys(("off", "no", "false", "n"), False),
}
VERSIONS: Final = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
_FILE: Final = {"nocow": Kind.FLAG, "extent_size_hint": Kind.SIZE}
#: in the order in which they are told
_QCOW2: Final = {
    "encryption": Kind.FLAG,
    "encrypt.format": Kind.TEXT,
    "encrypt.key-secret": Kind.TEXT,
    "encrypt.cipher-alg": Kind.TEXT,
    "encrypt.cipher-mode": Kind.TEXT,
    "encrypt.ivgen-alg": Kind.TEXT,
    "encrypt.ivgen-hash-alg": Kind.TEXT,
    "encrypt.hash-alg": Kind.TEXT,
    "encrypt.iter-time": Kind.NUMBER,
    "cluster_size": Kind.SIZE,
    "extended_l2": Kind.FLAG,
    "preallocation": Kind.TEXT,
    "compression_type": Kind.TEXT,
    "size": Kind.SIZE,
    "compat": Kind.TEXT,
    "backing_file": Kind.TEXT,
    "backing_fmt": Kind.TEXT,
    "data_file": Kind.TEXT,
    "data_file_raw": Kind.FLAG,
    "lazy_refcounts": Kind.FLAG,
    "refcount_bits": Kind.NUMBER,
    **_FILE,
}
_LUKS: Final = {
    "size": Kind.SIZE,
    "key-secret": Kind.TEXT,
    "cipher-alg": Kind.TEXT,
    "cipher-mode": Kind.TEXT,
    "ivgen-alg": Kind.TEXT,
    "ivgen-hash-alg": Kind.TEXT,
    "hash-alg": Kind.TEXT,
    "iter-time": Kind.NUMBER,
    "preallocation": Kind.TEXT,
    **_FILE,
}
_RAW: Final = {"size": Kind.SIZE, "preallocation": Kind.TEXT, **_FILE}
_DEFAULTS: Final[dict[str, Options]] = {
    "qcow2": {
        "cluster_size": 65536,
        "extended_l2": False,
        "compression_type": "zlib",
        "lazy_refcounts": False,
        "refcount_bits": 16,
    },
    "raw": {},
    "luks": {},
}
_KNOWN: Final[dict[str, Mapping[str, Kind]]] = {"qcow2": _QCOW2, "raw": _RAW, "luks": _LUKS}


class Encryption(NamedTuple):
    """How a new image is encrypted; the arguments of ``luks.new_luks`` but for the passphrase."""

    secret: str
    cipher: str
    mode: str
    hash_name: str
    key_bytes: int
    iter_time: int  # milliseconds


def parse_options(texts: Sequence[str], image_format: str, filename: str = "") -> Options:
    """``-o key=value,...``, several times; the last of a name counts. ToolError."""
    prefix = f"{filename}: " if filename else ""
    known = known_options(image_format, prefix)
    found: Options = {}
    for text in texts:
        for part in split_commas(text):
            name, equals, value = part.partition("=")
            if name not in known:
                raise ToolError(f"{prefix}Invalid parameter '{name}'")
            try:
                found[name] = option_value(name, known[name], value if equals else "on")
            except BlockError as error:
                raise ToolError(prefix + error.message) from None
    return found


def known_options(image_format: str, prefix: str = "") -> Mapping[str, Kind]:
    """The options of a format; ToolError where there is no such format, or none can be made."""
    if (known := _KNOWN.get(image_format)) is not None:
        return known
    try:
        find_driver(image_format)
    except BlockError:
        raise ToolError(f"{prefix}Unknown file format '{image_format}'") from None
    raise ToolError(f"{prefix}Format driver '{image_format}' does not support image creation")


def option_value(name: str, kind: Kind, text: str) -> Value:
    """What the text of an option says; raises BlockError."""
    if kind is Kind.FLAG:
        if text not in _FLAGS:
            raise BlockError(f"Parameter '{name}' expects 'on' or 'off'")
        return _FLAGS[text]
    if kind is Kind.SIZE:
        size = parse_size(text)
        if size is None:
            raise BlockError(
                f"Parameter '{name}' expects a non-negative number below 2^64\n"
                "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
                "and exabytes, respectively."
            )
        return size
    if kind is Kind.NUMBER:
        if not text.isdecimal():
            raise BlockError(f"Parameter '{name}' expects a number")
        return int(text)
    return text


def describe(filename: str, image_format: str, options: Options) -> str:
    """The line that tells what is being made; ``size`` is among the options."""
    known = known_options(image_format)
    values = _DEFAULTS[image_format] | options
    parts = [f"{name}={_shown(values[name])}" for name in known if name in values]
    return f"Formatting '{filename}', {' '.join([f'fmt={image_format}', *parts])}"


def _shown(value: Value) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value).replace(",", ",,")


def qcow2_arguments(options: Options) -> dict[str, Any]:
    """Arguments of ``create_qcow2`` but for the files, size and encryption; raises BlockError."""
    values = _DEFAULTS["qcow2"] | options
    version = str(values.get("compat", "1.1"))
    if version not in VERSIONS:
        raise BlockError(f"Invalid compatibility level: '{version}'")
    compression = values["compression_type"]
    if compression not in ("zlib", "zstd"):
        raise BlockError(f"Parameter 'compression-type' does not accept value '{compression}'")
    return {
        "cluster_size": values["cluster_size"],
        "version": VERSIONS[version],
        "refcount_bits": values["refcount_bits"],
        "backing_file": values.get("backing_file"),
        "backing_format": values.get("backing_fmt"),
        "lazy_refcounts": values["lazy_refcounts"],
        "extended_l2": values["extended_l2"],
        "compression": compression,
        "preallocation": values.get("preallocation", "off"),
        "data_file_raw": values.get("data_file_raw", False),
    }


#: bytes of a key
_CIPHERS: Final = {"aes-128": 16, "aes-192": 24, "aes-256": 32}
_OTHER_CIPHERS: Final = (
    "des", "3des", "cast5-128", "serpent-128", "serpent-192", "serpent-256", "twofish-128",
    "twofish-192", "twofish-256",
)  # fmt: skip
_HASHES: Final = ("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160")


def encryption(options: Options) -> Encryption | None:
    """What the ``encrypt.`` options ask for; raises BlockError."""
    given = {
        name.removeprefix("encrypt."): value
        for name, value in options.items()
        if name.startswith("encrypt.")
    }
    kind = given.get("format")
    if options.get("encryption"):
        kind = kind or "aes"
    if kind is None:
        if given:
            raise BlockError("Parameter 'encrypt.format' is missing")
        return None
    if kind == "aes":
        raise BlockError(
            "Encryption format 'aes' is not supported for new images: it is broken, use 'luks'"
        )
    if kind != "luks":
        raise BlockError(f"Parameter 'format' does not accept value '{kind}'")
    return luks_encryption(given, prefix="encrypt.")


def luks_encryption(given: Mapping[str, Value], prefix: str = "") -> Encryption:
    """What the options of LUKS say; raises BlockError."""

    def choice(name: str, default: str, known: Sequence[str]) -> str:
        value = str(given.get(name, default))
        if value not in known:
            raise BlockError(f"Parameter '{name}' does not accept value '{value}'")
        return value

    cipher = choice("cipher-alg", "aes-256", (*_CIPHERS, *_OTHER_CIPHERS))
    mode = choice("cipher-mode", "xts", ("ecb", "cbc", "xts", "ctr"))
    vectors = choice("ivgen-alg", "plain64", ("plain", "plain64", "essiv"))
    if vectors == "essiv":
        vectors += ":" + choice("ivgen-hash-alg", "sha256", _HASHES)
    hash_name = choice("hash-alg", "sha256", _HASHES)
    if "key-secret" not in given:
        raise BlockError(f"Parameter '{prefix}key-secret' is required for cipher")
    if cipher not in _CIPHERS or mode not in ("xts", "cbc"):
        raise BlockError(f"Algorithm '{cipher}' with mode '{mode}' is not supported", errno=95)
    key_bytes = _CIPHERS[cipher] * (2 if mode == "xts" else 1)
    return Encryption(
        str(given["key-secret"]),
        cipher.partition("-")[0],
        f"{mode}-{vectors}",
        hash_name,
        key_bytes,
        int(given.get("iter-time", 2000)),
    )
