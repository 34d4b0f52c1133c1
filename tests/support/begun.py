"""A write as an export makes it: at once, begun, or by the coroutine, whichever is taken first."""

from __future__ import annotations

import asyncio
from typing import Protocol

from liveblockd.storage.driver import Buffer, Done


class Writable(Protocol):
    """A backend or a driver."""

    def write_nowait(self, offset: int, data: Buffer) -> bool: ...
    def begin_write(self, offset: int, data: Buffer, done: Done) -> bool: ...
    async def write(self, offset: int, data: Buffer) -> None: ...


async def begin(target: Writable, offset: int, data: Buffer) -> bool:
    """Begin a write and wait for its end; False if it was refused. Raises OSError."""
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def done(error: OSError | None) -> None:
        if error is None:
            ended.set_result(None)
        else:
            ended.set_exception(error)

    # A view of a buffer that is overwritten at once: whoever needs it longer has to copy it.
    lent = bytearray(data)
    if not target.begin_write(offset, memoryview(lent), done):
        return False
    lent[:] = b"\xee" * len(lent)
    await ended
    return True


async def write_as_export(target: Writable, offset: int, data: Buffer) -> str:
    """Which of the three it was: "now", "begun" or "waited"."""
    if target.write_nowait(offset, data):
        return "now"
    if await begin(target, offset, data):
        return "begun"
    await target.write(offset, data)
    return "waited"
