"""Structs, arrays, unions and alternates of QAPI, made from the annotations of pydantic models.

Pure. Errors: ``BlockError`` from ``parse``; TypeError for an annotation that is no QAPI type.
"""

from __future__ import annotations

import enum
import functools
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final, Literal, TypeAlias, TypeVar, Union

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from liveblockd.errors import BlockError
from liveblockd.qapi.scalars import (
    INT,
    ROOT,
    AnyValue,
    Boolean,
    Enum,
    Integer,
    Null,
    Number,
    Path,
    String,
    Type,
)


def qapi_name(name: str) -> str:
    """The QMP spelling of a Python name: ``node_name`` -> ``node-name``, ``len_`` -> ``len``."""
    return name.rstrip("_").replace("_", "-")


class QapiModel(BaseModel):
    """Base of structs and unions. A member with a real ``_`` in QMP needs ``Field(alias=...)``."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        alias_generator=qapi_name,
        populate_by_name=True,
        defer_build=True,
        frozen=True,
        arbitrary_types_allowed=True,
        protected_namespaces=(),
    )

    if not typing.TYPE_CHECKING:

        def __init__(self, /, **values: Any) -> None:
            """By the names of attributes or of QMP; TypeError for a wrong name.

            Only validators of the model itself look at the values, which mypy has seen: what
            pydantic needs for more takes it 10 to 100 ms to make, once a model, and 3 MiB, while
            the guests wait.
            """
            cls = type(self)
            if _has_own_validation(cls):
                super().__init__(**values)
                return
            made = cls.model_construct(**values)
            if len(made.model_fields_set) != len(values):
                raise TypeError(f"{cls.__name__} has not all of {sorted(values)}")
            if missing := cls.__pydantic_fields__.keys() - made.__dict__.keys():
                raise TypeError(f"{cls.__name__} without {sorted(missing)}")
            for slot in ("__dict__", "__pydantic_fields_set__"):
                object.__setattr__(self, slot, getattr(made, slot))
            object.__setattr__(self, "__pydantic_extra__", None)
            object.__setattr__(self, "__pydantic_private__", None)

        __init__.__pydantic_base_init__ = True  # ``model_validate`` makes models in its own way

    #: Name of the member that chooses the variant, in the class that is the base of a flat union.
    qapi_tag: ClassVar[str]
    #: what clients may find out in the schema about the struct itself
    qapi_features: ClassVar[tuple[str, ...]] = ()
    #: of what will be refused for a better reason than a member that is not known
    qapi_any_members: ClassVar[bool] = False

    @classmethod
    def qapi_variants(cls) -> Mapping[str, type[QapiModel]]:
        """Variants by tag value. A value that the tag's enum has and this has not adds nothing."""
        return {}

    def to_qmp(self) -> dict[str, Any]:
        """As QMP shows it: QMP names, no absent members, plain values all the way down."""
        return {m.name: to_qmp(v) for m, v in _present(self)}


def to_qmp(value: Any) -> Any:
    """``value`` with every model in it turned into a dict and every enum into a str."""
    if isinstance(value, QapiModel):
        return value.to_qmp()
    if isinstance(value, enum.StrEnum):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): to_qmp(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_qmp(v) for v in value]
    return value


def _present(model: QapiModel) -> Iterator[tuple[Member, Any]]:
    for member in members(type(model)):
        value = getattr(model, member.attribute)
        if value is None and not (
            member.type.admits_null and member.attribute in model.model_fields_set
        ):
            continue
        yield member, value


@dataclass(frozen=True, slots=True)
class Array(Type):
    """A JSON array of one type."""

    element: Type

    def visit(self, value: Any, path: Path) -> list[Any]:
        """The list of what the elements are in the model."""
        if not isinstance(value, list):
            raise path.mistyped("array")
        visit = self.element.visit
        return [visit(v, path.element(i)) for i, v in enumerate(value)]


@dataclass(frozen=True, slots=True)
class Struct(Type):
    """A JSON object with the members of a model."""

    model: type[QapiModel]

    def visit(self, value: Any, path: Path) -> QapiModel:
        """An instance of the model."""
        if isinstance(value, self.model):
            return value
        if not isinstance(value, dict):
            raise path.mistyped("object")
        return _visit_members(self.model, value, path)


@dataclass(frozen=True, slots=True)
class FlatUnion(Type):
    """A JSON object whose member ``tag`` tells which further members it has."""

    base: type[QapiModel]
    tag: str

    def visit(self, value: Any, path: Path) -> QapiModel:
        """An instance of the variant; the members of the base are looked at first."""
        if isinstance(value, self.base):
            return value
        if not isinstance(value, dict):
            raise path.mistyped("object")
        variants = self.variants()
        for member in members(self.base):
            if member.name != self.tag:
                _visit_member(member, value, path)
                continue
            if self.tag not in value:
                raise BlockError(f"Parameter '{path.member(self.tag).full}' is missing")
            tag = member.type.visit(value[self.tag], path.member(self.tag))
            if not isinstance(member.type, Enum) and tag not in variants:
                raise path.member(self.tag).refused(tag)
        variant = variants.get(str(value[self.tag]), self.base)
        return _visit_members(variant, value, path)

    def variants(self) -> Mapping[str, type[QapiModel]]:
        """The models by the value of the tag."""
        return self.base.qapi_variants()


@dataclass(frozen=True, slots=True)
class TaggedModels(Type):
    """A flat union written as ``A | B`` with a discriminator."""

    tag: str
    models: tuple[tuple[str, type[QapiModel]], ...]

    def visit(self, value: Any, path: Path) -> QapiModel:
        """An instance of the model whose tag has the value."""
        variants = dict(self.models)
        if isinstance(value, tuple(variants.values())):
            return typing.cast(QapiModel, value)
        if not isinstance(value, dict):
            raise path.mistyped("object")
        place = path.member(self.tag)
        if self.tag not in value:
            raise BlockError(f"Parameter '{place.full}' is missing")
        tag = value[self.tag]
        if not isinstance(tag, str):
            raise place.mistyped("string")
        if tag not in variants:
            raise place.refused(tag)
        return _visit_members(variants[tag], value, path)


@dataclass(frozen=True, slots=True)
class AlternateType(Type):
    """One of several types, told apart by the JSON type of the value."""

    name: str
    branches: tuple[Type, ...]

    @property
    def admits_null(self) -> bool:  # type: ignore[override]
        """Whether null is one of the branches."""
        return any(isinstance(b, Null) for b in self.branches)

    def visit(self, value: Any, path: Path) -> Any:
        """What the one branch for values of this JSON type makes of it."""
        if isinstance(value, str) and path.keyval:
            scalars = [b for b in self.branches if not isinstance(b, Null | Struct | FlatUnion)]
            if scalars:
                return scalars[0].visit(value, path)
        for branch in self.branches:
            if _takes(branch, value):
                return branch.visit(value, path)
        raise path.mistyped(self.name, last=True)


def _takes(branch: Type, value: Any) -> bool:
    match branch:
        case Null():
            return value is None
        case String() | Enum():
            return isinstance(value, str)
        case Boolean():
            return isinstance(value, bool)
        case Integer():
            return type(value) is int
        case Number():
            return type(value) in (int, float)
        case Array():
            return isinstance(value, list)
        case AnyValue():
            return True
    return isinstance(value, dict | QapiModel)


@dataclass(frozen=True, slots=True)
class Alternate:
    """Marks a union of types as the QAPI alternate ``name``."""

    name: str


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a struct: ``attribute`` is its Python name, ``name`` its QMP name."""

    attribute: str
    name: str
    type: Type
    required: bool
    features: tuple[str, ...] = ()


# -- from annotations to types

StrOrNull: TypeAlias = Annotated[str | None, Alternate("StrOrNull")]

_SCALARS: Final[dict[Any, Type]] = {
    str: String(),
    bool: Boolean(),
    int: INT,
    float: Number(),
    type(None): Null(),
    None: Null(),
    Any: AnyValue(),
    object: AnyValue(),
    dict: AnyValue(object_only=True),
}


def type_of(annotation: Any, metadata: tuple[Any, ...] = (), discriminator: Any = None) -> Type:
    """The QAPI type that a Python annotation stands for; TypeError when there is none."""
    for mark in metadata:
        if isinstance(mark, Type):
            return mark
        if isinstance(mark, FieldInfo) and mark.discriminator is not None:
            discriminator = mark.discriminator
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        inner, *marks = typing.get_args(annotation)
        return type_of(inner, tuple(marks), discriminator)
    if origin in (Union, types.UnionType):
        return _union_type(typing.get_args(annotation), metadata, discriminator)
    if origin is Literal:
        return Enum(tuple(typing.get_args(annotation)))
    if origin in (list, tuple):
        return Array(type_of(typing.get_args(annotation)[0]))
    if origin in (dict, Mapping):
        return AnyValue(object_only=True)
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    if isinstance(annotation, type) and issubclass(annotation, enum.StrEnum):
        return Enum(tuple(m.value for m in annotation), annotation)
    if isinstance(annotation, type) and issubclass(annotation, QapiModel):
        if "qapi_tag" in vars(annotation):
            return FlatUnion(annotation, annotation.qapi_tag)
        return Struct(annotation)
    raise TypeError(f"no QAPI type for {annotation!r}")


def _union_type(args: tuple[Any, ...], metadata: tuple[Any, ...], discriminator: Any) -> Type:
    if isinstance(discriminator, str):
        return TaggedModels(qapi_name(discriminator), tuple(_by_tag(args, discriminator)))
    for mark in metadata:
        if isinstance(mark, Alternate):
            return AlternateType(mark.name, tuple(type_of(a) for a in args))
    rest = [a for a in args if a is not type(None)]
    if len(rest) == 1:  # X | None: an optional member, not one that may be null
        return type_of(rest[0])
    raise TypeError(f"a union of {args!r} needs Alternate(name) or a discriminator")


def _by_tag(models: tuple[type[QapiModel], ...], tag: str) -> Iterator[tuple[str, type[QapiModel]]]:
    for model in models:
        for value in typing.get_args(model.model_fields[tag].annotation):
            yield value, model


@functools.cache
def members(model: type[QapiModel]) -> tuple[Member, ...]:
    """The members of a model in the order in which they are looked at."""
    if not model.__pydantic_fields_complete__:
        model.model_rebuild()
    found = []
    for attribute, field in model.model_fields.items():
        extra = field.json_schema_extra
        features = extra.get("features", ()) if isinstance(extra, dict) else ()
        found.append(
            Member(
                attribute,
                field.alias or qapi_name(attribute),
                type_of(field.annotation, tuple(field.metadata), field.discriminator),
                field.is_required(),
                tuple(typing.cast("tuple[str, ...]", features)),
            )
        )
    return tuple(found)


# -- visiting

Model = TypeVar("Model", bound=QapiModel)


def parse(model: type[Model], value: Any, *, keyval: bool = False) -> Model:
    """``value``, a decoded JSON object, as an instance of ``model``; raises BlockError.

    With ``keyval`` the scalars are strings of a command line (``read-only=on``, ``size=10M``).
    """
    return typing.cast(Model, type_of(model).visit(value, Path("", None, keyval)))


def _visit_members(model: type[QapiModel], value: dict[str, Any], path: Path) -> QapiModel:
    found: dict[str, Any] = {}
    unexpected = dict.fromkeys(value)
    for member in members(model):
        unexpected.pop(member.name, None)
        if (held := _visit_member(member, value, path)) is not _ABSENT:
            found[member.attribute] = held
    for name in () if model.qapi_any_members else unexpected:
        raise BlockError(f"Parameter '{path.member(name).full}' is unexpected")
    if _has_own_validation(model):
        try:
            return model(**found)
        except ValidationError as error:
            raise argument_error(error) from None
    return model.model_construct(set(found), **found)


@functools.cache
def _has_own_validation(model: type[QapiModel]) -> bool:
    """Whether pydantic has more to say: validators, or constraints such as ``Field(ge=1)``."""
    decorators = model.__pydantic_decorators__
    return bool(decorators.field_validators or decorators.model_validators) or any(
        not isinstance(mark, Type | Alternate)
        for field in model.model_fields.values()
        for mark in field.metadata
    )


_ABSENT: Final = object()


def _visit_member(member: Member, value: dict[str, Any], path: Path) -> Any:
    place = path.member(member.name)
    if member.name in value:
        return member.type.visit(value[member.name], place)
    if member.required:
        raise BlockError(f"Parameter '{place.full}' is missing")
    return _ABSENT


_PYDANTIC_TYPES: Final = {
    "string": "string",
    "int": "integer",
    "bool": "boolean",
    "float": "number",
    "list": "array",
    "model": "object",
    "dict": "object",
    "enum": "string",
}


def argument_error(error: ValidationError) -> BlockError:
    """The first error of a pydantic validator, in QEMU's words; unexpected members come last."""
    problems = error.errors(include_url=False)
    first = min(problems, key=lambda problem: problem["type"] == "extra_forbidden")
    path = ROOT
    for part in first["loc"]:
        path = path.element(part) if isinstance(part, int) else path.member(part)
    match first["type"]:
        case "missing":
            return BlockError(f"Parameter '{path.full}' is missing")
        case "extra_forbidden":
            return BlockError(f"Parameter '{path.full}' is unexpected")
        case "enum" | "literal_error":
            return path.refused(first["input"])
        case "value_error" | "assertion_error":
            return BlockError(str(first["ctx"]["error"]))
    expected = _PYDANTIC_TYPES.get(first["type"].split("_")[0])
    return path.mistyped(expected) if expected else path.expects(first["msg"].lower())
