"""object-add, object-del and the little of QOM that block clients ask (QEMU qapi/qom.json).

An object is a named set of options that others refer to: a secret, credentials, limits. They are
kept in ``ObjectRegistry`` (``context.parts["objects"]``); who uses one holds a reference on it.

Runs on the event loop; BlockError escapes.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Mapping
from ssl import SSLContext
from typing import Any, ClassVar, Final, Literal

from liveblockd.errors import BlockError, ErrorClass
from liveblockd.exports.polling import POLL_MAX
from liveblockd.qapi import QapiModel, members, parse, to_qmp
from liveblockd.qapi.models import Member
from liveblockd.qapi.scalars import Boolean, String
from liveblockd.qmp import authz
from liveblockd.qmp.authz import AuthzRule
from liveblockd.qmp.context import Context
from liveblockd.qmp.registry import command
from liveblockd.qmp.secrets import load_secret
from liveblockd.runtime.tls import TlsCredentials, TlsFiles, load_credentials
from liveblockd.runtime.tls_anon import load_anon
from liveblockd.runtime.tls_psk import PskFile, load_psk
from liveblockd.storage.filters import buckets
from liveblockd.storage.filters.throttle_group import ThrottleGroup as GroupOfDisks
from liveblockd.storage.filters.throttle_options import (
    ThrottleLimits,
    changed,
    limits_of,
    to_members,
)

_ID: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")


class ObjectOptions(QapiModel):
    """Base of all objects; ``qom_type`` tells the further members."""

    qapi_tag: ClassVar[str] = "qom-type"
    qom_type: str
    id: str

    @classmethod
    def qapi_variants(cls) -> Mapping[str, type[QapiModel]]:
        """The types that can be added."""
        return _VARIANTS


class SecretFormat(enum.StrEnum):
    """QCryptoSecretFormat."""

    RAW = "raw"
    BASE64 = "base64"


class Secret(ObjectOptions):
    """A password or key, in ``data`` or in ``file``."""

    format: SecretFormat = SecretFormat.RAW
    keyid: str | None = None
    iv: str | None = None
    data: str | None = None
    file: str | None = None


class ThrottleGroup(ObjectOptions):
    """Limits that throttle nodes share; the ``x-`` members are the flat form of the old days."""

    limits: ThrottleLimits | None = None
    x_iops_total: int | None = None
    x_iops_total_max: int | None = None
    x_iops_total_max_length: int | None = None
    x_iops_read: int | None = None
    x_iops_read_max: int | None = None
    x_iops_read_max_length: int | None = None
    x_iops_write: int | None = None
    x_iops_write_max: int | None = None
    x_iops_write_max_length: int | None = None
    x_bps_total: int | None = None
    x_bps_total_max: int | None = None
    x_bps_total_max_length: int | None = None
    x_bps_read: int | None = None
    x_bps_read_max: int | None = None
    x_bps_read_max_length: int | None = None
    x_bps_write: int | None = None
    x_bps_write_max: int | None = None
    x_bps_write_max_length: int | None = None
    x_iops_size: int | None = None


class Iothread(ObjectOptions):
    """All I/O has the one event loop and its workers.

    Of an iothread that an export names, ``poll-max-ns`` counts: so long the next request of its
    clients is looked for at most. The rest is accepted so that command lines pass.
    """

    aio_max_batch: int | None = None
    thread_pool_min: int | None = None
    thread_pool_max: int | None = None
    poll_max_ns: int | None = None
    poll_grow: int | None = None
    poll_shrink: int | None = None
    poll_weight: int | None = None


class MainLoop(ObjectOptions):
    """As ``Iothread``."""

    aio_max_batch: int | None = None
    thread_pool_min: int | None = None
    thread_pool_max: int | None = None


class TlsCreds(ObjectOptions):
    """What all kinds of TLS credentials have."""

    verify_peer: bool = True
    dir: str | None = None
    endpoint: Literal["client", "server"] = "client"
    priority: str | None = None


class TlsCredsPsk(TlsCreds):
    """Pre-shared keys."""

    username: str | None = None


class TlsCredsX509(TlsCreds):
    """Certificates."""

    sanity_check: bool = True
    passwordid: str | None = None


class AuthzList(ObjectOptions):
    """Who may connect, in order."""

    policy: Literal["deny", "allow"] = "deny"
    rules: list[AuthzRule] | None = None


class AuthzListFile(ObjectOptions):
    """The same in a file."""

    filename: str
    refresh: bool = True


class AuthzSimple(ObjectOptions):
    """One who may connect."""

    identity: str


_VARIANTS: Final[Mapping[str, type[QapiModel]]] = {
    "authz-list": AuthzList,
    "authz-list-file": AuthzListFile,
    "authz-listfile": AuthzListFile,  # so spelt in QEMU's schema
    "authz-simple": AuthzSimple,
    "iothread": Iothread,
    "main-loop": MainLoop,
    "secret": Secret,
    "throttle-group": ThrottleGroup,
    "tls-creds-anon": TlsCreds,
    "tls-creds-psk": TlsCredsPsk,
    "tls-creds-x509": TlsCredsX509,
}


#: the types that are no plain ones, by the property that has them
_TYPE_NAMES: Final = {
    "endpoint": "QCryptoTLSCredsEndpoint",
    "format": "QCryptoSecretFormat",
    "limits": "ThrottleLimits",
    "policy": "QAuthZListPolicy",
    "rules": "QAuthZListRule",
}


class ObjectRegistry:
    """The objects of the daemon by id, in the order they were added."""

    def __init__(self) -> None:
        self._objects: dict[str, ObjectOptions] = {}
        self._references: dict[str, int] = {}
        self._secrets: dict[str, bytes] = {}
        self._throttle_groups: dict[str, GroupOfDisks] = {}
        self._tls: dict[str, TlsCredentials] = {}
        self._list_files: dict[str, authz.ListFile] = {}

    def add(self, options: ObjectOptions) -> None:
        """Keep a new object."""
        if not _ID.fullmatch(options.id):
            raise BlockError("Parameter 'id' expects an identifier")
        if options.id in self._objects:
            raise BlockError(
                f"attempt to add duplicate property '{options.id}' to object (type 'container')"
            )
        if isinstance(options, Secret):
            self._secrets[options.id] = load_secret(options, self.secret)
        if isinstance(options, ThrottleGroup):
            self._throttle_groups[options.id] = GroupOfDisks(limits_of(options))
        if isinstance(options, TlsCreds):
            self._load_tls(options)
        if isinstance(options, AuthzListFile):
            found = authz.ListFile(options.filename, refresh=options.refresh)
            self._list_files[options.id] = found
            options = options.model_copy(update={"qom_type": "authz-list-file"})
        self._objects[options.id] = options

    def remove(self, name: str) -> None:
        """Forget an object that nobody uses."""
        self.find(name)
        group = self._throttle_groups.get(name)
        if group is not None and group.members:
            raise BlockError(f"Cannot delete throttle group '{name}' with active references")
        if self._references.get(name):
            raise BlockError(f"object '{name}' is in use, can not be deleted")
        del self._objects[name]
        self._secrets.pop(name, None)
        self._throttle_groups.pop(name, None)
        self._tls.pop(name, None)
        self._list_files.pop(name, None)

    def _load_tls(self, options: TlsCreds) -> None:
        server, priority = options.endpoint == "server", options.priority
        if isinstance(options, TlsCredsX509):
            password = None if options.passwordid is None else self.secret(options.passwordid)
            files = TlsFiles(
                options.dir, server, options.verify_peer, password, priority, options.sanity_check
            )
            self._tls[options.id] = load_credentials(files)
        elif isinstance(options, TlsCredsPsk):
            keys = PskFile(options.dir, server, options.username, priority)
            self._tls[options.id] = load_psk(keys)
        else:
            self._tls[options.id] = load_anon(options.dir, server=server, priority=priority)

    def authorizer(self, name: str) -> Callable[[str], bool]:
        """What the ``authz-*`` object says of an identity; looked for each time, BlockError."""

        def allows(identity: str) -> bool:
            options = self._objects.get(name)
            match options:
                case AuthzSimple():
                    return options.identity == identity
                case AuthzList():
                    return authz.allowed_by(options, identity)
                case AuthzListFile():
                    return self._list_files[name].allows(identity)
                case None:
                    raise BlockError(f"Cannot find QAuthZ object ID {name}")
                case _:
                    raise BlockError(f"Object '{name}' is not a QAuthZ subclass")

        return allows

    def tls_server(self, name: str) -> SSLContext:
        """The TLS context of a server that the object ``name`` stands for."""
        return self._find_tls(name).for_server()

    def tls_client(self, name: str, named: bool) -> SSLContext:
        """The TLS context of a client; ``named``: the server has to be who it is called."""
        return self._find_tls(name).for_client(named=named)

    def _find_tls(self, name: str) -> TlsCredentials:
        options = self._objects.get(name)
        if options is None:
            raise BlockError(f"No TLS credentials with id '{name}'")
        if not isinstance(options, TlsCreds):
            raise BlockError(f"Object with id '{name}' is not TLS credentials")
        return self._tls[name]

    def find(self, name: str) -> ObjectOptions:
        """The object ``name``."""
        try:
            return self._objects[name]
        except KeyError:
            raise BlockError(f"object '{name}' not found") from None

    def get(self, name: str, qom_type: str) -> ObjectOptions | None:
        """The object if there is one of this type."""
        options = self._objects.get(name)
        return options if options is not None and options.qom_type == qom_type else None

    def poll_ns(self, name: str) -> int | None:
        """``poll-max-ns`` of the iothread ``name``, if there is one."""
        options = self.get(name, "iothread")
        if options is None:
            return None
        assert isinstance(options, Iothread)
        return POLL_MAX if options.poll_max_ns is None else max(0, options.poll_max_ns)

    def secret(self, name: str) -> bytes:
        """What the secret ``name`` holds."""
        if name not in self._objects:
            raise BlockError(f"No secret with id '{name}'")
        if name not in self._secrets:
            raise BlockError(f"Object with id '{name}' is not a secret")
        return self._secrets[name]

    def throttle_group(self, name: str) -> GroupOfDisks:
        """What the ``throttle-group`` object ``name`` stands for."""
        try:
            return self._throttle_groups[name]
        except KeyError:
            raise BlockError(f"Throttle group '{name}' does not exist") from None

    def reference(self, name: str) -> None:
        """Keep ``name`` from being removed; once for each ``release``."""
        self._references[name] = self._references.get(name, 0) + 1

    def release(self, name: str) -> None:
        """Undo one ``reference``."""
        assert self._references[name] > 0
        self._references[name] -= 1

    def all(self) -> list[ObjectOptions]:
        """Every object, oldest first."""
        return list(self._objects.values())


def object_registry(context: Context) -> ObjectRegistry:
    """The registry of this daemon."""
    found = context.parts.setdefault("objects", ObjectRegistry())
    assert isinstance(found, ObjectRegistry)
    return found


class ObjectId(QapiModel):
    """Which object."""

    id: str


class QomPath(QapiModel):
    """Which place of the object tree."""

    path: str


class QomProperty(QomPath):
    """Which property of it."""

    property: str


class QomValue(QomProperty):
    """What it is to be."""

    value: Any


class _LimitsProperty(QapiModel):
    limits: ThrottleLimits


class ObjectPropertyInfo(QapiModel):
    """A member of the tree or of an object."""

    name: str
    type: str
    description: str | None = None
    default_value: Any = None


@command("object-add", args=ObjectOptions)
async def object_add(context: Context, arguments: ObjectOptions) -> None:
    """Add an object."""
    object_registry(context).add(arguments)


@command("object-del", args=ObjectId)
async def object_del(context: Context, arguments: ObjectId) -> None:
    """Remove an object."""
    object_registry(context).remove(arguments.id)


@command("qom-list", args=QomPath, returns=list[ObjectPropertyInfo], query=True)
async def qom_list(context: Context, arguments: QomPath) -> list[ObjectPropertyInfo]:
    """What is below a path."""
    parts = [part for part in arguments.path.split("/") if part]
    if not parts:
        return [_property("type", "string"), _property("objects", "child<container>")]
    if parts == ["objects"]:
        below = [_property(o.id, f"child<{o.qom_type}>") for o in object_registry(context).all()]
        return [_property("type", "string"), *below]
    found = _object_at(context, arguments.path)
    return properties_of(type(found))


@command("qom-get", args=QomProperty, returns=Any, query=True)
async def qom_get(context: Context, arguments: QomProperty) -> Any:
    """The value of a property; what a secret holds is never told."""
    found = _object_at(context, arguments.path)
    if arguments.property == "type":
        return found.qom_type
    known = {m.name: m.attribute for m in members(type(found))}
    attribute = known.get(arguments.property)
    if attribute in (None, "qom_type", "id") or (isinstance(found, Secret) and attribute == "data"):
        raise BlockError(f"Property '{found.qom_type}.{arguments.property}' not found")
    if isinstance(found, ThrottleGroup):
        limits = to_members(object_registry(context).throttle_group(found.id).limits)
        return limits.get(arguments.property.removeprefix("x-"), limits)
    return to_qmp(getattr(found, str(attribute)))


@command("qom-set", args=QomValue)
async def qom_set(context: Context, arguments: QomValue) -> None:
    """Change a property of an object in use: the limits of a throttle group."""
    found = _object_at(context, arguments.path)
    name = arguments.property
    if name not in ("type", *(m.name for m in members(type(found)))) or name in ("qom-type", "id"):
        raise BlockError(f"Property '{found.qom_type}.{name}' not found")
    if not isinstance(found, ThrottleGroup) or name == "type":
        raise BlockError(f"Property '{found.qom_type}.{name}' is not writable")
    if name != "limits":
        raise BlockError("Property cannot be set after initialization")
    given = parse(_LimitsProperty, {"limits": arguments.value}).limits
    group = object_registry(context).throttle_group(found.id)
    limits = changed(group.limits, given)
    buckets.check(limits)
    group.configure(limits)


def _object_at(context: Context, path: str) -> ObjectOptions:
    parts = [part for part in path.split("/") if part]
    if len(parts) == 2 and parts[0] == "objects":
        parts = parts[1:]
    if len(parts) == 1:
        for found in object_registry(context).all():
            if found.id == parts[0]:
                return found
    raise BlockError(f"Device '{path}' not found", error_class=ErrorClass.DEVICE_NOT_FOUND)


def properties_of(model: type[QapiModel]) -> list[ObjectPropertyInfo]:
    """What objects of this type have, with the names that QEMU has for the types."""
    found = [m for m in members(model) if m.name not in ("qom-type", "id")]
    return [_property("type", "string"), *(_property(m.name, _type_name(m)) for m in found)]


def _type_name(member: Member) -> str:
    if (known := _TYPE_NAMES.get(member.name)) is not None:
        return known
    return {String: "string", Boolean: "bool"}.get(type(member.type), "int")


def _property(name: str, kind: str) -> ObjectPropertyInfo:
    return ObjectPropertyInfo(name=name, type=kind)
