"""Options of --chardev."""

import pytest

from liveblockd.errors import BlockError
from liveblockd.qmp.commands.chardev import ChardevRegistry, parse_chardev


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"backend": "bogus", "id": "c"}, "'bogus' is not a valid char driver name"),
        ({"backend": "socket", "path": "x"}, "chardev: no id specified"),
        ({"backend": "null", "id": "1n"}, "Parameter 'id' expects an identifier"),
        ({"id": "n"}, "Parameter 'backend' is missing"),
        ({"backend": "socket", "id": "c"}, "A socket has one of"),
        ({"backend": "socket", "id": "c", "path": "p", "fd": "3"}, "A socket has one of"),
        ({"backend": "socket", "id": "c", "path": "p", "server": "maybe"},
         "Parameter 'server' expects 'on' or 'off'"),
        ({"backend": "socket", "id": "c", "path": "p", "wait": "on"}, "'wait' option is"),
        ({"backend": "socket", "id": "c", "path": "p", "server": "on", "reconnect": "1"},
         "'reconnect' option is"),
        ({"backend": "socket", "id": "c", "path": "p", "server": "on", "telnet": "on"},
         "Parameter 'telnet' is not supported"),
        ({"backend": "socket", "id": "c", "path": "p", "nosuch": "on"},
         "Parameter 'nosuch' is unexpected"),
    ],
)  # fmt: skip
def test_refusals(value, message):
    with pytest.raises(BlockError, match=message):
        parse_chardev(value)


def test_a_server_waits_unless_told_otherwise():
    value = {"backend": "socket", "id": "c", "path": "p", "server": "on"}
    assert parse_chardev(value).waits
    assert not parse_chardev(value | {"wait": "off"}).waits
    assert not parse_chardev(value | {"server": "off"}).waits


def test_a_chardev_has_one_user():
    registry = ChardevRegistry()
    registry.add(parse_chardev({"backend": "null", "id": "n"}))
    with pytest.raises(BlockError, match="Chardev with id 'n' already exists"):
        registry.add(parse_chardev({"backend": "null", "id": "n"}))
    registry.take("n")
    with pytest.raises(BlockError, match="Device 'n' is in use"):
        registry.take("n")
    with pytest.raises(BlockError, match='chardev "x" not found'):
        registry.take("x")
