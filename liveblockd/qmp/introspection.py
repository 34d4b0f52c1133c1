"""query-qmp-schema, made from the registered commands and the event classes (qapi/introspect.json).

Types get numbers for names, as in QEMU: a client has to go by structure. Built at the first
question and kept: commands, events and drivers do not change once the daemon is up.

Runs on the event loop (a few ms, once). Raises TypeError when a model has a member that is no QAPI
type, which is a defect of that model.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Final

from liveblockd.events import Event
from liveblockd.qapi import (
    AlternateType,
    AnyValue,
    Array,
    Boolean,
    Enum,
    FlatUnion,
    Integer,
    Member,
    Null,
    Number,
    QapiModel,
    String,
    Struct,
    TaggedModels,
    Type,
    members,
    qapi_name,
    type_of,
)
from liveblockd.qmp import registry

Entity = dict[str, Any]

_BUILTINS: Final = {
    "str": "string",
    "int": "int",
    "number": "number",
    "bool": "boolean",
    "null": "null",
    "any": "value",
}
_NAMES: Final[dict[type[Type], str]] = {
    String: "str",
    Integer: "int",
    Number: "number",
    Boolean: "bool",
    Null: "null",
    AnyValue: "any",
}


@functools.cache
def schema() -> list[Entity]:
    """All SchemaInfo entities: commands, events, and every type they reach."""
    builder = _Builder()
    for command in registry.commands().values():
        builder.add_command(command)
    for event in events():
        builder.add_event(event)
    return builder.entities


def events() -> list[type[Event]]:
    """The event classes by name."""
    found: dict[str, type[Event]] = {}
    waiting = list(Event.__subclasses__())
    while waiting:
        event = waiting.pop()
        waiting += event.__subclasses__()
        if isinstance(getattr(event, "name", None), str):
            found[event.name] = event
    return [found[name] for name in sorted(found)]


def _event_enums() -> dict[tuple[str, str], type[enum.StrEnum]]:
    """Members of events that are enums in QMP; ``events.py``, below ``jobs``, has strings."""
    from liveblockd.jobs.job import BlockJobType
    from liveblockd.jobs.transitions import JobStatus

    ended = ("COMPLETED", "CANCELLED", "READY", "PENDING")
    job_events = [f"BLOCK_JOB_{end}" for end in ended]
    return {
        ("JOB_STATUS_CHANGE", "status"): JobStatus,
        **{(name, "type"): BlockJobType for name in job_events},
        ("BLOCK_JOB_ERROR", "operation"): IoOperationType,
        ("BLOCK_JOB_ERROR", "action"): BlockErrorAction,
        ("BLOCK_IO_ERROR", "operation"): IoOperationType,
        ("BLOCK_IO_ERROR", "action"): BlockErrorAction,
        ("SHUTDOWN", "reason"): ShutdownCause,
    }


class IoOperationType(enum.StrEnum):
    """Which request failed."""

    READ = "read"
    WRITE = "write"


class BlockErrorAction(enum.StrEnum):
    """What was done about an error."""

    IGNORE = "ignore"
    REPORT = "report"
    STOP = "stop"


class ShutdownCause(enum.StrEnum):
    """Who ended the daemon."""

    HOST_QMP_QUIT = "host-qmp-quit"
    HOST_SIGNAL = "host-signal"


class _Builder:
    """Entities so far, and the names that types have in them."""

    def __init__(self) -> None:
        self.entities: list[Entity] = []
        self._names: dict[Any, str] = {}
        self._counter = 0

    def add_command(self, command: registry.Command) -> None:
        """A command with its argument and return types."""
        annotation = command.returns
        if isinstance(annotation, types.FunctionType):
            annotation = annotation()
        returns = type_of(annotation) if annotation is not None else None
        entity: Entity = {
            "name": command.name,
            "meta-type": "command",
            "arg-type": self._name(type_of(command.args)),
            "ret-type": self._name(returns or Struct(registry.NoArguments)),
        }
        if command.features:
            entity["features"] = list(command.features)
        self.entities.append(entity)

    def add_event(self, event: type[Event]) -> None:
        """An event with its data."""
        enums = _event_enums()
        hints = typing.get_type_hints(event)
        found = []
        for field in dataclasses.fields(event):
            name = qapi_name(field.name)
            annotation = enums.get((event.name, name), hints[field.name])
            required = field.default is dataclasses.MISSING
            found.append(Member(field.name, name, type_of(annotation), required))
        arg_type = self._define(("event", event), lambda: self._object(found))
        self.entities.append({"name": event.name, "meta-type": "event", "arg-type": arg_type})

    def _define(self, key: Any, describe: Callable[[], Entity], name: str = "") -> str:
        """The name of the type ``key``, described at its first use; it may refer to itself."""
        if key in self._names:
            return self._names[key]
        if not name:
            name = str(self._counter)
            self._counter += 1
        self._names[key] = name
        self.entities.append({"name": name} | describe())
        return name

    def _name(self, kind: Type) -> str:
        match kind:
            case Enum():
                return self._define(kind, lambda: _enum(kind.values))
            case Array():
                element = self._name(kind.element)
                array: Entity = {"meta-type": "array", "element-type": element}
                return self._define(kind, lambda: array, f"[{element}]")
            case Struct():
                return self._define(kind, lambda: self._struct(kind.model))
            case FlatUnion():
                return self._define(kind, lambda: self._flat_union(kind))
            case TaggedModels():
                return self._define(kind, lambda: self._tagged_models(kind))
            case AlternateType():
                return self._define(kind, lambda: self._alternate(kind))
        name = _NAMES[type(kind)]
        builtin: Entity = {"meta-type": "builtin", "json-type": _BUILTINS[name]}
        return self._define(name, lambda: builtin, name)

    def _struct(self, model: type[QapiModel], leave_out: Collection[str] = ()) -> Entity:
        entity = self._object(m for m in members(model) if m.name not in leave_out)
        if model.qapi_features:
            entity["features"] = list(model.qapi_features)
        return entity

    def _object(self, found: Iterable[Member]) -> Entity:
        return {"meta-type": "object", "members": [self._member(m) for m in found]}

    def _member(self, member: Member, kind: Type | None = None) -> Entity:
        entity: Entity = {"name": member.name, "type": self._name(kind or member.type)}
        if not member.required:
            entity["default"] = None
        if member.features:
            entity["features"] = list(member.features)
        return entity

    def _alternate(self, kind: AlternateType) -> Entity:
        branches = [{"type": self._name(branch)} for branch in kind.branches]
        return {"meta-type": "alternate", "members": branches}

    def _flat_union(self, kind: FlatUnion) -> Entity:
        base = members(kind.base)
        tag = next(m for m in base if m.name == kind.tag)
        return self._union(kind, base, tag, kind.variants())

    def _tagged_models(self, kind: TaggedModels) -> Entity:
        variants = dict(kind.models)
        by_name = [{m.name: m for m in members(model)} for model in variants.values()]
        base = [m for m in by_name[0].values() if all(m.name in others for others in by_name)]
        tag = next(m for m in base if m.name == kind.tag)
        return self._union(kind, base, tag, variants)

    def _union(
        self,
        kind: Type,
        base: Iterable[Member],
        tag: Member,
        variants: Mapping[str, type[QapiModel]],
    ) -> Entity:
        has_enum = isinstance(kind, FlatUnion) and isinstance(tag.type, Enum)
        tag_type = tag.type if has_enum else Enum(tuple(variants))
        assert isinstance(tag_type, Enum)
        common = {m.name for m in base}
        return {
            "meta-type": "object",
            "members": [self._member(m, tag_type if m is tag else None) for m in base],
            "tag": tag.name,
            "variants": [
                {"case": value, "type": self._variant(variants.get(value), common)}
                for value in tag_type.values
            ],
        }

    def _variant(self, model: type[QapiModel] | None, common: set[str]) -> str:
        if model is None or all(m.name in common for m in members(model)):
            return self._name(Struct(registry.NoArguments))
        return self._define(("variant", model), lambda: self._struct(model, common))


def _enum(values: tuple[str, ...]) -> Entity:
    return {
        "meta-type": "enum",
        "members": [{"name": value} for value in values],
        "values": list(values),
    }


# -- what query-qmp-schema says of itself


class SchemaMetaType(enum.StrEnum):
    """Kinds of entities."""

    BUILTIN = "builtin"
    ENUM = "enum"
    ARRAY = "array"
    OBJECT = "object"
    ALTERNATE = "alternate"
    COMMAND = "command"
    EVENT = "event"


class SchemaInfo(QapiModel):
    """One entity of the schema."""

    qapi_tag: ClassVar[str] = "meta-type"

    name: str
    meta_type: SchemaMetaType
    features: list[str] | None = None

    @classmethod
    def qapi_variants(cls) -> Mapping[str, type[QapiModel]]:
        """The kinds by meta-type."""
        return {kind.__name__.removeprefix("SchemaInfo").lower(): kind for kind in _kinds()}


class JSONType(enum.StrEnum):
    """JSON types of builtins."""

    STRING = "string"
    NUMBER = "number"
    INT = "int"
    BOOLEAN = "boolean"
    NULL = "null"
    OBJECT = "object"
    ARRAY = "array"
    VALUE = "value"


class SchemaInfoEnumMember(QapiModel):
    """A value of an enum."""

    name: str
    features: list[str] | None = None


class SchemaInfoObjectMember(QapiModel):
    """A member of an object; ``default`` is there (null) when it may be left out."""

    name: str
    type: str
    default: Any = None
    features: list[str] | None = None


class SchemaInfoObjectVariant(QapiModel):
    """The further members for a value of the tag."""

    case: str
    type: str


class SchemaInfoAlternateMember(QapiModel):
    """A type that an alternate takes."""

    type: str


class SchemaInfoBuiltin(SchemaInfo):
    """A builtin type."""

    json_type: JSONType


class SchemaInfoEnum(SchemaInfo):
    """An enum."""

    members: list[SchemaInfoEnumMember]
    values: list[str]


class SchemaInfoArray(SchemaInfo):
    """An array."""

    element_type: str


class SchemaInfoObject(SchemaInfo):
    """A struct or union."""

    members: list[SchemaInfoObjectMember]
    tag: str | None = None
    variants: list[SchemaInfoObjectVariant] | None = None


class SchemaInfoAlternate(SchemaInfo):
    """An alternate."""

    members: list[SchemaInfoAlternateMember]


class SchemaInfoCommand(SchemaInfo):
    """A command."""

    arg_type: str
    ret_type: str
    allow_oob: bool = False


class SchemaInfoEvent(SchemaInfo):
    """An event."""

    arg_type: str


def _kinds() -> Iterator[type[SchemaInfo]]:
    yield from (
        SchemaInfoBuiltin,
        SchemaInfoEnum,
        SchemaInfoArray,
        SchemaInfoObject,
        SchemaInfoAlternate,
        SchemaInfoCommand,
        SchemaInfoEvent,
    )
