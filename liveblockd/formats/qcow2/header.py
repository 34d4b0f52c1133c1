"""The header of a qcow2 image and its extensions: bytes to ``Header`` and back.

Specification: docs/interop/qcow2, "Header", "Header extensions", "Feature name table".

Runs on: pure. Invariants: a ``Header`` that ``parse`` returned is within all bounds of ``layout``;
unknown extensions and unknown header fields survive ``serialise``. Everything that has to change
at one instant (sizes, table offsets, feature bits, the place of the backing name) lies in the
first 512 bytes, which a disk writes whole or not at all.
Errors: ``BlockError`` in QEMU's words.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace
from errno import EACCES, EFBIG, ENOSPC, ENOTSUP
from typing import Final

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.layout import (
    ENTRY_BYTES,
    HEADER_LENGTH_V2,
    HEADER_LENGTH_V3,
    MAGIC,
    MAX_BACKING_FORMAT,
    MAX_BACKING_NAME,
    MAX_CLUSTER_BITS,
    MAX_DISK_SIZE,
    MAX_HOST_OFFSET,
    MAX_L1_BYTES,
    MAX_REFCOUNT_ORDER,
    MAX_REFCOUNT_TABLE_BYTES,
    MAX_SNAPSHOTS,
    MIN_CLUSTER_BITS,
    MIN_HEADER_LENGTH_V3,
    SECTOR,
    Autoclear,
    Compatible,
    Compression,
    Crypt,
    Extension,
    Geometry,
    Incompatible,
)

_V2: Final = struct.Struct(">4sIQIIQIIQQIIQ")
_V3: Final = struct.Struct(">QQQII")
_EXTENSION: Final = struct.Struct(">II")
_KNOWN_INCOMPATIBLE: Final = sum(Incompatible)

#: names of the features this format has, for the table in new images: (type, bit, name)
FEATURE_NAMES: Final = (
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
)


@dataclass(frozen=True, slots=True)
class Header:
    """What the first cluster says; offsets and ``size`` in bytes."""

    version: int
    cluster_bits: int
    size: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    refcount_order: int = 4
    crypt_method: int = 0
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    compression_type: int = 0
    header_length: int = HEADER_LENGTH_V3
    #: header fields after compression_type that this version of the format does not know
    unknown_fields: bytes = b""
    backing_file: bytes | None = None
    #: where the name lies; ``serialise`` chooses when it is 0
    backing_file_offset: int = 0
    extensions: tuple[tuple[int, bytes], ...] = field(default=())

    @property
    def geometry(self) -> Geometry:
        """The derived sizes."""
        extended = bool(self.incompatible & Incompatible.EXTENDED_L2)
        return Geometry(self.version, self.cluster_bits, self.refcount_order, extended)

    @property
    def backing_format(self) -> str | None:
        """The format that the header states for the backing file."""
        data = self.extension(Extension.BACKING_FORMAT)
        return None if data is None else data.decode("utf-8", "surrogateescape")

    @property
    def backing_name(self) -> str | None:
        """The backing file string, or None."""
        if self.backing_file is None:
            return None
        return self.backing_file.decode("utf-8", "surrogateescape")

    @property
    def data_file_name(self) -> str | None:
        """The name of the external data file, where the header states one."""
        data = self.extension(Extension.DATA_FILE)
        return data.decode("utf-8", "surrogateescape") if data else None

    @property
    def has_data_file(self) -> bool:
        """Guest data lie in an external data file."""
        return bool(self.incompatible & Incompatible.DATA_FILE)

    @property
    def raw_data_file(self) -> bool:
        """And that file alone is the disk as the guest sees it."""
        return self.has_data_file and bool(self.autoclear & Autoclear.RAW_DATA_FILE)

    @property
    def dirty(self) -> bool:
        """Refcounts may be wrong."""
        return bool(self.incompatible & Incompatible.DIRTY)

    @property
    def corrupt(self) -> bool:
        """The image must not be written to."""
        return bool(self.incompatible & Incompatible.CORRUPT)

    @property
    def lazy_refcounts(self) -> bool:
        """A writer may leave the refcounts behind."""
        return bool(self.compatible & Compatible.LAZY_REFCOUNTS)

    def extension(self, kind: int) -> bytes | None:
        """The data of the first extension of a type."""
        return next((data for k, data in self.extensions if k == kind), None)


def parse(data: bytes) -> Header:
    """The header in ``data``, which is the start of the image (a cluster, or less at its end).

    Raises BlockError for what is no qcow2 image or lies outside the bounds. Features that are
    known but not supported pass: ``check_supported`` refuses them.
    """
    if len(data) < HEADER_LENGTH_V2 or data[:4] != MAGIC:
        raise BlockError("Image is not in qcow2 format")
    (
        _, version, backing_offset, backing_size, cluster_bits, size, crypt, l1_size, l1_offset,
        table_offset, table_clusters, nb_snapshots, snapshots_offset,
    ) = _V2.unpack_from(data)  # fmt: skip
    if version not in (2, 3):
        raise BlockError(f"Unsupported qcow2 version {version}", errno=ENOTSUP)
    if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
        raise BlockError(f"Unsupported cluster size: 2^{cluster_bits}")
    incompatible = compatible = autoclear = compression = 0
    order, header_length, unknown = 4, HEADER_LENGTH_V2, b""
    if version == 3:
        if len(data) < MIN_HEADER_LENGTH_V3:
            raise BlockError("qcow2 header too short")
        incompatible, compatible, autoclear, order, header_length = _V3.unpack_from(data, 72)
        if header_length < MIN_HEADER_LENGTH_V3:
            raise BlockError("qcow2 header too short")
    if header_length > min(1 << cluster_bits, len(data)):
        raise BlockError("qcow2 header exceeds cluster size")
    if header_length > MIN_HEADER_LENGTH_V3:
        compression = data[104]
        unknown = bytes(data[HEADER_LENGTH_V3:header_length])
    if backing_offset > 1 << cluster_bits:
        raise BlockError("Invalid backing file offset")
    header = Header(
        version, cluster_bits, size, l1_size, l1_offset, table_offset, table_clusters, order,
        crypt, nb_snapshots, snapshots_offset, incompatible, compatible, autoclear, compression,
        header_length, unknown,
    )  # fmt: skip
    _check_compression(header)
    extensions_end = min(backing_offset or 1 << cluster_bits, len(data))
    if incompatible & ~_KNOWN_INCOMPATIBLE:
        _refuse_unknown_features(header, data, extensions_end)
    _check_bounds(header)
    header = replace(header, extensions=_parse_extensions(data, header_length, extensions_end))
    if backing_offset:
        space = min((1 << cluster_bits), len(data)) - backing_offset
        if backing_size > min(MAX_BACKING_NAME, space):
            raise BlockError("Backing file name too long")
        name = bytes(data[backing_offset : backing_offset + backing_size]).split(b"\0")[0]
        header = replace(header, backing_file=name or None, backing_file_offset=backing_offset)
    return header


def _check_compression(header: Header) -> None:
    has_bit = bool(header.incompatible & Incompatible.COMPRESSION_TYPE)
    if header.compression_type not in (Compression.ZLIB, Compression.ZSTD):
        raise BlockError(
            f"qcow2: unknown compression type: {header.compression_type}", errno=ENOTSUP
        )
    if has_bit != (header.compression_type != Compression.ZLIB):
        must = "must not be set" if has_bit else "must be set"
        raise BlockError(f"qcow2: Compression type incompatible feature bit {must}")


def _refuse_unknown_features(header: Header, data: bytes, end: int) -> None:
    """Raise, with the names that the image itself gives to its features where it does."""
    names: dict[int, str] = {}
    try:
        extensions = _parse_extensions(data, header.header_length, end)
    except BlockError:
        extensions = ()
    for kind, table in extensions:
        if kind != Extension.FEATURE_NAMES:
            continue
        for start in range(0, len(table) - 47, 48):
            if table[start] == 0 and table[start + 1] < 64:
                text = table[start + 2 : start + 48].rstrip(b"\0").decode("utf-8", "replace")
                names.setdefault(table[start + 1], text)
    unknown = header.incompatible & ~_KNOWN_INCOMPATIBLE
    parts = [names[bit] for bit in sorted(names) if unknown >> bit & 1]
    rest = unknown & ~sum(1 << bit for bit in names)
    if rest:
        parts.append(f"Unknown incompatible feature: {rest:x}")
    raise BlockError(f"Unsupported qcow2 feature(s): {', '.join(parts)}", errno=ENOTSUP)


def _check_bounds(header: Header) -> None:
    geometry = header.geometry
    cluster_size = geometry.cluster_size
    if geometry.subcluster_size < SECTOR:
        raise BlockError(f"Unsupported subcluster size: {geometry.subcluster_size}")
    if header.refcount_order > MAX_REFCOUNT_ORDER:
        raise BlockError("Reference count entry width too large; may not exceed 64 bits")
    if header.crypt_method > Crypt.LUKS:
        raise BlockError(f"Unsupported encryption method {header.crypt_method}")
    if header.refcount_table_clusters == 0:
        raise BlockError("Image does not contain a reference count table")
    _check_table(
        "Reference count table",
        header.refcount_table_offset,
        header.refcount_table_clusters * cluster_size,
        MAX_REFCOUNT_TABLE_BYTES,
        cluster_size,
    )
    # 40 bytes is the fixed part of a snapshot table entry
    _check_table(
        "Snapshot table",
        header.snapshots_offset,
        header.nb_snapshots * 40,
        MAX_SNAPSHOTS * 40,
        cluster_size,
    )
    _check_table(
        "Active L1 table",
        header.l1_table_offset,
        header.l1_size * ENTRY_BYTES,
        MAX_L1_BYTES,
        cluster_size,
    )
    needed = geometry.l1_size(header.size)
    if needed > 0x7FFF_FFFF or header.size > MAX_DISK_SIZE:
        raise BlockError("Image is too big", errno=EFBIG)
    if header.l1_size < needed:
        raise BlockError("L1 table is too small")


def _check_table(name: str, offset: int, length: int, limit: int, cluster_size: int) -> None:
    if length > limit:
        raise BlockError(f"{name} too large", errno=EFBIG)
    if length == 0:
        if offset % cluster_size or offset >= 1 << 63:
            raise BlockError(f"{name} offset invalid")
        return
    # Cluster 0 is the header: no table may lie there.
    if offset % cluster_size or offset < cluster_size or offset + length > MAX_HOST_OFFSET:
        raise BlockError(f"{name} offset invalid")


def _parse_extensions(data: bytes, start: int, end: int) -> tuple[tuple[int, bytes], ...]:
    found: list[tuple[int, bytes]] = []
    while start + 8 <= end:
        kind, length = _EXTENSION.unpack_from(data, start)
        start += 8
        if length > end - start:
            raise BlockError("Header extension too large")
        if kind == Extension.END:
            break
        value = bytes(data[start : start + length])
        if kind == Extension.BACKING_FORMAT and length > MAX_BACKING_FORMAT:
            raise BlockError(f"ERROR: ext_backing_format: len={length} too large (>=16)")
        found.append((kind, value))
        start += -(-length // 8) * 8
    return tuple(found)


def check_supported(header: Header, *, read_only: bool) -> None:
    """Refuse, by name, what this engine does not do; raises BlockError."""
    if read_only:
        return
    if header.crypt_method == Crypt.AES:
        raise BlockError(
            "Images with the legacy AES encryption can only be opened read-only", errno=EACCES
        )
    if header.corrupt:
        raise BlockError("qcow2: Image is corrupt; cannot be opened read/write", errno=EACCES)


def feature_name_table() -> bytes:
    """The data of the extension that names the features."""
    return b"".join(
        bytes((kind, bit)) + name.encode().ljust(46, b"\0") for kind, bit, name in FEATURE_NAMES
    )


def fixed_fields(header: Header) -> bytes:
    """``header_length`` bytes: all but extensions and the backing name."""
    name = header.backing_file or b""
    data = _V2.pack(
        MAGIC, header.version, header.backing_file_offset if name else 0, len(name),
        header.cluster_bits, header.size, header.crypt_method, header.l1_size,
        header.l1_table_offset, header.refcount_table_offset, header.refcount_table_clusters,
        header.nb_snapshots, header.snapshots_offset,
    )  # fmt: skip
    if header.version == 2:
        return data
    data += _V3.pack(
        header.incompatible, header.compatible, header.autoclear, header.refcount_order,
        header.header_length,
    )  # fmt: skip
    data += bytes((header.compression_type,)).ljust(8, b"\0") + header.unknown_fields
    return data[: header.header_length].ljust(header.header_length, b"\0")


def extension_area(header: Header) -> bytes:
    """All extensions, in their order, and the end mark."""
    parts = []
    for kind, data in header.extensions:
        parts.append(_EXTENSION.pack(kind, len(data)) + data.ljust(-(-len(data) // 8) * 8, b"\0"))
    return b"".join(parts) + bytes(8)


def serialise(header: Header) -> bytes:
    """The used part of the first cluster; the backing name follows the extensions.

    Raises BlockError (ENOSPC) when it does not fit into a cluster.
    """
    extensions = extension_area(header)
    name = header.backing_file or b""
    end = header.header_length + len(extensions)
    offset = max(header.backing_file_offset, end)
    if offset + len(name) > 1 << header.cluster_bits or len(name) > MAX_BACKING_NAME:
        raise BlockError("No space left on device", errno=ENOSPC)
    header = replace(header, backing_file_offset=offset if name else 0)
    data = fixed_fields(header) + extensions
    if name:
        data = data.ljust(offset, b"\0") + name
    return data


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A new header and the writes that get there; each step is durable before the next.

    ``between`` is the header that the disk has after the first step, if that step is one.
    """

    header: Header
    steps: tuple[tuple[int, bytes], ...]
    between: Header | None = None


def relink(header: Header, backing_file: bytes | None, backing_format: str | None) -> Rewrite:
    """Change the backing link so that a torn write leaves the old link or the new one.

    The name is first stored where neither the old nor the new header has anything; then the first
    sector is written, which switches everything. For that the feature name table, which only
    serves to word errors, is left out where it would reach into a second sector, and an old link
    that is in the way is first moved into the first sector. Only with large unknown extensions is
    it one write of several sectors.
    Raises BlockError (ENOSPC) when the link does not fit, or not beside the old one.
    """
    link = []
    if backing_format is not None and backing_file is not None:
        raw_format = backing_format.encode("utf-8", "surrogateescape")
        if len(raw_format) > MAX_BACKING_FORMAT:
            raise BlockError("Backing format name too long")
        link.append((int(Extension.BACKING_FORMAT), raw_format))
    name = backing_file or b""
    if len(name) > MAX_BACKING_NAME:
        raise BlockError("Backing file name too long")
    others = [e for e in header.extensions if e[0] != Extension.BACKING_FORMAT]
    changed = replace(
        header, backing_file=name or None, backing_file_offset=0, extensions=(*link, *others)
    )
    return _rewrite(header, changed)


def replace_extension(
    header: Header, kind: Extension, data: bytes | None, *, autoclear: int
) -> Rewrite:
    """Add, replace or (None) drop an extension and set the autoclear bits, as ``relink`` does."""
    others = tuple(e for e in header.extensions if e[0] != kind)
    extensions = others if data is None else (*others, (int(kind), data))
    changed = replace(header, extensions=extensions, autoclear=autoclear)
    if header.backing_file is None:
        return _rewrite(header, changed)
    end = header.header_length + len(extension_area(_lean(changed)))
    if end <= min(SECTOR, header.backing_file_offset):  # the name stays where it is
        changed = _lean(changed)
        return Rewrite(changed, ((0, serialise(changed).ljust(SECTOR, b"\0")[:SECTOR]),))
    return _rewrite(header, replace(changed, backing_file_offset=0))


def change_version(header: Header, changed: Header) -> Rewrite:
    """From version 2 to 3 or back; ``changed`` has the fields and extensions of the new one."""
    return _rewrite(header, replace(changed, backing_file_offset=0))


def _lean(header: Header) -> Header:
    """Without the feature name table where it would reach into a second sector."""
    if header.header_length + len(extension_area(header)) <= SECTOR:
        return header
    lean = tuple(e for e in header.extensions if e[0] != Extension.FEATURE_NAMES)
    return replace(header, extensions=lean)


def _rewrite(header: Header, changed: Header) -> Rewrite:
    """From ``header`` to ``changed``, whose backing name has no place yet. Raises BlockError."""
    name = changed.backing_file or b""
    changed = _lean(changed)
    old_end = header.header_length + len(extension_area(header))
    if header.backing_file:
        old_end = max(old_end, header.backing_file_offset + len(header.backing_file))
    new_end = changed.header_length + len(extension_area(changed))
    cluster_size = 1 << header.cluster_bits
    if new_end + len(name) <= SECTOR:  # all of it in the sector that is written whole
        data = serialise(changed)
        return Rewrite(_placed(changed, new_end), ((0, data.ljust(SECTOR, b"\0")),))
    apart = _place_apart(header, old_end, new_end, len(name), cluster_size)
    if new_end <= SECTOR and apart is not None:
        changed = replace(changed, backing_file_offset=apart)
        first = (fixed_fields(changed) + extension_area(changed)).ljust(SECTOR, b"\0")
        # A name behind the sector only; a short one never comes here.
        return Rewrite(changed, ((apart, name), (0, first)))
    data = serialise(changed)
    if new_end > SECTOR:
        return Rewrite(_placed(changed, new_end), ((0, data),))
    if old_end <= SECTOR:
        # The end of the name lies where the old header has nothing, its head in the first sector.
        steps = ((SECTOR, data[SECTOR:]), (0, data[:SECTOR]))
        return Rewrite(_placed(changed, new_end), steps)
    compact = _compact(header)
    rest = _rewrite(compact, changed)
    moved = serialise(compact).ljust(SECTOR, b"\0")
    return Rewrite(rest.header, ((0, moved), *rest.steps), between=compact)


def _compact(header: Header) -> Header:
    """The same link, all of it in the first sector; raises BlockError (ENOSPC)."""
    lean = tuple(e for e in header.extensions if e[0] != Extension.FEATURE_NAMES)
    changed = replace(header, backing_file_offset=0, extensions=lean)
    end = header.header_length + len(extension_area(changed))
    if end + len(header.backing_file or b"") > SECTOR:
        raise BlockError("No space left on device", errno=ENOSPC)
    return _placed(changed, end)


def _placed(header: Header, offset: int) -> Header:
    return replace(header, backing_file_offset=offset if header.backing_file else 0)


def _place_apart(
    header: Header, old_end: int, new_end: int, length: int, cluster_size: int
) -> int | None:
    """Where ``length`` bytes lie outside the first sector, the old name and both areas."""
    lowest = max(SECTOR, new_end, header.header_length + len(extension_area(header)))
    if header.backing_file and lowest + length <= header.backing_file_offset:
        return lowest
    place = max(lowest, -(-old_end // 8) * 8)
    return place if place + length <= cluster_size else None
