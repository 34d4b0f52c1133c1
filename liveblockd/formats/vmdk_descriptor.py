"""The text that describes a VMDK disk: of which files it is made, and what its parent is.

Specification: VMware, "Virtual Disk Format 5.0", "The Descriptor File".

Runs on: pure. Invariants: an extent's file lies beside the descriptor, whatever the text says: an
image must not be able to show other files of the host. Errors: ``BlockError``.
"""

from __future__ import annotations

import re
from errno import ENOTSUP
from typing import Final, NamedTuple

from liveblockd.errors import BlockError

#: bytes of a descriptor file that are looked at
MAX_BYTES: Final = 64 << 10
#: of files that are no descriptors
MAGICS: Final = (b"KDMV", b"COWD")
MAX_EXTENTS: Final = 1024
NO_PARENT: Final = 0xFFFFFFFF

_EXTENT: Final = re.compile(
    r'(RW|RDONLY|NOACCESS) +(\d{1,12}) +([A-Z]+)(?: +"([^"]*)")?(?: +(\d{1,12}))?(?: .*)?'
)
_FLAT: Final = ("FLAT", "VMFS")
#: ways to make a disk that are understood
_TYPES: Final = (
    "monolithicSparse", "monolithicFlat", "streamOptimized", "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat", "vmfs",
)  # fmt: skip


class DescribedExtent(NamedTuple):
    """A run of the disk; sectors are of 512 bytes."""

    sectors: int
    #: kept as it is, not in a sparse file
    flat: bool
    #: "" for zeros
    filename: str
    #: where it begins in a flat file
    first_sector: int


class Descriptor(NamedTuple):
    """What the text says."""

    extents: tuple[DescribedExtent, ...]
    content_id: int
    parent_content_id: int
    parent: str | None


def parse(data: bytes, *, embedded: bool = False) -> Descriptor:
    """The descriptor; ``embedded`` in a sparse file it only tells of the parent. BlockError."""
    text = data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
    fields: dict[str, str] = {}
    extents = []
    for line in (line.strip() for line in text.splitlines()):
        if line.startswith(("RW ", "RDONLY ", "NOACCESS ")):
            if not embedded:
                extents.append(_extent(line))
        elif "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            fields.setdefault(key.strip(), value.strip().strip('"'))
    if not embedded:
        _check_kind(fields.get("createType"))
        if not 0 < len(extents) <= MAX_EXTENTS:
            raise BlockError(f"it has {len(extents)} extents: 1 to {MAX_EXTENTS} can be")
    parent_id = _number(fields.get("parentCID", "ffffffff"))
    parent = fields.get("parentFileNameHint")
    if parent_id != NO_PARENT and not parent:
        raise BlockError("it has a parent, but no name of it")
    return Descriptor(
        tuple(extents),
        _number(fields.get("CID", "ffffffff")),
        parent_id,
        parent if parent_id != NO_PARENT else None,
    )


def _check_kind(kind: str | None) -> None:
    if kind is None:
        raise BlockError("invalid VMDK image descriptor")
    if kind not in _TYPES:
        raise BlockError(f"Unsupported image type '{kind}'", errno=ENOTSUP)


def _number(text: str) -> int:
    if not re.fullmatch(r"[0-9a-fA-F]{1,8}", text):
        raise BlockError("invalid VMDK image descriptor")
    return int(text, 16)


def _extent(line: str) -> DescribedExtent:
    found = _EXTENT.fullmatch(line)
    if found is None or found[1] == "NOACCESS":
        raise BlockError(f"Invalid extent line: {line[:200]}")
    sectors, kind, name = int(found[2]), found[3], found[4] or ""
    if kind not in ("SPARSE", "ZERO", *_FLAT):
        raise BlockError(f"Unsupported extent type '{kind}'", errno=ENOTSUP)
    if sectors == 0 or bool(name) != (kind != "ZERO"):
        raise BlockError(f"Invalid extent line: {line[:200]}")
    if "/" in name or ":" in name or name in (".", ".."):
        raise BlockError(f"the extent '{name}' does not lie beside the descriptor")
    return DescribedExtent(sectors, kind in _FLAT, name, int(found[5] or 0))
