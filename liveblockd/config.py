"""The configuration file: the options of the command line as TOML.

Each table has the members of the option of its name, typed and without escapes::

    pidfile = "/run/liveblockd/liveblockd.pid"
    qmp = ["/run/liveblockd/qmp.sock"]
    hmp = ["/run/liveblockd/hmp.sock"]

    [[drive]]
    id = "virtio0"
    file = "/var/lib/liveblockd/images/disk.qcow2"

    [nbd-server]
    addr = { type = "unix", path = "/run/liveblockd/nbd.sock" }

    [[export]]
    type = "nbd"
    id = "disk"
    node-name = "disk"

Tables are worked on in the order of the fields of ``Configuration``, whatever the order in the
file: TOML has none that counts. What the members mean is checked where the option is (a driver's
options by the driver), so that there is one schema for both.

Runs on the main thread, before there is a loop. ``ConfigError`` escapes.
"""

from __future__ import annotations

import tomllib
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from liveblockd.errors import ConfigError

Table = dict[str, Any]


class Configuration(BaseModel):
    """What a file may hold."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    pidfile: str | None = None
    jobs: Table | None = None
    object_: list[Table] = Field(default=[], alias="object")
    blockdev: list[Table] = []
    drive: list[Table] = []
    nbd_server: Table | None = Field(default=None, alias="nbd-server")
    export: list[Table] = []
    chardev: list[Table] = []
    monitor: list[Table] = []
    qmp: list[str] = []  # paths or addresses, as --qmp
    hmp: list[str] = []  # the same, for people


def load(path: str) -> Configuration:
    """The configuration in the file ``path``."""
    try:
        with open(path, "rb") as file:
            value = tomllib.load(file)
    except OSError as exc:
        raise ConfigError(f"Could not open '{path}': {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: {exc}") from exc
    return parse(value, path)


def parse(value: dict[str, Any], path: str) -> Configuration:
    """The configuration in a decoded file; ``path`` is for messages."""
    try:
        return Configuration.model_validate(value)
    except ValidationError as exc:
        error = exc.errors(include_url=False)[0]
        where = ".".join(str(part) for part in error["loc"])
        what = "unknown option" if error["type"] == "extra_forbidden" else error["msg"]
        raise ConfigError(f"{path}: {where}: {what}") from exc
