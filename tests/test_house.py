"""The house as CONTRIBUTING.md draws it: one way for the data, files to be read in a sitting, a map that is true."""

from __future__ import annotations

import ast
import io
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cka_hooks"
# Lines of code, without docstrings, comments and blank lines.
FILE, CLASS = 320, 220


def code_lines(source: str) -> tuple[set[int], ast.Module]:
    """Numbers of the lines that hold code, and the syntax tree."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            docstrings.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines - docstrings, tree


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_and_its_classes_can_be_read_in_a_sitting(path: Path) -> None:
    lines, tree = code_lines(path.read_text(encoding="utf-8"))
    assert len(lines) <= FILE
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            assert len(lines & set(range(node.lineno, (node.end_lineno or 0) + 1))) <= CLASS, node.name


def test_code_is_counted_without_docstrings_comments_and_blank_lines() -> None:
    source = (
        '"""Doc."""\n\n# Why.\nclass A:\n    """Doc.\n\n    More.\n    """\n\n    x = (\n        1,\n    )  # what\n'
    )
    assert code_lines(source)[0] == {4, 10, 11, 12}


def contract(folder: Path) -> subprocess.CompletedProcess[str]:
    """The contract of pyproject.toml on the package in a folder."""
    pytest.importorskip("importlinter", reason="the extra `lint` has import-linter")
    code = "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command as run; run()"
    return subprocess.run(
        [sys.executable, "-c", code, "--no-cache"], cwd=folder, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("where", "forbidden"),
    [
        ("similarity/state.py", "from cka_hooks.recording import batches"),
        ("recording/batches.py", "from cka_hooks.similarity import state"),
        ("results/tables.py", "from cka_hooks.views import page"),
        ("views/page.py", "from cka_hooks.recording import batches"),
        ("hsic.py", "from cka_hooks.results import tables"),
        ("run/loop.py", "import cka_hooks.compare"),
        ("compare.py", "from cka_hooks import integrations"),
    ],
)
def test_a_forbidden_import_breaks_the_contract(tmp_path: Path, where: str, forbidden: str) -> None:
    shutil.copytree(PACKAGE, tmp_path / "cka_hooks", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    planted = tmp_path / "cka_hooks" / where
    planted.write_text(planted.read_text(encoding="utf-8") + f"\n{forbidden}\n", encoding="utf-8")
    done = contract(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN" in done.stdout


def test_the_contract_holds() -> None:
    done = contract(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_map_is_true() -> None:
    """Every file stands in CONTRIBUTING.md's map, in the folder that it is in, and nothing else does."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    drawn = re.search(r"<!-- map -->\n```\n(.*?)```", text, re.DOTALL)
    assert drawn is not None, "CONTRIBUTING.md has lost its map"
    folder, found = "", set()
    for line in drawn[1].splitlines():
        if heading := re.match(r"^(\S+)/(?:\s|$)", line):
            folder = "" if heading[1] == "cka_hooks" else heading[1] + "/"
        if name := re.match(r"^    (\S+\.\w+)\s", line):
            found.add(folder + name[1])
    there = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*")
        if path.suffix in {".py", ".c", ".h", ".html", ".pyi"} and path.name != "__init__.py"
    }
    assert found == there
