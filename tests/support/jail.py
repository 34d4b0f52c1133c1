"""Runs a command that may make some system calls only, as systemd's SystemCallFilter= does.

``jail.py FILE COMMAND...``: FILE has the names of what is allowed; the rest fails with EPERM.
Memory is never writable and executable, where the kernel sees to it (MemoryDenyWriteExecute=).
"""

import ctypes
import os
import re
import struct
import sys

HEADER = "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"
_LOAD_NUMBER, _IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _EPERM = 0x7FFF0000, 0x00050001
_PR_SET_SECCOMP, _FILTER, _PR_SET_NO_NEW_PRIVS, _PR_SET_MDWE = 22, 2, 38, 65


class Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def numbers() -> dict[str, int]:
    """System calls of this machine by name; raises OSError."""
    with open(HEADER) as file:
        return {m[1]: int(m[2]) for m in re.finditer(r"#define __NR_(\w+) (\d+)", file.read())}


def lock_in(allowed: set[str]) -> None:
    """For this process and all that it becomes or starts; raises OSError."""
    steps = [(_LOAD_NUMBER, 0, 0, 0)]
    for number in sorted(n for name, n in numbers().items() if name in allowed):
        steps += [(_IF_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    steps.append((_RETURN, 0, 0, _EPERM))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = Program(len(steps), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_MDWE, 1, 0, 0, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.prctl(_PR_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "no filter of system calls")


if __name__ == "__main__":
    with open(sys.argv[1]) as names:
        lock_in(set(names.read().split()))
    os.execvp(sys.argv[2], sys.argv[2:])
