"""Coverage-guided fuzzing of qcow2 images.

``python -m tests.fuzz.atheris_qcow2 [CORPUS] [-runs=N]``, once ``--write-seeds CORPUS`` has made a
corpus to start from. Needs atheris (``pip install atheris``), which the tests do not. What it finds
goes to ``corpus/NAME.bin``, where ``test_qcow2_images`` replays it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.fuzz.qcow2_mutations import seeds


def _write_seeds(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for seed in seeds():
        (directory / seed.name).write_bytes(seed.content)


def main() -> None:
    if sys.argv[1:2] == ["--write-seeds"]:
        _write_seeds(Path(sys.argv[2]))
        return
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is not installed")
    with atheris.instrument_imports(include=["liveblockd.formats", "liveblockd.graph"]):
        from tests.fuzz.qcow2_exercise import exercise

    def one(data: bytes) -> None:
        exercise(data, read_only=len(data) % 2 == 1, seed=len(data))

    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
