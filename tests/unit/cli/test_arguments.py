"""The command line as a list of actions."""

import pytest

from liveblockd.cli import parse_command_line
from liveblockd.cli.arguments import monitor_address
from liveblockd.errors import ConfigError


def test_order_is_kept_and_both_spellings_work():
    line = parse_command_line(
        [
            "--blockdev",
            "file,node-name=f,filename=x",
            "--export=nbd,id=e,node-name=f",
            "-drive",
            "file=a.qcow2,id=d0",
            "--pidfile=p",
            "--daemonize",
        ]
    )
    assert [a.option for a in line.actions] == ["blockdev", "export", "drive"]
    assert line.actions[1].value == {"type": "nbd", "id": "e", "node-name": "f"}
    assert line.actions[2].value == {"file": "a.qcow2", "id": "d0"}
    assert (line.pidfile, line.daemonize) == ("p", True)
    assert line.actions[2].where == "--drive file=a.qcow2,id=d0"


def test_json_blockdev_is_typed():
    (action,) = parse_command_line(["--blockdev", '{"driver":"null-co","size":1}']).actions
    assert action.typed and action.value == {"driver": "null-co", "size": 1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nosuch"], "unrecognized option '--nosuch'"),
        (["--nosuch=3"], "unrecognized option '--nosuch'"),
        (["--blockdev"], "option '--blockdev' requires an argument"),
        (["--daemonize=1"], "option '--daemonize' doesn't allow an argument"),
        (["extra"], "extra: Unexpected argument"),
        (["--", "--help"], "--help: Unexpected argument"),
        (["-"], "-: Unexpected argument"),
        (["--=x"], "unrecognized option '--'"),
        (["--d=x"], "option '--d' is ambiguous; possibilities: '--daemonize' '--drive'"),
        (["--blockdev", "file,foo"], "--blockdev file,foo: Expected '=' after parameter 'foo'"),
        (["--nbd-server", "foo"], "--nbd-server foo: Expected '=' after parameter 'foo'"),
    ],
)
def test_wrong_options(words, message):
    with pytest.raises(ConfigError) as caught:
        parse_command_line(words)
    assert str(caught.value) == message


def test_a_beginning_that_only_one_option_has_is_enough():
    line = parse_command_line(["--block", "file,node-name=f", "--exp=nbd,id=e", "--daem", "--"])
    assert [a.option for a in line.actions] == ["blockdev", "export"]
    assert line.daemonize


@pytest.mark.parametrize("word", ["-h", "--help", "-help", "--hel"])
def test_help_wins(word):
    assert parse_command_line([word, "--nosuch"]).show == "help"


def test_trace_is_accepted_and_version_shown():
    assert parse_command_line(["-T", "qcow2_*", "-V"]).show == "version"


def test_drive_format_help():
    assert parse_command_line(["--drive", "format=help"]).show == "drive-formats"


def test_drive_options_nest():
    (action,) = parse_command_line(
        ["--drive", "file=a,backing.file.filename=b,throttling.bps-total=1"]
    ).actions
    assert action.value == {
        "file": "a",
        "backing": {"file": {"filename": "b"}},
        "throttling.bps-total": "1",
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("/run/q", {"backend": "socket", "server": "on", "wait": "off", "path": "/run/q"}),
        (
            "unix:/run/q,server=on,wait=off",
            {"backend": "socket", "path": "/run/q", "server": "on", "wait": "off"},
        ),
        (
            "unix:/run/q,server,nowait",
            {"backend": "socket", "path": "/run/q", "server": "on", "wait": "off"},
        ),
        ("tcp:[::1]:44,server", {"backend": "socket", "host": "::1", "port": "44", "server": "on"}),
        ("stdio", {"backend": "stdio"}),
    ],
)
def test_qmp_shorthand(text, value):
    assert monitor_address(text) == value


@pytest.mark.parametrize("text", ["tcp:44", "tcp:", "", "tcp:h:"])
def test_bad_qmp_address(text):
    with pytest.raises(ConfigError):
        monitor_address(text)
