"""Members that ``block-export-add`` has for every type of export.

Specification: qapi/block-export.json, BlockExportOptions.

A type of export extends ``BlockExportOptions``; ``export.register_export`` makes it known here.
Pure. Errors: ``BlockError`` from ``qapi.parse``.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Annotated, ClassVar, TypeAlias

from liveblockd.qapi import Alternate, QapiModel

Models: TypeAlias = Mapping[str, type[QapiModel]]

#: options of each type of export by the value of ``type``; written by ``register_export`` alone
option_models: dict[str, type[BlockExportOptions]] = {}


class BlockExportRemoveMode(enum.StrEnum):
    """What to do with clients that are connected."""

    SAFE = "safe"
    HARD = "hard"


class BlockExportOptions(QapiModel):
    """The common members."""

    qapi_tag: ClassVar[str] = "type"

    type: str
    id: str
    fixed_iothread: bool = False
    iothread: Annotated[str | list[str], Alternate("BlockExportIothreads")] | None = None
    node_name: str
    writable: bool = False
    writethrough: bool = False
    allow_inactive: bool = False

    @classmethod
    def qapi_variants(cls) -> Models:
        """The options of all types."""
        return option_models
