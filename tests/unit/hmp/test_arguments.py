"""Words of the human monitor."""

import pytest

from liveblockd.qmp.hmp.arguments import (
    Argument,
    ArgumentError,
    Flag,
    Kind,
    parse_arguments,
    size,
    take_word,
)

MIB = 1 << 20
SPEC = (
    Flag("f", "force"),
    Flag("n", "reuse"),
    Argument("device", Kind.DEVICE),
    Argument("speed", Kind.SIZE, optional=True, or_else="base"),
    Argument("base", Kind.STRING, optional=True),
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", MIB), ("1.5", MIB * 3 // 2), ("64k", 65536), ("64K", 65536), ("1G", 1 << 30),
        ("100B", 100), ("0x10", 16 * MIB), ("1.5G", 3 << 29), ("0", 0), ("2T", 2 << 40),
        ("", None), ("x", None), ("-1", None), ("1q", None), ("A", None), ("k", None),
        ("9999999999999", None), ("1 k", None), ("\u0661", None),
    ],
)  # fmt: skip
def test_a_bare_number_counts_mebibytes(text, expected):
    assert size(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("d0", {"device": "d0"}),
        ("d0 1", {"device": "d0", "speed": MIB}),
        ("d0 1 b.img", {"device": "d0", "speed": MIB, "base": "b.img"}),
        ("virtio0 A", {"device": "virtio0", "base": "A"}),
        ('d0 0 "with blank \\"q\\""', {"device": "d0", "speed": 0, "base": 'with blank "q"'}),
        ("-f d0", {"device": "d0", "force": True}),
        ("-n -f d0", {"device": "d0", "force": True, "reuse": True}),
    ],
)
def test_words_in_order(text, expected):
    assert parse_arguments("c", SPEC, text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "c: block device name expected"),
        ("-x d0", "c: unsupported option -x"),
        ("d0 1 2 3", "c: extraneous characters at the end of line"),
        ("d0 A B", "invalid size"),
        ('"d0', "unterminated string"),
        ('"\\q"', "unsupported escape code: '\\q'"),
    ],
)
def test_errors_are_qemus(text, message):
    with pytest.raises(ArgumentError) as caught:
        parse_arguments("c", SPEC, text)
    assert caught.value.message == message


def test_a_missing_size_is_an_invalid_one():
    with pytest.raises(ArgumentError, match="invalid size"):
        parse_arguments("c", (Argument("size", Kind.SIZE),), "")


def test_the_rest_of_the_line_is_one_argument():
    spec = (Argument("slot", Kind.STRING), Argument("options", Kind.LINE))
    assert parse_arguments("c", spec, "0 a b  c") == {"slot": "0", "options": "a b  c"}


def test_take_word():
    assert take_word("a b c") == ("a", "b c")
    assert take_word('"a b"  c') == ("a b", "c")
