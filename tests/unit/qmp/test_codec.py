"""The QMP codec: QEMU's dialect of JSON, whole and cut into pieces, and what is written."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest

from liveblockd.qmp import jsonlexer, jsonparser
from liveblockd.qmp.codec import JsonReader, ParseError, encode, plain_numbers

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "qmp_json.json").read_text())


def wanted(out: list[list[Any]]) -> list[Any]:
    return [ParseError(what) if kind == "error" else what for kind, what in out]


def same(got: list[Any], want: list[Any]) -> bool:
    return repr(got) == repr(want)  # True is not 1, 1.0 is not 1


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v["why"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 10_000])
def test_vectors(vector: dict[str, Any], size: int) -> None:
    data = vector["in"].encode("latin-1")
    reader = JsonReader()
    got = [i for at in range(0, len(data), size) for i in reader.feed(data[at : at + size])]
    assert same(got, wanted(vector["out"]))


def test_every_single_cut() -> None:
    data = b'{"execute": "x", "id": [1.5, "\\u00e9", \'q\', true]}\n@\n{"a" 1, [2]}{"b": -1}'
    whole = JsonReader().feed(data)
    assert len(whole) == 4
    for cut in range(len(data)):
        reader = JsonReader()
        assert same(reader.feed(data[:cut]) + reader.feed(data[cut:]), whole), cut


def test_positions_go_on_behind_the_fast_way() -> None:
    reader = JsonReader()
    assert reader.feed(b'{"a": 1}\n{"b":\n 2} ') == [{"a": 1}, {"b": 2}]
    assert reader.feed(b"@") == [ParseError("3:5: JSON parse error, stray '@'")]


@pytest.mark.parametrize("packet", [1, 1 << 20])
def test_nesting_limit(packet: int) -> None:
    deepest = b"[" * 1024 + b"]" * 1024
    reader = JsonReader()
    (value,) = [
        i for at in range(0, len(deepest), packet) for i in reader.feed(deepest[at : at + packet])
    ]
    depth = 0
    while value:
        (value,), depth = value, depth + 1
    assert depth == 1023
    too_deep = b"[" * 1025 + b"\n" + b"[" * 10 + b"]" * 1035 + b"{}"
    got = [
        i for at in range(0, len(too_deep), packet) for i in reader.feed(too_deep[at : at + packet])
    ]
    assert got == [ParseError("JSON nesting depth limit exceeded"), {}]


def test_token_count_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonparser, "MAX_TOKENS", 100)
    reader = JsonReader()
    assert reader.feed(b"['a'" + b",1" * 48 + b"] ")[0][-1] == 1  # 99 tokens
    got = reader.feed(b"['a'" + b",1" * 60 + b"]{}")
    assert got == [ParseError("JSON token count limit exceeded"), {}]


def test_token_size_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonlexer, "MAX_TOKEN_SIZE", 1000)
    monkeypatch.setattr(jsonparser, "MAX_TOKEN_SIZE", 1000)
    reader = JsonReader()
    got: list[Any] = []
    for _ in range(500):
        got += reader.feed(b"'" + b"x" * 9 if not got and not _ else b"x" * 10)
    assert got == [ParseError("JSON token size limit exceeded")]
    assert reader.feed(b"\n{}") == [{}]
    got = reader.feed(b"[" + b"'1234567'," * 200 + b"0]{}")  # many that are too much together
    assert got == [ParseError("JSON token size limit exceeded"), {}]


def test_a_long_string_byte_by_byte_takes_linear_time() -> None:
    def seconds(count: int) -> float:
        reader, begin = JsonReader(), time.process_time()
        reader.feed(b'"')
        for _ in range(count):
            reader.feed(b"y")
        assert reader.feed(b'"') == ["y" * count]
        return time.process_time() - begin

    seconds(1000)
    short, long = seconds(10_000), seconds(160_000)
    assert long < short * 16 * 5  # a quadratic reader would take 256 times as long


def test_many_broken_values_in_one_packet_take_linear_time() -> None:
    begin = time.process_time()
    got = JsonReader().feed(b"{'a':1}" * 20_000)
    assert len(got) == 20_000
    assert time.process_time() - begin < 10


def test_the_fast_way_is_taken() -> None:
    reader = JsonReader()
    reader._read = None  # type: ignore[assignment,method-assign]
    assert reader.feed(b'{"a": "it\'s"}\r\n{"b": 1}\n') == [{"a": "it's"}, {"b": 1}]


# -- output


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ({"return": {}}, b'{"return": {}}\r\n'),
        (
            {"a": [1, "é\n\x01😀", None, True]},
            b'{"a": [1, "\\u00e9\\n\\u0001\\ud83d\\ude00", null, true]}\r\n',
        ),
    ],
)
def test_encode(value: Any, line: bytes) -> None:
    assert encode(value) == line


def test_encode_pretty() -> None:
    value = {"return": {"qemu": {}, "l": [], "m": [1, {"a": "b"}]}, "id": 7}
    assert encode(value, pretty=True).decode().split("\r\n") == [
        "{",
        '    "return": {',
        '        "qemu": {',
        "        },",
        '        "l": [',
        "        ],",
        '        "m": [',
        "            1,",
        "            {",
        '                "a": "b"',
        "            }",
        "        ]",
        "    },",
        '    "id": 7',
        "}",
        "",
    ]


def test_encode_deeper_than_the_stack() -> None:
    deep: Any = {"k": []}
    for _ in range(5000):
        deep = [deep]
    line = encode(deep)
    assert line == b"[" * 5000 + b'{"k": []}' + b"]" * 5000 + b"\r\n"


def test_encode_refuses_what_is_no_json() -> None:
    with pytest.raises(TypeError):
        encode({"a": object()})


def test_infinity_is_never_written() -> None:
    assert encode([float("inf")]) == b"[1.7976931348623157e+308]\r\n"


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (1.0, "1"),
        (1e3, "1000"),
        (2.5, "2.5"),
        ([1.0, {"a": [-2.0]}], '[1, {"a": [-2]}]'),
        (1e29, "1e+29"),
    ],
)
def test_plain_numbers(value: Any, want: str) -> None:
    assert json.dumps(plain_numbers(value)) == want


def test_value_types() -> None:
    values = JsonReader().feed(b"['a',1,1.0,true,null,{}]")
    assert [type(v) for v in values[0]] == [str, int, float, bool, type(None), dict]


def test_all_pairs_of_vectors_recover() -> None:
    """Whatever broken input came before, after a newline-separated 0xFF the reader is in step."""
    for first, second in itertools.product(VECTORS, VECTORS[:6]):
        reader = JsonReader()
        reader.feed(first["in"].encode("latin-1"))
        reader.feed(b"\n\xff\n")
        assert reader.idle
        got = reader.feed(second["in"].encode("latin-1"))
        assert same(got, wanted(second["out"])), (first["why"], second["why"])
