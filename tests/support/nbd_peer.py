"""An NBD server that is not ours, on the socket ``nbd.sock``."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

#: seconds; only a server that does not start takes so long
TIMEOUT = 30


@contextlib.contextmanager
def server(directory: Path, *command: object) -> Iterator[subprocess.Popen[bytes]]:
    """It runs in ``directory`` and listens there while the context lasts; then it is killed."""
    path = directory / "nbd.sock"
    process = subprocess.Popen([str(part) for part in command], cwd=directory)
    try:
        deadline = time.monotonic() + TIMEOUT
        while not path.exists():
            assert process.poll() is None, "no start"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.wait()
