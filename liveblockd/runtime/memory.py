"""How glibc's malloc treats the buffers of large requests.

By default it gets a buffer of 1 MiB from the kernel and gives it back when it is freed: each
request of a guest then pays for 256 page faults, as much as for the system calls that fill the
buffer and send it. With the thresholds here such memory stays in the process, within limits that
do not grow with the disk: reads of 1 MiB take half the processor time, measured.

Specification: mallopt(3). Runs on: the main thread, before the loop. Errors: none escape; where
there is no mallopt (musl) nothing changes.
"""

from __future__ import annotations

import ctypes
import os
from typing import Final

#: numbers of mallopt(3) and the environment variables that say the same
_TRIM: Final = (-1, "MALLOC_TRIM_THRESHOLD_")
_MMAP: Final = (-3, "MALLOC_MMAP_THRESHOLD_")
#: bytes: larger buffers come from the kernel each time
MMAP_THRESHOLD: Final = 4 << 20
#: free bytes at the top of the heap that are kept
TRIM_THRESHOLD: Final = 16 << 20


def keep_freed_buffers() -> bool:
    """Set the thresholds, but for those that the environment sets; whether malloc has them."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    done = True
    for (number, variable), value in ((_MMAP, MMAP_THRESHOLD), (_TRIM, TRIM_THRESHOLD)):
        if variable not in os.environ:
            done = bool(mallopt(number, value)) and done
    return done
