"""What a request is, before it is known whether there is such a command."""

from __future__ import annotations

from typing import Any

import pytest

from liveblockd.errors import BlockError
from liveblockd.events import BlockExportDeleted, JobStatusChange, Shutdown
from liveblockd.qmp.session import Request, check_request, event_message


@pytest.mark.parametrize(
    ("message", "oob", "text"),
    [
        ([1], False, "QMP input must be a JSON object"),
        ("x", False, "QMP input must be a JSON object"),
        (None, False, "QMP input must be a JSON object"),
        ({}, False, "QMP input lacks member 'execute'"),
        ({"arguments": {}}, False, "QMP input lacks member 'execute'"),
        ({"execute": None}, False, "QMP input member 'execute' must be a string"),
        ({"execute": 5, "id": 1}, False, "QMP input member 'execute' must be a string"),
        (
            {"execute": "x", "arguments": None},
            False,
            "QMP input member 'arguments' must be an object",
        ),
        (
            {"execute": "x", "arguments": []},
            False,
            "QMP input member 'arguments' must be an object",
        ),
        ({"execute": "x", "frobnicate": 1}, False, "QMP input member 'frobnicate' is unexpected"),
        ({"exec-oob": "x"}, False, "QMP input member 'exec-oob' is unexpected"),
        ({"execute": "x", "exec-oob": "x"}, False, "QMP input member 'exec-oob' is unexpected"),
        ({"exec-oob": 7}, True, "QMP input member 'exec-oob' must be a string"),
        (
            {"execute": "x", "exec-oob": "x"},
            True,
            "QMP input member 'execute' clashes with 'exec-oob'",
        ),
    ],
)
def test_refused(message: Any, oob: bool, text: str) -> None:
    with pytest.raises(BlockError) as caught:
        check_request(message, oob)
    assert caught.value.message == text


def test_accepted() -> None:
    assert check_request({"execute": "x", "id": None}, False) == Request("x", {}, False)
    message = {"arguments": {"a": 1}, "exec-oob": "x"}
    assert check_request(message, True) == Request("x", {"a": 1}, True)


def test_event_message() -> None:
    message = event_message(BlockExportDeleted("e"))
    assert list(message) == ["timestamp", "event", "data"]
    assert message["event"] == "BLOCK_EXPORT_DELETED"
    assert message["data"] == {"id": "e"}
    assert event_message(JobStatusChange("j", "null"))["data"]["status"] == "null"
    assert event_message(Shutdown(guest=False, reason="x"))["data"]["guest"] is False
