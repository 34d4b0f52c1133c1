"""Entry point of ``liveblockd`` and of ``python -m liveblockd``.

Help, version and wrong options are answered without importing the daemon.
"""

from __future__ import annotations

import os
import sys

from liveblockd import __version__
from liveblockd.cli import parse_command_line
from liveblockd.cli.arguments import HELP
from liveblockd.errors import ConfigError
from liveblockd.runtime.streams import open_standard_streams


def main() -> int:
    """Run the command line; the exit status."""
    open_standard_streams()
    prog = os.path.basename(sys.argv[0]).removesuffix(".py")
    if prog == "__main__":
        prog = "liveblockd"
    try:
        line = parse_command_line(sys.argv[1:])
        if line.show is None:
            from liveblockd.daemon import run_daemon

            return run_daemon(prog, line)
    except ConfigError as exc:
        sys.stderr.write(f"{prog}: {exc}\n")
        return 1
    sys.stdout.write(_text(line.show, prog))
    return 0


def _text(show: str, prog: str) -> str:
    if show == "help":
        return HELP.format(prog=prog)
    if show == "version":
        return f"{prog} version {__version__}\n"
    from liveblockd.daemon.drivers import driver_names

    return f"Supported formats: {' '.join(driver_names())}\n"


if __name__ == "__main__":
    sys.exit(main())
