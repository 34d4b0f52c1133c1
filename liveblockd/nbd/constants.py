"""Names for the numbers of the NBD protocol.

Specification: NBD doc/proto.md, "Values"; docs/interop/nbd.txt of QEMU for the ``qemu:`` contexts.

Pure. Flags are compared as plain integers on the request path: an ``IntFlag`` operation takes
ten times as long.
"""

from __future__ import annotations

import enum
from typing import Final

GREETING_MAGIC: Final = 0x4E42444D41474943  # "NBDMAGIC"
OPTION_MAGIC: Final = 0x49484156454F5054  # "IHAVEOPT"
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF

#: longest string, in bytes: export names, descriptions, context names, error messages
MAX_STRING: Final = 4096
#: most bytes that one READ, WRITE or CACHE may ask for; what BLOCK_SIZE says
MAX_PAYLOAD: Final = 32 << 20
#: most bytes of one option that are looked at; an honest client stays far below
MAX_OPTION: Final = 256 << 10
#: an option that claims more than this ends the connection, unread
MAX_OPTION_SKIPPED: Final = 32 << 20
#: most extents in one BLOCK_STATUS chunk; a client asks again for the rest
MAX_EXTENTS: Final = 16384
#: what BLOCK_SIZE says by default, in bytes
PREFERRED_BLOCK_SIZE: Final = 4096

BASE_ALLOCATION: Final = "base:allocation"
ALLOCATION_DEPTH: Final = "qemu:allocation-depth"
DIRTY_BITMAP: Final = "qemu:dirty-bitmap:"  # followed by the name of the bitmap


class HandshakeFlag(enum.IntFlag):
    """Of the server, in its greeting; the client's have the same bits."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Option(enum.IntEnum):
    """What a client may ask for while it negotiates."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class OptionReply(enum.IntEnum):
    """Type of the server's answer to an option; errors have bit 31."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 0x80000001
    ERR_POLICY = 0x80000002
    ERR_INVALID = 0x80000003
    ERR_TLS_REQD = 0x80000005
    ERR_UNKNOWN = 0x80000006
    ERR_SHUTDOWN = 0x80000007
    ERR_TOO_BIG = 0x80000009


class Info(enum.IntEnum):
    """Pieces of information in the answer to INFO and GO."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(enum.IntFlag):
    """What an export can do."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11


class Command(enum.IntEnum):
    """Type of a request."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(enum.IntFlag):
    """Flags of a request."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4


class ChunkType(enum.IntEnum):
    """Type of a chunk of a structured reply; errors have bit 15."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = 0x8001
    ERROR_OFFSET = 0x8002


#: flag of a chunk: the last one of its reply
CHUNK_DONE: Final = 1

#: flags of an extent of base:allocation
STATE_HOLE: Final = 1
STATE_ZERO: Final = 2
#: flag of an extent of qemu:dirty-bitmap:NAME
STATE_DIRTY: Final = 1
