"""What every type of export offers, and the table of types.

A type is a class in a module ``exports/NAME_export.py`` that registers itself with
``register_export``; ``load`` imports those modules once, a name taken twice is refused then.

Runs on the loop. Errors: ``BlockError`` from ``create``.
"""

from __future__ import annotations

import abc
import importlib
import pkgutil
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from liveblockd.exports.backend import ExportBackend
from liveblockd.exports.options import BlockExportOptions, option_models
from liveblockd.exports.polling import POLL_MAX

if TYPE_CHECKING:
    from liveblockd.exports.registry import ExportRegistry


class Export(abc.ABC):
    """One export; a subclass is a type of export."""

    type_name: ClassVar[str]
    Options: ClassVar[type[BlockExportOptions]]

    id: str
    backend: ExportBackend
    shutting_down: bool = False
    #: how long the next request of a client is looked for before the loop sleeps; nanoseconds
    poll_ns: int = POLL_MAX

    @classmethod
    @abc.abstractmethod
    async def create(cls, registry: ExportRegistry, options: Any, backend: ExportBackend) -> Export:
        """The export, ready for clients; ``backend`` stays the caller's if this raises.

        ``options`` is an instance of ``Options``.
        """

    @property
    @abc.abstractmethod
    def in_use(self) -> bool:
        """Whether a client is connected."""

    @abc.abstractmethod
    def request_shutdown(self) -> None:
        """Take no new client and disconnect those there are."""

    @abc.abstractmethod
    async def drained(self) -> None:
        """Return when, after ``request_shutdown``, no request is in flight any more."""


_types: dict[str, type[Export]] = {}
_Type = TypeVar("_Type", bound=type[Export])


def register_export(cls: _Type) -> _Type:
    """Make a type of export known; ValueError when its name is taken."""
    if cls.type_name in _types:
        raise ValueError(f"export type {cls.type_name} is registered twice")
    _types[cls.type_name] = cls
    option_models[cls.type_name] = cls.Options
    return cls


def load() -> None:
    """Import the modules of all types of export."""
    package = importlib.import_module("liveblockd.exports")
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        if module.name.endswith("_export"):
            importlib.import_module(module.name)


def export_type(name: str) -> type[Export]:
    """The class for a value of ``type``; KeyError without one (the options were not parsed)."""
    return _types[name]
