"""The names of block drivers that QMP knows, whether they are here or not (qapi/block-core.json).

Pure. A header can name any of them as its backing format.
"""

from __future__ import annotations

import enum

BlockdevDriver = enum.StrEnum(  # type: ignore[misc]
    "BlockdevDriver",
    {
        name.upper().replace("-", "_"): name
        for name in (
            "blkdebug", "blklogwrites", "blkreplay", "blkverify", "bochs", "cloop", "compress",
            "copy-before-write", "copy-on-read", "dmg", "file", "snapshot-access", "ftp", "ftps",
            "host_cdrom", "host_device", "http", "https", "iscsi", "luks", "nbd", "nfs", "null-aio",
            "null-co", "nvme", "parallels", "preallocate", "qcow", "qcow2", "qed", "quorum", "raw",
            "rbd", "replication", "ssh", "throttle", "vdi", "vhdx", "vmdk", "vpc", "vvfat",
        )
    },
)  # fmt: skip
