"""An ImageInfo of qapi/block-core.json as ``qemu-img info`` prints it.

Pure: values in, text out.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any, Final

_UNITS: Final = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")


def human_size(size: int) -> str:
    """``1.25 MiB``: three digits, binary units."""
    value, unit = float(size), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value /= 1024
        unit += 1
    return f"{value:.3g} {_UNITS[unit]}B"


def describe_image(image: Mapping[str, Any]) -> str:
    """The lines of one image, each with its newline."""
    lines = [
        f"image: {image['filename']}",
        f"file format: {image['format']}",
        f"virtual size: {human_size(image['virtual-size'])} ({image['virtual-size']} bytes)",
    ]
    actual = image.get("actual-size")
    lines.append(f"disk size: {'unavailable' if actual is None else human_size(actual)}")
    if image.get("encrypted"):
        lines.append("encrypted: yes")
    if image.get("cluster-size"):
        lines.append(f"cluster_size: {image['cluster-size']}")
    if image.get("dirty-flag"):
        lines.append("cleanly shut down: no")
    if image.get("backing-filename"):
        lines.append(f"backing file: {_backing(image)}")
        if image.get("backing-filename-format"):
            lines.append(f"backing file format: {image['backing-filename-format']}")
    text = "\n".join(lines) + "\n"
    if image.get("snapshots"):
        text += "Snapshot list:\n" + describe_snapshots(image["snapshots"])
    specific = image.get("format-specific")
    if specific and specific.get("data"):
        text += "Format specific information:\n" + format_members(specific["data"])
    return text


def _backing(image: Mapping[str, Any]) -> str:
    written = image["backing-filename"]
    full = image.get("full-backing-filename")
    if full is None:
        return f"{written} (cannot determine actual path)"
    return str(written) if full == written else f"{written} (actual path: {full})"


def format_members(data: Mapping[str, Any], depth: int = 1) -> str:
    """What is special to a format, each line with its newline."""
    text = ""
    for key, value in data.items():
        label = "    " * depth + key.replace("-", " ") + ":"
        if isinstance(value, Mapping):
            text += f"{label}\n{format_members(value, depth + 1)}"
        elif isinstance(value, list):
            text += f"{label}\n{_elements(value, depth + 1)}"
        else:
            text += f"{label} {_scalar(value)}\n"
    return text


def _elements(values: Sequence[Any], depth: int) -> str:
    text = ""
    for index, value in enumerate(values):
        label = "    " * depth + f"[{index}]:"
        if isinstance(value, Mapping):
            text += f"{label}\n{format_members(value, depth + 1)}"
        else:
            text += f"{label} {_scalar(value)}\n"
    return text


def _scalar(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def describe_snapshots(snapshots: Sequence[Mapping[str, Any]], *, of_all: bool = False) -> str:
    """The table of internal snapshots; those ``of_all`` disks have one id on each: none is told."""
    row = "{:<9} {:<16} {:>8}{:>20}{:>13}{:>11}\n".format
    text = row("ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT")
    for snapshot in snapshots:
        seconds, milliseconds = divmod(
            snapshot["vm-clock-sec"] * 1000 + snapshot["vm-clock-nsec"] // 1_000_000, 1000
        )
        minutes, second = divmod(seconds, 60)
        hours, minute = divmod(minutes, 60)
        date = datetime.datetime.fromtimestamp(snapshot["date-sec"])
        text += row(
            "--" if of_all else snapshot["id"],
            snapshot["name"],
            human_size(snapshot["vm-state-size"]),
            date.strftime("%Y-%m-%d %H:%M:%S"),
            f"{hours:02}:{minute:02}:{second:02}.{milliseconds:03}",
            snapshot.get("icount", ""),
        )
    return text
