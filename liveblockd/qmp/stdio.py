"""stdin and stdout as a connection, whatever they are: pipes, a terminal, sockets, files.

Runs on the event loop. A file is read at once (it ends) and written to directly; the others go
through transports. Errors: BlockError from ``open_stdio``.
"""

from __future__ import annotations

import asyncio
import os
import stat
from typing import Any

from liveblockd.errors import BlockError
from liveblockd.qmp.session import Streams


async def open_stdio(stdin: int = 0, stdout: int = 1) -> Streams:
    """Streams over copies of two descriptors; raises BlockError."""
    try:
        reader = await _open_input(os.dup(stdin))
        writer = await _open_output(os.dup(stdout), reader)
    except OSError as error:
        raise BlockError.from_os_error("Failed to open stdio", error) from None
    return Streams(reader, writer)


async def _open_input(fd: int) -> asyncio.StreamReader:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    if _is_plain(fd):
        with os.fdopen(fd, "rb") as file:
            reader.feed_data(file.read())
        reader.feed_eof()
    else:
        await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb", buffering=0)
        )
    return reader


async def _open_output(fd: int, reader: asyncio.StreamReader) -> asyncio.StreamWriter:
    loop = asyncio.get_running_loop()
    if _is_plain(fd):
        return asyncio.StreamWriter(_FileTransport(fd), _FileProtocol(), reader, loop)
    transport, output = await loop.connect_write_pipe(
        lambda: asyncio.StreamReaderProtocol(asyncio.StreamReader()),
        os.fdopen(fd, "wb", buffering=0),
    )
    return asyncio.StreamWriter(transport, output, reader, loop)


def _is_plain(fd: int) -> bool:
    """Whether it is a file or a device that no event loop can wait for (/dev/null)."""
    mode = os.fstat(fd).st_mode
    return stat.S_ISREG(mode) or (stat.S_ISCHR(mode) and not os.isatty(fd))


class _FileProtocol(asyncio.streams.FlowControlMixin):
    """The other side of ``_FileTransport``: writes never wait."""

    def _get_close_waiter(self, _stream: Any) -> asyncio.Future[None]:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done


class _FileTransport(asyncio.WriteTransport):
    """Writes at once."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd

    def write(self, data: Any) -> None:
        left = memoryview(data)
        while left and self._fd >= 0:
            left = left[os.write(self._fd, left) :]

    def is_closing(self) -> bool:
        return self._fd < 0

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def abort(self) -> None:
        self.close()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return 0, 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """There is no buffer."""

    def get_extra_info(self, _name: str, default: Any = None) -> Any:
        return default
