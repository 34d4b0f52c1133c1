"""Models of QMP commands and options, visited as QAPI visits them (QEMU docs/devel/qapi-code-gen).

A command's arguments or a block driver's options are a ``QapiModel``. ``parse(model, value)`` goes
through a decoded JSON value member by member, in the order of the fields, and stops at the first
error, which is worded as QEMU words it; members nobody asked for come last. The same description
of a type (``members``, ``type_of``) makes ``query-qmp-schema``.

How types are written::

    class Thing(QapiModel):
        node_name: str                      # "node-name", required
        speed: int = 0                      # optional; null is refused
        base: str | None = None             # optional; None means "not given"
        size: Size                          # uint64 from JSON, "10M" from the command line
        on_error: OnError = OnError.REPORT  # enum.StrEnum
        names: list[str] | None = None
        iothread: StrOrNull = None          # an Alternate that admits null; whether it was given:
                                            # "iothread" in thing.model_fields_set
    BlockdevRef = Annotated[str | BlockdevOptions, Alternate("BlockdevRef")]

A flat union is a base class that says which member chooses and what there is to choose from; it
is asked for the variants at the first use, so drivers may register late::

    class BlockdevOptions(QapiModel):
        qapi_tag: ClassVar[str] = "driver"
        driver: str
        @classmethod
        def qapi_variants(cls) -> Mapping[str, type[QapiModel]]: ...   # subclasses, by tag value

``Annotated[A | B, Field(discriminator="type")]`` with ``type: Literal["a"]`` works too.

Pure. Errors: ``BlockError`` from ``parse``; TypeError for an annotation that is no QAPI type.
"""

from liveblockd.qapi.models import (
    Alternate,
    AlternateType,
    Array,
    FlatUnion,
    Member,
    QapiModel,
    StrOrNull,
    Struct,
    TaggedModels,
    argument_error,
    members,
    parse,
    qapi_name,
    to_qmp,
    type_of,
)
from liveblockd.qapi.scalars import (
    INT,
    ROOT,
    AnyValue,
    Boolean,
    Enum,
    Int8,
    Int16,
    Int32,
    Int64,
    Integer,
    Null,
    Number,
    Path,
    Size,
    String,
    Type,
    UInt8,
    UInt16,
    UInt32,
    UInt64,
    parse_size,
)

__all__ = [
    "INT",
    "ROOT",
    "Alternate",
    "AlternateType",
    "AnyValue",
    "Array",
    "Boolean",
    "Enum",
    "FlatUnion",
    "Int8",
    "Int16",
    "Int32",
    "Int64",
    "Integer",
    "Member",
    "Null",
    "Number",
    "Path",
    "QapiModel",
    "Size",
    "StrOrNull",
    "String",
    "Struct",
    "TaggedModels",
    "Type",
    "UInt8",
    "UInt16",
    "UInt32",
    "UInt64",
    "argument_error",
    "members",
    "parse",
    "parse_size",
    "qapi_name",
    "to_qmp",
    "type_of",
]
