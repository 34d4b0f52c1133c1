"""What the driver ``qcow2`` says of its image.

Specification: qapi/block-core.json (ImageInfo, ImageInfoSpecificQCow2, BlockLimitsInfo).

Runs on: the event loop; looks at what is in memory and waits for nothing. Errors: none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from liveblockd.formats.luks import LuksHeader
from liveblockd.formats.qcow2.bitmap_store import BitmapStore
from liveblockd.formats.qcow2.layout import Compression, Crypt
from liveblockd.formats.qcow2.metadata import Metadata
from liveblockd.formats.qcow2.snapshot_store import SnapshotStore
from liveblockd.storage.driver import BlockDriver, HostFile
from liveblockd.storage.snapshot_info import SnapshotInfo


class Described(BlockDriver):
    """The part of the driver that describes; ``image.Qcow2`` is all of it."""

    _metadata: Metadata
    _snapshots: SnapshotStore
    _bitmaps: BitmapStore
    _lazy_refcounts: bool | None
    #: of an image that is encrypted so; its key slots may change
    _luks: LuksHeader | None = None

    @property
    def backing_file(self) -> str | None:
        """The string of the header."""
        return self._metadata.header.backing_name

    @property
    def backing_format(self) -> str | None:
        """The format of the header."""
        return self._metadata.header.backing_format

    def list_snapshots(self) -> Sequence[SnapshotInfo]:
        """See ``BlockDriver``."""
        size = self._metadata.header.size
        return [snapshot.info(size) for snapshot in self._snapshots.snapshots]

    @property
    def encrypted(self) -> bool:
        """See ``BlockDriver``."""
        return bool(self._metadata.header.crypt_method)

    def data_host_file(self) -> HostFile | None:
        """See ``BlockDriver``: none where data are encrypted."""
        return self._metadata.data.host_file()

    def actual_size(self) -> int | None:
        """Bytes of the file child in use."""
        file = self.children["file"]
        size = getattr(getattr(file, "driver", file), "actual_size", None)
        return None if size is None else size()

    def dirty_flag(self) -> bool:
        """The dirty bit of the header."""
        return self._metadata.header.dirty

    @property
    def vm_state_offset(self) -> int:
        """Guest offset of what a snapshot keeps of a machine, in bytes: behind the disk."""
        geometry = self._metadata.geometry
        return geometry.l1_size(self._metadata.header.size) * geometry.span

    @property
    def lazy_refcounts(self) -> bool:
        """What the header or the options say; refcounts are kept strictly in any case."""
        if self._lazy_refcounts is not None:
            return self._lazy_refcounts
        return self._metadata.header.lazy_refcounts

    def format_specific(self) -> Mapping[str, Any]:
        """ImageInfoSpecificQCow2."""
        header = self._metadata.header
        data: dict[str, Any] = {
            "compat": "1.1" if header.version >= 3 else "0.10",
            "compression-type": Compression(header.compression_type).name.lower(),
        }
        if header.version >= 3:
            data["lazy-refcounts"] = header.lazy_refcounts
        if (name := header.data_file_name) is not None:
            data["data-file"] = name
        if header.has_data_file:
            data["data-file-raw"] = header.raw_data_file
        data["refcount-bits"] = header.geometry.refcount_bits
        if header.crypt_method:
            details = self._luks.describe() if self._luks is not None else {}
            kind = Crypt(header.crypt_method).name.lower()
            data["encrypt"] = details | {"format": kind}
        if header.version >= 3:
            data["corrupt"] = header.corrupt
            data["extended-l2"] = header.geometry.extended_l2
        if stored := self._bitmaps.describe():
            data["bitmaps"] = stored
        return {"type": "qcow2", "data": data}

    def limits(self) -> dict[str, int]:
        """Zeros and discards work on clusters."""
        geometry = self._metadata.geometry
        return {
            **super().limits(),
            "write-zeroes-alignment": geometry.subcluster_size,
            "discard-alignment": geometry.cluster_size,
        }
