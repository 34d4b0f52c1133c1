"""Types of single values in QAPI: strings, numbers, enums, and what is said when one does not fit.

A ``Type`` describes what a member may hold and checks a value; ``Path`` is where in the arguments
the value stands, which is what the error messages are about.

Pure. Errors: BlockError in QEMU's words from ``visit``.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeAlias

from liveblockd.errors import BlockError


class Type:
    """What a member may hold; ``visit`` checks a value and returns what the model stores."""

    __slots__ = ()
    admits_null: bool = False

    def visit(self, value: Any, path: Path) -> Any:
        """The value for the model; BlockError when ``value`` does not fit."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Path:
    """Where in the arguments a value stands; ``name`` is the last component, None in an array."""

    full: str
    name: str | None
    keyval: bool = False  # scalars are strings of a command line

    def member(self, name: str) -> Path:
        """The member ``name`` of the object here."""
        return Path(f"{self.full}.{name}" if self.full else name, name, self.keyval)

    def element(self, index: int) -> Path:
        """Element ``index`` of the array here."""
        return Path(f"{self.full}[{index}]", None, self.keyval)

    def mistyped(self, expected: str, *, last: bool = False) -> BlockError:
        """The error of a value of another JSON type."""
        shown = (self.name or "null") if last else (self.full or "null")
        return BlockError(f"Invalid parameter type for '{shown}', expected: {expected}")

    def refused(self, value: object) -> BlockError:
        """The error of a string that the enum has not; QEMU names the last component only."""
        return BlockError(f"Parameter '{self.name or 'null'}' does not accept value '{value}'")

    def expects(self, expected: str, *, last: bool = False) -> BlockError:
        """The error of a value of the right type that is out of range or cannot be read."""
        shown = (self.name or "null") if last else (self.full or "null")
        return BlockError(f"Parameter '{shown}' expects {expected}")


ROOT: Final = Path("", None)


@dataclass(frozen=True, slots=True)
class String(Type):
    """A JSON string."""

    def visit(self, value: Any, path: Path) -> str:
        """As it is."""
        if not isinstance(value, str):
            raise path.mistyped("string")
        return value


_TRUE: Final = frozenset(("on", "yes", "true", "y"))
_FALSE: Final = frozenset(("off", "no", "false", "n"))


@dataclass(frozen=True, slots=True)
class Boolean(Type):
    """true or false; on the command line on and off."""

    def visit(self, value: Any, path: Path) -> bool:
        """As it is, or the meaning of the word."""
        if path.keyval and isinstance(value, str):
            if value in _TRUE:
                return True
            if value in _FALSE:
                return False
            raise path.expects("'on' or 'off'")
        if not isinstance(value, bool):
            raise path.mistyped("boolean")
        return value


_INT64_MIN, _INT64_MAX, _UINT64_MAX = -(2**63), 2**63 - 1, 2**64 - 1


@dataclass(frozen=True, slots=True)
class Integer(Type):
    """A JSON number without fraction or exponent, between ``low`` and ``high``."""

    kind: str
    low: int
    high: int
    is_size: bool = False

    def visit(self, value: Any, path: Path) -> int:
        """The integer. QEMU reads each as int64 or uint64 first, then looks at the range."""
        if path.keyval and isinstance(value, str):
            number = parse_size(value) if self.is_size else _parse_integer(value)
            if number is None or not self._wide_enough(number):
                raise path.expects("a size" if self.is_size else "integer")
            value = number
        elif type(value) is not int or not self._wide_enough(value):
            raise path.mistyped(self._json_name)
        elif value < 0 and self.high == _UINT64_MAX:
            value += 1 << 64  # QEMU has always taken the two's complement
        if not self.low <= value <= self.high:
            raise path.expects("a size" if self.is_size else f"{self.kind}_t", last=True)
        return int(value)

    @property
    def _json_name(self) -> str:
        return "integer" if self.low else "uint64"

    def _wide_enough(self, value: int) -> bool:
        return _INT64_MIN <= value <= (_INT64_MAX if self.low else _UINT64_MAX)


@dataclass(frozen=True, slots=True)
class Number(Type):
    """Any JSON number."""

    def visit(self, value: Any, path: Path) -> float:
        """As a float."""
        if path.keyval and isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                raise path.expects("number") from None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise path.mistyped("number")
        return float(value)


@dataclass(frozen=True, slots=True)
class Null(Type):
    """The JSON null."""

    admits_null = True

    def visit(self, value: Any, path: Path) -> None:
        """None."""
        if value is not None:
            raise path.mistyped("null")


@dataclass(frozen=True, slots=True)
class AnyValue(Type):
    """Whatever JSON value; ``object_only`` where it has to be an object."""

    object_only: bool = False
    admits_null = True

    def visit(self, value: Any, path: Path) -> Any:
        """As it is."""
        if self.object_only and not isinstance(value, dict):
            raise path.mistyped("object")
        return value


@dataclass(frozen=True, slots=True)
class Enum(Type):
    """One of some strings; ``cls`` is the StrEnum, or None for a Literal."""

    values: tuple[str, ...]
    cls: type[enum.StrEnum] | None = None

    def visit(self, value: Any, path: Path) -> str:
        """The member of the StrEnum."""
        if not isinstance(value, str):
            raise path.mistyped("string")
        if value not in self.values:
            raise path.refused(value)
        return self.cls(value) if self.cls is not None else value


#: ``int`` in a model
INT: Final = Integer("int", _INT64_MIN, _INT64_MAX)
Int8: TypeAlias = Annotated[int, Integer("int8", -(2**7), 2**7 - 1)]
Int16: TypeAlias = Annotated[int, Integer("int16", -(2**15), 2**15 - 1)]
Int32: TypeAlias = Annotated[int, Integer("int32", -(2**31), 2**31 - 1)]
Int64: TypeAlias = Annotated[int, Integer("int64", _INT64_MIN, _INT64_MAX)]
UInt8: TypeAlias = Annotated[int, Integer("uint8", 0, 2**8 - 1)]
UInt16: TypeAlias = Annotated[int, Integer("uint16", 0, 2**16 - 1)]
UInt32: TypeAlias = Annotated[int, Integer("uint32", 0, 2**32 - 1)]
UInt64: TypeAlias = Annotated[int, Integer("uint64", 0, _UINT64_MAX)]
#: Bytes; on the command line also with a suffix (10k, 1.5G).
Size: TypeAlias = Annotated[int, Integer("size", 0, _UINT64_MAX, is_size=True)]


def _parse_integer(text: str) -> int | None:
    """An integer as strtoll reads it with base 0; None when it is not one."""
    match = re.fullmatch(
        r"([-+]?)(?:0[xX]([0-9a-fA-F]{1,16})|(0[0-7]{0,22})|([1-9][0-9]{0,19}))", text
    )
    if match is None:
        return None
    sign, hexadecimal, octal, decimal = match.groups()
    number = int(hexadecimal, 16) if hexadecimal else int(octal, 8) if octal else int(decimal)
    return -number if sign == "-" else number


_SUFFIXES: Final = {s: 1 << (10 * i) for i, s in enumerate("bkmgtpe")}


def parse_size(text: str) -> int | None:
    """Bytes in ``10``, ``0x10``, ``64k``, ``1.5G``; None for no size. Suffixes are binary."""
    if match := re.fullmatch(r"0[xX]([0-9a-fA-F]{1,16})", text):
        return int(match[1], 16)
    match = re.fullmatch(
        r"([0-9]{1,20})(?:\.([0-9]{0,20}))?([bkmgtpe]?)", text, re.IGNORECASE | re.ASCII
    )
    if match is None:
        return None
    whole, fraction, suffix = match.groups()
    unit = _SUFFIXES.get(suffix.lower(), 1)
    if fraction is not None and unit == 1:
        return None
    part = int(fraction or 0) * unit // int("1" + "0" * len(fraction or ""))
    return int(whole) * unit + part
