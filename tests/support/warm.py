"""Daemons that begin with everything imported: a test does not pay for what it is not about.

A start from nothing is 0.4 s of CPU, nearly all of it imports, and there are hundreds of them in a
run of the tests. Here one process (``python -m tests.support.warm``) imports what a daemon does and
forks for every daemon that is asked for. What the tests get is a ``Popen`` like any other: the
daemon is their own child, with the descriptors, the directory and the environment of its call.
What is about the start itself (its options, its memory, the environment of the interpreter) begins
from nothing, as ``DaemonProcess(..., cold=True)`` does.

The daemon is a grandchild of the process that forks, and its parent has ended when the test hears
of it. As the test has declared itself the reaper of such orphans (``prctl(2)``), the daemon is its
child from then on; it declares so for the time of the call only, or processes that have gone to the
background on purpose would become its children too.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_PR_SET_CHILD_SUBREAPER = 36
_LARGEST = 1 << 18  # bytes of a request: an environment is a few thousand
_execute_child = inspect.signature(subprocess.Popen._execute_child)  # type: ignore[attr-defined]


#: how a daemon is begun from nothing
LIVEBLOCKD = (sys.executable, "-m", "liveblockd")


def begin(command: Sequence[str], **more: Any) -> subprocess.Popen[Any]:
    """``Popen(command, ...)``, warm where that can be: ``python -m`` what is known here."""
    known = tuple(command[:2]) == LIVEBLOCKD[:2] and command[2] in {**PROGRAMS, **BESIDE}
    return (WarmPopen if known and "pass_fds" not in more else subprocess.Popen)(command, **more)


def run(command: Sequence[str], *, timeout: float, **more: Any) -> subprocess.CompletedProcess[str]:
    """``subprocess.run`` with ``capture_output`` and ``text``, of what ``begin`` begins."""
    with begin(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    ) as process:
        try:
            out, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


class WarmPopen(subprocess.Popen[Any]):
    """``python -m PROGRAM WORDS``, begun warm; takes what Popen takes for pipes, cwd and env."""

    def _execute_child(self, *more: Any) -> None:
        call = _execute_child.bind(self, *more).arguments
        pipes = [call[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        program = call["args"][2]
        request = {
            "program": program,
            "words": [os.fspath(word) for word in call["args"][3:]],
            "directory": os.fspath(call["cwd"] or os.getcwd()),
            "environment": dict(os.environ if call["env"] is None else call["env"]),
        }
        standard = [own if theirs == -1 else theirs for own, theirs in enumerate(pipes)]
        with _one_at_a_time, _reaping_orphans():
            starter = _starter("liveblockd" if program in BESIDE else program)
            socket.send_fds(starter, [json.dumps(request).encode()], standard)
            answer = starter.recv(100)
        if not answer:
            raise OSError("the process that starts warm daemons has ended")
        self.pid = int(answer)
        self._child_created = True
        self._close_pipe_fds(  # type: ignore[attr-defined]
            *(call[f"{name}{end}"] for name in ("p2c", "c2p", "err") for end in ("read", "write"))
        )


_one_at_a_time = threading.Lock()
_running: dict[tuple[int, str], socket.socket] = {}


def _starter(program: str) -> socket.socket:
    """The socket to this process's starter of a program; it ends with the last who holds it."""
    own = os.getpid(), program
    if own not in _running:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            subprocess.Popen(
                [sys.executable, "-m", "tests.support.warm", program, str(theirs.fileno())],
                cwd=ROOT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        _running[own] = ours
    return _running[own]


@contextlib.contextmanager
def _reaping_orphans() -> Iterator[None]:
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


# -- in the process that forks


def import_daemon() -> Callable[[], int]:
    """What ``run_daemon`` imports and loads."""
    import liveblockd.daemon.core  # noqa: F401
    from liveblockd.__main__ import main
    from liveblockd.daemon.drivers import load_all_drivers
    from liveblockd.qmp import registry

    load_all_drivers()
    registry.load()
    return main


def import_monitors() -> Callable[[], int]:
    """The daemon of the QMP wire: other commands, and few of them."""
    from tests.support.qmp_daemon import main, register_stand_ins

    register_stand_ins()
    return main


#: by the name of the module: where its file is, and what imports it
PROGRAMS = {
    "liveblockd": ("liveblockd/__main__.py", import_daemon),
    "tests.support.qmp_daemon": ("tests/support/qmp_daemon.py", import_monitors),
}

#: those that the starter of ``liveblockd`` forks, too: each imports little more than that has
BESIDE = {
    "liveblockd.ctl": "liveblockd/ctl.py",
    "tests.simulation.victim": "tests/simulation/victim.py",
    "tests.unit.exports.memory_export": "tests/unit/exports/memory_export.py",
}


def next_daemon(control: socket.socket) -> dict[str, Any] | None:
    """Fork for every request; returns it in each child, and None where there are no more."""
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, _LARGEST, 3)
        if not data:
            return None
        told, tell = os.pipe()
        between = os.fork()
        if between == 0:
            if pid := os.fork():
                os.write(tell, str(pid).encode())
                os._exit(0)
            for number, descriptor in enumerate(descriptors):
                os.dup2(descriptor, number)
            for descriptor in (*descriptors, told, tell, control.detach()):
                os.close(descriptor)
            return json.loads(data)
        os.close(tell)
        for descriptor in descriptors:
            os.close(descriptor)
        pid_text = os.read(told, 100)
        os.close(told)
        os.waitpid(between, 0)  # only now is the daemon the child of who asked
        control.send(pid_text)


def main() -> int:
    """Serve until the other side is gone; in a child, be the daemon."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    file, import_program = PROGRAMS[sys.argv[1]]
    control = socket.socket(fileno=int(sys.argv[2]))
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # no threads: only one would be forked
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    gc.disable()
    import uvloop  # noqa: F401

    program = import_program()
    gc.freeze()
    gc.enable()
    request = next_daemon(control)
    if request is None:
        return 0
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    if (name := request["program"]) in BESIDE:
        file, program = BESIDE[name], importlib.import_module(name).main
    sys.argv = [str(ROOT / file), *request["words"]]
    return program()


if __name__ == "__main__":
    sys.exit(main())
