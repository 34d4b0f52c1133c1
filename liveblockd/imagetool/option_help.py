"""``-o help``: which options a new image, or an amended one, may have.

Runs on: pure, but for writing to stdout. The shape is that of qemu-img, which scripts look through
for the names. Errors: ``ToolError`` for a format of which no image can be made.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Final

from liveblockd.imagetool import amend, creation
from liveblockd.imagetool.creation import Kind
from liveblockd.imagetool.images import ToolError
from liveblockd.imagetool.output import say
from liveblockd.keyval import split_commas

_TYPES: Final = {
    Kind.TEXT: "str",
    Kind.FLAG: "bool (on/off)",
    Kind.SIZE: "size",
    Kind.NUMBER: "num",
}
_COLUMN: Final = 22
#: of LUKS without the prefix that they have in qcow2
_MEANINGS: Final = {
    "backing_file": "image whose data show through where this one has none",
    "backing_fmt": "format of the backing file",
    "cipher-alg": "cipher: aes-128, aes-192, aes-256",
    "cipher-mode": "mode of the cipher: xts, cbc",
    "cluster_size": "bytes that are allocated together, 512 to 2M",
    "compat": "version of the format: v2 (0.10) or v3 (1.1)",
    "compression_type": "how clusters are compressed: zlib, zstd",
    "data_file": "file that guest data go to instead",
    "data_file_raw": "the data file is a raw image of the same disk at any time",
    "encryption": "as encrypt.format=aes, which is only read here",
    "extended_l2": "32 subclusters in a cluster",
    "extent_size_hint": "has no effect here",
    "format": "encrypt guest data: luks",
    "hash-alg": "hash that keys are derived by",
    "iter-time": "milliseconds that unlocking shall take",
    "ivgen-alg": "initial vectors: plain, plain64, essiv",
    "ivgen-hash-alg": "hash of essiv",
    "key-secret": "id of the secret that is the passphrase",
    "keyslot": "the slot to change, 0 to 7",
    "lazy_refcounts": "refcounts may be written late",
    "new-secret": "id of the secret that is the new passphrase",
    "nocow": "write in place on btrfs",
    "old-secret": "id of the secret of the slots to change",
    "preallocation": "what is allocated beforehand: off, metadata, falloc, full",
    "refcount_bits": "width of a refcount, 1 to 64",
    "size": "size of the disk",
    "state": "active: add a passphrase, inactive: erase it",
}
#: the option that names the format, and the format without it
_FORMAT: Final = {"create": ("-f", "raw"), "convert": ("-O", "raw"), "amend": ("-f", "qcow2")}


def asked_for(argv: Sequence[str]) -> tuple[str, str] | None:
    """Command and format, if ``-o help`` is among the words; whatever else is missing there."""
    command = argv[0] if argv else ""
    if command not in _FORMAT:
        return None
    option, default = _FORMAT[command]
    words = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    words.add_argument("-o", dest="options", action="append", default=[])
    words.add_argument(option, dest="format", default=default)
    try:
        args, _ = words.parse_known_args(argv[1:])
    except argparse.ArgumentError:  # an option without its value: the real parser says so better
        return None
    given = [part for text in args.options for part in split_commas(text)]
    return (command, args.format) if {"help", "?"} & set(given) else None


def show(command: str, image_format: str) -> None:
    """Print the options; ToolError."""
    if command == "amend":
        known = amend.KNOWN.get(image_format)
        if known is None:
            raise ToolError(f"Format driver '{image_format}' does not support option amendment")
        say(f"Amend options for '{image_format}':")
    else:
        known = creation.known_options(image_format)
        say(f"Supported {image_format} options:")
    say("\n".join(_lines(known)))


def _lines(known: Mapping[str, Kind]) -> list[str]:
    return [
        f"  {f'{name}=<{_TYPES[kind]}>':<{_COLUMN}} - {_MEANINGS[name.removeprefix('encrypt.')]}"
        for name, kind in sorted(known.items())
    ]
