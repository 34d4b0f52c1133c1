"""``image convert``: the bytes of images, whatever their chains, into a new one.

Runs on an event loop of its own; files of the host are copied by workers, and workers compress.
What the chain says is zeros is not read, and zeros in its data take no space in the target. The
target is durable when the command ends, unless ``-t unsafe`` says that nobody needs that.

Invariants: pieces are written in the order of their offsets, so that what is contiguous for the
guest is so in the file. Exit status and words are those of ``qemu-img convert``.
"""

from __future__ import annotations

import argparse
from typing import Final

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.image import Qcow2
from liveblockd.graph.node import Node
from liveblockd.imagetool import create, creation
from liveblockd.imagetool.bitmap import check_bitmaps, copy_bitmaps
from liveblockd.imagetool.copying import PIECE, Copy
from liveblockd.imagetool.creation import Options
from liveblockd.imagetool.images import (
    Images,
    OptionText,
    ToolError,
    check_cache_mode,
    reason,
    size_of,
)
from liveblockd.imagetool.source import Source, load_snapshot
from liveblockd.storage.driver import BlockDriver

_SECTOR: Final = 512


async def run(args: argparse.Namespace) -> int:
    """The command."""
    sparse = _check(args)
    async with Images(args.objects) as images:
        nodes = [
            await images.open(name, args.format, force_share=args.force_share)
            for name in args.sources
        ]
        if args.snapshot is not None:
            await load_snapshot(nodes[0], args.snapshot)
        backends = [await images.use(node) for node in nodes]
        options: Options = {}
        if not args.no_create:
            options = _options(args)
        backing = "backing_file" in options if not args.no_create else args.backing is not None
        if backing and len(nodes) > 1:
            raise ToolError(
                "Having a backing file for the target makes no sense when concatenating multiple "
                "input images"
            )
        source = Source(backends, above_backing=backing)
        if not args.no_create:
            await _create(images, args, options, source.length)
        target = await images.open(
            args.target,
            None if isinstance(args.target, OptionText) else args.output_format,
            writable=True,
            no_flush=args.target_cache == "unsafe",
            secrets={k: str(v) for k, v in options.items() if k.endswith("key-secret")},
        )
        _check_target(args, nodes, target)
        writer = await images.use(target, writable=True)
        if writer.length < source.length:
            raise ToolError("output file is smaller than input file")
        blank = (not args.no_create and not backing) or args.target_is_zero
        if not args.target_is_zero and target.driver.driver_name == "luks":
            blank = False  # what a hole decrypts to is noise
        copy = Copy(images.workers, source, writer, sparse=sparse, blank=blank)
        copy.compress = args.compress
        copy.show(args.progress, 0 if args.rate is None else size_of(args.rate, "rate limit"))
        try:
            await copy.run()
        except OSError as error:
            raise ToolError(f"error while converting: {reason(error)}") from error
        if args.bitmaps:
            await copy_bitmaps(images, nodes[0], target)
    return 0


def _check(args: argparse.Namespace) -> int:
    """The bytes of zeros that become a hole; ToolError for options that do not go together."""
    if not 1 <= (8 if args.coroutines is None else args.coroutines) <= 16:
        raise ToolError(
            "Invalid number of coroutines. Allowed number of coroutines is between 1 and 16"
        )
    check_cache_mode(args.target_cache)
    check_cache_mode(args.source_cache, "source cache")
    if args.target_image_opts and not args.no_create:
        raise ToolError("--target-image-opts requires use of -n flag")
    if args.options and args.no_create:
        raise ToolError("-o has no effect when skipping image creation")
    if args.target_is_zero and not args.no_create:
        raise ToolError("--target-is-zero requires use of -n flag")
    if args.copy_range and (args.sparse_size or args.compress):
        option = "-S" if args.sparse_size else "-c"
        raise ToolError(f"Cannot enable copy offloading when {option} is used")
    if args.snapshot is not None and len(args.sources) > 1:
        raise ToolError("No support for concatenating multiple snapshot")
    if args.skip_broken_bitmaps and not args.bitmaps:
        raise ToolError("Use of --skip-broken-bitmaps requires --bitmaps")
    if args.rate is not None:
        size_of(args.rate, "rate limit")
    sparse = (
        size_of(args.sparse_size, "buffer size for sparse output") if args.sparse_size else 4096
    )
    if sparse % _SECTOR or sparse > 16 << 20:
        raise ToolError(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up "
            "to 16777216. Select 0 to disable sparse detection (fully allocates output)."
        )
    return min(sparse, PIECE)


def _options(args: argparse.Namespace) -> Options:
    options = creation.parse_options(args.options, args.output_format)
    for name, value in (("backing_file", args.backing), ("backing_fmt", args.backing_format)):
        if value is not None:
            if args.output_format in ("raw", "luks"):
                name = args.output_format
                raise ToolError(f"Backing file not supported for file format '{name}'")
            options[name] = value
    if "backing_file" in options and "backing_fmt" not in options:
        raise ToolError("Use of backing file requires explicit backing format")
    if args.compress:
        if args.output_format in ("raw", "luks"):
            raise ToolError("Compression not supported for this file format")
        if options.get("preallocation", "off") != "off":
            raise ToolError("Compression and preallocation not supported at the same time")
        if "data_file" in options:
            raise ToolError("Compression not supported with an external data file")
    if args.bitmaps and args.output_format != "qcow2":
        raise ToolError(f"Format driver '{args.output_format}' does not support bitmaps")
    return options


def _check_target(args: argparse.Namespace, sources: list[Node], target: Node) -> None:
    name = target.driver.driver_name
    if args.compress and type(target.driver).write_compressed is BlockDriver.write_compressed:
        raise ToolError("Compression not supported for this file format")
    if args.bitmaps:
        if len(sources) > 1:
            raise ToolError("Copying bitmaps only possible with single source")
        check_bitmaps(sources[0], skip_broken=args.skip_broken_bitmaps)
        if not isinstance(sources[0].driver, Qcow2):
            raise ToolError("Source lacks bitmap support")
        if not isinstance(target.driver, Qcow2):
            raise ToolError(f"Format driver '{name}' does not support bitmaps")


async def _create(images: Images, args: argparse.Namespace, options: Options, size: int) -> None:
    options["size"] = size  # whatever -o says, as qemu-img
    try:
        if "backing_fmt" in options and "backing_file" not in options:
            raise BlockError("Backing format cannot be used without backing file")
        await create.create_image(images, args.target, args.output_format, options)
    except (BlockError, OSError) as error:
        raise ToolError(
            f"{args.target}: error while converting {args.output_format}: {reason(error)}"
        ) from error
