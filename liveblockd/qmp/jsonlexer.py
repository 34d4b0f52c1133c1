"""Cuts a stream of bytes into JSON tokens the way QEMU's monitor does (RFC 8259, section 2).

Beside JSON it takes 'single quoted' strings. A token that cannot be is reported with the byte that
made it so; the lexer then skips to a structural character, a control character other than tab, or
one of the bytes 0xFE and 0xFF, which no UTF-8 has: a client can send those to get back in step.

Positions are line and column of the token's first byte, from 1, counted in bytes from the start of
the connection. As in QEMU a token right behind a number, a keyword or skipped input is
reported one column further on.

Pure. A token is kept in one growing buffer and runs of bytes are taken at once, so input that comes
byte by byte costs no more than its length. Raises nothing.
"""

from __future__ import annotations

import enum
import re
from typing import Final, NamedTuple

#: Longest token, in bytes.
MAX_TOKEN_SIZE: Final = 64 << 20


class Kind(enum.IntEnum):
    """What a token is; ``ERROR`` is input that is none, ``TOO_LONG`` one past MAX_TOKEN_SIZE."""

    LCURLY = 0
    RCURLY = 1
    LSQUARE = 2
    RSQUARE = 3
    COLON = 4
    COMMA = 5
    STRING = 6
    INTEGER = 7
    FLOAT = 8
    KEYWORD = 9
    ERROR = 10
    TOO_LONG = 11


class Token(NamedTuple):
    """A token; the text of a string has its quotes and escapes still."""

    kind: Kind
    text: bytes
    line: int
    column: int


class _State(enum.IntEnum):
    START = 0
    RECOVERY = 1
    DOUBLE_QUOTED = 2
    SINGLE_QUOTED = 3
    DOUBLE_ESCAPE = 4
    SINGLE_ESCAPE = 5
    MINUS = 6
    ZERO = 7
    DIGITS = 8
    POINT = 9
    FRACTION = 10
    E = 11
    E_SIGN = 12
    EXPONENT = 13
    KEYWORD = 14


_STRUCTURAL: Final = {ord(c): kind for c, kind in zip("{}[]:,", list(Kind)[:6], strict=True)}
_SPACE: Final = re.compile(rb"[ \t\r\n]+")
_SKIPPED: Final = re.compile(rb"[^\x00-\x08\x0a-\x1f\xfe\xff\[\]{}:,]*")
#: a usual token that is in the packet as a whole, the long way spared
_WHOLE: Final = re.compile(
    rb" *(?:([{}\[\]:,])"
    rb'|("[^"\\\x00-\x1f\xfe\xff]*")'
    rb"|(-?(?:0|[1-9][0-9]*)(?=[,}\] ]))"
    rb"|((?:true|false|null)(?=[,}\] ])))"
)
_WHOLE_KINDS: Final[tuple[Kind | None, ...]] = (None, None, Kind.STRING, Kind.INTEGER, Kind.KEYWORD)
#: bytes that go on with the token in a state, taken as a run
_RUN: Final = {
    _State.DOUBLE_QUOTED: re.compile(rb'[^"\\\x00-\x1f\xfe\xff]*'),
    _State.SINGLE_QUOTED: re.compile(rb"[^'\\\x00-\x1f\xfe\xff]*"),
    _State.DIGITS: re.compile(rb"[0-9]*"),
    _State.FRACTION: re.compile(rb"[0-9]*"),
    _State.EXPONENT: re.compile(rb"[0-9]*"),
    _State.KEYWORD: re.compile(rb"[a-z]*"),
}
#: state in which a token may end at a byte that does not belong to it
_ENDS: Final = {
    _State.ZERO: Kind.INTEGER,
    _State.DIGITS: Kind.INTEGER,
    _State.FRACTION: Kind.FLOAT,
    _State.EXPONENT: Kind.FLOAT,
    _State.KEYWORD: Kind.KEYWORD,
}


def _steps(source: dict[_State, list[tuple[str, _State]]]) -> dict[_State, dict[int, _State]]:
    return {s: {ord(c): to for cs, to in rules for c in cs} for s, rules in source.items()}


_NONZERO: Final = "123456789"
_NUMBER_TAIL: Final = [(".", _State.POINT), ("eE", _State.E)]
_STEP: Final = _steps(
    {
        _State.START: [
            ('"', _State.DOUBLE_QUOTED),
            ("'", _State.SINGLE_QUOTED),
            ("-", _State.MINUS),
            ("0", _State.ZERO),
            (_NONZERO, _State.DIGITS),
            ("abcdefghijklmnopqrstuvwxyz", _State.KEYWORD),
        ],
        _State.DOUBLE_QUOTED: [("\\", _State.DOUBLE_ESCAPE)],
        _State.SINGLE_QUOTED: [("\\", _State.SINGLE_ESCAPE)],
        _State.MINUS: [("0", _State.ZERO), (_NONZERO, _State.DIGITS)],
        _State.ZERO: _NUMBER_TAIL,
        _State.DIGITS: _NUMBER_TAIL,
        _State.POINT: [("0" + _NONZERO, _State.FRACTION)],
        _State.FRACTION: [("eE", _State.E)],
        _State.E: [("+-", _State.E_SIGN), ("0" + _NONZERO, _State.EXPONENT)],
        _State.E_SIGN: [("0" + _NONZERO, _State.EXPONENT)],
        _State.EXPONENT: [],
        _State.KEYWORD: [],
    }
)
_CLOSING: Final = {_State.DOUBLE_QUOTED: ord('"'), _State.SINGLE_QUOTED: ord("'")}
_AFTER_ESCAPE: Final = {
    _State.DOUBLE_ESCAPE: _State.DOUBLE_QUOTED,
    _State.SINGLE_ESCAPE: _State.SINGLE_QUOTED,
}


class Lexer:
    """The state between two pieces of input."""

    def __init__(self) -> None:
        self._state = _State.START
        self._text = bytearray()
        self._line = self._start_line = 1
        self._column = 0  # of the byte last looked at
        self._start_column = 1

    @property
    def idle(self) -> bool:
        """Whether no token has begun."""
        return self._state is _State.START

    def skip(self, data: bytes, begin: int, end: int) -> None:
        """Count ``data[begin:end]``, which somebody else has read, as seen."""
        if begin == end:
            return
        newlines = data.count(b"\n", begin, end)
        if newlines:
            self._line += newlines
            self._column = end - data.rfind(b"\n", begin, end) - 1
        else:
            self._column += end - begin
        self._begin_here()

    def next(self, data: bytes, position: int) -> tuple[Token | None, int]:
        """The next token that ends in ``data[position:]``, and where to go on; None at its end."""
        end = len(data)
        while position < end:
            if self._state is _State.START:
                token, position = self._start(data, position)
            elif self._state is _State.RECOVERY:
                token, position = self._recover(data, position)
            else:
                token, position = self._continue(data, position)
            if token is not None:
                return token, position
        return None, position

    def _start(self, data: bytes, position: int) -> tuple[Token | None, int]:
        if match := _WHOLE.match(data, position):
            return self._whole(match, position), match.end()
        if space := _SPACE.match(data, position):
            self.skip(data, position, space.end())
            return None, space.end()
        byte = data[position]
        self._column += 1
        self._text = bytearray((byte,))
        kind = _STRUCTURAL.get(byte)
        if kind is not None:
            return self._finish(kind), position + 1
        state = _STEP[_State.START].get(byte)
        if state is None:
            return self._fail(), position + 1
        self._state = state
        return None, position + 1

    def _whole(self, match: re.Match[bytes], position: int) -> Token:
        index = match.lastindex
        assert index is not None
        text = match[index]
        spaces = match.start(index) - position
        column = self._column + spaces + 1 if spaces else self._start_column
        self._column += match.end() - position
        # behind a number or a keyword QEMU counts the byte that ended it twice
        self._start_column = self._column + (2 if index > 2 else 1)
        kind = _WHOLE_KINDS[index]
        return Token(kind or _STRUCTURAL[text[0]], text, self._start_line, column)

    def _continue(self, data: bytes, position: int) -> tuple[Token | None, int]:
        """Go on with a token that has begun: a run of bytes, then the one that decides."""
        state = self._state
        if run := _RUN.get(state):
            match = run.match(data, position)
            assert match is not None
            self._text += match[0]
            self._column += match.end() - position
            position = match.end()
            if len(self._text) > MAX_TOKEN_SIZE:
                self._state = _State.RECOVERY
                return self._finish(Kind.TOO_LONG, _State.RECOVERY), position
            if position == len(data):
                return None, position
        byte = data[position]
        after = _AFTER_ESCAPE.get(state) if 0x20 <= byte <= 0xFD else None
        after = _STEP[state].get(byte) if state in _STEP else after
        if after is None and state in _ENDS and not (state is _State.ZERO and 48 <= byte <= 57):
            self._look_ahead(byte)
            token = self._finish(_ENDS[state])
            self._unlook(byte)
            return token, position
        self._column += 1
        self._text.append(byte)
        if after is not None:
            self._state = after
            return None, position + 1
        if byte == _CLOSING.get(state):
            return self._finish(Kind.STRING), position + 1
        if byte == 0x0A:
            self._newline()
        return self._fail(), position + 1

    def _recover(self, data: bytes, position: int) -> tuple[Token | None, int]:
        match = _SKIPPED.match(data, position)
        assert match is not None
        self._column += match.end() - position
        position = match.end()
        if position < len(data):
            self._look_ahead(data[position])
            self._begin_here()
            self._unlook(data[position])
        return None, position

    def _finish(self, kind: Kind, state: _State = _State.START) -> Token:
        token = Token(kind, bytes(self._text), self._start_line, self._start_column)
        self._begin_here()
        self._state = state
        return token

    def _fail(self) -> Token:
        return self._finish(Kind.ERROR, _State.RECOVERY)

    def _begin_here(self) -> None:
        self._state = _State.START
        self._text = bytearray()
        self._start_line = self._line
        self._start_column = self._column + 1

    def _newline(self) -> None:
        self._line += 1
        self._column = 0

    def _look_ahead(self, byte: int) -> None:
        """Count a byte that ends a token without belonging to it, for the position of the next."""
        if byte == 0x0A:
            self._newline()
        else:
            self._column += 1

    def _unlook(self, byte: int) -> None:
        """Take back what ``_look_ahead`` counted: the byte is going to be read again."""
        if byte == 0x0A:
            self._line -= 1
            self._column = self._start_column  # set anew when the newline is skipped as space
        else:
            self._column -= 1
