"""Lines and answers of ``qemu-io``: words, sizes and the report of a request.

The forms are those that scripts read from the program qemu-io; the words are split at blanks, there
are no quotes. Pure. ``IoRefusedError`` escapes; its text is what is printed.
"""

from __future__ import annotations

import getopt
import re
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

#: a request of qemu-io, in bytes
REQUEST_MAX: Final = 2**31 - 512
SECTOR: Final = 512

_SUFFIXES: Final = {suffix: 1 << (10 * power) for power, suffix in enumerate("BKMGTPE")}
_SIZE: Final = re.compile(r"\+?(?:0[xX]([0-9a-fA-F]+)|([0-9]+)(?:\.([0-9]*))?([bkmgtpeBKMGTPE]?))")
_UNITS: Final = ("EiB", "PiB", "TiB", "GiB", "MiB", "KiB")


class IoRefusedError(Exception):
    """A line that cannot be done; the message is printed as it is."""


class Usage(NamedTuple):
    """What a command takes; ``letters`` as getopt has them, words without the options."""

    letters: str
    words: str
    least: int
    most: int  # -1: any number
    help: str

    def line(self, name: str) -> str:
        """For ``help`` and after a wrong option."""
        plain = "".join(re.findall(r"\w(?!:)", self.letters))
        with_value = re.findall(r"(\w):", self.letters)
        parts = [name]
        parts += [f"[-{plain}]"] if plain else []
        values = _VALUES | ({"s": "file"} if name == "write" else {})
        parts += [f"[-{letter} {values.get(letter, 'value')}]" for letter in with_value]
        parts += [self.words] if self.words else []
        return f"{' '.join(parts)} -- {self.help}"


_VALUES: Final = {"P": "pattern", "s": "off", "l": "len", "m": "prealloc", "c": "cache", "o": "opt"}


class Words(NamedTuple):
    """A parsed line: options by letter ("" for flags), and the other words."""

    options: dict[str, str]
    words: list[str]

    def has(self, letter: str) -> bool:
        """Whether the flag is there."""
        return letter in self.options


def parse_words(name: str, usage: Usage, words: Sequence[str]) -> Words:
    """Options may stand anywhere. IoRefusedError."""
    count = len(words)
    if count < usage.least or (usage.most >= 0 and count > usage.most):
        raise IoRefusedError(_bad_count(name, usage, count))
    if not usage.letters:  # nothing is looked at as an option: "-1" is a word
        return Words({}, list(words))
    try:
        options, rest = getopt.gnu_getopt(list(words), usage.letters)
    except getopt.GetoptError as error:
        needs = "option requires an argument" if "requires" in error.msg else "invalid option"
        message = f"{name}: {needs} -- '{error.opt}'\n{usage.line(name)}"
        raise IoRefusedError(message) from None
    return Words({option[1:]: value for option, value in options}, rest)


def _bad_count(name: str, usage: Usage, count: int) -> str:
    if usage.most < 0:
        expected = f"at least {usage.least}"
    elif usage.least == usage.most:
        expected = f"{usage.least}"
    else:
        expected = f"between {usage.least} and {usage.most}"
    return f"bad argument count {count} to {name}, expected {expected} arguments"


def number(text: str) -> int:
    """Bytes of ``512``, ``64k``, ``1.5M`` or ``0x200``. IoRefusedError."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise _not_a_size(text)
    hexadecimal, whole, fraction, suffix = match.groups()
    if hexadecimal is not None:
        value = int(hexadecimal, 16)
    else:
        unit = _SUFFIXES[(suffix or "B").upper()]
        if unit == 1 and int(fraction or 0):
            raise _not_a_size(text)
        value = int(whole) * unit + int(fraction or 0) * unit // 10 ** len(fraction or "")
    if value >= 2**63:
        raise IoRefusedError(f"Parsing error: argument too large -- {text}")
    return value


def _not_a_size(text: str) -> IoRefusedError:
    return IoRefusedError(
        f"Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}"
    )


def length_of(text: str, *, unless: str = "") -> int:
    """The length of one request; ``unless`` says what lifts the limit. IoRefusedError."""
    value = number(text)
    if value > REQUEST_MAX:
        raise IoRefusedError(f"length cannot exceed {REQUEST_MAX}{unless}, given {text}")
    return value


def lengths_of(texts: Sequence[str]) -> list[int]:
    """The pieces of a vector. IoRefusedError."""
    lengths = []
    for text in texts:
        value = number(text)
        if value > REQUEST_MAX:
            raise IoRefusedError(f"Argument '{text}' exceeds maximum size {REQUEST_MAX}")
        lengths.append(value)
    if sum(lengths) > REQUEST_MAX:
        raise IoRefusedError(f"The total number of bytes exceed the maximum size {REQUEST_MAX}")
    return lengths


def pattern_of(text: str) -> int:
    """A byte. IoRefusedError."""
    try:
        octal = text.startswith("0") and text.isdigit()
        value = int(text, 8 if octal else 0)
    except ValueError:
        value = -1
    if not 0 <= value <= 255:
        raise IoRefusedError(f"{text} is not a valid pattern byte")
    return value


def amount(value: float) -> str:
    """``64 KiB``, ``63.812 MiB``, ``12 bytes``."""
    for power, unit in zip(range(60, 0, -10), _UNITS, strict=True):
        if value >= 1 << power:
            return f"{value / (1 << power):.3f}".removesuffix(".000") + f" {unit}"
    if isinstance(value, int):
        return f"{value} bytes"
    return f"{value:.6f}".rstrip("0").rstrip(".") + " bytes"


def report(verb: str, offset: int, length: int, seconds: float, *, terse: bool) -> str:
    """What is printed of a request that was done whole; two lines, or one for machines."""
    seconds = max(seconds, 1e-9)
    if terse:
        return f"{length},1,{_clock(seconds)},{length / seconds:.3f},{1 / seconds:.3f}\n"
    time = _clock(seconds) if seconds >= 1 else f"00.{_hundredths(seconds):02} sec"
    return (
        f"{verb} {length}/{length} bytes at offset {offset}\n"
        f"{amount(length)}, 1 ops; {time} "
        f"({amount(length / seconds)}/sec and {1 / seconds:.4f} ops/sec)\n"
    )


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}.{_hundredths(seconds):02}"


def _hundredths(seconds: float) -> int:
    return int(seconds * 100) % 100


def dump(offset: int, data: bytes | bytearray | memoryview) -> Iterator[str]:
    """Lines of sixteen bytes, as numbers and as characters."""
    for start in range(0, len(data), 16):
        row = bytes(data[start : start + 16])
        digits = "".join(f"{byte:02x} " for byte in row)
        letters = "".join(
            chr(byte) if chr(byte).isascii() and chr(byte).isalnum() else "." for byte in row
        )
        yield f"{offset + start:08x}:  {digits} {letters}\n"


def allocation(length: int, allocated: bool, offset: int) -> str:
    """A line of ``map``."""
    word = "    allocated" if allocated else "not allocated"
    return (
        f"{amount(length)} (0x{length:x}) bytes {word} at offset {amount(offset)} (0x{offset:x})\n"
    )
