"""Which format an image has, from its first bytes.

Specification: the magic numbers of the formats that QEMU probes. Runs on: pure.
Errors: none: what nobody claims is ``raw``.
"""

from __future__ import annotations

from collections.abc import Callable

#: bytes that ``probe_format`` wants to see
PROBE_BYTES = 2048


def _qcow(version: range) -> Callable[[bytes], bool]:
    return lambda head: head[:4] == b"QFI\xfb" and int.from_bytes(head[4:8], "big") in version


def _vmdk(head: bytes) -> bool:
    if head[:4] in (b"KDMV", b"COWD"):
        return True
    # A descriptor file: comments and blank lines up to its version
    for line in head.decode("latin-1").splitlines():
        text = line.strip()
        if text and not text.startswith("#"):
            return text in ("version=1", "version=2", "version=3")
    return False


_PROBES: tuple[tuple[str, Callable[[bytes], bool]], ...] = (
    ("qcow2", _qcow(range(2, 1 << 32))),
    ("qcow", _qcow(range(1, 2))),
    ("qed", lambda head: head[:4] == b"QED\0"),
    ("luks", lambda head: head[:6] == b"LUKS\xba\xbe" and head[6:8] == b"\0\x01"),
    ("vdi", lambda head: head[64:68] == b"\x7f\x10\xda\xbe"),
    ("vhdx", lambda head: head[:8] == b"vhdxfile"),
    ("vpc", lambda head: head[:8] == b"conectix"),
    ("parallels", lambda head: head[:16] in (b"WithoutFreeSpace", b"WithouFreSpacExt")),
    ("bochs", lambda head: head[:22] == b"Bochs Virtual HD Image"),
    ("dmg", lambda head: head[:4] == b"koly"),
    ("cloop", lambda head: head.startswith(b"#!/bin/sh\n#V2.0 Format\n")),
    ("vmdk", _vmdk),
)


def probe_format(head: bytes) -> str:
    """The name of the format that an image beginning with ``head`` has."""
    return next((name for name, probe in _PROBES if probe(head)), "raw")
