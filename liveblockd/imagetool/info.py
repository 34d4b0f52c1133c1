"""``image info``: what an image says of itself.

Runs on an event loop of its own. JSON and words are those of ``qemu-img info``. With
``--backing-chain`` each image is opened for itself, so that a broken chain shows up to the break.
"""

from __future__ import annotations

import argparse
from typing import Any, Final

from liveblockd.graph.info import Query
from liveblockd.imagetool.images import Images, ToolError
from liveblockd.imagetool.output import say, show_json
from liveblockd.qmp.hmp.images import describe_image

#: members of ImageInfo that are for those who run the image
_NOT_SHOWN: Final = ("limits", "backing-image")


async def run(args: argparse.Namespace) -> int:
    """The command."""
    found = []
    filename: str | None = args.filename
    image_format = args.format
    seen: set[str] = set()
    while filename is not None:
        if filename in seen:
            raise ToolError(f"Backing file '{filename}' creates an infinite loop.")
        seen.add(filename)
        info = await _one(args, filename, image_format)
        found.append(info)
        if not args.backing_chain:
            break
        filename = info.get("full-backing-filename")
        if filename is None and "backing-filename" in info:
            raise ToolError("Could not determine the backing file name")
        image_format = info.get("backing-filename-format")
    if args.output == "json":
        show_json(found if args.backing_chain else found[0])
    else:
        say("\n".join(describe_image(info) for info in found).removesuffix("\n"))
    return 0


async def _one(args: argparse.Namespace, filename: str, image_format: str | None) -> dict[str, Any]:
    async with Images(args.objects) as images:
        node = await images.look_at(filename, image_format, force_share=args.force_share)
        info = Query(flat=True).image(node)
        return {name: value for name, value in info.items() if name not in _NOT_SHOWN}
