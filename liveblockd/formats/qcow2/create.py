"""Creating qcow2 images, and looking at the header of one that is not open.

Specification: docs/interop/qcow2. Runs on: the event loop.
Invariants: the image is durable, whole, when ``create_qcow2`` returns; before that it is no qcow2
image, for the header is written last. Errors: ``BlockError`` (options), OSError (I/O).
"""

from __future__ import annotations

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.commit import Committer
from liveblockd.formats.qcow2.header import Header, parse
from liveblockd.formats.qcow2.layout import Compression
from liveblockd.formats.qcow2.newimage import NewImage, lay_out
from liveblockd.formats.qcow2.opening import open_image
from liveblockd.formats.qcow2.options import Qcow2Options
from liveblockd.formats.qcow2.preallocate import Preallocation, preallocate
from liveblockd.qapi import parse as parse_options
from liveblockd.storage.driver import BlockIO


async def create_qcow2(
    file: BlockIO,
    *,
    size: int,
    cluster_size: int = 65536,
    version: int = 3,
    refcount_bits: int = 16,
    backing_file: str | None = None,
    backing_format: str | None = None,
    lazy_refcounts: bool = False,
    extended_l2: bool = False,
    compression: str = "zlib",
    preallocation: Preallocation | str = Preallocation.OFF,
) -> None:
    """Make ``file`` an empty qcow2 image of ``size`` bytes; what the file had is lost.

    ``compression``: ``zlib`` or ``zstd``. Raises BlockError, OSError.
    """
    if preallocation not in list(Preallocation):
        raise BlockError(f"Parameter 'preallocation' does not accept value '{preallocation}'")
    mode = Preallocation(preallocation)
    if mode is not Preallocation.OFF and backing_file is not None and not extended_l2:
        raise BlockError(
            "Backing file and preallocation can only be used at the same time if extended_l2 is on"
        )
    layout = lay_out(
        NewImage(
            size=size,
            cluster_size=cluster_size,
            version=version,
            refcount_bits=refcount_bits,
            backing_file=backing_file,
            backing_format=backing_format,
            lazy_refcounts=lazy_refcounts,
            extended_l2=extended_l2,
            compression=Compression[compression.upper()],
        )
    )
    for write in layout.tables:
        await file.write(write.offset, write.data)
    await file.flush()
    await file.write(0, layout.header)
    await file.flush()
    if mode is not Preallocation.OFF:
        await _preallocate(file, mode, size)


async def _preallocate(file: BlockIO, mode: Preallocation, size: int) -> None:
    options = parse_options(Qcow2Options, {"driver": "qcow2", "file": "file"})
    opened = await open_image(options, {"file": file}, read_only=False)
    metadata = opened.metadata
    metadata.refcounts.touched(0, metadata.geometry.clusters(file.length))
    committer = Committer(metadata, opened.first_sector, autosync=None)
    committer.begin()
    try:
        await preallocate(metadata, committer, mode, 0, size)
    finally:
        await committer.close()
        await committer.end()
    await file.flush()


def peek_header(data: bytes) -> Header:
    """The header of an image from its first bytes (the first 4 KiB do, mostly; a cluster always).

    Raises BlockError.
    """
    return parse(data)
