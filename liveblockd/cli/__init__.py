"""The command line: qemu-storage-daemon's syntax, QEMU's ``-drive`` and ``-qmp``, ``--config``.

It turns words into values and does no I/O; ``liveblockd.daemon`` acts on them.
"""

from __future__ import annotations

from liveblockd.cli.arguments import Action, CommandLine, parse_command_line

__all__ = ["Action", "CommandLine", "parse_command_line"]
