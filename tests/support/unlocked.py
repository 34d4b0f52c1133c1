"""Encrypted images that are opened hundreds of times: what a key slot comes to is worked out once.

``luks.merge`` is thousands of rounds for each open, and pure.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from unittest import mock

from liveblockd.formats import luks

_merge = functools.lru_cache(maxsize=64)(luks.merge)


def unlocked_once() -> AbstractContextManager[object]:
    """While in the block ``luks.merge`` remembers."""
    return mock.patch.object(luks, "merge", _merge)
