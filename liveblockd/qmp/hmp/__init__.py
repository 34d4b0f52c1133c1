"""The human monitor: one table of commands, and an interactive session with a line editor."""

from __future__ import annotations

from liveblockd.qmp.hmp.table import run_line

__all__ = ["run_line"]
