"""``image check``: is an image sound, and repair of what is not.

Runs on an event loop of its own. Exit status, words and JSON are those of ``qemu-img check``:
0 sound, 1 the check failed, 2 corruptions, 3 leaks, 63 a format that knows no checks.
"""

from __future__ import annotations

import argparse
from typing import Any, Final

from liveblockd.errors import BlockError
from liveblockd.formats.qcow2.check import CheckResult, Fix
from liveblockd.formats.qcow2.checking import check_image
from liveblockd.imagetool.images import Images, ToolError, reason
from liveblockd.imagetool.output import say, show_json, warn
from liveblockd.storage.driver import BlockIO

FAILED, CORRUPT, LEAKS, UNSUPPORTED = 1, 2, 3, 63

_MEMBERS: Final = (
    "image-end-offset", "corruptions", "leaks", "corruptions-fixed", "leaks-fixed",
    "total-clusters", "allocated-clusters", "fragmented-clusters", "compressed-clusters",
)  # fmt: skip


async def run(args: argparse.Namespace) -> int:
    """The command."""
    fix = {None: Fix.NONE, "leaks": Fix.LEAKS, "all": Fix.ALL}[args.repair]
    human = args.output == "human"
    async with Images(args.objects) as images:
        image_format = args.format or await images.format_of(
            args.filename, force_share=args.force_share
        )
        if image_format != "qcow2":
            if args.format:
                await images.open(args.filename, image_format, force_share=args.force_share)
            raise ToolError("This image format does not support checks", UNSUPPORTED)
        if fix and args.force_share:
            raise ToolError(
                f"Could not open '{args.filename}': force-share=on can only be used with "
                "read-only images"
            )
        file = await images.open_file(
            args.filename, writable=bool(fix), force_share=args.force_share
        )
        result = await _check(file, fix, args)
        if result.corruptions_fixed or result.leaks_fixed:
            fixed = (result.leaks_fixed, result.corruptions_fixed)
            if human:
                say(
                    "The following inconsistencies were found and repaired:\n\n"
                    f"    {fixed[0]} leaked clusters\n    {fixed[1]} corruptions\n\n"
                    "Double checking the fixed image now...",
                    quiet=args.quiet,
                )
            result = await _check(file, Fix.NONE, args)
            result.leaks_fixed, result.corruptions_fixed = fixed
        if human:
            say(describe(result), quiet=args.quiet)
        else:
            show_json(image_check(result, args.filename, image_format))
    if result.check_errors:
        return FAILED
    return CORRUPT if result.corruptions else LEAKS if result.leaks else 0


async def _check(file: BlockIO, fix: Fix, args: argparse.Namespace) -> CheckResult:
    try:
        result = await check_image(file, fix=fix)
    except BlockError as error:
        raise ToolError(f"Could not open '{args.filename}': {reason(error)}", FAILED) from error
    except OSError as error:
        raise ToolError(f"Check failed: {reason(error)}", FAILED) from error
    if not args.quiet:
        for message in result.messages:
            warn(message)
        if result.suppressed:
            warn(f"... and {result.suppressed} more")
    return result


def image_check(result: CheckResult, filename: str, image_format: str) -> dict[str, Any]:
    """ImageCheck of qapi/block-core.json: counts of 0 are left out, but for the errors."""
    info: dict[str, Any] = {
        "filename": filename,
        "format": image_format,
        "check-errors": result.check_errors,
    }
    for name in _MEMBERS:
        if value := getattr(result, name.replace("-", "_")):
            info[name] = value
    return info


def describe(result: CheckResult) -> str:
    """The lines for people."""
    lines = []
    if result.clean:
        lines.append("No errors were found on the image.")
    if result.corruptions:
        lines.append(
            f"\n{result.corruptions} errors were found on the image.\n"
            "Data may be corrupted, or further writes to the image may corrupt it."
        )
    if result.leaks:
        lines.append(
            f"\n{result.leaks} leaked clusters were found on the image.\n"
            "This means waste of disk space, but no harm to data."
        )
    if result.check_errors:
        lines.append(f"\n{result.check_errors} internal errors have occurred during the check.")
    total, allocated = result.total_clusters, result.allocated_clusters
    if total and allocated:
        lines.append(
            f"{allocated}/{total} = {allocated * 100 / total:.2f}% allocated, "
            f"{result.fragmented_clusters * 100 / allocated:.2f}% fragmented, "
            f"{result.compressed_clusters * 100 / allocated:.2f}% compressed clusters"
        )
    if result.image_end_offset:
        lines.append(f"Image end offset: {result.image_end_offset}")
    return "\n".join(lines)
