"""Who may connect: the decisions of the ``authz-*`` objects.

Specification: qapi/authz.json; QEMU's TLS documentation for the identity of a certificate, which is
its distinguished name as GnuTLS writes it (``runtime.tls.distinguished_name``).

Runs on the event loop, which it holds for the reading of a small file (``ListFile``). Invariant:
what cannot be decided is denied. Errors: BlockError for a file that cannot be used.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from typing import Final, Literal, Protocol

from liveblockd.errors import BlockError
from liveblockd.qapi import QapiModel, parse

log = logging.getLogger(__name__)

#: bytes of a list file
_MOST: Final = 1 << 20


class AuthzRule(QapiModel):
    """One line of an ``authz-list``."""

    match: str
    policy: Literal["deny", "allow"]
    format: Literal["exact", "glob"] = "exact"


class Rules(Protocol):
    """An ``authz-list``, whether an object or a file says it."""

    policy: Literal["deny", "allow"]
    rules: list[AuthzRule] | None


class _FileContents(QapiModel):
    policy: Literal["deny", "allow"] = "deny"
    rules: list[AuthzRule] | None = None


def allowed_by(found: Rules, identity: str) -> bool:
    """What the first rule that matches says, or else the policy."""
    return _first(found.rules or (), identity, found.policy) == "allow"


def _first(rules: Sequence[AuthzRule], identity: str, policy: str) -> str:
    for rule in rules:
        if rule.format == "exact":
            matches = rule.match == identity
        else:
            matches = _glob(rule.match).fullmatch(identity) is not None
        if matches:
            return rule.policy
    return policy


def _glob(pattern: str) -> re.Pattern[str]:
    """Of ``*`` and ``?`` alone; a run of ``*`` is one, so that no pattern takes for ever."""
    words = {"*": ".*", "?": "."}
    pattern = re.sub(r"\*+", "*", pattern)
    return re.compile("".join(words.get(c) or re.escape(c) for c in pattern), re.DOTALL)


class ListFile:
    """An ``authz-list-file``; with ``refresh`` a file that has changed is read again."""

    def __init__(self, filename: str, *, refresh: bool) -> None:
        self._filename = filename
        self._refresh = refresh
        self._rules: Rules | None = self._read()
        self._seen = self._state()
        if refresh and not os.path.dirname(filename):
            raise BlockError("Filename must be an absolute path")

    def allows(self, identity: str) -> bool:
        """Whether the file, as it is now, lets ``identity`` in; not when it cannot be read."""
        if self._refresh and (state := self._state()) != self._seen:
            self._seen = state
            try:
                self._rules = self._read()
            except BlockError as error:
                log.error("%s", error.message)
                self._rules = None
        return self._rules is not None and allowed_by(self._rules, identity)

    def _state(self) -> tuple[int, ...]:
        try:
            found = os.stat(self._filename)
        except OSError:
            return ()
        return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size

    def _read(self) -> Rules:
        try:
            with open(self._filename, "rb") as file:
                data = file.read(_MOST)
        except OSError as error:
            raise BlockError.from_os_error(f"Unable to read '{self._filename}'", error) from error
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BlockError(f"File '{self._filename}' is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise BlockError(f"File '{self._filename}' must contain a JSON object")
        return parse(_FileContents, value)
