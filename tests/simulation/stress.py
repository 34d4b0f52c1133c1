"""``python -m tests.simulation.stress --seeds 200``: the streams of many seeds, until one fails."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
import time

from tests.simulation.scenario import run_seed


def main() -> int:
    """Exit status 1, with the seed, at the first failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=200, help="how many")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--keep", action="store_true", help="leave the images of a failed seed")
    arguments = parser.parse_args()
    started = time.monotonic()
    for seed in range(arguments.start, arguments.start + arguments.seeds):
        directory = tempfile.mkdtemp(prefix="liveblockd-stress-")
        try:
            say(asyncio.run(run_seed(seed, directory)))
        except BaseException as error:
            say(f"FAILED: seed {seed}: {error!r}")
            say(f"again: python -m tests.simulation.stress --start {seed} --seeds 1")
            if arguments.keep:
                say(f"images: {directory}")
            else:
                _remove(directory)
            raise
        _remove(directory)
    say(f"{arguments.seeds} seeds in {time.monotonic() - started:.0f} s")
    return 0


def say(line: str) -> None:
    """To stdout, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _remove(directory: str) -> None:
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
