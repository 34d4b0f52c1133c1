"""What the image commands print: JSON as qemu-img does, progress, and lines for people.

Runs on: pure, but for writing to stdout and stderr. Errors: ``OSError`` of a closed pipe.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def say(text: str, *, quiet: bool = False) -> None:
    """A line on stdout."""
    if not quiet:
        sys.stdout.write(text + "\n")


def warn(text: str) -> None:
    """A line on stderr."""
    sys.stderr.write(f"liveblockctl: {text}\n")


def show_json(value: Any) -> None:
    """``value`` as qemu-img prints it."""
    say(json.dumps(value, indent=4, ensure_ascii=True))


class Progress:
    """``    (12.50/100%)``, again and again on one line; as ``qemu-img -p``."""

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._last = -1.0

    def update(self, done: int, total: int) -> None:
        """``done`` of ``total`` bytes."""
        if not self._shown:
            return
        percent = 100.0 * done / total if total else 100.0
        # As QEMU, a line for each percent: a terminal that is slow must not hold up a copy.
        if percent - self._last >= 1 or (percent >= 100 > self._last):
            self._last = percent
            sys.stdout.write(f"    ({percent:3.2f}/100%)\r")
            sys.stdout.flush()

    def end(self) -> None:
        """Leave the line."""
        if self._shown:
            sys.stdout.write("\n")
            sys.stdout.flush()
