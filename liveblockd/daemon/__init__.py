"""The running daemon: its process, its start from the command line, its orderly end."""

from __future__ import annotations

import gc
import logging
import os

from liveblockd.cli import CommandLine
from liveblockd.daemon.process import Background, go_to_background, raise_open_files_limit


def run_daemon(prog: str, line: CommandLine) -> int:
    """Run until somebody asks for the end; the exit status."""
    background = go_to_background() if line.daemonize else Background()
    raise_open_files_limit()
    # numpy would start a thread a core for linear algebra, of which there is none here
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # pydantic would look through everything that is installed, for plugins of its own
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    # What is imported stays: the collector would only look through all of it, again and again. It
    # comes back when the parts of the daemon are there.
    gc.disable()
    # imported after the fork: nothing of it shall run in the process that only waits
    from liveblockd.daemon.core import Daemon
    from liveblockd.runtime.loop import run
    from liveblockd.runtime.streams import LogHandler

    logging.basicConfig(
        format=f"{prog}: %(message)s", level=logging.WARNING, handlers=[LogHandler()]
    )

    async def serve() -> int:
        return await Daemon(prog, line, background).run()

    return run(serve())
