"""The daemon as a process: background, limit of files, PID file, systemd's messages and sockets.

Specifications: daemon(7), getrlimit(2), sd_notify(3), sd_listen_fds(3).

Runs on the main thread; ``go_to_background`` before there is a loop or a thread. Errors:
``ConfigError`` where the start fails.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import resource
import socket
import sys
from collections.abc import Mapping
from typing import NoReturn

from liveblockd.errors import ConfigError

log = logging.getLogger(__name__)

_LISTEN_FDS_START = 3
#: bytes that a PID file has at most (zeros after a power cut)
_PID_FILE = 32


class Background:
    """The parent that waits until everything is up; ``None`` streams without ``--daemonize``."""

    def __init__(self, pipe: int | None = None) -> None:
        self._pipe = pipe

    def ready(self) -> None:
        """All is up: the parent exits with status 0, and the terminal is let go of."""
        if self._pipe is None:
            return
        null = os.open(os.devnull, os.O_RDWR)
        sys.stdout.flush()
        sys.stderr.flush()
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        os.close(null)
        with contextlib.suppress(OSError):  # a parent that was killed does not matter
            os.write(self._pipe, b"\0")
        os.close(self._pipe)
        self._pipe = None


def go_to_background() -> Background:
    """Fork twice; returns in the daemon. The first process exits when that is up, or has failed.

    Errors of the start still reach the terminal. The working directory stays, because relative
    names of images and sockets go on meaning what they meant.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        os.close(writing)
        _exit_with_the_daemon(pid, reading)
    os.close(reading)
    os.setsid()
    if os.fork():  # not the leader of the session: it never gets a terminal
        os._exit(0)
    return Background(writing)


def _exit_with_the_daemon(pid: int, reading: int) -> NoReturn:
    """0 if the daemon says that it is up; an end of the pipe without a word says it has failed."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
    status = 1
    with contextlib.suppress(OSError):
        status = 0 if os.read(reading, 1) == b"\0" else 1
    os._exit(status)


def raise_open_files_limit() -> None:
    """Let the process open as many files as its hard limit allows.

    Long chains of many drives need more than the usual 1024, which is for select(2) alone.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # a filter of system calls: then it stays
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class PidFile:
    """A file with the process ID, locked as long as the process lives."""

    def __init__(self, path: str) -> None:
        self._path = os.path.abspath(path)
        self._fd: int | None = None
        try:
            self._fd = self._locked(path)
            # it is about to be emptied: somebody may have given the name of a disk image
            found = os.pread(self._fd, _PID_FILE + 1, 0)
            if len(found) > _PID_FILE or found.strip(b"0123456789 \r\n\0"):
                os.close(self._fd)
                self._fd = None
                raise ConfigError(f"cannot create PID file: '{path}' is a file of something else")
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as exc:
            self.remove()
            raise ConfigError(
                f"cannot create PID file: Could not create '{path}': {exc.strerror}"
            ) from exc

    def _locked(self, path: str) -> int:
        while True:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with contextlib.suppress(FileNotFoundError):
                    # the one whose file it was may have removed it between open and lock
                    if os.path.samestat(os.fstat(fd), os.stat(self._path)):
                        return fd
            except BlockingIOError as exc:
                os.close(fd)
                raise ConfigError(
                    f"cannot create PID file: '{path}' belongs to a running process"
                ) from exc
            except OSError:
                os.close(fd)
                raise
            os.close(fd)

    def remove(self) -> None:
        """Remove the file; a second time is harmless."""
        if self._fd is None:
            return
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._fd), os.stat(self._path)):
                os.unlink(self._path)
        os.close(self._fd)
        self._fd = None


class Notifier:
    """systemd's side of the daemon; without NOTIFY_SOCKET every call does nothing."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        given = os.environ if environment is None else environment
        self._address = given.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):
            self._address = "\0" + self._address[1:]
        self._watchdog = 0.0
        if given.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
            with contextlib.suppress(ValueError):
                self._watchdog = int(given.get("WATCHDOG_USEC", "0")) / 1e6

    @property
    def watchdog_interval(self) -> float:
        """Seconds between two ``WATCHDOG=1``, half of what systemd allows; 0: none wanted."""
        return self._watchdog / 2 if self._address and self._watchdog > 0 else 0.0

    def send(self, *assignments: str) -> None:
        """Send ``READY=1`` and the like."""
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
                to.setblocking(False)
                to.sendto("\n".join(assignments).encode(), self._address)
        except OSError as exc:
            log.warning("cannot notify the service manager: %s", exc)


def inherited_fd(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The number of the descriptor that ``systemd`` or ``systemd:NAME`` means, else ``text``."""
    kind, _, name = text.partition(":")
    if kind != "systemd":
        return text
    given = os.environ if environment is None else environment
    count = given.get("LISTEN_FDS", "")
    if given.get("LISTEN_PID") != str(os.getpid()) or not count.isdecimal() or count == "0":
        raise ConfigError("no socket was passed by systemd")
    names = given.get("LISTEN_FDNAMES", "").split(":")
    if not name:
        if int(count) > 1:
            raise ConfigError("more than one socket was passed by systemd: use systemd:NAME")
        return str(_LISTEN_FDS_START)
    if name not in names[: int(count)]:
        raise ConfigError(f"no socket named '{name}' was passed by systemd")
    return str(_LISTEN_FDS_START + names.index(name))
