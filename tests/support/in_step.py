"""qemu-storage-daemon and liveblockd side by side: each request to both, answers compared at once.

A difference is an AssertionError that names the request. What ``ASIDE`` lists is put aside before:
what releases of QEMU say differently, what is the engine's own affair, and what differs on purpose
(docs/compatibility.md has the reasons). When the peer dies, as its assertions do fail,
``PeerEndedError`` is raised; when ours does, that is a failure.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tests.support.daemon import TIMEOUT
from tests.support.peer import Peer, plain
from tests.support.warm import LIVEBLOCKD

MONITOR = ("--chardev", "socket,id=m,path=qmp.sock,server=on,wait=off", "--monitor", "m")
#: a job stays in these until a request comes
SETTLED = ("pending", "concluded", "ready")
#: statuses of a pause, and what the job was before it
PAUSES = {"paused": "running", "standby": "ready"}


#: what is said differently: by releases (7.2, 11.0), or on purpose
ASIDE: list[tuple[str, str]] = [
    (r"#block\d+", "#block"),
    (r"#auto", "#block"),
    (r"therange", "the range"),
    (r"support Transaction property", "support transaction property"),
    (r"the  actual", "the actual"),
    (r"Failed to open file “.*”: ", ""),  # GLib's words
    (r"(Compression is not supported for this drive) .*", r"\1"),
    (r"Either 'file' or 'data' must be provided", "Must provide 'file' or 'data'"),
    (r"in state 'paused'", "in state 'running'"),  # on its way to a pause
    (r"in state 'standby'", "in state 'ready'"),
]

#: (theirs, ours) where releases say it in other words
WORDED = (
    (r"Permission conflict .*", r"Node '.*' is busy: .*"),
    (r"Node '.*' is busy: .* block job: .*", r"Node .* is in use"),
    (r"Block device .* is in use", r"Node '.*' is busy: .* block job: backup"),
    (r"Device '\(null\)' is in use", r"Node '.*' is busy: .*"),
    (r"Permission conflict on node '#block': permissions 'resize' .*", r"Permission conflict .*"),
    (r"Image is read-only", r"Block node is read-only"),
    (r"The overlay is already in use", r"Node '.*' is busy: .* block job: .*"),
    (r"Job ID '.*' already in use", r"Node '.*' is busy: .* block job: backup"),
)  # fmt: skip

#: what QEMU does, and liveblockd refuses (docs/compatibility.md says why)
REFUSED = (
    r"(block-)?job-complete: Job '.*' in state 'ready' cannot accept .*",  # it is on a pause
    r".*: The overlay is already in use",
    r"blockdev-snapshot: Node '.*' is busy: node is used as backing hd of '.*'",
    r".*: Permission conflict .*: permissions 'write' are both .*",
    r"drive-.*: Format driver 'file' does not support image creation",
    r"blockdev-reopen: Cannot change the option 'file'",
    r".*: Can't make bitmap '.*' persistent in '.*': Block node is read-only",
    r".*: Node '.*' is busy: block device is in use by block job: backup",
)

#: what QEMU refuses, and liveblockd does
DONE = (
    r"Permission conflict .*: permissions 'resize' are .*",
    # an export of a disk that is being committed, over layers in between
    r"Permission conflict .*: permissions 'consistent read' are both required by node '.*' "
    r"\(uses node '.*' as 'backing' child\) and unshared by .*",
)

#: what may be said first where a request has more than one mistake
EITHER = (
    r"Format driver '.*' does not support image creation",
    r"NBD server already has export named '.*'",
    r"No TLS credentials with id '.*'",
    r"Could not create node: .*",
    r"Could not open 'm\.qcow2': No such file or directory",  # it leaves what it made
    r"setting detect-zeroes to unmap is not allowed .*",
    r"offset\(.*\) exceeds maximum\(.*\)",
    r"Parameter '.*' is unexpected",
    r"description '.*' too long",
    r"Unknown file format '.*'",
    r"New overlay node-name missing",
    r"Action '.*' does not support transaction property .*",
    r"Making '.*' a .* child of '.*' would create a cycle",
    r"export name '.*' too long",
    r"Cannot change the option 'force-share'",
    r"Invalid node-name: .*",
    r"Duplicate nodes with node-name=.*",
    r"Node name too long",
    r"Cannot change the option 'driver'",
    r"Job ID '.*' already in use",
    r"Sync mode '.*' not supported",
    r"The new size must be a multiple of 512",
    r'Failed to get "write" lock',
)


class PeerEndedError(Exception):
    """qemu-storage-daemon is gone."""


class PartedWaysError(Exception):
    """One of the two did on purpose what the other refused."""


class InStep:
    """``with InStep(theirs, ours, *options) as both``: two directories with the same images."""

    def __init__(self, theirs: Path, ours: Path, *options: str) -> None:
        command = (*options, *MONITOR)
        self.peers = (
            Peer(theirs, "qemu-storage-daemon", *command),
            Peer(ours, *LIVEBLOCKD, *command),
        )
        self._seen = [0, 0]
        self._statuses: tuple[dict[str, str], ...] = ({}, {})
        self.requests: list[str] = []
        self.held: set[str] = set()  # jobs that run on slowly: they have a speed

    def __enter__(self) -> Self:
        for peer in self.peers:
            peer.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):  # some jobs never let it end
            self.peers[0].__exit__(*exc)
        self.peers[1].__exit__(*exc)

    def do(self, name: str, /, **arguments: Any) -> dict[str, Any]:
        """A request to both; the answer, ours. Jobs have come to rest, events are the same."""
        given = {k.replace("_", "-"): v for k, v in arguments.items()}
        self.requests.append(json.dumps({"execute": name, "arguments": given}))
        theirs, ours = self._both(name, given)
        self._same(name, *_alike(name, _answer(theirs), _answer(ours)))
        if ("return" in theirs) != ("return" in ours):
            raise PartedWaysError(self.requests[-1])
        if "return" in ours and name.endswith("set-speed") and not given["speed"]:
            self._both("job-resume", {"id": given["device"]})  # if it was held
        if "return" in ours and isinstance(given.get("speed"), int):
            job = given.get("job-id", given.get("device", ""))
            (self.held.add if given["speed"] == 1 else self.held.discard)(job)
        self._settle()
        self._hold()
        events = [self._events(i) for i in (0, 1)]
        if name == "transaction" and "error" in ours:
            # QEMU may have made jobs before it finds out; we look at all actions first.
            events = [
                {k: v for k, v in found.items() if v[-1]["data"].get("status") != "null"}
                for found in events
            ]
        self._same("events", *events)
        return ours

    def ask(self, name: str) -> Any:
        """What ours says to a query, which is no part of the walk."""
        return self.peers[1].do(name)["return"]

    def look(self) -> None:
        """Compare nodes with their bitmaps, jobs and exports."""
        if not self.held and not any(
            map(_idle_stream, self._both("query-block-jobs")[1]["return"])
        ):  # jobs that are held have done some of their work, which bitmaps of targets show
            self._same("nodes", *map(_nodes, self._both("query-named-block-nodes")))
        self._same("jobs", *map(_jobs, self._both("query-jobs")))
        self._same("block jobs", *map(_jobs, self._both("query-block-jobs")))
        self._same("exports", *_exports(*self._both("query-block-exports")))

    def _both(self, name: str, given: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        answers = []
        for number, peer in enumerate(self.peers):
            try:
                answers.append(peer.do(name, **(given or {})))
            except (EOFError, OSError) as error:
                if number == 0:
                    raise PeerEndedError(self.requests[-1]) from error
                raise AssertionError(f"liveblockd ended at {self.requests[-1]}") from error
        return answers

    def _hold(self) -> None:
        """Pause jobs with a speed: each drain of the graph makes QEMU's do a piece more."""
        running = [
            job["device"]
            for job in self.peers[1].do("query-block-jobs")["return"]
            if job["status"] == "running" and not job["paused"]
        ]
        for job in running:
            self._both("job-pause", {"id": job})
        if running:
            self._settle()

    def _settle(self) -> None:
        """Until no job of either moves any more, and both daemons have the same ones."""
        deadline = time.monotonic() + TIMEOUT
        patience = time.monotonic() + 3
        before: list[Any] = []
        while True:
            found = [_states(answer) for answer in self._both("query-jobs")]
            rests = all(
                status in SETTLED or (status == "running" and job in self.held)
                for states in found
                for job, status in states.items()
            )
            now = time.monotonic()
            if rests and found == before and (found[0] == found[1] or now > patience):
                self.held &= found[1].keys()
                return
            assert now < deadline, f"{found} after {self.requests[-1]}"
            before = found
            time.sleep(0.01)

    def _events(self, number: int) -> dict[str, list[Any]]:
        """New events, each source's in order; how sources interleave is no promise.

        A pause is no event here: QEMU's jobs pause whenever the graph is drained.
        """
        log = self.peers[number].log
        found: dict[str, list[Any]] = {}
        for entry in log[self._seen[number] :]:
            if "event" not in entry:
                continue
            data = entry.get("data", {})
            data.pop("len", None)
            source = data.get("id") or data.get("device") or data.get("node-name") or ""
            if (status := data.get("status")) is not None:
                if status in PAUSES or self._statuses[number].get(source) == status:
                    continue
                self._statuses[number][source] = status
            found.setdefault(source, []).append({"event": entry["event"], "data": data})
        self._seen[number] = len(log)
        return found

    def _same(self, what: str, theirs: Any, ours: Any) -> None:
        if theirs != ours:
            if isinstance(theirs, list) and isinstance(ours, list):
                theirs, ours = ([e for e in a if e not in b]
                                for a, b in ((theirs, ours), (ours, theirs)))  # fmt: skip
            session = "\n".join(self.requests)
            raise AssertionError(f"{session}\n\n{what}:\n  theirs {theirs}\n  ours   {ours}")


def _states(answer: dict[str, Any]) -> dict[str, str]:
    return {job["id"]: PAUSES.get(job["status"], job["status"]) for job in answer["return"]}


def _answer(message: dict[str, Any]) -> Any:
    if "error" in message:
        return {**message["error"], "desc": words(message["error"]["desc"])}
    return plain(message["return"])


def _alike(name: str, theirs: Any, ours: Any) -> tuple[Any, Any]:
    """Two mistakes in one request may be told in either order."""
    descs = [answer.get("desc") if isinstance(answer, dict) else None for answer in (theirs, ours)]
    if descs[0] is None or descs[1] is None:
        refused = any(re.fullmatch(pattern, f"{name}: {descs[1]}") for pattern in REFUSED)
        done = any(re.fullmatch(pattern, descs[0] or "") for pattern in DONE)
        return (ours, ours) if refused or done else (theirs, ours)
    told = any(re.fullmatch(pattern, desc) for pattern in EITHER for desc in descs)
    worded = any(re.fullmatch(a, descs[0]) and re.fullmatch(b, descs[1]) for a, b in WORDED)
    later = any(re.fullmatch(pattern, descs[0]) for pattern in DONE)  # another mistake comes after
    return (ours, ours) if told or worded or later else (theirs, ours)


def words(text: str) -> str:
    """A description, without what is the affair of a release."""
    for pattern, instead in ASIDE:
        text = re.sub(pattern, instead, text)
    return text


def _nodes(answer: dict[str, Any]) -> list[Any]:
    found = []
    for node in plain(answer["return"]):
        named = [b for b in node.get("dirty-bitmaps", ()) if "name" in b]  # jobs have some, too
        bitmaps = sorted((sorted(b.items()) for b in named), key=_key)
        snapshots = [s["name"] for s in node["image"].get("snapshots", ())]
        keys = ("node-name", "drv", "file", "ro", "backing_file", "backing_file_depth",
                "detect_zeroes", "write_threshold", "cache")  # fmt: skip
        if node["node-name"] == "#block":
            del node["ro"], node["detect_zeroes"]
        found.append([*(_name(node.get(key)) for key in keys), bitmaps, snapshots])
    return sorted(found, key=_key)


def _idle_stream(job: dict[str, Any]) -> bool:
    """QEMU's has a filter, and a writable image, though there is nothing to copy."""
    return job["type"] == "stream" and job["status"] == "pending" and not job["len"]


def _exports(*answers: dict[str, Any]) -> list[list[Any]]:
    theirs, ours = [sorted(plain(a["return"]), key=lambda export: export["id"]) for a in answers]
    for one, other in zip(theirs, ours, strict=False):
        if (
            other["node-name"] == "#block"
        ):  # of a disk that is being committed: where its guests are
            one["node-name"] = "#block"
    return [theirs, ours]


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _name(value: Any) -> Any:
    """Members of a json: name are in any order."""
    if isinstance(value, str) and value.startswith("json:"):
        return json.loads(value[5:])
    return value


def _jobs(answer: dict[str, Any]) -> list[Any]:
    jobs = []
    for job in plain(answer["return"]):
        job.pop("busy", None)
        job.pop("len", None)
        job.pop("actively-synced", None)
        job["status"] = PAUSES.get(job["status"], job["status"])
        if job["status"] != "running":
            job.pop("paused", None)
        jobs.append(job)
    return sorted(jobs, key=_key)


def missing() -> str | None:
    """The first program that is not installed."""
    programs = ("qemu-img", "qemu-io", "qemu-storage-daemon")
    return next((name for name in programs if shutil.which(name) is None), None)
