"""The client's side of the negotiation, from the greeting to an export, as a state machine.

Specification: NBD doc/proto.md, "Handshake" and "Option types" (fixed newstyle).

Pure. ``ClientNegotiation.feed`` takes bytes as they come and returns what to send; when ``export``
is set, the transmission begins with what is in ``rest``. Asked for are structured replies,
base:allocation and the block sizes; a server without one of them is served all the same.

Errors: ``ProtocolError`` for a server that breaks the protocol, ``RefusedError`` for one that does
not want us. No input makes it hold more than ``MAX_OPTION`` bytes.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final

from liveblockd.nbd.constants import (
    BASE_ALLOCATION,
    GREETING_MAGIC,
    MAX_OPTION,
    MAX_PAYLOAD,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
)
from liveblockd.nbd.transmission import ProtocolError

_GREETING: Final = struct.Struct(">QQH")
_U32: Final = struct.Struct(">I")
_HEADER: Final = struct.Struct(">QII")
_REPLY: Final = struct.Struct(">QIII")
_EXPORT: Final = struct.Struct(">QH")
_INFO_EXPORT: Final = struct.Struct(">HQH")
_INFO_BLOCK_SIZE: Final = struct.Struct(">HIII")
#: zeros after the answer to EXPORT_NAME
_PADDING: Final = 124
#: bytes; offsets are signed in QEMU and in files
MAX_SIZE: Final = (1 << 63) - 1


class RefusedError(Exception):
    """The server said no; the text is for people."""


@dataclass(frozen=True, slots=True)
class RemoteExport:
    """What the server said of the export; sizes in bytes."""

    size: int
    flags: int
    #: READ is answered by chunks
    structured: bool
    #: id of the context that block status is asked of, None where the server does not know it
    allocation: int | None
    minimum_block: int = 1
    maximum_payload: int = MAX_PAYLOAD

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""
        return bool(self.flags & TransmissionFlag.READ_ONLY)


class _Stage(enum.Enum):
    GREETING = enum.auto()
    TLS = enum.auto()
    SECURING = enum.auto()
    STRUCTURED = enum.auto()
    META = enum.auto()
    GO = enum.auto()
    EXPORT_NAME = enum.auto()
    DONE = enum.auto()


class ClientNegotiation:
    """One connection until ``export`` is set."""

    def __init__(self, name: str, *, tls: bool = False, context: str = BASE_ALLOCATION) -> None:
        self._tls = tls
        self._context = context.encode()
        self.export: RemoteExport | None = None
        self._name = name.encode()
        self._buffer = bytearray()
        self._stage = _Stage.GREETING
        self._no_zeroes = False
        self._structured = False
        self._allocation: int | None = None
        self._size = -1
        self._flags = 0
        self._minimum_block = 1
        self._maximum_payload = MAX_PAYLOAD

    @property
    def rest(self) -> bytes:
        """What came after the negotiation."""
        return bytes(self._buffer)

    def feed(self, data: bytes) -> bytes:
        """Take what was received; what to send."""
        self._buffer += data
        out = bytearray()
        while self._stage not in (_Stage.DONE, _Stage.SECURING):
            answer = self._step()
            if answer is None:
                break
            out += answer
        return bytes(out)

    @property
    def wants_tls(self) -> bool:
        """The server waits for TLS: nothing is fed until ``secured`` was called."""
        return self._stage is _Stage.SECURING

    def secured(self) -> bytes:
        """TLS is spoken; what to send."""
        assert self._stage is _Stage.SECURING
        self._stage = _Stage.STRUCTURED
        return _option(Option.STRUCTURED_REPLY)

    def _step(self) -> bytes | None:
        """None: more bytes are needed."""
        if self._stage is _Stage.GREETING:
            return self._greeting()
        if self._stage is _Stage.EXPORT_NAME:
            return self._export_name()
        if len(self._buffer) < _REPLY.size:
            return None
        magic, option, kind, length = _REPLY.unpack_from(self._buffer)
        if magic != OPTION_REPLY_MAGIC:
            raise ProtocolError(f"option reply magic {magic:#x}")
        if length > MAX_OPTION:
            raise ProtocolError(f"option reply of {length} bytes")
        if len(self._buffer) < _REPLY.size + length:
            return None
        payload = bytes(self._buffer[_REPLY.size : _REPLY.size + length])
        del self._buffer[: _REPLY.size + length]
        match self._stage:
            case _Stage.TLS:
                return self._after_starttls(option, kind, payload)
            case _Stage.STRUCTURED:
                return self._after_structured(option, kind)
            case _Stage.META:
                return self._after_meta(option, kind, payload)
            case _:
                return self._after_go(option, kind, payload)

    def _greeting(self) -> bytes | None:
        if len(self._buffer) < _GREETING.size:
            return None
        magic, style, flags = _GREETING.unpack_from(self._buffer)
        if magic != GREETING_MAGIC:
            raise ProtocolError("Bad initial magic received")
        if style != OPTION_MAGIC:
            raise ProtocolError("the server speaks the oldstyle protocol")
        del self._buffer[: _GREETING.size]
        self._no_zeroes = bool(flags & HandshakeFlag.NO_ZEROES)
        own = flags & int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
        if self._tls:
            if not flags & HandshakeFlag.FIXED_NEWSTYLE:
                raise RefusedError("Server does not support STARTTLS")
            self._stage = _Stage.TLS
            return _U32.pack(own) + _option(Option.STARTTLS)
        if not flags & HandshakeFlag.FIXED_NEWSTYLE:
            return _U32.pack(own) + self._ask_export_name()
        self._stage = _Stage.STRUCTURED
        return _U32.pack(own) + _option(Option.STRUCTURED_REPLY)

    def _after_starttls(self, option: int, kind: int, payload: bytes) -> bytes:
        _check(option, Option.STARTTLS)
        if kind != OptionReply.ACK:
            _check_error(kind)
            raise RefusedError(_reason(kind, payload, self._name))
        if self._buffer:
            raise ProtocolError("data sent in the clear after STARTTLS")
        self._stage = _Stage.SECURING
        return b""

    def _ask_export_name(self) -> bytes:
        self._stage = _Stage.EXPORT_NAME
        return _option(Option.EXPORT_NAME, self._name)

    def _after_structured(self, option: int, kind: int) -> bytes:
        _check(option, Option.STRUCTURED_REPLY)
        if kind == OptionReply.ACK:
            self._structured = True
            self._stage = _Stage.META
            return _option(
                Option.SET_META_CONTEXT,
                _string(self._name) + _U32.pack(1) + _string(self._context),
            )
        _check_error(kind)
        return self._ask_go()

    def _after_meta(self, option: int, kind: int, payload: bytes) -> bytes:
        _check(option, Option.SET_META_CONTEXT)
        if kind == OptionReply.META_CONTEXT:
            if len(payload) < _U32.size:
                raise ProtocolError("a meta context without an id")
            if payload[_U32.size :] == self._context:
                self._allocation = _U32.unpack_from(payload)[0]
            return b""
        if kind != OptionReply.ACK:
            _check_error(kind)
        return self._ask_go()

    def _ask_go(self) -> bytes:
        self._stage = _Stage.GO
        wanted = struct.pack(">HH", 1, Info.BLOCK_SIZE)
        return _option(Option.GO, _string(self._name) + wanted)

    def _after_go(self, option: int, kind: int, payload: bytes) -> bytes:
        _check(option, Option.GO)
        if kind == OptionReply.INFO:
            self._info(payload)
            return b""
        if kind == OptionReply.ACK:
            if self._size < 0:
                raise ProtocolError("the server did not say how large the export is")
            self._done()
            return b""
        _check_error(kind)
        if kind == OptionReply.ERR_UNSUP:
            return self._ask_export_name()
        raise RefusedError(_reason(kind, payload, self._name))

    def _info(self, payload: bytes) -> None:
        kind = int.from_bytes(payload[:2], "big")
        if kind == Info.EXPORT and len(payload) == _INFO_EXPORT.size:
            _, self._size, self._flags = _INFO_EXPORT.unpack(payload)
        elif kind == Info.BLOCK_SIZE and len(payload) == _INFO_BLOCK_SIZE.size:
            _, least, _, most = _INFO_BLOCK_SIZE.unpack(payload)
            if least == 0 or least & (least - 1) or least > 65536 or most < least:
                raise ProtocolError(f"block sizes {least} to {most}")
            self._minimum_block = least
            self._maximum_payload = max(least, min(most, MAX_PAYLOAD) // least * least)

    def _export_name(self) -> bytes | None:
        wanted = _EXPORT.size + (0 if self._no_zeroes else _PADDING)
        if len(self._buffer) < wanted:
            return None
        self._size, self._flags = _EXPORT.unpack_from(self._buffer)
        del self._buffer[:wanted]
        self._done()
        return b""

    def _done(self) -> None:
        if self._size > MAX_SIZE:
            raise ProtocolError(f"an export of {self._size} bytes")
        self._stage = _Stage.DONE
        self.export = RemoteExport(
            self._size,
            self._flags,
            self._structured,
            self._allocation,
            self._minimum_block,
            self._maximum_payload,
        )


def _option(option: Option, data: bytes = b"") -> bytes:
    return _HEADER.pack(OPTION_MAGIC, option, len(data)) + data


def _string(data: bytes) -> bytes:
    return _U32.pack(len(data)) + data


def _check(option: int, expected: Option) -> None:
    if option != expected:
        raise ProtocolError(f"a reply to option {option} instead of {int(expected)}")


def _check_error(kind: int) -> None:
    if not kind >> 31:
        raise ProtocolError(f"an option reply of type {kind}")


def _reason(kind: int, payload: bytes, name: bytes) -> str:
    shown = name.decode(errors="replace")
    if kind == OptionReply.ERR_UNKNOWN:
        return f"Requested export not available: '{shown}'"
    text = payload.decode(errors="replace")[:200]
    try:
        known = OptionReply(kind).name
    except ValueError:
        known = f"error {kind:#x}"
    return f"the server refused export '{shown}' ({known}){': ' if text else ''}{text}"
