"""The configuration file."""

import pytest

from liveblockd import config
from liveblockd.daemon.startup import configured
from liveblockd.errors import ConfigError


def test_tables_become_options_in_an_order_that_works(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(
        'pidfile = "p"\nqmp = ["/run/q", "unix:/run/r,server=on,wait=off,pretty=on"]\n'
        '[[export]]\ntype = "nbd"\nid = "e"\nnode-name = "d"\n'
        '[nbd-server]\naddr = { type = "unix", path = "n" }\n'
        '[[drive]]\nfile = "a,b"\nread-only = true\n'
        '[[blockdev]]\ndriver = "null-co"\nsize = 5\n'
        '[[object]]\nqom-type = "secret"\nid = "s"\ndata = "x"\n'
    )
    loaded = config.load(str(path))
    assert loaded.pidfile == "p"
    actions = list(configured(loaded, "c.toml"))
    assert [a.option for a in actions] == [
        "object", "blockdev", "drive", "nbd-server", "export", "qmp", "qmp"]  # fmt: skip
    assert actions[2].value == {"file": "a,b", "read-only": True} and actions[2].typed
    assert actions[2].where == "c.toml: drive[0]"
    assert actions[5].value["path"] == "/run/q" and not actions[5].typed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "x: unknown option"),
        ("pidfile = 1\n", "pidfile: Input should be a valid string"),
        ("a b\n", "Expected '='"),
        ("[[drive]]\nfile = 'x'\n[drive]\n", "drive"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        config.load(str(path))
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(ConfigError, match=r"Could not open '.*nosuch': No such file or directory"):
        config.load(str(tmp_path / "nosuch"))
