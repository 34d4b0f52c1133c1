r"""The words of a line of the human monitor, and what a command makes of them.

Words are separated by blanks; ``"..."`` keeps blanks and knows ``\n \r \\ \' \"``. The words
of a command are taken in the order of its ``Argument``s; a ``Flag`` takes a word only if that is
``-`` and its letter.

Pure. ``ArgumentError`` escapes; its text is what QEMU's monitor prints.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias


class ArgumentError(Exception):
    """A line that does not fit its command; ``show_help`` adds the line that points to help."""

    def __init__(self, message: str, *, show_help: bool = True) -> None:
        super().__init__(message)
        self.message = message
        self.show_help = show_help


class Kind(enum.Enum):
    """What an argument is; the value is how QEMU names it when it is missing."""

    DEVICE = "block device name"
    FILENAME = "filename"
    STRING = "string"
    SIZE = "size"  # bytes; a bare number counts MiB
    NUMBER = "number"
    LINE = "rest of the line"


@dataclass(frozen=True, slots=True)
class Argument:
    """One word; ``or_else`` names the argument that a word which is no size stands for."""

    name: str
    kind: Kind
    optional: bool = False
    or_else: str | None = None


@dataclass(frozen=True, slots=True)
class Flag:
    """A switch of one letter."""

    letter: str
    name: str


Spec: TypeAlias = Sequence[Argument | Flag]

_ESCAPES: Final = {"n": "\n", "r": "\r", "\\": "\\", "'": "'", '"': '"'}
_SUFFIXES: Final = {s: 1 << (10 * i) for i, s in enumerate("BKMGTPE")}
_SIZE: Final = re.compile(
    r"(?:0[xX]([0-9a-fA-F]{1,16})|([0-9]{1,20})(?:\.([0-9]{0,20}))?)([bkmgtpeBKMGTPE]?)"
)
_SIZE_MAX: Final = 2**63 - 1


def take_word(text: str) -> tuple[str, str]:
    """The first word of ``text`` (which starts with it) and what follows; ArgumentError."""
    if not text.startswith('"'):
        word = text.split(maxsplit=1)[0]
        return word, text[len(word) :].lstrip()
    word = ""
    position = 1
    while position < len(text) and text[position] != '"':
        if text[position] != "\\":
            word += text[position]
            position += 1
            continue
        escaped = text[position + 1 : position + 2]
        if escaped not in _ESCAPES:
            raise ArgumentError(f"unsupported escape code: '\\{escaped}'")
        word += _ESCAPES[escaped]
        position += 2
    if position >= len(text):
        raise ArgumentError("unterminated string")
    return word, text[position + 1 :].lstrip()


def size(text: str) -> int | None:
    """Bytes of ``64k``, ``1.5G``, ``0x10000B``, or of a bare number of MiB; None for no size."""
    match = _SIZE.fullmatch(text)
    if match is None:
        return None
    hexadecimal, whole, fraction, suffix = match.groups()
    unit = _SUFFIXES[suffix.upper() or "M"]
    if hexadecimal is not None:
        number = int(hexadecimal, 16) * unit
    else:
        number = int(whole) * unit + int(fraction or 0) * unit // 10 ** len(fraction or "")
    return number if number <= _SIZE_MAX else None


def parse_arguments(command: str, spec: Spec, text: str) -> dict[str, Any]:
    """The arguments in ``text`` by name, absent ones left out; flags are True. ArgumentError."""
    found: dict[str, Any] = {}
    text = text.strip()
    for expected in spec:
        if isinstance(expected, Flag):
            text = _take_flags(command, spec, text, found)
        elif not text:
            if expected.optional:
                break
            _missing(command, expected)
        elif expected.kind is Kind.LINE:
            found[expected.name], text = text, ""
        else:
            text = _take_argument(expected, text, found)
    if text:
        raise ArgumentError(f"{command}: extraneous characters at the end of line")
    return found


def _take_flags(command: str, spec: Spec, text: str, found: dict[str, Any]) -> str:
    """Flags may come in any order before the first word that is none."""
    while text.startswith("-") and len(text) > 1 and not text[1].isspace():
        word, rest = take_word(text)
        known = next((f for f in spec if isinstance(f, Flag) and word == f"-{f.letter}"), None)
        if known is None:
            raise ArgumentError(f"{command}: unsupported option -{word[1]}")
        found[known.name] = True
        text = rest
    return text


def _take_argument(expected: Argument, text: str, found: dict[str, Any]) -> str:
    word, rest = take_word(text)
    if expected.kind is Kind.NUMBER:
        try:
            found[expected.name] = int(word, 0)
        except ValueError:
            raise ArgumentError(f"invalid char '{word[:1]}' in expression") from None
        return rest
    if expected.kind is not Kind.SIZE:
        found[expected.name] = word
        return rest
    number = size(word)
    if number is not None:
        found[expected.name] = number
    elif expected.or_else is not None and not rest:
        found[expected.or_else] = word
    else:
        raise ArgumentError("invalid size")
    return rest


def _missing(command: str, expected: Argument) -> None:
    if expected.kind is Kind.SIZE:
        raise ArgumentError("invalid size")
    if expected.kind is Kind.NUMBER:
        raise ArgumentError("unexpected end of expression")
    raise ArgumentError(f"{command}: {expected.kind.value} expected")
