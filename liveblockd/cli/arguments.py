"""The words of the command line as a list of things to do, in the order they were written.

The order counts: a ``--blockdev`` may name a node of an earlier one, and an error is reported for
the first option that fails. What an option's value means is found out by ``liveblockd.daemon``.

Pure. ``ConfigError`` escapes; its text lacks the program's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from liveblockd.errors import ConfigError
from liveblockd.keyval import parse_drive, parse_option_object, parse_opts


@dataclass(frozen=True, slots=True)
class Action:
    """One option: ``value`` is nested members; ``typed`` if they come from JSON or TOML."""

    option: str
    where: str  # how messages name it: ``--drive file=x``, or its place in the configuration
    value: dict[str, Any]
    typed: bool = False


@dataclass(slots=True)
class CommandLine:
    """Everything that was asked for."""

    actions: list[Action] = field(default_factory=list)
    pidfile: str | None = None
    daemonize: bool = False
    show: str | None = None  # "help", "version" or "drive-formats": print that and do nothing else


#: options without a value
_SWITCHES: Final = {"help": "h", "version": "V", "daemonize": ""}
#: options with one, and whether they are nested (keyval) and what a bare first word stands for
_OBJECTS: Final = {
    "blockdev": "driver",
    "export": "type",
    "nbd-server": None,
    "object": "qom-type",
}
#: flat ones, where a switch may lack its ``=on``
_FLAT: Final = {"chardev": "backend", "monitor": "chardev", "jobs": None}
_VALUED: Final = {*_OBJECTS, *_FLAT, "drive", "qmp", "config", "pidfile", "trace"}
_NAMES: Final = sorted({*_SWITCHES, *_VALUED})


def parse_command_line(arguments: Sequence[str]) -> CommandLine:
    """Parse ``arguments`` (without the program's name)."""
    result = CommandLine()
    words = list(arguments)
    while words:
        if words[0] == "--":  # options end here, and there is nothing else
            if words[1:]:
                raise ConfigError(f"{words[1]}: Unexpected argument")
            break
        name, value = _next_option(words)
        match name:
            case "help" | "version":
                result.show = name
                return result
            case "daemonize":
                result.daemonize = True
            case "pidfile":
                result.pidfile = value
            case "trace":
                pass  # tracing is QEMU's own; the option must not stop a script
            case _:
                action = _action(name, value)
                if name == "drive" and action.value.get("format") in ("help", "?"):
                    result.show = "drive-formats"
                    return result
                result.actions.append(action)
    return result


def _next_option(words: list[str]) -> tuple[str, str]:
    word = words.pop(0)
    if not word.startswith("-") or word == "-":
        raise ConfigError(f"{word}: Unexpected argument")
    if not word.startswith("--") and word[1] in "hVT" and len(word) == 2:
        name = {"h": "help", "V": "version", "T": "trace"}[word[1]]
        equals, value = "", ""
    else:
        name, equals, value = word.lstrip("-").partition("=")
        name = _whole_name(name, word)
    if name in _SWITCHES:
        if equals:
            raise ConfigError(f"option '--{name}' doesn't allow an argument")
        return name, ""
    if not equals:
        if not words:
            raise ConfigError(f"option '--{name}' requires an argument")
        value = words.pop(0)
    return name, value


def _whole_name(name: str, word: str) -> str:
    """The option that ``name`` is or begins; getopt_long(3) takes a beginning that only one has."""
    found = [known for known in _NAMES if known.startswith(name)] if name else []
    if name in found or len(found) == 1:
        return name if name in found else found[0]
    shown = word.partition("=")[0]
    if found:
        possible = " ".join(f"'--{known}'" for known in found)
        raise ConfigError(f"option '{shown}' is ambiguous; possibilities: {possible}")
    raise ConfigError(f"unrecognized option '{shown}'")


def _action(name: str, text: str) -> Action:
    where = f"--{name} {text}"
    try:
        if name in _OBJECTS:
            return Action(name, where, *parse_option_object(text, _OBJECTS[name]))
        if name in _FLAT:
            return Action(name, where, dict(parse_opts(text, _FLAT[name])))
        if name == "drive":
            return Action(name, where, dict(parse_drive(text)))
        if name == "qmp":
            return Action(name, where, dict(monitor_address(text)))
        return Action(name, where, {"file": text})  # config
    except ConfigError as exc:
        raise ConfigError(f"{where}: {exc}") from exc


def monitor_address(text: str) -> dict[str, str]:
    """Chardev options of ``-qmp``: a path, ``unix:PATH,...``, ``tcp:HOST:PORT,...`` or ``stdio``.

    A plain path listens and does not wait for a client, which is what everybody wants; with a
    prefix it is QEMU's text, where listening has to be asked for.
    """
    kind, colon, rest = text.partition(":")
    if text == "stdio":
        return {"backend": "stdio"}
    if colon and kind == "unix":
        options = parse_opts(rest, "path")
        return {"backend": "socket", **options}
    if colon and kind == "tcp":
        options = parse_opts(rest, "address")
        host, colon, port = options.pop("address", "").rpartition(":")
        if not colon or not port:
            raise ConfigError("address must be HOST:PORT")
        return {"backend": "socket", "host": host.strip("[]"), "port": port, **options}
    options = parse_opts(text, "path")
    if not options.get("path"):
        raise ConfigError("a path is missing")
    return {"backend": "socket", "server": "on", "wait": "off", **options}


HELP: Final = """\
Usage: {prog} [options]
Live block operations on disk images in use

  -h, --help             display this help and exit
  -V, --version          output version information and exit

  --config <file>        read options from a TOML file (docs/configuration.md)

  --drive [file=]<file>[,id=<id>][,format=<F>][,node-name=<N>][,cache=<C>]
          [,discard=<D>][,detect-zeroes=<Z>][,read-only=on|off][,if=<type>]
          [,index=<I>][,snapshot=on|off][,copy-on-read=on|off]
          [,backing.<option>=...]
          [,throttling.<bps|iops>-<total|read|write>[-max[-length]]=<n>]
          [,throttling.iops-size=<bytes>][,throttling.group=<name>]
                         open a disk image as QEMU's -drive does
  --blockdev [driver=]<driver>,node-name=<N>[,discard=ignore|unmap]
             [,cache.direct=on|off][,cache.no-flush=on|off]
             [,read-only=on|off][,auto-read-only=on|off]
             [,force-share=on|off][,detect-zeroes=on|off|unmap]
             [,driver specific parameters...]
                         open a block node; also as a JSON object

  --nbd-server addr.type=unix,addr.path=<path>[,max-connections=<n>]
  --nbd-server addr.type=inet,addr.host=<host>,addr.port=<port>[,...]
                         start an NBD server for exports
  --export [type=]nbd,id=<id>,node-name=<N>[,name=<export>][,writable=on|off]
                         export a block node over NBD

  --qmp <path>           serve QMP on a UNIX socket; also unix:PATH,server=on,
                         tcp:HOST:PORT,server=on and stdio as QEMU's -qmp
  --chardev socket,id=<id>,path=<path>[,server=on][,wait=off]
  --chardev socket,id=<id>,host=<host>,port=<port>[,server=on][,wait=off]
  --chardev socket,id=<id>,fd=<fd>
  --chardev stdio,id=<id>
                         a character device for a monitor
  --monitor [chardev=]<id>[,mode=control|readline][,pretty=on|off]
                         serve QMP (control) or the human monitor (readline)
  --object [qom-type=]<type>,id=<id>[,<property>=<value>...]
                         create an object (secret, throttle-group, iothread...)

  --jobs [max-concurrent=<n>][,journal=<file>][,resume=on|off]
                         let at most so many jobs copy at once (0: all); remember
                         jobs and drives in a file, and resume what was cut off

  --pidfile <path>       write the process ID to a file once all is up
  --daemonize            go to the background once all is up
  -T, --trace <pattern>  accepted for compatibility, does nothing
"""
