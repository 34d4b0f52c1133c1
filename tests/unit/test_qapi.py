"""Arguments are checked in QAPI's order and refused in QEMU's words."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import Field, ValidationError, field_validator

from liveblockd.errors import BlockError
from liveblockd.qapi import (
    Alternate,
    Int32,
    QapiModel,
    Size,
    StrOrNull,
    UInt8,
    UInt64,
    argument_error,
    members,
    parse,
    parse_size,
    qapi_name,
    to_qmp,
    type_of,
)


class OnError(enum.StrEnum):
    REPORT = "report"
    STOP = "stop"


class Options(QapiModel):
    qapi_tag: ClassVar[str] = "driver"
    driver: str
    node_name: str | None = None

    @classmethod
    def qapi_variants(cls) -> Mapping[str, type[QapiModel]]:
        return {"file": FileOptions, "qcow2": Qcow2Options}


BlockdevRef = Annotated[str | Options, Alternate("BlockdevRef")]
BlockdevRefOrNull = Annotated[str | Options | None, Alternate("BlockdevRefOrNull")]


class FileOptions(Options):
    filename: str


class Qcow2Options(Options):
    file: BlockdevRef
    backing: BlockdevRefOrNull = None
    l2_cache_size: Size = 0


class Stream(QapiModel):
    device: str
    speed: int = 0
    on_error: OnError = OnError.REPORT
    flat: bool = False
    base: str | None = None
    names: list[OnError] | None = None
    big: UInt64 = 0
    small: UInt8 = 0
    word: Int32 = 0
    ratio: float = 0.0
    iothread: StrOrNull = None
    len_: int = 0
    props: dict[str, Any] | None = None


class Backup(QapiModel):
    type: Literal["backup"]
    data: Stream


class Snapshot(QapiModel):
    type: Literal["snapshot"]
    data: FileOptions


class Transaction(QapiModel):
    actions: list[Annotated[Backup | Snapshot, Field(discriminator="type")]]


MISSING, EXPECTED = "Parameter '{}' is missing", "Invalid parameter type for '{}', expected: {}"
UNEXPECTED, VALUE = "Parameter '{}' is unexpected", "Parameter '{}' does not accept value '{}'"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, MISSING.format("device")),
        ({"x": 1}, MISSING.format("device")),
        ({"device": 1}, EXPECTED.format("device", "string")),
        ({"device": None}, EXPECTED.format("device", "string")),
        ({"device": ["d"]}, EXPECTED.format("device", "string")),
        ({"x": 1, "device": "d", "speed": "fast"}, EXPECTED.format("speed", "integer")),
        ({"device": "d", "speed": 1.5}, EXPECTED.format("speed", "integer")),
        ({"device": "d", "speed": 1.0}, EXPECTED.format("speed", "integer")),
        ({"device": "d", "speed": True}, EXPECTED.format("speed", "integer")),
        ({"device": "d", "speed": 2**64 - 1}, EXPECTED.format("speed", "integer")),
        ({"device": "d", "speed": None}, EXPECTED.format("speed", "integer")),
        ({"device": "d", "flat": 1}, EXPECTED.format("flat", "boolean")),
        ({"device": "d", "flat": "on"}, EXPECTED.format("flat", "boolean")),
        ({"device": "d", "on-error": "explode"}, VALUE.format("on-error", "explode")),
        ({"device": "d", "on-error": 1}, EXPECTED.format("on-error", "string")),
        ({"device": "d", "on_error": "stop"}, UNEXPECTED.format("on_error")),
        ({"device": "d", "base": None}, EXPECTED.format("base", "string")),
        ({"device": "d", "names": "report"}, EXPECTED.format("names", "array")),
        ({"device": "d", "names": ["stop", 1]}, EXPECTED.format("names[1]", "string")),
        ({"device": "d", "names": ["x"]}, VALUE.format("null", "x")),
        ({"device": "d", "big": 2**64}, EXPECTED.format("big", "uint64")),
        ({"device": "d", "big": "1"}, EXPECTED.format("big", "uint64")),
        ({"device": "d", "small": 256}, "Parameter 'small' expects uint8_t"),
        ({"device": "d", "word": 2**31}, "Parameter 'word' expects int32_t"),
        ({"device": "d", "word": 2**63}, EXPECTED.format("word", "integer")),
        ({"device": "d", "ratio": "1"}, EXPECTED.format("ratio", "number")),
        ({"device": "d", "iothread": 1}, EXPECTED.format("iothread", "StrOrNull")),
        ({"device": "d", "props": []}, EXPECTED.format("props", "object")),
        ({"device": "d", "unexpected": True}, UNEXPECTED.format("unexpected")),
    ],
)
def test_struct_errors(value: dict[str, Any], message: str) -> None:
    with pytest.raises(BlockError) as caught:
        parse(Stream, value)
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, MISSING.format("driver")),
        ({"filename": "x"}, MISSING.format("driver")),
        ({"driver": "nope", "node-name": 1}, VALUE.format("driver", "nope")),
        ({"driver": 1}, EXPECTED.format("driver", "string")),
        ({"driver": "file", "node-name": 1}, EXPECTED.format("node-name", "string")),
        ({"driver": "file"}, MISSING.format("filename")),
        ({"driver": "file", "filename": "f", "file": "x"}, UNEXPECTED.format("file")),
        ({"driver": "qcow2", "file": {"driver": "file"}}, MISSING.format("file.filename")),
        ({"driver": "qcow2", "file": {"driver": "x"}}, VALUE.format("driver", "x")),
        ({"driver": "qcow2", "file": 1}, EXPECTED.format("file", "BlockdevRef")),
        ({"driver": "qcow2", "file": None}, EXPECTED.format("file", "BlockdevRef")),
        (
            {"driver": "qcow2", "file": "f", "backing": 1},
            EXPECTED.format("backing", "BlockdevRefOrNull"),
        ),
        (
            {
                "driver": "qcow2",
                "file": {"driver": "file", "filename": "f", "z": 1},
                "l2-cache-size": "x",
            },
            UNEXPECTED.format("file.z"),
        ),
    ],
)
def test_union_errors(value: dict[str, Any], message: str) -> None:
    with pytest.raises(BlockError) as caught:
        parse(Options, value)
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"actions": {}}, EXPECTED.format("actions", "array")),
        ({"actions": [1]}, EXPECTED.format("actions[0]", "object")),
        ({"actions": [{}]}, MISSING.format("actions[0].type")),
        ({"actions": [{"type": "x"}]}, VALUE.format("type", "x")),
        ({"actions": [{"type": "backup"}]}, MISSING.format("actions[0].data")),
        ({"actions": [{"type": "backup", "data": {}}]}, MISSING.format("actions[0].data.device")),
    ],
)
def test_tagged_models_errors(value: dict[str, Any], message: str) -> None:
    with pytest.raises(BlockError) as caught:
        parse(Transaction, value)
    assert caught.value.message == message


def test_values_arrive() -> None:
    stream = parse(
        Stream, {"device": "d", "on-error": "stop", "names": ["stop"], "len": 3, "ratio": 2}
    )
    assert stream.on_error is OnError.STOP
    assert stream.names == [OnError.STOP]
    assert stream.len_ == 3
    assert isinstance(stream.ratio, float)
    assert stream.model_fields_set == {"device", "on_error", "names", "len_", "ratio"}


def test_union_gives_the_variant() -> None:
    value = {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": "f"},
        "backing": None,
        "l2-cache-size": 2**64 - 1,
    }
    found = parse(Options, value)
    assert isinstance(found, Qcow2Options)
    assert isinstance(found.file, FileOptions)
    assert "backing" in found.model_fields_set
    assert found.to_qmp() == value  # an explicit null is kept
    assert parse(Options, found) is found  # an instance is taken as it is


def test_null_that_was_not_given_is_not_shown() -> None:
    found = parse(Options, {"driver": "qcow2", "file": "f"})
    assert found.to_qmp() == {"driver": "qcow2", "file": "f", "l2-cache-size": 0}


def test_a_python_caller_writes_python_names() -> None:
    assert Stream(device="d", on_error=OnError.STOP, base=None).to_qmp()["on-error"] == "stop"


@pytest.mark.parametrize(
    ("key", "text", "want"),
    [
        ("flat", "on", True),
        ("flat", "no", False),
        ("speed", "-5", -5),
        ("speed", "0x10", 16),
        ("speed", "010", 8),
        ("big", "18446744073709551615", 2**64 - 1),
        ("ratio", "1.5", 1.5),
        ("on-error", "stop", OnError.STOP),
        ("iothread", "t0", "t0"),
    ],
)
def test_command_line_scalars(key: str, text: str, want: Any) -> None:
    found = parse(Stream, {"device": "d", key: text}, keyval=True)
    assert getattr(found, key.replace("-", "_")) == want


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("flat", "maybe", "Parameter 'flat' expects 'on' or 'off'"),
        ("speed", "1M", "Parameter 'speed' expects integer"),
        ("speed", "", "Parameter 'speed' expects integer"),
        ("speed", "9223372036854775808", "Parameter 'speed' expects integer"),
    ],
)
def test_command_line_errors(key: str, text: str, message: str) -> None:
    with pytest.raises(BlockError) as caught:
        parse(Stream, {"device": "d", key: text}, keyval=True)
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("0", 0),
        ("512", 512),
        ("0x200", 512),
        ("1k", 1024),
        ("1.5G", 3 << 29),
        ("2T", 2 << 40),
        ("7B", 7),
        ("1.5", None),
        ("", None),
        ("-1", None),
        ("1KiB", None),
        ("k", None),
        ("1 k", None),
    ],
)
def test_parse_size(text: str, want: int | None) -> None:
    assert parse_size(text) == want


class Checked(QapiModel):
    text: str
    count: int = Field(default=1, ge=1)

    @field_validator("text")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        if not value:
            raise ValueError("text may not be empty")
        return value


def test_validators_of_a_model_are_asked() -> None:
    assert parse(Checked, {"text": "x"}).text == "x"
    with pytest.raises(BlockError, match=r"^text may not be empty$"):
        parse(Checked, {"text": ""})
    with pytest.raises(BlockError, match=r"^Parameter 'count' expects"):
        parse(Checked, {"text": "x", "count": 0})


def test_pydantic_errors_are_worded() -> None:
    for value, message in [
        ({"x": 1}, "Parameter 'device' is missing"),
        ({"device": 1}, "Invalid parameter type for 'device', expected: string"),
        ({"device": "d", "x": 1}, "Parameter 'x' is unexpected"),
    ]:
        with pytest.raises(ValidationError) as caught:
            Stream.model_validate(value)
        assert argument_error(caught.value).message == message


def test_models_that_code_makes_need_no_validator() -> None:
    """To make one takes pydantic up to 100 ms, in which the loop serves nobody."""

    class Answer(QapiModel):
        some_name: str
        count: int = 3
        len_: int | None = None

    for answer in (Answer(some_name="x", len_=2), Answer(**{"some-name": "x", "len": 2})):
        assert answer.to_qmp() == {"some-name": "x", "count": 3, "len": 2}
        assert answer == Answer(some_name="x", count=3, len_=2)
        assert answer.model_fields_set == {"some_name", "len_"}
    assert not Answer.__pydantic_complete__, "nothing has been built"
    with pytest.raises(TypeError, match="Answer without"):
        Answer(count=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="Answer has not all of"):
        Answer(some_name="x", other=1)  # type: ignore[call-arg]


def test_defects_of_a_model_are_found() -> None:
    with pytest.raises(TypeError):
        type_of(str | int)
    with pytest.raises(TypeError):
        type_of(set[str])


def test_names() -> None:
    assert qapi_name("node_name") == "node-name"
    assert qapi_name("len_") == "len"
    assert [m.name for m in members(Qcow2Options)][:3] == ["driver", "node-name", "file"]


def test_to_qmp_goes_all_the_way_down() -> None:
    shown = to_qmp([{"a": OnError.STOP, "b": (Stream(device="d"),)}])
    assert type(shown[0]["a"]) is str
    assert shown[0]["b"][0]["device"] == "d"
