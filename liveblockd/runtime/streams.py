"""The three standard streams: always open, and no reason to wait.

Whoever starts the daemon may have closed them, and then the next files that are opened, disk images
say, get their numbers: what a library prints in its last moment would be written into a disk. And
whoever reads them may have stopped (a full pipe, a terminal on hold): a line that cannot be written
now is left out, as guests are not to wait for it.

Specification: poll(2), pipe(7). Runs anywhere; ``open_standard_streams`` on the main thread, before
anything else is opened. Errors: none escape from ``say``; OSError without /dev/null.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import select
import sys
from typing import TextIO

#: A pipe that can be written to takes at least so much (PIPE_BUF).
_PIECE = 4096


def open_standard_streams() -> None:
    """Have /dev/null where descriptors 0, 1 and 2 are closed; ``sys.stdout`` and the like too."""
    fd = os.open(os.devnull, os.O_RDWR)
    while fd <= 2:
        os.set_inheritable(fd, True)
        fd = os.open(os.devnull, os.O_RDWR)
    os.close(fd)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, open(number, mode, closefd=False, encoding="utf-8"))  # noqa: SIM115


def say(text: str, stream: TextIO) -> bool:
    """Write a line now; False, and all or the rest of it is left out, where that would wait."""
    try:
        stream.flush()
        fd = stream.fileno()
    except io.UnsupportedOperation:  # no file: a test, say
        stream.write(f"{text}\n")
        return True
    except (OSError, ValueError):
        return False
    left = memoryview(f"{text}\n".encode(errors="backslashreplace"))
    ready = select.poll()
    ready.register(fd, select.POLLOUT)
    with contextlib.suppress(OSError):  # nobody reads it any more, the disk is full
        while left and ready.poll(0) == [(fd, select.POLLOUT)]:
            left = left[os.write(fd, left[:_PIECE]) :]
    return not left


class LogHandler(logging.Handler):
    """Writes to stderr by ``say``."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, unless that would wait."""
        try:
            say(self.format(record), sys.stderr)
        except Exception:
            self.handleError(record)
