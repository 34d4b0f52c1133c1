"""The import order of pyproject.toml holds, and the checker that says so can fail."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINT = [
    sys.executable,
    "-c",
    "from importlinter.cli import lint_imports_command; lint_imports_command()",
    "--no-cache",
]


def test_imports_go_one_way():
    pytest.importorskip("importlinter", reason="import-linter is not installed")
    result = subprocess.run(LINT, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_wrong_import_is_noticed(tmp_path):
    pytest.importorskip("importlinter", reason="import-linter is not installed")
    package = tmp_path / "liveblockd"
    for name in ("storage", "graph"):
        (package / name).mkdir(parents=True)
        (package / name / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "storage" / "upward.py").write_text("import liveblockd.graph\n")
    (tmp_path / "pyproject.toml").write_text(
        '[tool.importlinter]\nroot_package = "liveblockd"\n'
        '[[tool.importlinter.contracts]]\nname = "x"\ntype = "layers"\n'
        'containers = ["liveblockd"]\nlayers = ["graph", "storage"]\n'
    )
    result = subprocess.run(
        LINT,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
    )
    assert result.returncode != 0
    assert "upward" in result.stdout
