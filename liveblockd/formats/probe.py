"""Which format an image is in, guessed from its first bytes.

For drives whose format nobody stated and for backing files without a stated format. A guess that
says raw is dangerous: a guest could write another format's header into the disk; the graph
therefore refuses such writes to a disk that was probed as raw (``graph.backend``).

Sources: the formats' own descriptions of their magic numbers. Pure; raises nothing.
"""

from __future__ import annotations

#: bytes of the start of an image that ``probe_format`` looks at
PROBE_LENGTH = 2048

#: (offset in bytes, magic, format)
_MAGICS: tuple[tuple[int, bytes, str], ...] = (
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
)


def probe_format(head: bytes) -> str:
    """The name of the format whose image begins with ``head``; "raw" if it looks like none."""
    if head[:4] == b"QFI\xfb" and len(head) >= 8:
        version = int.from_bytes(head[4:8], "big")
        if version >= 2:
            return "qcow2"
        if version == 1:
            return "qcow"
    for offset, magic, name in _MAGICS:
        if head[offset : offset + len(magic)] == magic:
            return name
    return "raw"
