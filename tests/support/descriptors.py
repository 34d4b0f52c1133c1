"""What this process has open, so that a test sees what somebody has forgotten to close."""

from __future__ import annotations

import contextlib
import gc
import os
from collections import Counter


def descriptors() -> Counter[str]:
    """How many descriptors lead to each thing; ``descriptors() - before`` is what is new.

    What tests before this one have left to the collector is closed first, or it would be missing
    the next time.
    """
    gc.collect()
    found: Counter[str] = Counter()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one of the directory itself
            found[os.readlink(f"/proc/self/fd/{number}")] += 1
    return found
