"""``python -m tests.fuzz.guards``: takes away every guard against hostile images, one at a time.

A guard is what refuses a lying offset, count, length or alignment: the operands of a condition
that raises, the masks that collect bad entries, the calls that check or that make metadata known.
Each is taken out of a copy of the package (by ``ast``), and tests are run on the copy until one
fails. What no test misses is printed, and makes the exit status 1: that guard could go, and nobody
would know. ``EQUIVALENT`` has those that cannot be missed, with the reason.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
QCOW2 = "liveblockd/formats/qcow2"
MODULES = (
    *(
        f"{QCOW2}/{name}.py"
        for name in (
            "header", "opening", "tables", "metadata", "reader", "snapshots", "snapshot_store",
            "bitmaps", "bitmap_store", "encrypted", "subclusters", "compression", "mapping",
        )
    ),
    "liveblockd/formats/luks.py",
)  # fmt: skip
#: run one after another until one fails; the first is made for this
TESTS = (
    ("tests/unit/formats/test_qcow2_guards.py",),
    (
        "tests/unit/formats/test_qcow2_hostile.py",
        "tests/unit/formats/test_luks.py",
        "tests/unit/formats/test_qcow2_pure.py",
        "tests/unit/formats/test_qcow2_snapshots.py",
        "tests/unit/formats/test_qcow2_data_file.py",
        "tests/unit/formats/test_qcow2_packing.py",
        "tests/unit/formats/test_qcow2_subclusters.py",
        "tests/unit/formats/test_qcow2_image.py",
    ),
    ("tests/fuzz/test_qcow2_images.py", "tests/integration/test_hostile_chains.py"),
)
#: names of variables that say what is wrong
MASKS = ("bad", "wrong", "standard", "compressed", "clash", "both", "nowhere", "refused", "there")
#: calls that check, or that say where metadata lies
CALLS = re.compile(r"(\b_?check_?\w*|_guard|add_metadata|add_many|refuse_blocks_at)$")
#: functions that judge what the engine makes itself, or the user asks for, not what is in an image
OWN = re.compile(
    r"relink|_rewrite|_compact|serialise\w*|check_new|check_limits|new_luks|delete|create|find"
    r"|_write_\w+|replace_l1|writable|_add_table|_make_exclusive|unlock_image|_inflate_zstd_import"
    r"|check_options|kinds|summaries|_host_ranges|allocated_length|publish\w*|_publish|write|write_zeroes|_switch|_set_l1|map\w*|runs"
)
#: (module, function, text): why no test can see that it is gone
EQUIVALENT: dict[tuple[str, str, str], str] = {
    ("bitmap_store", "_load", "total > MAX_LOADED_BYTES"): (
        "one bitmap has at most MAX_DATA_BYTES, and the sum is checked after each"
    ),
    ("metadata", "_register_tables", "refcounts.add_metadata(0, 1)"): (
        "offset 0 means nothing everywhere, and compressed data there are refused for themselves"
    ),
    (
        "bitmaps",
        "_check_entry",
        "not 0 < entry.table_entries <= MAX_TABLE_ENTRIES -> not (0 < entry.table_entries)",
    ): "so many entries are more than MAX_DATA_BYTES, whatever the size of clusters",
}


class Guard(NamedTuple):
    """One guard and the source of its module without it."""

    module: str
    line: int
    function: str
    text: str
    source: str


def _operands(test: ast.expr) -> Iterator[ast.expr]:
    """The smallest parts of a condition that refuse something by themselves."""
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.Or):
        for value in test.values:
            yield from _operands(value)
    elif isinstance(test, ast.BinOp) and isinstance(test.op, ast.BitOr):
        yield from _operands(test.left)
        yield from _operands(test.right)
    elif isinstance(test, ast.BoolOp):
        inner = [v for v in test.values if isinstance(v, ast.BoolOp)]
        yield from (part for value in inner for part in _operands(value))
        if not inner:
            yield test
    else:
        yield test


def _bounds(test: ast.expr) -> Iterator[tuple[ast.Compare, int]]:
    """The two bounds of ``not low <= x <= high``; 0: the lower one."""
    compare = test.operand if isinstance(test, ast.UnaryOp) else None
    if isinstance(compare, ast.Compare) and len(compare.ops) == 2:
        yield compare, 0
        yield compare, 1


class _Finder:
    def __init__(self, path: str, text: str) -> None:
        self.path, self.text = path, text
        self.tree = ast.parse(text)
        self.lines = text.splitlines(keepends=True)

    def guards(self) -> Iterator[Guard]:
        for node in ast.walk(self.tree):
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if function and not OWN.fullmatch(node.name):
                yield from self._of_function(node)

    def _of_function(self, function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[Guard]:
        for node in ast.walk(function):
            if isinstance(node, ast.If) and any(isinstance(s, ast.Raise) for s in node.body):
                yield from self._condition(function.name, node.test)
            elif isinstance(node, ast.Assign | ast.AugAssign):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                name = target.id if isinstance(target, ast.Name) else ""
                if name in MASKS and not isinstance(node.value, ast.List | ast.Set | ast.Call):
                    if isinstance(node.value, ast.BoolOp):
                        yield from self._condition(function.name, node.value)
                    else:
                        for part in _operands(node.value):
                            yield self._replace(function.name, part, "(({}) & False)")
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                called = node.value.func
                name = (
                    called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
                )
                if CALLS.search(name):
                    yield self._replace(function.name, node.value, "None")

    def _condition(self, function: str, test: ast.expr) -> Iterator[Guard]:
        for part in _operands(test):
            bounds = list(_bounds(part))
            if not bounds:
                yield self._replace(function, part, "False")
            for compare, which in bounds:
                less = copy.deepcopy(compare)
                if which == 0:
                    less.left = less.comparators[0]
                    del less.ops[0], less.comparators[0]
                else:
                    del less.ops[1], less.comparators[1]
                yield self._replace(function, part, f"not ({ast.unparse(less)})", of=part)

    def _replace(self, function: str, node: ast.expr, by: str, of: ast.expr | None = None) -> Guard:
        """The module with ``by`` in place of a node; its lines keep their numbers."""
        assert node.end_lineno is not None and node.end_col_offset is not None
        lines = [line.encode() for line in self.lines]
        first, last = node.lineno - 1, node.end_lineno - 1
        head, tail = lines[first][: node.col_offset], lines[last][node.end_col_offset :]
        old = (ast.get_source_segment(self.text, node) or "").replace("\n", " ")
        old = re.sub(r"\s+", " ", old)
        new = by.format(old) if "{}" in by else by
        filler = b"\n" * (last - first) if not head.strip().startswith(b"if") else b""
        lines[first : last + 1] = [head + new.encode() + tail + filler]
        shown = old if of is None else f"{old} -> {by}"
        return Guard(self.path, node.lineno, function, shown, b"".join(lines).decode())


def guards(only: str = "") -> list[Guard]:
    """All of them, in the order of the modules."""
    found = []
    for path in MODULES:
        for guard in _Finder(path, (ROOT / path).read_text()).guards():
            if only in f"{guard.module}:{guard.line} {guard.function}: {guard.text}":
                ast.parse(guard.source)
                found.append(guard)
    return sorted(set(found), key=lambda g: (g.module, g.line, g.text))


def missed_by(guard: Guard, copy_of: Path, seconds: float, steps: int) -> str | None:
    """The test that fails without the guard, among so many steps of TESTS; None: none does."""
    path = copy_of / guard.module
    original = path.read_text()
    path.write_text(guard.source)
    environment = {**os.environ, "PYTHONPATH": str(copy_of), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        for tests in TESTS[:steps]:
            there = [name for name in tests if (copy_of / name).exists()]
            command = [
                sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=no", "-p",
                "no:cacheprovider", "-p", "no:randomly", "-m", "not slow", "--timeout=60", *there,
            ]  # fmt: skip
            try:
                done = subprocess.run(
                    command, cwd=copy_of, env=environment, timeout=seconds, check=False,
                    capture_output=True, text=True,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                return f"(time limit) {tests[0]}"
            if done.returncode:
                failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
                return failed[1] if failed else f"(status {done.returncode}) {tests[0]}"
    finally:
        path.write_text(original)
    return None


def copied(directory: str) -> Path:
    """The package and its tests, in a directory of their own."""
    where = Path(directory)
    for name in ("liveblockd", "tests"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, where / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", where)
    return where


def main() -> int:
    """Print the table guard -> test; status 1 where a guard is missed by none."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.guards")
    parser.add_argument("--only", default="", help="part of MODULE:LINE FUNCTION: TEXT")
    parser.add_argument("--list", action="store_true", help="only say which guards there are")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="only the tests made for this")
    parser.add_argument("--seconds", type=float, default=400, help="of one run of tests")
    arguments = parser.parse_args()
    found = guards(arguments.only)
    if arguments.list:
        for guard in found:
            say(f"{guard.module}:{guard.line} {guard.function}: {guard.text}")
        say(f"{len(found)} guards")
        return 0
    share = [found[number :: arguments.jobs] for number in range(arguments.jobs)]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        steps = 1 if arguments.quick else len(TESTS)
        unseen = sum(pool.map(lambda part: _try_all(part, arguments.seconds, steps), share))
    say(f"{len(found)} guards, {unseen} of them missed by no test")
    return 1 if unseen else 0


def _try_all(found: list[Guard], seconds: float, steps: int) -> int:
    unseen = 0
    with tempfile.TemporaryDirectory(prefix="liveblockd-guards-") as directory:
        where = copied(directory)
        for guard in found:
            key = (Path(guard.module).stem, guard.function, guard.text)
            place = f"{guard.module}:{guard.line} {guard.function}: {guard.text}"
            if key in EQUIVALENT:
                say(f"{place}\n    = {EQUIVALENT[key]}")
                continue
            test = missed_by(guard, where, seconds, steps)
            unseen += test is None
            say(f"{place}\n    {'MISSED BY NO TEST' if test is None else '-> ' + test}")
    return unseen


def say(line: str) -> None:
    """To stdout, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
