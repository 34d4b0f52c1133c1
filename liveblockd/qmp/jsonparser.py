"""Makes values of JSON tokens, one token at a time, with QEMU's recovery from errors.

A syntax error is reported at the token that shows it. What follows is then dropped until
braces and brackets, counted apart from the start of the value, are both balanced; a closing one too
many or a lexical error ends the dropping at once (qmp-spec, section 2.5 "Handling of errors").

Pure. No recursion, so depth costs no stack. Bounds of one value: ``MAX_NESTING`` levels,
``MAX_TOKENS`` tokens, ``MAX_TOKEN_SIZE`` bytes of tokens. Raises nothing; errors are values.
"""

from __future__ import annotations

import enum
import math
import re
import sys
from dataclasses import dataclass
from typing import Any, Final

from liveblockd.qmp.jsonlexer import MAX_TOKEN_SIZE, Kind, Token

MAX_NESTING: Final = 1024
MAX_TOKENS: Final = 2 << 20


@dataclass(frozen=True, slots=True)
class ParseError:
    """Input that is no JSON; ``message`` is what the client is told."""

    message: str


class _UnfitError(Exception):
    """The token does not fit here."""


class _Expect(enum.Enum):
    VALUE = enum.auto()
    VALUE_OR_END = enum.auto()
    COMMA_OR_END = enum.auto()
    KEY = enum.auto()
    KEY_OR_END = enum.auto()
    COLON = enum.auto()
    COMMA_OR_CLOSE = enum.auto()


_UNFIT: Final = {
    _Expect.VALUE: "expecting value",
    _Expect.VALUE_OR_END: "expecting value",
    _Expect.COMMA_OR_END: "expected ',' or ']'",
    _Expect.KEY: "expecting key",
    _Expect.KEY_OR_END: "expecting key",
    _Expect.COLON: "expecting ':'",
    _Expect.COMMA_OR_CLOSE: "expected ',' or '}'",
}
_NOTHING: Final = object()
_KEYWORDS: Final = {b"true": True, b"false": False, b"null": None}


class Parser:
    """The value under way."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._stack: list[dict[str, Any] | list[Any]] = []
        self._keys: list[str] = []  # of the objects on the stack that wait for a value
        self._expect = _Expect.VALUE
        self._braces = self._brackets = 0
        self._tokens = self._size = 0
        self._dropping = False

    @property
    def idle(self) -> bool:
        """Whether no value has begun and nothing is being dropped."""
        return not self._tokens

    def token(self, token: Token) -> tuple[bool, Any]:
        """Take a token: ``(True, value or ParseError)`` when there is something to tell."""
        self._tokens += 1
        self._size += len(token.text)
        if token.kind is Kind.ERROR:
            return self._end(_error(token, f"stray '{_show(token.text)}'"))
        if token.kind is Kind.TOO_LONG:
            return self._end(ParseError("JSON token size limit exceeded"))
        self._count(token.kind)
        is_open = self._is_open()
        if self._dropping:
            if not is_open:
                self._reset()
            return False, None
        outcome = self._over_limit()
        if outcome is None:
            try:
                outcome = self._place(token)
            except _UnfitError as reason:
                outcome = _error(token, str(reason))
        if not is_open:
            return self._end(outcome)
        if isinstance(outcome, ParseError):
            self._stack, self._keys, self._dropping = [], [], True
            return True, outcome
        return False, None

    def _end(self, outcome: Any) -> tuple[bool, Any]:
        assert outcome is not _NOTHING, "brackets are balanced but the value is not complete"
        self._reset()
        return True, outcome

    def _count(self, kind: Kind) -> None:
        if kind is Kind.LCURLY:
            self._braces += 1
        elif kind is Kind.RCURLY:
            self._braces -= 1
        elif kind is Kind.LSQUARE:
            self._brackets += 1
        elif kind is Kind.RSQUARE:
            self._brackets -= 1

    def _is_open(self) -> bool:
        return min(self._braces, self._brackets) >= 0 < self._braces + self._brackets

    def _over_limit(self) -> ParseError | None:
        if self._size > MAX_TOKEN_SIZE:
            return ParseError("JSON token size limit exceeded")
        if self._tokens > MAX_TOKENS:
            return ParseError("JSON token count limit exceeded")
        if self._braces + self._brackets > MAX_NESTING:
            return ParseError("JSON nesting depth limit exceeded")
        return None

    def _place(self, token: Token) -> Any:
        """Put a token where it belongs; the whole value if that completes it, else _NOTHING."""
        expect, kind = self._expect, token.kind
        if expect in (_Expect.VALUE, _Expect.VALUE_OR_END):
            if kind is Kind.RSQUARE and expect is _Expect.VALUE_OR_END:
                return self._put(self._stack.pop())
            return self._value(token)
        if expect in (_Expect.KEY, _Expect.KEY_OR_END):
            if kind is Kind.STRING:
                self._keys.append(string(token.text))
                self._expect = _Expect.COLON
                return _NOTHING
            if kind is Kind.RCURLY and expect is _Expect.KEY_OR_END:
                return self._put(self._stack.pop())
        elif expect is _Expect.COLON:
            if kind is Kind.COLON:
                self._expect = _Expect.VALUE
                return _NOTHING
        elif kind is Kind.COMMA:
            self._expect = _Expect.VALUE if expect is _Expect.COMMA_OR_END else _Expect.KEY
            return _NOTHING
        elif kind is (Kind.RSQUARE if expect is _Expect.COMMA_OR_END else Kind.RCURLY):
            return self._put(self._stack.pop())
        raise _UnfitError(_UNFIT[expect])

    def _value(self, token: Token) -> Any:
        match token.kind:
            case Kind.LCURLY:
                self._stack.append({})
                self._expect = _Expect.KEY_OR_END
                return _NOTHING
            case Kind.LSQUARE:
                self._stack.append([])
                self._expect = _Expect.VALUE_OR_END
                return _NOTHING
            case Kind.STRING:
                return self._put(string(token.text))
            case Kind.INTEGER:
                return self._put(integer(token.text))
            case Kind.FLOAT:
                return self._put(number(token.text))
            case Kind.KEYWORD:
                if token.text not in _KEYWORDS:
                    raise _UnfitError(f"invalid keyword '{_show(token.text)}'")
                return self._put(_KEYWORDS[token.text])
        raise _UnfitError(_UNFIT[self._expect])

    def _put(self, value: Any) -> Any:
        """Store a complete value in what is open around it; the value itself at the top."""
        if not self._stack:
            return value
        container = self._stack[-1]
        if isinstance(container, list):
            container.append(value)
            self._expect = _Expect.COMMA_OR_END
        else:
            key = self._keys.pop()
            if key in container:
                raise _UnfitError("duplicate key")
            container[key] = value
            self._expect = _Expect.COMMA_OR_CLOSE
        return _NOTHING


def _error(token: Token, reason: str) -> ParseError:
    return ParseError(f"{token.line}:{token.column}: JSON parse error, {reason}")


#: Bytes of a token that an error message shows.
_MAX_SHOWN: Final = 256


def _show(text: bytes) -> str:
    return text[:_MAX_SHOWN].decode("utf-8", "replace")


def integer(text: bytes | str) -> int | float:
    """An int where 64 bits hold it, signed or unsigned, else a float."""
    if len(text) > 20:
        return number(text)
    value = int(text)
    return value if -(2**63) <= value < 2**64 else float(value)


def number(text: bytes | str) -> float:
    """A finite float: what is out of range becomes the largest there is."""
    value = float(text)
    return value if math.isfinite(value) else math.copysign(sys.float_info.max, value)


_ESCAPE: Final = re.compile(rb"\\(?:u([0-9a-fA-F]{4})|(.))", re.DOTALL)
_PLAIN_ESCAPES: Final = {
    b'"': '"',
    b"'": "'",
    b"\\": "\\",
    b"/": "/",
    b"b": "\b",
    b"f": "\f",
    b"n": "\n",
    b"r": "\r",
    b"t": "\t",
}
_NONCHARACTER: Final = re.compile(
    "[\ufdd0-\ufdef"
    + "".join(chr(p << 16 | low) for p in range(17) for low in (0xFFFE, 0xFFFF))
    + "]"
)


def string(text: bytes) -> str:
    """The text of a string token, quotes and escapes undone; raises _UnfitError."""
    if b"\\" not in text:
        return _decode(text[1:-1])
    parts: list[str] = []
    position, end = 1, len(text) - 1
    while (found := text.find(b"\\", position, end)) >= 0:
        parts.append(_decode(text[position:found]))
        escape = _ESCAPE.match(text, found)
        assert escape is not None
        position = escape.end()
        if escape[1] is None and escape[2] != b"u":
            if escape[2] not in _PLAIN_ESCAPES:
                raise _UnfitError("invalid escape sequence in string")
            parts.append(_PLAIN_ESCAPES[escape[2]])
            continue
        point = int(escape[1], 16) if escape[1] else -1
        if 0xD800 <= point < 0xDC00 and (low := _ESCAPE.match(text, position)) and low[1]:
            trail = int(low[1], 16)
            if 0xDC00 <= trail < 0xE000:
                point = 0x10000 + ((point & 0x3FF) << 10) + (trail & 0x3FF)
                position = low.end()
        if point < 0 or 0xD800 <= point < 0xE000 or _NONCHARACTER.match(chr(point)):
            raise _UnfitError(
                f"{_show(text[found : max(found + 6, position)])} is not a valid Unicode character"
            )
        parts.append(chr(point))
    parts.append(_decode(text[position:end]))
    return "".join(parts)


def _decode(raw: bytes) -> str:
    if raw.isascii():
        return raw.decode("ascii")
    try:
        decoded = raw.replace(b"\xc0\x80", b"\0").decode("utf-8")
    except UnicodeDecodeError:
        raise _UnfitError("invalid UTF-8 sequence in string") from None
    if _NONCHARACTER.search(decoded):
        raise _UnfitError("invalid UTF-8 sequence in string")
    return decoded
