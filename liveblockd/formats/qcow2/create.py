"""Creating qcow2 images, and looking at the header of one that is not open.

Specification: docs/interop/qcow2. Runs on: the event loop.
Invariants: the image is durable, whole, when ``create_qcow2`` returns; before that it is no qcow2
image, for the header is written last. Errors: ``BlockError`` (options), OSError (I/O).
"""

from __future__ import annotations

from liveblockd.formats.qcow2.header import Header, parse
from liveblockd.formats.qcow2.newimage import NewImage, lay_out
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
) -> None:
    """Make ``file`` an empty qcow2 image of ``size`` bytes; what the file had is lost."""
    layout = lay_out(
        NewImage(
            size=size,
            cluster_size=cluster_size,
            version=version,
            refcount_bits=refcount_bits,
            backing_file=backing_file,
            backing_format=backing_format,
            lazy_refcounts=lazy_refcounts,
        )
    )
    for write in layout.tables:
        await file.write(write.offset, write.data)
    await file.flush()
    await file.write(0, layout.header)
    await file.flush()


def peek_header(data: bytes) -> Header:
    """The header of an image from its first bytes (the first 4 KiB do, mostly; a cluster always).

    Raises BlockError.
    """
    return parse(data)
