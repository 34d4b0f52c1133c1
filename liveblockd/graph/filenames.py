"""How the file name of a node is shown, and where a backing name leads.

Follows QEMU (docs/system/images, ``json:`` in docs/interop/qemu-qmp and the ImageInfo of
qapi/block-core.json): a node that opening a plain file name would give again is shown by that name;
any other by ``json:`` and the options that make a difference to what is read.

Pure. Errors: BlockError when a relative name has no directory to start from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from liveblockd.errors import BlockError
from liveblockd.nbd import url as nbd_url
from liveblockd.qapi import QapiModel, members, to_qmp

if TYPE_CHECKING:
    from liveblockd.graph.node import Node

#: options that make a difference to what is read; of a driver that is not here, all of its own
_STRONG: Final[dict[str, frozenset[str]]] = {
    "file": frozenset(("filename",)),
    "host_device": frozenset(("filename",)),
    "null-co": frozenset(("size", "read-zeroes")),
    "null-aio": frozenset(("size", "read-zeroes")),
    "qcow2": frozenset(("encrypt", "data-file")),
    "nbd": frozenset(("server", "export", "tls-creds", "tls-hostname")),
    "raw": frozenset(("offset", "size")),
    "copy-on-read": frozenset(),
    "compress": frozenset(),
    "preallocate": frozenset(),
}
_COMMON: Final = frozenset(
    (
        "driver",
        "node-name",
        "discard",
        "cache",
        "active",
        "read-only",
        "auto-read-only",
        "force-share",
        "detect-zeroes",
    )
)
#: the options of blkdebug that change no requests
_BLKDEBUG_WEAK: Final = frozenset(("take-child-perms", "unshare-child-perms"))


def strong_options(node: Node) -> dict[str, Any]:
    """The options that were given and make a difference, children left out."""
    driver = node.driver_class
    wanted = _STRONG.get(driver.driver_name)
    found: dict[str, Any] = {}
    for member in members(type(node.given)):
        if member.attribute not in node.given.model_fields_set or member.name in _COMMON:
            continue
        if member.name in driver.child_roles and member.name != "data-file":
            continue
        if driver.driver_name == "blkdebug" and member.name in _BLKDEBUG_WEAK:
            continue
        if wanted is None or member.name in wanted:
            value = getattr(node.given, member.attribute)
            if value is not None:
                found |= _flat(member.name, value)
    return found


def _flat(name: str, value: Any) -> dict[str, Any]:
    """A list of objects by dotted names, as QEMU shows it (``inject-error.0.event``)."""
    if not isinstance(value, list):
        return {name: to_qmp(value)}
    items: list[QapiModel] = value
    return {
        f"{name}.{number}.{member.name}": to_qmp(getattr(item, member.attribute))
        for number, item in enumerate(items)
        for member in members(type(item))
        if member.attribute in item.model_fields_set
    }


#: names worked out already: a name may depend on all that is below, so a query of a whole chain
#: shares what it has found; valid as long as nothing is awaited
Known: TypeAlias = dict["Node", str]


def backing_overridden(node: Node, known: Known | None = None) -> bool:
    """Whether the backing node is another than the header would give."""
    if not node.supports_backing or not node.opened or node.without_chain:
        return False
    written = node.driver.backing_file or ""
    backing = node.backing
    if backing is None:
        return bool(written)
    if node.implied_backing is not None and node.implied_backing[0] == written:
        written = node.implied_backing[1]
    return written != filename(backing, known)


#: nodes that go by the name of what they stand on
_AS_THE_CHILD = ("commit_top", "mirror_top", "copy-before-write", "snapshot-access")


def _described(node: Node) -> Node:
    """The node whose options are shown for ``node``: some are called as their child."""
    while (node := node.asked_for).driver_class.driver_name in _AS_THE_CHILD and node.file:
        node = node.file
    return node


def exact_filename(node: Node, known: Known | None = None) -> str | None:
    """The plain name that gives this node again, or None."""
    node = _described(node)
    name = node.driver_class.driver_name
    options = strong_options(node)
    file = node.file
    if name in ("file", "host_device"):
        return str(options.get("filename", ""))
    if name in ("null-co", "null-aio"):
        return None if options else f"{name}://"
    if name == "nbd":
        if options.keys() - {"server", "export"}:
            return None
        return nbd_url.to_url(options["server"], options.get("export"))
    if file is None:
        plain = options.pop("filename", None)
        return None if options or not isinstance(plain, str) else plain
    if name == "blkdebug":
        below = exact_filename(file)
        if below is None or options.keys() - {"config"}:
            return None
        return f"blkdebug:{options.get('config', '')}:{below}"
    if name == "blkverify":
        parts = [exact_filename(node.children[role].child) for role in ("raw", "test")]
        return None if None in parts else f"blkverify:{parts[0]}:{parts[1]}"
    if node.is_filter or options or backing_overridden(node, known):
        return None
    is_protocol = not file.driver_class.is_format and (
        not file.is_filter or file.driver_class.driver_name == "blkdebug"
    )
    return exact_filename(file) if is_protocol else None


def full_options(node: Node, known: Known | None = None) -> dict[str, Any]:
    """What blockdev-add would take to make this node, without what makes no difference."""
    node = _described(node)
    found: dict[str, Any] = {"driver": node.driver_class.driver_name, **strong_options(node)}
    for role, edge in node.children.items():
        name, dot, _ = role.partition(".")
        if dot:  # one of a list
            found.setdefault(name, []).append(full_options(edge.child, known))
        elif role != "backing":
            found[role] = full_options(edge.child, known)
    if backing_overridden(node, known):
        found["backing"] = None if node.backing is None else full_options(node.backing, known)
    return found


def filename(node: Node, known: Known | None = None) -> str:
    """As ``file`` of BlockDeviceInfo shows it."""
    known = {} if known is None else known
    if (found := known.get(node)) is None:
        found = exact_filename(node, known)
        if found is None:
            found = "json:" + json.dumps(full_options(node, known), sort_keys=True)
        known[node] = found
    return found


def has_protocol(name: str) -> bool:
    """Whether ``name`` starts with ``protocol:``; a path with a colon has a slash before it."""
    head, colon, _ = name.partition(":")
    return bool(colon) and "/" not in head


def protocol_options(name: str) -> dict[str, Any]:
    """What a file name with a protocol prefix stands for, as members of blockdev-add.

    A plain path is the driver ``file``; ``json:{...}`` may describe a format node as well.
    BlockError for a protocol that is not known.
    """
    if not has_protocol(name):
        return {"driver": "file", "filename": name}
    protocol, _, rest = name.partition(":")
    match protocol:
        case "file" | "host_device":
            return {"driver": protocol, "filename": rest.removeprefix("//")}
        case "json":
            try:
                value = json.loads(rest)
            except (ValueError, RecursionError):
                value = None
            if not isinstance(value, dict):
                raise BlockError(f"Could not parse the JSON options of '{name}'")
            return with_drivers(lists(nested(value)))
        case "null-co" | "null-aio":
            return {"driver": protocol}
        case "nbd" | "nbd+tcp" | "nbd+unix":
            try:
                return {"driver": "nbd"} | nbd_url.from_name(name)
            except ValueError:
                raise BlockError("nbd: the name of the export cannot be understood") from None
        case "blkdebug":
            config, colon, image = rest.partition(":")
            if not colon:
                raise BlockError("blkdebug requires blkdebug:CONFIG:IMAGE")
            found = {"driver": "blkdebug", "image": protocol_options(image)}
            return found | ({"config": config} if config else {})
    raise BlockError(f"Unknown protocol '{protocol}'", errno=2)


def with_drivers(members: Mapping[str, Any]) -> dict[str, Any]:
    """Members of blockdev-add in which files that have a name have a driver, too."""
    found = dict(members)
    for role, child in members.items():
        if not isinstance(child, Mapping):
            continue
        child = with_drivers(child)
        name = child.get("filename")
        if "driver" not in child and isinstance(name, str):
            del child["filename"]
            child = protocol_options(name) | child
        found[role] = child
    return found


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Members with dotted names (``file.filename``) put into objects."""
    found: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        place = found
        for part in path:
            inner = place.setdefault(part, {})
            if not isinstance(inner, dict):
                raise BlockError(f"Cannot mix '{part}' and '{key}'")
            place = inner
        new = nested(value) if isinstance(value, Mapping) else value
        if isinstance(new, dict) and isinstance(place.get(last), dict):
            place[last] = place[last] | new
        elif last in place:
            raise BlockError(f"Parameter '{key}' is given twice")
        else:
            place[last] = new
    return found


def lists(members: Mapping[str, Any]) -> dict[str, Any]:
    """Members in which what has the keys 0, 1, ... is a list."""
    found: dict[str, Any] = {}
    for key, value in members.items():
        if isinstance(value, Mapping):
            value = lists(value)
            if value and list(value) == [str(n) for n in range(len(value))]:
                value = list(value.values())
        found[key] = value
    return found


def combine(base: str, name: str) -> str:
    """``name`` as seen from the directory of the file ``base``; absolute names stay."""
    if not name or has_protocol(name) or name.startswith("/"):
        return name
    start = 0
    if has_protocol(base):
        if "://" not in base:
            raise BlockError(f"Cannot use relative backing file names for '{base}'")
        start = base.index("://") + 3
        cut = base.rfind("/", start)
        return base[: cut + 1] + name if cut >= 0 else f"{base}/{name}"
    return base[: base.rfind("/") + 1] + name


def base_for_relative(node: Node) -> str | None:
    """The plain file name from which names in the header of ``node`` are seen; None without."""
    below: Node | None = node
    while below is not None:
        if below.file is None:
            exact = exact_filename(below)
            return (
                exact if exact and not below.driver_class.driver_name.startswith("null") else None
            )
        below = below.file
    return None


def full_backing_filename(node: Node, written: str) -> str:
    """Where the backing string ``written`` of the header of ``node`` leads.

    BlockError for a relative name in an image that has no plain file name.
    """
    if not written or written.startswith("/") or has_protocol(written):
        return written
    base = base_for_relative(node)
    if base is None:
        raise BlockError(f"Cannot use relative backing file names for '{node.filename}'")
    return combine(base, written)
