"""``image measure``: how many bytes a new image would take, empty or as a copy of another.

Runs on an event loop of its own. Options, words and figures are those of ``qemu-img measure``; what
the figures stand on is in ``formats/qcow2/measure``. Nothing is made or written.
"""

from __future__ import annotations

import argparse
from errno import ENOTSUP
from typing import Final, NamedTuple

from liveblockd.errors import BlockError
from liveblockd.formats.luks import new_header_bytes
from liveblockd.formats.qcow2.bitmaps import MAX_GRANULARITY_BITS
from liveblockd.formats.qcow2.layout import Geometry
from liveblockd.formats.qcow2.measure import allocated_bytes, bitmap_bytes
from liveblockd.formats.qcow2.newimage import NewImage, check_options
from liveblockd.formats.qcow2.preallocate import Preallocation
from liveblockd.graph.backend import Backend
from liveblockd.imagetool import creation
from liveblockd.imagetool.creation import Encryption, Options
from liveblockd.imagetool.images import Images, ToolError, reason, size_of
from liveblockd.imagetool.output import say, show_json
from liveblockd.imagetool.source import Holds, Source, load_snapshot
from liveblockd.storage.registry import find_driver

_SECTOR: Final = 512


class Figures(NamedTuple):
    """A BlockMeasureInfo of qapi/block-core.json, in bytes."""

    required: int
    fully_allocated: int
    #: None where bitmaps cannot be copied
    bitmaps: int | None = None


async def run(args: argparse.Namespace) -> int:
    """The command."""
    size = _check(args)
    image_format = args.output_format
    if image_format not in ("qcow2", "raw", "luks"):
        try:
            find_driver(image_format)
        except BlockError:
            raise ToolError(f"Unknown file format '{image_format}'") from None
        raise ToolError(f"Block driver '{image_format}' does not support size measurement")
    async with Images(args.objects) as images:
        options = creation.parse_options(args.options, args.output_format)
        source: Backend | None = None
        if size is None:
            node = await images.open(args.filename, args.format, force_share=args.force_share)
            if args.snapshot is not None:
                await load_snapshot(node, args.snapshot)
            source = await images.use(node)
        try:
            figures = await _measure(images, args.output_format, options, size or 0, source)
        except (BlockError, OSError) as error:
            raise ToolError(reason(error)) from error
    if args.output == "json":
        bitmaps = {} if figures.bitmaps is None else {"bitmaps": figures.bitmaps}
        known = {"required": figures.required, "fully-allocated": figures.fully_allocated}
        show_json(bitmaps | known)
        return 0
    say(f"required size: {figures.required}")
    say(f"fully allocated size: {figures.fully_allocated}")
    if figures.bitmaps is not None:
        say(f"bitmaps size: {figures.bitmaps}")
    return 0


def _check(args: argparse.Namespace) -> int | None:
    """The size that is asked about, if any; ToolError."""
    size = None if args.size is None else size_of(args.size)
    if len(args.filenames) > 1:
        raise ToolError("At most one filename argument is allowed.")
    args.filename = args.filenames[0] if args.filenames else None
    if args.filename is None and (args.image_opts or args.format or args.snapshot):
        raise ToolError("--image-opts, -f, and -l require a filename argument.")
    if args.filename is None and size is None:
        raise ToolError("Either --size N or one filename must be specified.")
    if args.filename is not None and size is not None:
        raise ToolError("--size N cannot be used together with a filename.")
    return size


async def _measure(
    images: Images, image_format: str, options: Options, size: int, source: Backend | None
) -> Figures:
    if source is not None:
        size = source.node.driver.virtual_size
    size = -(-size // _SECTOR) * _SECTOR
    if image_format == "qcow2":
        return await _measure_qcow2(images, options, size, source)
    if image_format == "luks":
        size += _header_bytes(images, creation.luks_encryption(options))
    return Figures(size, size)


def _header_bytes(images: Images, wanted: Encryption) -> int:
    images.graph.environment.secret(wanted.secret)  # whose absence is an error
    return new_header_bytes(wanted.key_bytes)


async def _measure_qcow2(
    images: Images, options: Options, size: int, source: Backend | None
) -> Figures:
    geometry = _geometry(options)
    header = 0
    if (wanted := creation.encryption(options)) is not None:
        clusters = geometry.clusters(_header_bytes(images, wanted))
        header = clusters * geometry.cluster_size
    whole = allocated_bytes(geometry, size) + header
    tables = whole - geometry.clusters(size) * geometry.cluster_size
    # What a backing file will show of the source is not known: perhaps nothing.
    if options.get("preallocation") in (Preallocation.FALLOC, Preallocation.FULL) or (
        source is not None and "backing_file" in options
    ):
        return Figures(whole, whole, _bitmaps(geometry, source))
    held = 0 if source is None else await _clusters_with_data(source, geometry)
    return Figures(tables + held * geometry.cluster_size, whole, _bitmaps(geometry, source))


def _geometry(options: Options) -> Geometry:
    """Raises BlockError for options that ``create`` would refuse, whatever the size."""
    arguments = creation.qcow2_arguments(options)
    mode = arguments["preallocation"]
    if mode not in tuple(Preallocation):
        raise BlockError(f"Parameter 'preallocation' does not accept value '{mode}'")
    return check_options(
        NewImage(
            0,
            cluster_size=arguments["cluster_size"],
            version=arguments["version"],
            refcount_bits=arguments["refcount_bits"],
            extended_l2=arguments["extended_l2"],
        )
    )


async def _clusters_with_data(source: Backend, geometry: Geometry) -> int:
    """Clusters of the new image that hold something of what the chain of ``source`` has."""
    clusters = counted = 0  # clusters up to ``counted`` have been looked at
    async for run in Source([source]).runs():
        if run.holds is Holds.DATA:
            first = max(counted, run.offset >> geometry.cluster_bits)
            counted = max(counted, geometry.clusters(run.offset + run.length))
            clusters += counted - first
    return clusters


def _bitmaps(geometry: Geometry, source: Backend | None) -> int | None:
    if source is None or geometry.version < 3:
        return None
    node = source.node
    try:
        node.driver.check_new_bitmap("", 1 << MAX_GRANULARITY_BITS, 0)
    except BlockError as error:
        if error.errno == ENOTSUP:  # the source can have none
            return None
    kept = [
        (bitmap.name, bitmap.granularity)
        for bitmap in node.bitmaps
        if bitmap.persistent and not bitmap.inconsistent
    ]
    return bitmap_bytes(geometry, node.driver.virtual_size, kept)
