"""Any bytes: values and ParseErrors, nothing else, the same however the input is cut."""

from __future__ import annotations

import json
import math
import random
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from liveblockd.qmp.codec import JsonReader, ParseError, encode

PIECES = st.sampled_from(
    [
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b",",
        b'"',
        b"'",
        b"\\",
        b"\\u12",
        b"\\ud83d",
        b"\\ude00",
        b"\n",
        b" ",
        b"\t",
        b"0",
        b"1",
        b"-",
        b".",
        b"e",
        b"+",
        b"true",
        b"null",
        b"nope",
        b"\xff",
        b"\xfe",
        b"\x00",
        b"\xc3\xa9",
        b"\xed\xa0\x80",
        b'"a":',
        b'{"a": 1}',
        b"9223372036854775808",
        b"'x'",
        b"A",
    ]
)
INPUT = st.one_of(st.binary(max_size=60), st.lists(PIECES, max_size=40).map(b"".join))
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=10)
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=5), inner, max_size=4
        )
    ),
    max_leaves=20,
)


def read(data: bytes, cuts: list[int]) -> list[Any]:
    reader, found, begin = JsonReader(), [], 0
    for cut in [*sorted(c % (len(data) + 1) for c in cuts), len(data)]:
        found += reader.feed(data[begin:cut])
        begin = cut
    return found


@settings(max_examples=400, deadline=None)
@given(INPUT, st.lists(st.integers(0, 10_000), max_size=5))
@example(b'"x"null,', [])
@example(b'{"a":1}1{"b":2},', [9])
def test_cutting_changes_nothing(data: bytes, cuts: list[int]) -> None:
    whole = read(data, [])
    assert repr(read(data, cuts)) == repr(whole)
    assert repr(read(data, list(range(len(data))))) == repr(whole)
    for item in whole:
        encode(item.message if isinstance(item, ParseError) else item)


@settings(max_examples=300, deadline=None)
@given(st.lists(VALUES, max_size=4), st.booleans(), st.lists(st.integers(0, 10_000), max_size=3))
def test_valid_json_is_read_as_json_reads_it(
    values: list[Any], ascii_only: bool, cuts: list[int]
) -> None:
    data = b"\n".join(json.dumps(v, ensure_ascii=ascii_only).encode() for v in values) + b"\n"
    assert repr(read(data, cuts)) == repr([json.loads(json.dumps(v)) for v in values])


@settings(max_examples=200, deadline=None)
@given(VALUES, st.booleans())
def test_what_is_written_is_read_again(value: Any, pretty: bool) -> None:
    line = encode(value, pretty=pretty)
    assert line.isascii()
    assert line.endswith(b"\r\n")
    assert pretty or line.count(b"\n") == 1
    assert repr(read(line, [3])) == repr([value])
    if pretty:
        assert json.loads(line) == value


def test_bit_flips_of_real_requests() -> None:
    seed = 20240611
    chance = random.Random(seed)
    request = (
        b'{"execute": "blockdev-add", "arguments": {"driver": "qcow2", "x": [1, -2.5e3, null]}}\n'
    )
    for _ in range(3000):
        data = bytearray(request * 2)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        whole = read(bytes(data), [])
        cut = read(bytes(data), [chance.randrange(len(data)) for _ in range(4)])
        assert repr(cut) == repr(whole), (seed, bytes(data))
        for item in whole:
            assert not isinstance(item, float) or math.isfinite(item)
