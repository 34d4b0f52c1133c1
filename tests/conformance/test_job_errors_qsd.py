"""Errors of every job under every policy, in step with qemu-storage-daemon.

Some requests fail (blkdebug, once each: what is one request of one daemon the other one tries
again, in other ways). A job that stops is met by a guest who writes to the same place before it is
resumed, or is cancelled. What clients are told is the same, once or more, and so are the bytes.

The target of a stream is left out: ours gets around errors that do not last.
"""

import subprocess
import time
from itertools import product

import pytest

from tests.conformance.test_against_qsd import run
from tests.conformance.test_random_requests_qsd import directories
from tests.support.daemon import TIMEOUT
from tests.support.in_step import InStep

__all__ = ["directories"]

#: a worker's copy of many pieces, of one, reading and writing
TRIES = 3
NBD = "nbd+unix:///disk?socket=nbd.sock"
#: what a guest writes while the job stands still: where the error was, and elsewhere
WRITES = ("write -P 99 0 64k", "write -P 98 512k 64k", "write -P 97 1900k 4k")

#: (name of the job, its source, its target, where the guest is): images of ``make_images``
JOBS = {
    "stream": ("mid", "top", "top"),
    "commit": ("mid", "base", "top"),
    "active": ("top", "mid", "top"),
    "mirror": ("d0", "t0", "d0"),
    "blocking": ("d0", "t0", "d0"),
    "backup": ("d0", "t0", "d0"),
}


def start(both, kind, source, target, policy):
    sides = {"on_source_error": policy, "on_target_error": policy}
    common = {"job_id": "j", "auto_dismiss": True}
    match kind:
        case "stream":
            both.do("block-stream", device="top", on_error=policy, **common)
        case "commit":
            both.do("block-commit", device="top", top_node="mid", base_node="base",
                    on_error=policy, **common)  # fmt: skip
        case "active":
            both.do("block-commit", device="top", base_node="mid", on_error=policy, **common)
        case "backup":
            both.do("blockdev-backup", device=source, target=target, sync="full", **sides, **common)
        case _:
            mode = "write-blocking" if kind == "blocking" else "background"
            both.do("blockdev-mirror", device=source, target=target, sync="full", copy_mode=mode,
                    **sides, **common)  # fmt: skip


def options(kind, failing, side):
    """The images of the job, one of them on a file whose first request of data fails once."""
    event = "read_aio" if side == "source" else "write_aio"
    nodes = ["d0", "t0"] if kind in ("mirror", "blocking", "backup") else ["base", "mid", "top"]
    found = []
    for number, name in enumerate(nodes):
        if name == failing:
            rules = "".join(
                f",inject-error.{n}.event={event},inject-error.{n}.errno=5,inject-error.{n}.once=on"
                for n in range(TRIES)
            )
            image = f"image.driver=file,image.filename={name}.qcow2"
            found += ["--blockdev", f"driver=blkdebug,node-name={name}-file,{image}{rules}"]
        else:
            file = f"driver=file,node-name={name}-file,filename={name}.qcow2"
            found += ["--blockdev", file]
        backing = f",backing={nodes[number - 1]}" if number and len(nodes) == 3 else ""
        found += ["--blockdev", f"driver=qcow2,node-name={name},file={name}-file{backing}"]
    return found


def state(peer):
    found = {job["id"]: job["status"] for job in peer.do("query-jobs")["return"]}
    return found.get("j", "null")


def told(peer):
    """What clients heard of errors and of the end."""
    found = [
        (entry["event"], *(entry["data"].get(k) for k in ("operation", "action", "error")))
        for entry in peer.log
        if entry.get("event", "").startswith("BLOCK_JOB_") and entry["event"] != "BLOCK_JOB_READY"
    ]
    return list(dict.fromkeys(found))


def settled(peer, *statuses):
    deadline = time.monotonic() + TIMEOUT
    while (found := state(peer)) not in statuses:
        assert time.monotonic() < deadline, found
    return found


CASES = [
    pytest.param(kind, side, policy, then, marks=[pytest.mark.slow] * (policy != "stop"))
    for kind, side, policy in product(JOBS, ("source", "target"), ("report", "stop", "ignore"))
    for then in (("resume", "cancel") if policy == "stop" else ("",))
    if (kind, side) != ("stream", "target")
]


class Started:
    """``both.do`` without comparing: what one side does first is its own affair here."""

    def __init__(self, both):
        self.peers = both.peers

    def do(self, name, /, **given):
        for peer in self.peers:
            answer = peer.do(name, **{k.replace("_", "-"): v for k, v in given.items()})
            assert "return" in answer, answer


@pytest.mark.parametrize(("kind", "side", "policy", "then"), CASES)
def test_an_error_and_what_becomes_of_it(kind, side, policy, then, directories):
    source, target, disk = JOBS[kind]
    failing = source if side == "source" else target
    with InStep(*directories, *options(kind, failing, side)) as both:
        plain = Started(both)
        plain.do("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})
        plain.do("block-export-add", type="nbd", id="x", node_name=disk, name="disk", writable=True)
        start(plain, kind, source, target, policy)
        ends = [to_the_end(peer, then) for peer in both.peers]
    assert ends[0] == ends[1]
    completed = ends[0][-1] == ("BLOCK_JOB_COMPLETED", None, None, None)
    for name in {disk, target} if completed else {disk}:
        same = [str(peer.directory / f"{name}.qcow2") for peer in both.peers]
        run(directories[0], "qemu-img", "compare", "-q", *same)
        run(directories[1], "qemu-img", "check", "-q", same[1])


def to_the_end(peer, then):
    """What clients were told; a job that stops is met by a guest, and goes on or not."""
    while (found := settled(peer, "paused", "ready", "null")) == "paused":
        words = [word for write in WRITES for word in ("-c", write)]
        command = ("qemu-io", "-f", "raw", *words, NBD)
        while subprocess.run(
            command, cwd=peer.directory, capture_output=True, timeout=30
        ).returncode:
            pass  # it was the guest whose request failed
        peer.do("job-cancel" if then == "cancel" else "job-resume", id="j")
        while then == "cancel" and state(peer) == "paused":
            pass
    if found == "ready":
        peer.do("job-complete", id="j")
    settled(peer, "null")
    return told(peer)
