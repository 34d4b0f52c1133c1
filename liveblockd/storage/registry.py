"""Which block drivers there are, and what a driver is given of the daemon.

A driver module registers its class by ``@register_driver``; two of one name are refused. The
registry holds protocol drivers and formats alike: ``blockdev-add`` knows one list.

Runs on: import time and the event loop. Errors: ``BlockError`` for an unknown driver.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ssl import SSLContext
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from liveblockd.errors import BlockError
from liveblockd.events import Publisher
from liveblockd.runtime.workers import WorkerPool
from liveblockd.storage.driver import BlockDriver, BlockIO
from liveblockd.storage.options import BlockdevOptions, option_models

if TYPE_CHECKING:
    from liveblockd.storage.filters.throttle_group import ThrottleGroup


def _no_secret(name: str) -> bytes:
    raise BlockError(f"No secret with id '{name}'")


def _no_throttle_group(name: str) -> ThrottleGroup:
    raise BlockError(f"Throttle group '{name}' does not exist")


def _no_credentials(name: str, _named: bool) -> SSLContext:
    raise BlockError(f"No TLS credentials with id '{name}'")


@dataclass(frozen=True, slots=True)
class Environment:
    """What drivers need of the daemon; one a node (``dataclasses.replace`` for the next)."""

    workers: WorkerPool
    publisher: Publisher = field(default_factory=Publisher)
    #: name of the node that is being opened
    node_name: str = ""
    #: name of the ``file`` child as QEMU shows it, for relative backing names; "" without one
    filename: str = ""
    #: the bytes of a ``secret`` object by its id; raises BlockError
    secret: Callable[[str], bytes] = _no_secret
    #: the ``throttle-group`` object of an id; raises BlockError
    throttle_group: Callable[[str], ThrottleGroup] = _no_throttle_group
    #: the TLS context of a client by the id of a ``tls-creds-*`` object, and whether the server has
    #: to be who it is called; raises BlockError
    tls_client: Callable[[str, bool], SSLContext] = _no_credentials
    #: a node of the graph by its name, None if there is none
    find_node: Callable[[str], BlockIO | None] = lambda _: None
    #: only what images say of themselves is asked for: no key of an encrypted one is needed
    no_io: bool = False
    #: another process may be writing to the image: nothing is said in its header yet
    inactive: bool = False


DriverClass = TypeVar("DriverClass", bound=type[BlockDriver])

_drivers: dict[str, Any] = {}

#: storage drivers, imported by ``load_drivers``
STORAGE_MODULES = (
    "liveblockd.storage.file",
    "liveblockd.storage.null",
    "liveblockd.storage.nbd",
    "liveblockd.storage.blkdebug",
)


def register_driver(driver: DriverClass) -> DriverClass:
    """Make a driver known by its ``driver_name``; ValueError if the name is taken."""
    name = driver.driver_name
    if name in _drivers:
        raise ValueError(f"two drivers are called {name!r}: {_drivers[name]!r} and {driver!r}")
    options = getattr(driver, "Options", None)
    if not (isinstance(options, type) and issubclass(options, BlockdevOptions)):
        raise ValueError(f"driver {name!r} has no Options that extend BlockdevOptions")
    _drivers[name] = driver
    option_models[name] = options
    return driver


def load_drivers() -> None:
    """Import the protocol drivers of this package; the formats are imported by theirs."""
    from liveblockd.storage.filters import FILTER_MODULES  # which imports this module

    for module in (*STORAGE_MODULES, *FILTER_MODULES):
        importlib.import_module(module)


def drivers() -> Mapping[str, Any]:
    """All registered driver classes by name."""
    return MappingProxyType(_drivers)


def find_driver(name: str) -> Any:
    """The class registered as ``name``; BlockError in QEMU's words when there is none."""
    try:
        return _drivers[name]
    except KeyError:
        raise BlockError(f"Unknown driver '{name}'") from None
