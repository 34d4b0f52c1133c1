"""Creating qcow2 images, and looking at the header of one that is not open.

Specification: docs/interop/qcow2. Runs on: the event loop.
Invariants: the image is durable, whole, when ``create_qcow2`` returns; before that it is no qcow2
image, for the header is written last. Errors: ``BlockError`` (options; what cannot be written, in
QEMU's words), OSError (a file that cannot be made durable or longer).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from errno import ENOTSUP
from typing import Final

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

#: what is said where one of the tables of a ``Layout`` cannot be written
_FAILING: Final = (
    *("Could not write refcount table",) * 2,
    "Could not resize image: Failed to grow the L1 table",
    "Could not write encryption header",
)


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
    data_file: BlockIO | None = None,
    data_file_name: str = "",
    data_file_raw: bool = False,
    crypto_header: bytes = b"",
) -> None:
    """Make ``file`` an empty qcow2 image of ``size`` bytes; what the file had is lost.

    ``compression``: ``zlib`` or ``zstd``. ``data_file``: where guest data go instead; it is made as
    long as the disk, and what a raw one has is what the disk has. The header states its name, if
    one is given. ``crypto_header``: of ``luks.new_luks``. Raises BlockError, OSError.
    """
    if preallocation not in list(Preallocation):
        raise BlockError(f"Parameter 'preallocation' does not accept value '{preallocation}'")
    mode = Preallocation(preallocation)
    if mode is not Preallocation.OFF and backing_file is not None and not extended_l2:
        raise BlockError(
            "Backing file and preallocation can only be used at the same time if extended_l2 is on"
        )
    if crypto_header and data_file_raw and data_file is not None:
        # QEMU makes such images: whoever reads the raw file finds no disk in it.
        raise BlockError("A raw data file cannot hold the data of an encrypted image")
    if crypto_header and version < 3 and mode is not Preallocation.OFF:
        raise BlockError("Encrypted images of version 2 cannot be preallocated", errno=ENOTSUP)
    if data_file_raw and mode is Preallocation.OFF:
        mode = Preallocation.METADATA  # who reads the raw file and who reads the image see the same
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
            data_file=None if data_file is None else data_file_name,
            data_file_raw=data_file_raw,
            crypto_header=crypto_header,
        )
    )
    if data_file is not None:
        await data_file.truncate(size)
    needed = max(write.offset + len(write.data) for write in layout.tables)
    await _empty(file, needed, zeros=mode is not Preallocation.OFF)
    for write, failing in zip(layout.tables, _FAILING, strict=False):
        with _failing_as(failing):
            await file.write(write.offset, write.data)
    await file.flush()
    with _failing_as("Could not write qcow2 header"):
        await file.write(0, layout.header)
    await file.flush()
    if mode is not Preallocation.OFF:
        with _failing_as("Could not resize image: Allocating clusters failed"):
            await _preallocate(file, data_file, mode, size)


@contextmanager
def _failing_as(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BlockError.from_os_error(what, error) from error


async def _empty(file: BlockIO, needed: int, *, zeros: bool) -> None:
    """What was there is gone, and there is room for ``needed`` bytes.

    A file of the host grows by writing to it; another disk keeps its size, if that is enough, and
    what it had is overwritten only where clusters need ``zeros``.
    """
    if file.host_file() is not None:
        if file.length:
            await file.truncate(0)
    elif file.length < needed:
        await file.truncate(needed)
    if file.length and zeros:
        await file.write_zeroes(0, file.length, may_unmap=True)


async def _preallocate(
    file: BlockIO, data_file: BlockIO | None, mode: Preallocation, size: int
) -> None:
    options = parse_options(Qcow2Options, {"driver": "qcow2", "file": "file"})
    children = {"file": file}
    if data_file is not None:
        children["data-file"] = data_file
    opened = await open_image(options, children, read_only=False)
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
