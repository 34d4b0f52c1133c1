"""The stream of JSON values that QMP is: bytes to values or errors, values to lines.

qmp-spec, section 2.1. Input is a sequence of JSON values with any white space or none between them,
cut into packets anyhow. ``JsonReader.feed`` gives back what a packet completes, each a value or a
``ParseError``. Plain input, whole objects in ASCII, goes through json's C scanner; everything else
through ``jsonlexer`` and ``jsonparser``, which know QEMU's dialect and the places of errors. Both
ways give the same values. ``encode`` makes one message, ended by CR LF.

Pure. Time and memory are linear in the input. Raises nothing on input; ``encode`` raises TypeError
for a value that is no JSON.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, Final

from liveblockd.qmp.jsonlexer import Lexer
from liveblockd.qmp.jsonparser import ParseError, Parser, number

__all__ = ["JsonReader", "ParseError", "encode"]

#: what the C scanner would not read as QEMU does: other bytes than ASCII, \u, integers near 2^64
_NOT_PLAIN: Final = re.compile(rb"[^\t\n\r\x20-\x7e]|\\u|[0-9]{19}")
_SPACE: Final = re.compile(r"[ \t\r\n]*")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate key")
    return found


def _constant(name: str) -> Any:
    raise ValueError(name)  # NaN and Infinity are keywords that JSON has not


_decoder: Final = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=number, parse_constant=_constant
)


class JsonReader:
    """Input of one client."""

    def __init__(self) -> None:
        self._lexer = Lexer()
        self._parser = Parser()

    @property
    def idle(self) -> bool:
        """Whether the input so far ends between two values."""
        return self._lexer.idle and self._parser.idle

    def feed(self, data: bytes) -> list[Any]:
        """Values and ParseErrors that ``data`` completes, in their order."""
        found: list[Any] = []
        position = 0
        text = None if _NOT_PLAIN.search(data) else data.decode("ascii")
        while position < len(data):
            if text is not None and self.idle:
                position, text = self._scan(data, text, position, found)
            else:
                position = self._read(data, position, found)
        return found

    def _scan(self, data: bytes, text: str, begin: int, found: list[Any]) -> tuple[int, str | None]:
        """Read whole objects the fast way as far as that goes; None for the text ends it."""
        position = begin
        while True:
            space = _SPACE.match(text, position)
            assert space is not None
            position = space.end()
            if position == len(text):
                self._lexer.skip(data, begin, position)
                return position, text
            if text[position] != "{":
                break
            try:
                value, position = _decoder.raw_decode(text, position)
            except (ValueError, RecursionError):
                break
            found.append(value)
        self._lexer.skip(data, begin, position)
        # What is wrong or incomplete here is found out the slow way, without another try in
        # this packet: that keeps the time linear.
        return position, None

    def _read(self, data: bytes, position: int, found: list[Any]) -> int:
        """Read up to the end of the value that is under way."""
        while True:
            token, position = self._lexer.next(data, position)
            if token is None:
                return position
            done, outcome = self._parser.token(token)
            if done:
                found.append(outcome)
            if self._parser.idle and self._lexer.idle:
                return position


def encode(value: Any, *, pretty: bool = False) -> bytes:
    """One message: ASCII JSON and CR LF; ``pretty`` spreads it over lines, all ended so."""
    if not pretty:
        try:
            return json.dumps(value, allow_nan=False).encode("ascii") + b"\r\n"
        except (RecursionError, ValueError):
            pass  # deeper than the C stack goes, as an id may be
    return "".join((*_pieces(value, pretty), "\r\n")).encode("ascii")


def plain_numbers(value: Any) -> Any:
    """Floats without a fraction as integers, as QEMU writes them (1.0 -> 1); for an ``id``."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e17:
        return int(value)
    if not isinstance(value, dict | list):
        return value
    top: Any = [value]
    waiting: list[Any] = [top]
    while waiting:
        holder = waiting.pop()
        for key, held in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
            if isinstance(held, float):
                holder[key] = plain_numbers(held)
            elif isinstance(held, dict | list):
                waiting.append(held)
    return value


def _pieces(value: Any, pretty: bool) -> Iterator[str]:
    """``value`` as JSON text in pieces, without recursion."""
    closing: list[tuple[Iterator[tuple[str | None, Any]], str]] = []
    begun, text, children = _open(value)
    yield text
    if not begun:
        return
    closing.append((children, "}" if text == "{" else "]"))
    first = True
    while closing:
        items, end = closing[-1]
        item = next(items, None)
        indent = "\r\n" + "    " * (len(closing) - (item is None)) if pretty else ""
        if item is None:
            closing.pop()
            yield indent + end
            first = False
            continue
        key, held = item
        separator = "" if first else "," if pretty else ", "
        yield f"{separator}{indent}" + (f"{json.dumps(key)}: " if key is not None else "")
        begun, text, children = _open(held)
        yield text
        if begun:
            closing.append((children, "}" if text == "{" else "]"))
        first = begun


def _open(value: Any) -> tuple[bool, str, Iterator[tuple[str | None, Any]]]:
    """Whether ``value`` is a container; the text it begins with; its items as (key, value)."""
    if isinstance(value, dict):
        return True, "{", iter(value.items())
    if isinstance(value, list | tuple):
        return True, "[", ((None, held) for held in value)
    if isinstance(value, float) and not math.isfinite(value):
        return False, str(json.dumps(number(str(value)))), iter(())
    return False, json.dumps(value), iter(())
