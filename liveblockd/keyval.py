"""QEMU's option strings: ``key=value,key=value`` text to nested values.

QEMU has two dialects and users mix them, so both are here:

* *keyval* (``--blockdev``, ``--export``, ``--nbd-server``, ``--object``): dotted keys make nested
  objects, numeric components make lists, the text may be a JSON object instead.
* *opts* (``--chardev``, ``--monitor``, ``--drive``): flat; a word without ``=`` is a switch that
  is on, and one that starts with ``no`` is off (``server,nowait``).

In both a comma inside a value is written twice, and the first word may leave out its key. All
scalars stay strings here: which of them are numbers or booleans only the schema of the option
knows (``liveblockd.qapi.parse`` with ``keyval``).

Pure. ``ConfigError`` escapes, with QEMU's words.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final, TypeAlias

from liveblockd.errors import ConfigError

Value: TypeAlias = "str | dict[str, Value] | list[Value]"

#: a component of a key: a QAPI name (also one of a vendor, __com.example_x) or a list index
_FRAGMENT: Final = re.compile(r"(?:__[A-Za-z0-9.-]+_)?[A-Za-z][A-Za-z0-9_-]*\Z|[0-9]+\Z")
_FRAGMENT_MAX: Final = 127
_LIST_MAX: Final = 65536


def split_commas(text: str) -> list[str]:
    """Parts between single commas; ``,,`` stands for a comma inside a part."""
    parts: list[str] = []
    part = ""
    pieces = text.split(",")
    index = 0
    while index < len(pieces):
        part += pieces[index]
        if index + 2 < len(pieces) and pieces[index + 1] == "":
            part += ","
            index += 2
            continue
        parts.append(part)
        part = ""
        index += 1
    return parts


def parse_keyval(text: str, implied: str | None = None) -> dict[str, Value]:
    """The nested object that ``text`` means; ``implied`` is the key of a bare first word."""
    flat: dict[str, str] = {}
    if not text:
        return {}
    for index, part in enumerate(_parts(text)):
        key, equals, value = part.partition("=")
        if not equals:
            if index or implied is None:
                raise ConfigError(f"Expected '=' after parameter '{key}'")
            key, value = implied, part
        if not key or not _is_key(key):
            raise ConfigError(f"Invalid parameter '{key}'")
        flat.pop(key, None)  # the last of two wins, and takes its place at the end
        flat[key] = value
    return _listify(_nest(flat), "")


def parse_option_object(text: str, implied: str | None = None) -> tuple[dict[str, Any], bool]:
    """A keyval text or a JSON object, and whether it was JSON (whose scalars are typed)."""
    if text.startswith("{"):
        return parse_json_object(text), True
    return dict(parse_keyval(text, implied)), False


def parse_json_object(text: str) -> dict[str, Any]:
    """The object written as JSON in ``text``; names may not occur twice in one object."""

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ConfigError("JSON parse error, duplicate key")
            result[key] = value
        return result

    try:
        value = json.loads(text, object_pairs_hook=members)
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"JSON parse error, {str(exc).splitlines()[0]}") from exc
    if not isinstance(value, dict):
        raise ConfigError("JSON parse error, expected an object")
    return value


def parse_opts(text: str, implied: str | None = None) -> dict[str, str]:
    """The flat options of ``text``, in order; of a key given twice the last value holds."""
    result: dict[str, str] = {}
    if not text:
        return result
    for index, part in enumerate(_parts(text)):
        key, equals, value = part.partition("=")
        if not equals:
            if index == 0 and implied is not None:
                key, value = implied, part
            elif part.startswith("no") and len(part) > 2:
                key, value = part[2:], "off"
            else:
                key, value = part, "on"
        if not key:
            raise ConfigError(f"Invalid parameter '{part}'")
        result.pop(key, None)
        result[key] = value
    return result


def nest(options: dict[str, str], keep: frozenset[str] = frozenset()) -> dict[str, Value]:
    """Dotted keys of flat options as nested values, except keys whose first component is kept."""
    kept = {k: v for k, v in options.items() if k.partition(".")[0] in keep}
    nested = _listify(_nest({k: v for k, v in options.items() if k not in kept}), "")
    return {**kept, **nested}


#: dotted keys of ``-drive`` that stay flat
_DRIVE_FLAT: Final = frozenset({"throttling"})


def parse_drive(text: str) -> dict[str, Value]:
    """The members of a ``-drive`` text. ``file=x`` goes together with ``file.locking=off``."""
    flat = parse_opts(text, "file")
    if "file" in flat and any(key.startswith("file.") for key in flat):
        flat = {"file.filename" if key == "file" else key: value for key, value in flat.items()}
    return nest(flat, _DRIVE_FLAT)


def _parts(text: str) -> list[str]:
    parts = split_commas(text)
    if parts[-1] == "" and len(parts) > 1:
        parts.pop()  # one comma too many at the end is forgiven, as QEMU does
    return parts


def _is_key(key: str) -> bool:
    fragments = key.split(".") if not key.startswith("__") else [key]
    if not all(len(f) <= _FRAGMENT_MAX and _FRAGMENT.match(f) for f in fragments):
        return False
    return not fragments[0].isdigit()


def _nest(flat: dict[str, str]) -> dict[str, Value]:
    root: dict[str, Value] = {}
    for key, value in flat.items():
        fragments = key.split(".") if not key.startswith("__") else [key]
        here = root
        for depth, fragment in enumerate(fragments[:-1]):
            child = here.setdefault(fragment, {})
            if not isinstance(child, dict):
                raise _inconsistent(fragments[: depth + 1])
            here = child
        if isinstance(here.get(fragments[-1]), dict):
            raise _inconsistent(fragments)
        here[fragments[-1]] = value
    return root


def _inconsistent(fragments: list[str]) -> ConfigError:
    return ConfigError(f"Parameters '{'.'.join(fragments)}.*' used inconsistently")


def _listify(value: dict[str, Value], path: str) -> dict[str, Value]:
    return {
        key: _listed(member, f"{path}{key}.") if isinstance(member, dict) else member
        for key, member in value.items()
    }


def _listed(value: dict[str, Value], path: str) -> Value:
    numbers = [key for key in value if key.isdigit()]
    if not numbers:
        return _listify(value, path)
    if len(numbers) != len(value):
        raise ConfigError(f"Parameters '{path}*' used inconsistently")
    by_index = {int(key): member for key, member in value.items()}
    if len(by_index) != len(value):
        raise ConfigError(f"Parameters '{path}*' used inconsistently")
    for index in range(min(max(by_index) + 1, _LIST_MAX + 1)):
        if index not in by_index:
            raise ConfigError(f"Parameter '{path}{index}' missing")
    if len(by_index) > _LIST_MAX:
        raise ConfigError(f"Parameters '{path}*' make too long a list")
    items = (by_index[index] for index in range(len(by_index)))
    return [
        _listed(item, f"{path}{index}.") if isinstance(item, dict) else item
        for index, item in enumerate(items)
    ]
