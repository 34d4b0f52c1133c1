"""Types of objects and their properties: qom-list-types, -properties, -get (QEMU qapi/qom.json).

There are the types that ``object-add`` takes, and what they are derived from. What a secret holds
is never told. Runs on the event loop; BlockError escapes.
"""

from __future__ import annotations

from typing import Any, Final

from liveblockd.errors import BlockError, ErrorClass
from liveblockd.qapi import QapiModel
from liveblockd.qmp.commands.objects import (
    ObjectOptions,
    ObjectPropertyInfo,
    QomPath,
    QomProperty,
    properties_of,
    qom_get,
    qom_list,
)
from liveblockd.qmp.context import Context
from liveblockd.qmp.registry import command

_ABSTRACT: Final = {
    "object": None,
    "container": "object",
    "interface": None,
    "user-creatable": "interface",
    "authz": "object",
    "event-loop-base": "object",
    "secret_common": "object",
    "tls-creds": "object",
}
_PARENTS: Final = {
    "authz-list": "authz",
    "authz-list-file": "authz",
    "authz-simple": "authz",
    "iothread": "event-loop-base",
    "main-loop": "event-loop-base",
    "secret": "secret_common",
    "throttle-group": "object",
    "tls-creds-anon": "tls-creds",
    "tls-creds-psk": "tls-creds",
    "tls-creds-x509": "tls-creds",
}
_ALL: Final[dict[str, str | None]] = {**_ABSTRACT, **_PARENTS}
_INTERFACES: Final = ("interface", "user-creatable")


class ObjectTypeInfo(QapiModel):
    """A type; ``abstract`` ones have no objects."""

    name: str
    abstract: bool | None = None
    parent: str | None = None


class QomListTypes(QapiModel):
    """Arguments of qom-list-types."""

    implements: str | None = None
    abstract: bool = False


class TypeName(QapiModel):
    """Arguments of qom-list-properties."""

    typename: str


class QomPaths(QapiModel):
    """Arguments of qom-list-get."""

    paths: list[str]


class ObjectPropertyValue(QapiModel):
    """A property and what it is; without ``value`` it cannot be read."""

    name: str
    type: str
    value: Any = None


class ObjectPropertiesValues(QapiModel):
    """The properties of one object."""

    properties: list[ObjectPropertyValue]


def _is_a(name: str, ancestor: str) -> bool:
    if ancestor == "user-creatable" and name in _PARENTS:
        return True
    found: str | None = name
    while found is not None and found != ancestor:
        found = _ALL[found]
    return found is not None


@command("qom-list-types", args=QomListTypes, returns=list[ObjectTypeInfo], query=True)
async def qom_list_types(context: Context, arguments: QomListTypes) -> list[ObjectTypeInfo]:  # noqa: ARG001
    """The types, or those derived from one; the abstract ones too if asked."""
    found = []
    for name, parent in _ALL.items():
        abstract = name in _ABSTRACT and name != "container"
        if abstract and not arguments.abstract:
            continue
        if arguments.implements is None or _is_a(name, arguments.implements):
            found.append(ObjectTypeInfo(name=name, abstract=abstract or None, parent=parent))
    return found


@command("qom-list-properties", args=TypeName, returns=list[ObjectPropertyInfo], query=True)
async def qom_list_properties(context: Context, arguments: TypeName) -> list[ObjectPropertyInfo]:  # noqa: ARG001
    """What objects of a type have; of an abstract type what all that are derived have."""
    name = arguments.typename
    if name not in _ALL:
        raise BlockError(f"Class '{name}' not found", error_class=ErrorClass.DEVICE_NOT_FOUND)
    if name in _INTERFACES:
        raise BlockError("Parameter 'typename' expects a QOM type")
    variants = ObjectOptions.qapi_variants()
    if name in variants:
        return properties_of(variants[name])
    lists = [properties_of(variants[n]) for n in _PARENTS if _is_a(n, name)]
    if not lists or name == "object":
        return [ObjectPropertyInfo(name="type", type="string")]
    shared = set.intersection(*({found.name for found in one} for one in lists))
    return [found for found in lists[0] if found.name in shared]


@command("qom-list-get", args=QomPaths, returns=list[ObjectPropertiesValues], query=True)
async def qom_list_get(context: Context, arguments: QomPaths) -> list[dict[str, Any]]:
    """The properties of several objects with their values."""
    answer = []
    for path in arguments.paths:
        found = []
        for known in await qom_list(context, QomPath(path=path)):
            entry = {"name": known.name, "type": known.type}
            if not known.type.startswith("child<"):
                try:
                    asked = QomProperty(path=path, property=known.name)
                    entry["value"] = await qom_get(context, asked)
                except BlockError:
                    pass  # a secret keeps what it holds; a container has no values
            found.append(entry)
        answer.append({"properties": found})
    return answer
