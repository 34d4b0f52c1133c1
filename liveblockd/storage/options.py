"""The members that every ``blockdev-add`` object has, and references to other nodes.

Specification: qapi/block-core.json, BlockdevOptions, BlockdevRef, BlockdevRefOrNull.

A driver's ``Options`` extend ``BlockdevOptions``; ``storage.registry`` makes them known here, so
that a ``BlockdevRef`` member of any driver takes the options of every driver. The lookup is made
when a value is parsed: the order in which drivers are imported does not matter.
``qapi.parse(BlockdevOptions, value)`` gives an instance of the right driver's ``Options``.

Runs on: anything (no I/O). Errors: ``BlockError`` from ``qapi.parse``.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Annotated, ClassVar, TypeAlias

from liveblockd.qapi import Alternate, QapiModel


class BlockdevDiscardOptions(enum.StrEnum):
    """What a discard does to this node."""

    IGNORE = "ignore"
    UNMAP = "unmap"


class BlockdevDetectZeroesOptions(enum.StrEnum):
    """Whether written zeros are looked for, and then whether they may be unmapped."""

    OFF = "off"
    ON = "on"
    UNMAP = "unmap"


class BlockdevCacheOptions(QapiModel):
    """How the host caches this node."""

    direct: bool | None = None
    no_flush: bool | None = None


#: ``Options`` of each driver by the value of ``driver``; written by ``storage.registry`` alone
option_models: dict[str, type[BlockdevOptions]] = {}


class BlockdevOptions(QapiModel):
    """The common members; None where one was not given (the graph inherits some of them)."""

    qapi_tag: ClassVar[str] = "driver"

    driver: str
    node_name: str | None = None
    discard: BlockdevDiscardOptions | None = None
    cache: BlockdevCacheOptions | None = None
    active: bool | None = None
    read_only: bool | None = None
    auto_read_only: bool | None = None
    force_share: bool | None = None
    detect_zeroes: BlockdevDetectZeroesOptions | None = None

    @classmethod
    def qapi_variants(cls) -> Mapping[str, type[QapiModel]]:
        """The options of all registered drivers."""
        return option_models

    @property
    def unmaps(self) -> bool:
        """``discard=unmap``: space may be given back to the host."""
        return self.discard is BlockdevDiscardOptions.UNMAP

    @property
    def cache_direct(self) -> bool:
        """``cache.direct=on``: past the page cache of the host."""
        return self.cache is not None and bool(self.cache.direct)

    @property
    def cache_no_flush(self) -> bool:
        """``cache.no-flush=on``: flushes are not handed down."""
        return self.cache is not None and bool(self.cache.no_flush)


#: the name of a node, or the options of a new one
BlockdevRef: TypeAlias = Annotated[str | BlockdevOptions, Alternate("BlockdevRef")]
#: the same, or null for "none at all"; whether it was given: look into ``model_fields_set``
BlockdevRefOrNull: TypeAlias = Annotated[
    str | BlockdevOptions | None, Alternate("BlockdevRefOrNull")
]
