"""The same QMP session with two daemons, as transcripts that can be compared.

Left out of a transcript: time stamps, the numbers in generated node names, how far a job was when
somebody looked, its pauses (QEMU's jobs pause whenever the graph is drained), sizes on the host,
and members that only a newer QEMU than the one at hand has.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any, Self

from tests.support.daemon import TIMEOUT, QmpSocket
from tests.support.warm import begin

#: members of replies that QEMU 7.2 has not, or whose values are the host's
_LEFT_OUT = re.compile(
    r"active|children|limits|actual-size|.*zone_append.*|driver-specific|io-status"
    r"|date-n?sec|vm-clock-n?sec|current-progress|total-progress|offset|singlestep|timestamp"
)


class Peer:
    """A daemon with a monitor on ``qmp.sock`` in ``directory``; ``log`` is its transcript."""

    def __init__(self, directory: Path, *command: str) -> None:
        self.log: list[Any] = []
        self._status = ""  # of the job, of which there is one at a time
        self.directory = directory
        self._path = str(directory / "qmp.sock")
        self._process = begin(
            command, cwd=directory, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )

    def __enter__(self) -> Self:
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                self._client = QmpSocket(self._path)
            except OSError:
                assert self._process.poll() is None, "no start"
                assert time.monotonic() < deadline, "no monitor"
                time.sleep(0.02)
            else:
                return self

    def __exit__(self, *exc: object) -> None:
        self._client.close()
        self._process.terminate()
        try:
            self._process.wait(20)  # there are jobs that QEMU does not let end
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise

    def kill(self) -> None:
        """End it as a crash would."""
        self._process.kill()
        self._process.wait()

    def do(self, name: str, /, **arguments: Any) -> Any:
        """Run a command; its reply, which is kept with the events before it."""
        request: dict[str, Any] = {"execute": name}
        if arguments:
            request["arguments"] = {k.replace("_", "-"): v for k, v in arguments.items()}
        self.log.append(request)
        self._client.socket.sendall(json.dumps(request).encode())
        while "event" in (reply := self._client.receive()):
            self._keep(reply)
        self._keep(reply)
        return reply

    def hmp(self, line: str) -> None:
        """A line of the human monitor."""
        self.do("human-monitor-command", command_line=line)

    def until(self, event: str, **data: Any) -> None:
        """Keep events up to this one, which has come already or is to come."""
        while not any(self._is(entry, event, data) for entry in self.log):
            self._keep(self._client.receive())

    def _is(self, entry: dict[str, Any], event: str, data: dict[str, Any]) -> bool:
        return entry.get("event") == event and data.items() <= entry["data"].items()

    def _keep(self, message: dict[str, Any]) -> None:
        if message.get("event") == "JOB_STATUS_CHANGE":
            before, after = self._status, message["data"]["status"]
            self._status = after
            if after == "paused" or (before, after) == ("paused", "running"):
                return
        self.log.append(plain(message))


def plain(value: Any) -> Any:
    """``value`` without what is left out of transcripts."""
    if isinstance(value, dict):
        if value.get("format") == "file":  # how far a file has grown is the engine's own affair
            value = {"filename": value["filename"]}
        return {k: plain(v) for k, v in value.items() if not _LEFT_OUT.fullmatch(k)}
    if isinstance(value, list):
        return [plain(element) for element in value]
    if isinstance(value, str):
        text = re.sub(r"#block\d+", "#block", value)
        return re.sub(r"Completed \d+ of \d+ bytes", "Completed N bytes", text)
    return value
