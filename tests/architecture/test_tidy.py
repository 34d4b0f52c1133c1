"""House rules that a reader would otherwise have to enforce (docs/internals.md)."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "liveblockd").rglob("*.py"))
WITHOUT_README = {ROOT / "liveblockd", ROOT / "liveblockd/qmp/commands"}
PACKAGES = sorted({p.parent for p in SOURCES} - WITHOUT_README)
PUBLISHED = (
    "liveblockd/**/*", "tests/**/*", "examples/*", "docs/**/*", "*.md", "Makefile", ".ci/*",
    "systemd/*", "benchmarks/**/*", "tools/*",
)  # fmt: skip
MAX_MODULE_LINES = 600
MAX_FUNCTION_LINES = 70
MAX_README_LINES = 90


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(tree: ast.AST):
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_module(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module says what it is for"
    assert len(text.splitlines()) <= MAX_MODULE_LINES, "a room that wants a wall"
    long = [
        f"{f.name} ({f.end_lineno - f.lineno + 1} lines)"
        for f in functions(tree)
        if f.end_lineno - f.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert not long, f"functions of more than {MAX_FUNCTION_LINES} lines: {long}"
    assert not re.search(r"util|manager|helper", path.stem), "a name that says nothing"


@pytest.mark.parametrize("package", PACKAGES, ids=name)
def test_package_has_a_readme_of_a_screen(package):
    readme = package / "README.md"
    assert readme.exists()
    assert len(readme.read_text().splitlines()) <= MAX_README_LINES


def test_what_is_referred_to_is_there():
    """Links of pages, and pages that code names: a reader has nothing but this tree."""
    missing = []
    for path in [path for pattern in PUBLISHED for path in ROOT.glob(pattern) if path.is_file()]:
        if path.suffix not in (".md", ".py", ".toml", ".service"):
            continue
        text = path.read_text()
        links = re.findall(r"\]\(([^)#:]+)\)", text) if path.suffix == ".md" else []
        wanted = [(path.parent, link) for link in links]
        wanted += [(ROOT, link) for link in re.findall(r"\bdocs/[\w-]+\.md\b", text)]
        missing += [f"{name(path)}: {link}" for base, link in wanted if not (base / link).exists()]
        missing += [f"{name(path)}: {word}" for word in re.findall(r"\bDE" r"SIGN\b", text)]
    assert not missing


def test_no_path_of_a_machine():
    needles = ("/wo" + "rk/", "../sha" + "red", "/ro" + "ot/", "/ho" + "me/")
    found = [
        f"{name(path)}: {needle}"
        for pattern in PUBLISHED
        for path in ROOT.glob(pattern)
        if path.is_file() and path.suffix != ".pyc"
        for needle in needles
        if needle in path.read_text(errors="replace")
    ]
    assert not found
