"""Requests out of bytes and replies into bytes, for the phase after the negotiation.

Specification: NBD doc/proto.md, "Transmission".

Pure. A request is a tuple unpacked from a buffer in place; ``Request`` gives its members names
off the fast path. ``refusal`` holds every rule about which requests are taken. Replies are built
whole; the bytes of a READ are never copied here: ``data_chunk`` and ``simple_reply`` give the
header that goes before them.

Errors: ``ProtocolError`` when the peer has lost step (bad magic); nothing can follow but the end
of the connection.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from liveblockd.nbd.constants import (
    CHUNK_DONE,
    MAX_PAYLOAD,
    MAX_STRING,
    REQUEST_MAGIC,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    ChunkType,
    Command,
    CommandFlag,
)
from liveblockd.nbd.errno import NbdError

#: magic, flags, command, cookie, offset, length
REQUEST: Final = struct.Struct(">IHHQQI")
REQUEST_SIZE: Final = REQUEST.size

_SIMPLE: Final = struct.Struct(">IIQ")
_CHUNK: Final = struct.Struct(">IHHQI")
_DATA: Final = struct.Struct(">IHHQIQ")
_HOLE: Final = struct.Struct(">IHHQIQI")
_ERROR: Final = struct.Struct(">IH")
_STATUS: Final = struct.Struct(">I")
_OFFSET: Final = struct.Struct(">Q")
_OFFSET_LENGTH: Final = struct.Struct(">QI")

Buffer = bytes | bytearray | memoryview


class ProtocolError(Exception):
    """The peer broke the protocol in a way that leaves nothing to answer."""


class Request(NamedTuple):
    """One request; a WRITE is followed by ``length`` bytes."""

    flags: int
    command: int
    cookie: int
    offset: int  # bytes
    length: int  # bytes

    def to_bytes(self) -> bytes:
        """As a client sends it, without the payload."""
        return REQUEST.pack(REQUEST_MAGIC, *self)


class Refusal(NamedTuple):
    """Why a request is not done: the error and a sentence for the user."""

    error: NbdError
    message: str


# plain integers: ``~`` of an IntFlag keeps to the flags it knows and would let others through
_VALID_FLAGS: Final[dict[Command, int]] = {
    # every command takes FUA where the export offers it, even those that write nothing
    Command.READ: int(CommandFlag.FUA),
    Command.WRITE: int(CommandFlag.FUA),
    Command.FLUSH: int(CommandFlag.FUA),
    Command.TRIM: int(CommandFlag.FUA),
    Command.CACHE: int(CommandFlag.FUA),
    Command.WRITE_ZEROES: int(CommandFlag.FUA | CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO),
    Command.BLOCK_STATUS: int(CommandFlag.FUA | CommandFlag.REQ_ONE),
}
_CHANGING: Final = frozenset((Command.WRITE, Command.TRIM, Command.WRITE_ZEROES))
_LIMITED: Final = frozenset((Command.READ, Command.WRITE, Command.CACHE))


def refusal(
    request: Request, *, size: int, read_only: bool, structured: bool, contexts: bool
) -> Refusal | None:
    """Why ``request`` cannot be taken by an export of ``size`` bytes, or None when it can.

    ``structured``: structured replies were negotiated; ``contexts``: metadata contexts were.
    DISC has no reply and is not asked about.
    """
    flags, command, _, offset, length = request
    try:
        kind = Command(command)
    except ValueError:
        return Refusal(NbdError.EINVAL, f"unknown request type {command}")
    if kind in _LIMITED and length > MAX_PAYLOAD:
        return Refusal(NbdError.EINVAL, f"length {length} exceeds the maximum of {MAX_PAYLOAD}")
    if read_only and kind in _CHANGING:
        return Refusal(NbdError.EPERM, "export is read-only")
    if kind is not Command.FLUSH and offset + length > size:
        writes = kind is Command.WRITE or kind is Command.WRITE_ZEROES
        error = NbdError.ENOSPC if writes else NbdError.EINVAL
        return Refusal(error, f"{kind.name} at {offset} of {length} bytes is past the end, {size}")
    valid = _VALID_FLAGS[kind]
    if kind is Command.READ and structured:
        valid |= int(CommandFlag.DF)
    if flags & ~valid:
        return Refusal(NbdError.EINVAL, f"unsupported flags {flags:#x} for {kind.name}")
    if kind is Command.BLOCK_STATUS:
        if not contexts:
            return Refusal(NbdError.EINVAL, "no metadata context was negotiated")
        if not length:
            return Refusal(NbdError.EINVAL, "BLOCK_STATUS needs a length")
    return None


# -- replies

#: magic, error, cookie: ``simple_reply`` where a call counts
pack_simple: Final = _SIMPLE.pack


def simple_reply(cookie: int, error: int = 0) -> bytes:
    """A whole reply; of a READ that went well the data follows."""
    return _SIMPLE.pack(SIMPLE_REPLY_MAGIC, error, cookie)


def data_chunk(cookie: int, offset: int, length: int) -> bytes:
    """Header of the only chunk of the reply to a READ; ``length`` bytes of data follow."""
    return _DATA.pack(
        STRUCTURED_REPLY_MAGIC, CHUNK_DONE, 1, cookie, length + 8, offset
    )  # 1: ChunkType.OFFSET_DATA


def hole_chunk(cookie: int, offset: int, length: int) -> bytes:
    """The whole reply to a READ of zeros."""
    return _HOLE.pack(
        STRUCTURED_REPLY_MAGIC, CHUNK_DONE, ChunkType.OFFSET_HOLE, cookie, 12, offset, length
    )


def none_chunk(cookie: int) -> bytes:
    """The end of a reply that went well."""
    return _CHUNK.pack(STRUCTURED_REPLY_MAGIC, CHUNK_DONE, ChunkType.NONE, cookie, 0)


def error_chunk(cookie: int, error: int, message: str = "") -> bytes:
    """The end of a reply that did not."""
    text = message.encode()[:MAX_STRING]
    return b"".join(
        (
            _CHUNK.pack(
                STRUCTURED_REPLY_MAGIC, CHUNK_DONE, ChunkType.ERROR, cookie, _ERROR.size + len(text)
            ),
            _ERROR.pack(error, len(text)),
            text,
        )
    )


def status_chunk(
    cookie: int, context_id: int, extents: Sequence[tuple[int, int]], *, done: bool
) -> bytes:
    """Extents (length, flags) of one metadata context."""
    assert extents
    words = [word for extent in extents for word in extent]
    return b"".join(
        (
            _CHUNK.pack(
                STRUCTURED_REPLY_MAGIC,
                CHUNK_DONE if done else 0,
                ChunkType.BLOCK_STATUS,
                cookie,
                _STATUS.size + 4 * len(words),
            ),
            _STATUS.pack(context_id),
            struct.pack(f">{len(words)}I", *words),
        )
    )


# -- the client's side


class SimpleReply(NamedTuple):
    """A simple reply; of a READ that went well the data follows."""

    error: int
    cookie: int


class Chunk(NamedTuple):
    """One chunk of a structured reply."""

    done: bool
    type: int
    cookie: int
    payload: bytes

    def data(self) -> tuple[int, bytes]:
        """Of OFFSET_DATA: offset and bytes."""
        return _OFFSET.unpack_from(self.payload)[0], self.payload[_OFFSET.size :]

    def hole(self) -> tuple[int, int]:
        """Of OFFSET_HOLE: offset and length."""
        offset, length = _OFFSET_LENGTH.unpack(self.payload)
        return offset, length

    def error(self) -> tuple[int, str]:
        """Of ERROR and ERROR_OFFSET: the error and its message."""
        error, length = _ERROR.unpack_from(self.payload)
        return error, self.payload[_ERROR.size : _ERROR.size + length].decode(errors="replace")

    def extents(self) -> tuple[int, list[tuple[int, int]]]:
        """Of BLOCK_STATUS: context id and (length, flags) of each extent."""
        words: Iterable[int] = struct.unpack_from(
            f">{(len(self.payload) - 4) // 4}I", self.payload, _STATUS.size
        )
        numbers = iter(words)
        return _STATUS.unpack_from(self.payload)[0], list(zip(numbers, numbers, strict=True))


def parse_reply(buffer: Buffer, position: int = 0) -> tuple[SimpleReply | Chunk, int] | None:
    """The reply at ``position`` and where it ends; None when more bytes are needed.

    Raises ProtocolError for anything that is neither a reply nor a chunk of a sane length.
    """
    if len(buffer) - position < _SIMPLE.size:
        return None
    magic, error, cookie = _SIMPLE.unpack_from(buffer, position)
    if magic == SIMPLE_REPLY_MAGIC:
        return SimpleReply(error, cookie), position + _SIMPLE.size
    if magic != STRUCTURED_REPLY_MAGIC:
        raise ProtocolError(f"reply magic {magic:#x}")
    if len(buffer) - position < _CHUNK.size:
        return None
    _, flags, kind, cookie, length = _CHUNK.unpack_from(buffer, position)
    if length > MAX_PAYLOAD + _DATA.size:
        raise ProtocolError(f"chunk of {length} bytes")
    start = position + _CHUNK.size
    if len(buffer) - start < length:
        return None
    payload = bytes(memoryview(buffer)[start : start + length])
    return Chunk(bool(flags & CHUNK_DONE), kind, cookie, payload), start + length
