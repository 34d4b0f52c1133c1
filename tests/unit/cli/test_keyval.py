"""QEMU's option strings; the expected values are what qemu-storage-daemon 7.2 makes of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liveblockd.errors import ConfigError
from liveblockd.keyval import (
    nest,
    parse_drive,
    parse_json_object,
    parse_keyval,
    parse_option_object,
    parse_opts,
    split_commas,
)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        ("a,,b", ["a,b"]),
        ("a,,,b", ["a,", "b"]),
        ("a,,,,b", ["a,,b"]),
        ("a,", ["a", ""]),
        ("a,,", ["a,"]),
        ("", [""]),
    ],
)
def test_commas_inside_a_value_are_doubled(text, parts):
    assert split_commas(text) == parts


@given(st.lists(st.text("ab,=.", max_size=5), min_size=1, max_size=5))
def test_escaped_values_come_back_as_they_were(values):
    text = ",".join(f"k{i}={v.replace(',', ',,')}" for i, v in enumerate(values))
    assert parse_keyval(text) == {f"k{i}": v for i, v in enumerate(values)}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("driver=file,filename=a", {"driver": "file", "filename": "a"}),
        ("file,filename=a=b", {"driver": "file", "filename": "a=b"}),
        (
            "qcow2,file.driver=file,file.filename=x",
            {"driver": "qcow2", "file": {"driver": "file", "filename": "x"}},
        ),
        ("qcow2,backing=", {"driver": "qcow2", "backing": ""}),
        (
            "q,e.0.errno=5,e.0.once=on,e.1.errno=28",
            {"driver": "q", "e": [{"errno": "5", "once": "on"}, {"errno": "28"}]},
        ),
        ("q,a.1=y,a.0=x", {"driver": "q", "a": ["x", "y"]}),
        ("q,a.0.0=x", {"driver": "q", "a": [["x"]]}),
        ("q,x=1,x=2", {"driver": "q", "x": "2"}),
        ("q,x=1,", {"driver": "q", "x": "1"}),
        ("", {}),
    ],
)
def test_nested_keys(text, value):
    assert parse_keyval(text, "driver") == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,foo", "Expected '=' after parameter 'foo'"),
        ("a.b=1,a=2", "Parameters 'a.*' used inconsistently"),
        ("a=2,a.b=1", "Parameters 'a.*' used inconsistently"),
        ("a.0=1,a.2=1", "Parameter 'a.1' missing"),
        ("a.0=1,a.x=1", "Parameters 'a.*' used inconsistently"),
        ("a.00=1,a.0=1", "Parameters 'a.*' used inconsistently"),
        ("=1", "Invalid parameter ''"),
        ("0a=1", "Invalid parameter '0a'"),
        ("0=1", "Invalid parameter '0'"),
        ("a..b=1", "Invalid parameter 'a..b'"),
        ("a.99999999=1", "Parameter 'a.0' missing"),
    ],
)
def test_errors_are_qemus(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_keyval(text, "driver")
    assert str(caught.value) == message


def test_without_an_implied_key_the_first_word_needs_one():
    with pytest.raises(ConfigError, match="Expected '=' after parameter 'foo'"):
        parse_keyval("foo")


@given(st.text("ab.0,=-", max_size=30))
def test_any_text_parses_or_is_refused(text):
    try:
        parse_keyval(text, "driver")
        nest(parse_opts(text, "driver"))
    except ConfigError:
        pass


def test_flat_options_have_switches():
    assert parse_opts("unix,server,nowait", "path") == {
        "path": "unix",
        "server": "on",
        "wait": "off",
    }
    assert parse_opts("socket,id=m,path=a,,b", "backend") == {
        "backend": "socket",
        "id": "m",
        "path": "a,b",
    }


def test_nest_keeps_what_it_is_told_to():
    flat = {"file": "x", "throttling.bps": "1", "backing.file.filename": "b"}
    assert nest(flat, frozenset({"throttling"})) == {
        "file": "x",
        "throttling.bps": "1",
        "backing": {"file": {"filename": "b"}},
    }


def test_json_is_typed():
    assert parse_option_object('{"driver": "x", "n": 1}') == ({"driver": "x", "n": 1}, True)
    assert parse_option_object("x,n=1", "driver") == ({"driver": "x", "n": "1"}, False)


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "{x", "{", '{"a":{"b":1,"b":1}}', "{" * 5000])
def test_bad_json(text):
    with pytest.raises(ConfigError, match="JSON parse error"):
        parse_json_object(text)


def test_a_drive_has_a_file_and_options_for_it():
    assert parse_drive("x,file.locking=off,id=d") == {
        "file": {"filename": "x", "locking": "off"},
        "id": "d",
    }
    assert parse_drive("file=x,backing=n") == {"file": "x", "backing": "n"}
