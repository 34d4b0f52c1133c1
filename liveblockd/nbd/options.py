"""The negotiation: from the greeting to the moment an export is chosen, as a state machine.

Specification: NBD doc/proto.md, "Handshake" and "Option types" (fixed newstyle; a client that does
not say so may send EXPORT_NAME alone).

Pure. ``Negotiation.feed`` takes bytes as they come, in pieces of any size, and returns what to
send. What is not used up when an export is chosen stays in ``rest``: a client need not wait for the
answer before its first request. No input makes it hold more than ``MAX_OPTION`` bytes.

Errors: none escape. A client that breaks the protocol is ``Phase.CLOSED``, with ``problem`` set.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Protocol

from liveblockd.nbd.constants import (
    GREETING_MAGIC,
    MAX_OPTION,
    MAX_OPTION_SKIPPED,
    MAX_PAYLOAD,
    MAX_STRING,
    OPTION_MAGIC,
    OPTION_REPLY_MAGIC,
    PREFERRED_BLOCK_SIZE,
    HandshakeFlag,
    Info,
    Option,
    OptionReply,
    TransmissionFlag,
)
from liveblockd.nbd.metadata import selected

_GREETING: Final = struct.Struct(">QQH")
_CLIENT_FLAGS: Final = struct.Struct(">I")
_HEADER: Final = struct.Struct(">QII")
_REPLY: Final = struct.Struct(">QIII")
_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")
_EXPORT: Final = struct.Struct(">QH")
_INFO_EXPORT: Final = struct.Struct(">HQH")
_INFO_BLOCK_SIZE: Final = struct.Struct(">HIII")

#: bytes of answers after which ``feed`` takes a rest
_MAX_ANSWER: Final = 64 << 10

_SERVER_FLAGS: Final = int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
GREETING: Final = _GREETING.pack(GREETING_MAGIC, OPTION_MAGIC, _SERVER_FLAGS)


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What a client is told of an export."""

    name: str
    size: int  # bytes
    read_only: bool
    description: str = ""
    contexts: tuple[str, ...] = ()  # names of the metadata contexts it has
    minimum_block_size: int = 1  # bytes
    preferred_block_size: int = PREFERRED_BLOCK_SIZE  # bytes

    def transmission_flags(self, *, structured: bool) -> int:
        """What can be done with it; a change is refused where it is read-only."""
        flags = (
            TransmissionFlag.HAS_FLAGS
            | TransmissionFlag.SEND_FLUSH
            | TransmissionFlag.SEND_FUA
            | TransmissionFlag.SEND_CACHE
            | TransmissionFlag.CAN_MULTI_CONN
        )
        if self.read_only:
            flags |= TransmissionFlag.READ_ONLY
        else:
            flags |= (
                TransmissionFlag.SEND_TRIM
                | TransmissionFlag.SEND_WRITE_ZEROES
                | TransmissionFlag.SEND_FAST_ZERO
            )
        if structured:
            flags |= TransmissionFlag.SEND_DF
        return int(flags)


class Directory(Protocol):
    """The exports a client may ask for, as they are at the moment it asks."""

    def find(self, name: str) -> ExportInfo | None:
        """The export called ``name``."""

    def listed(self) -> Iterable[ExportInfo]:
        """All of them, in the order in which they were made."""


class Phase(enum.Enum):
    """Where a negotiation stands."""

    FLAGS = enum.auto()  # the greeting was sent, the client's flags are awaited
    OPTIONS = enum.auto()
    TLS = enum.auto()  # send what was returned, start TLS, call ``secured``
    TRANSMISSION = enum.auto()  # an export was chosen
    CLOSED = enum.auto()  # send what was returned, then close


class OptionError(Exception):
    """An option cannot be done; the client is told and may go on."""

    def __init__(self, reply: OptionReply, message: str) -> None:
        super().__init__(message)
        self.reply = reply
        self.message = message


class Negotiation:
    """One client's negotiation."""

    def __init__(self, directory: Directory, *, tls: bool = False) -> None:
        self._tls = tls  # nothing is told before TLS
        self._secure = False
        self.phase = Phase.FLAGS
        self.export: ExportInfo | None = None  # the one chosen
        self.structured = False  # structured replies were agreed on
        #: names of the contexts agreed on; the id of each is its index
        self.contexts: tuple[str, ...] = ()
        self.problem = ""  # why the connection is to be closed; "" after ABORT
        #: options that can be done wait in the input: call ``feed`` again, with nothing
        self.more = False
        self._directory = directory
        self._input = bytearray()
        self._skip = 0  # bytes of a refused option that are still to come
        self._fixed = False
        self._no_zeroes = False
        self._contexts_of: str | None = None  # export that ``contexts`` was agreed on for

    @property
    def rest(self) -> bytes:
        """Bytes that came after the option which chose the export."""
        return bytes(self._input)

    def feed(self, data: bytes | bytearray | memoryview) -> bytes:
        """Take the next bytes of the client; what is to be sent to it now.

        Stops with ``more`` set when the answers get long, for a client may never read them.
        """
        self._input += data
        self.more = False
        out = bytearray()
        step = True
        while step and self.phase in (Phase.FLAGS, Phase.OPTIONS):
            if len(out) > _MAX_ANSWER:
                self.more = True
                break
            step = self._flags() if self.phase is Phase.FLAGS else self._option(out)
        if self.phase is Phase.CLOSED:
            self._input.clear()
        return bytes(out)

    def _close(self, problem: str) -> bool:
        self.phase = Phase.CLOSED
        self.problem = problem
        return False

    def _take(self, length: int) -> bytes:
        data = bytes(self._input[:length])
        del self._input[:length]
        return data

    def _flags(self) -> bool:
        if len(self._input) < _CLIENT_FLAGS.size:
            return False
        (flags,) = _CLIENT_FLAGS.unpack(self._take(_CLIENT_FLAGS.size))
        if flags & ~_SERVER_FLAGS:
            return self._close(f"unknown client flags {flags:#x}")
        self._fixed = bool(flags & HandshakeFlag.FIXED_NEWSTYLE)
        self._no_zeroes = bool(flags & HandshakeFlag.NO_ZEROES)
        self.phase = Phase.OPTIONS
        return True

    def _option(self, out: bytearray) -> bool:
        """Do one option if all of it is here; whether there may be more to do."""
        if self._skip:
            part = min(self._skip, len(self._input))
            del self._input[:part]
            self._skip -= part
            if self._skip:
                return False
        if len(self._input) < _HEADER.size:
            return False
        magic, option, length = _HEADER.unpack_from(self._input)
        if magic != OPTION_MAGIC:
            return self._close(f"option magic {magic:#x}")
        if length > MAX_OPTION_SKIPPED:
            return self._close(f"option {option} of {length} bytes")
        if not self._fixed and option != Option.EXPORT_NAME:
            return self._close(f"option {option} without fixed newstyle")
        if option == Option.EXPORT_NAME and length > MAX_STRING:
            return self._close(f"export name of {length} bytes")
        handler = self._handlers.get(option)
        if self._tls and not self._secure and option not in (Option.STARTTLS, Option.ABORT):
            if option == Option.EXPORT_NAME:
                return self._close("an export asked for without TLS")
            del self._input[: _HEADER.size]
            self._skip = length
            why = f"Option 0x{option:x} not permitted before TLS"
            out += self._refuse(option, OptionError(OptionReply.ERR_TLS_REQD, why))
            return True
        if handler is None or length > MAX_OPTION:
            del self._input[: _HEADER.size]
            self._skip = length
            out += self._refuse(option, self._why_not(option, known=handler is not None))
            return True
        if len(self._input) < _HEADER.size + length:
            return False
        del self._input[: _HEADER.size]
        try:
            out += handler(self, option, self._take(length))
        except OptionError as error:
            out += self._refuse(option, error)
        return True

    @staticmethod
    def _why_not(option: int, *, known: bool) -> OptionError:
        if known:
            return OptionError(OptionReply.ERR_TOO_BIG, "option is too large")
        return OptionError(OptionReply.ERR_UNSUP, f"unsupported option {option}")

    def _refuse(self, option: int, error: OptionError) -> bytes:
        return _reply(option, error.reply, error.message.encode()[:MAX_STRING])

    # -- options

    def _export_name(self, _option: int, data: bytes) -> bytes:
        try:
            export = self._find(data.decode())
        except (UnicodeDecodeError, OptionError) as error:
            self._close(str(error))  # this option has no way to say so
            return b""
        self._choose(export)
        head = _EXPORT.pack(export.size, export.transmission_flags(structured=self.structured))
        return head if self._no_zeroes else head + bytes(124)

    def _abort(self, option: int, _data: bytes) -> bytes:
        self._close("")
        return _reply(option, OptionReply.ACK)

    def _list(self, option: int, data: bytes) -> bytes:
        _expect_empty(data)
        replies = []
        for export in self._directory.listed():
            name = export.name.encode()
            detail = export.description.encode()
            replies.append(_reply(option, OptionReply.SERVER, _U32.pack(len(name)) + name + detail))
        return b"".join(replies) + _reply(option, OptionReply.ACK)

    def _starttls(self, option: int, data: bytes) -> bytes:
        _expect_empty(data)
        if not self._tls:
            raise OptionError(OptionReply.ERR_POLICY, "TLS not configured")
        if self._secure:
            raise OptionError(OptionReply.ERR_INVALID, "TLS is negotiated already")
        if self._input:
            # Whoever put it there may not be the one that we shall talk to.
            self._close("data sent in the clear after STARTTLS")
            return b""
        self.phase = Phase.TLS
        return _reply(option, OptionReply.ACK)

    def secured(self) -> None:
        """The connection is encrypted; what was agreed on before counts no more."""
        assert self.phase is Phase.TLS
        self.phase, self._secure = Phase.OPTIONS, True
        self.structured = False
        self.contexts, self._contexts_of = (), None

    def _structured_reply(self, option: int, data: bytes) -> bytes:
        _expect_empty(data)
        if self.structured:
            raise OptionError(OptionReply.ERR_INVALID, "structured replies are negotiated already")
        self.structured = True
        return _reply(option, OptionReply.ACK)

    def _info(self, option: int, data: bytes) -> bytes:
        reader = _Reader(data)
        name = reader.string()
        wanted = [reader.u16() for _ in range(reader.u16())]
        reader.end()
        export = self._find(name)
        facts = []
        if Info.NAME in wanted:
            facts.append(_U16.pack(Info.NAME) + export.name.encode())
        if export.description:
            facts.append(_U16.pack(Info.DESCRIPTION) + export.description.encode())
        facts.append(
            _INFO_BLOCK_SIZE.pack(
                Info.BLOCK_SIZE, export.minimum_block_size, export.preferred_block_size, MAX_PAYLOAD
            )
        )
        flags = export.transmission_flags(structured=self.structured)
        facts.append(_INFO_EXPORT.pack(Info.EXPORT, export.size, flags))
        out = [_reply(option, OptionReply.INFO, fact) for fact in facts]
        out.append(_reply(option, OptionReply.ACK))
        if option == Option.GO:
            self._choose(export)
        return b"".join(out)

    def _meta_context(self, option: int, data: bytes) -> bytes:
        listing = option == Option.LIST_META_CONTEXT
        if not listing:  # an option that fails leaves no context selected
            self.contexts, self._contexts_of = (), None
            if not self.structured:
                raise OptionError(
                    OptionReply.ERR_INVALID, "metadata contexts need structured replies"
                )
        reader = _Reader(data)
        name = reader.string()
        queries = [reader.string() for _ in range(reader.u32())]
        reader.end()
        export = self._find(name)
        chosen = selected(queries, export.contexts, listing=listing)
        if not listing:
            self.contexts, self._contexts_of = tuple(chosen), name
        replies = [
            _reply(
                option,
                OptionReply.META_CONTEXT,
                _U32.pack(0 if listing else context_id) + context.encode(),
            )
            for context_id, context in enumerate(chosen)
        ]
        return b"".join(replies) + _reply(option, OptionReply.ACK)

    def _find(self, name: str) -> ExportInfo:
        export = self._directory.find(name)
        if export is None:
            raise OptionError(OptionReply.ERR_UNKNOWN, f"export '{name}' not present")
        return export

    def _choose(self, export: ExportInfo) -> None:
        if self._contexts_of != export.name:
            self.contexts = ()
        self.export = export
        self.phase = Phase.TRANSMISSION

    _Handler = Callable[["Negotiation", int, bytes], bytes]
    _handlers: Final[dict[int, _Handler]] = {
        Option.EXPORT_NAME: _export_name,
        Option.ABORT: _abort,
        Option.LIST: _list,
        Option.STARTTLS: _starttls,
        Option.INFO: _info,
        Option.GO: _info,
        Option.STRUCTURED_REPLY: _structured_reply,
        Option.LIST_META_CONTEXT: _meta_context,
        Option.SET_META_CONTEXT: _meta_context,
    }


class _Reader:
    """Members of an option's data, in order; OptionError where they do not fit."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def _bytes(self, length: int) -> bytes:
        start = self._position
        if len(self._data) - start < length:
            raise OptionError(OptionReply.ERR_INVALID, "inconsistent lengths in option")
        self._position = start + length
        return self._data[start : self._position]

    def u16(self) -> int:
        (number,) = _U16.unpack(self._bytes(_U16.size))
        return int(number)

    def u32(self) -> int:
        (number,) = _U32.unpack(self._bytes(_U32.size))
        return int(number)

    def string(self) -> str:
        length = self.u32()
        if length > MAX_STRING:
            raise OptionError(OptionReply.ERR_INVALID, f"string of {length} bytes is too long")
        try:
            return self._bytes(length).decode()
        except UnicodeDecodeError:
            raise OptionError(OptionReply.ERR_INVALID, "string is not UTF-8") from None

    def end(self) -> None:
        if self._position != len(self._data):
            raise OptionError(OptionReply.ERR_INVALID, "option has unexpected length")


def _expect_empty(data: bytes) -> None:
    if data:
        raise OptionError(OptionReply.ERR_INVALID, "option has unexpected length")


def _reply(option: int, kind: OptionReply, data: bytes = b"") -> bytes:
    return _REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data
