"""docs/guide/extending.md is right: its snippets extend a copy of the repository, which then trains with all of it."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from helpers import ROOT

PAGE = (ROOT / "docs" / "guide" / "extending.md").read_text(encoding="utf-8")
KINDS = ("PEFT method of our own", "PEFT method of Hugging Face", "Data set", "Objective", "Sampler", "Metric")
KINDS += ("Network size", "Checkpoint format")
NEW = re.compile(r"# ([\w/]+\.(?:py|yaml))")
IMPORTS = re.compile(r"# add to the imports of (\S+)")
ROWS = re.compile(r"# add to (\w+) in (\S+)")
BESIDE = re.compile(r'# add (before|after) "(.+)" in (\S+)')


class Snippet(NamedTuple):
    """A block of the page: the line that says where it belongs, and its code."""

    where: str
    code: str


def snippets(kind: str) -> list[Snippet]:
    """ImageShards of a section, in its order."""
    section = re.search(rf"^## {re.escape(kind)}$(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert section, f"the page has no section {kind}"
    blocks = re.findall(r"^```(?:python|yaml)\n(.*?)^```$", section[1], flags=re.DOTALL | re.MULTILINE)
    return [Snippet(*block.split("\n", 1)) for block in blocks]


def apply(snippet: Snippet, root: Path) -> None:
    """Write a new file, or insert rows into one."""
    if new := NEW.fullmatch(snippet.where):
        path = root / new[1]
        assert not path.exists(), f"{new[1]} is there already"
        path.write_text(snippet.code, encoding="utf-8")
    elif imports := IMPORTS.fullmatch(snippet.where):
        path = root / imports[1]
        text = path.read_text(encoding="utf-8")
        first = next(node.lineno for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom))
        lines = text.splitlines(keepends=True)
        path.write_text("".join([*lines[: first - 1], snippet.code, *lines[first - 1 :]]), encoding="utf-8")
    elif rows := ROWS.fullmatch(snippet.where):
        opening = rf"^{rows[1]}:.*$" if rows[2].endswith(".yaml") else rf"^{rows[1]}\b[^=\n]*= *[\[({{]"
        insert(root / rows[2], opening, "\n" + snippet.code)
    else:
        beside = BESIDE.fullmatch(snippet.where)
        assert beside, f"nobody knows where this belongs: {snippet.where}"
        where, text, name = beside.groups()
        pattern = rf"(?m)(?=^.*{re.escape(text)})" if where == "before" else re.escape(text) + "(?=\n)"
        insert(root / name, pattern, snippet.code if where == "before" else "\n" + snippet.code)


def insert(path: Path, pattern: str, rows: str) -> None:
    """Insert rows behind the first match of a pattern."""
    text = path.read_text(encoding="utf-8")
    place = re.search(pattern, text, flags=re.MULTILINE)
    assert place, f"{path.name} has no {pattern}"
    rest = text[place.end() :]
    path.write_text(text[: place.end()] + rows.rstrip("\n" if rest.startswith("\n") else "") + rest, encoding="utf-8")


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with every example of the page."""
    root = tmp_path_factory.mktemp("extended")
    for name in ("src", "configs", "tests/support"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "assets").symlink_to(ROOT / "assets")
    for kind in KINDS:
        for snippet in snippets(kind):
            apply(snippet, root)
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_snippets(kind: str) -> None:
    found = snippets(kind)
    assert found
    for snippet in found:
        if snippet.where.endswith(".py") and NEW.fullmatch(snippet.where):
            assert ast.get_docstring(ast.parse(snippet.code)), snippet.where
        known = (NEW, IMPORTS, ROWS, BESIDE)
        assert any(pattern.fullmatch(snippet.where) for pattern in known), snippet.where


@pytest.mark.slow
def test_the_copy_uses_all_of_them(extended: Path, tmp_path: Path) -> None:
    """One process trains, generates, evaluates and reads a file with the new classes."""
    environment = {key: value for key, value in os.environ.items() if key != "DITUNE_ROOT"}
    environment |= {"PYTHONPATH": str(extended / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(extended / "tests" / "support" / "extended.py"), str(tmp_path)],
        env=environment,
        cwd=extended,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["base"]["data"]["name"] == "shapes"
    assert found["base"]["metrics"]["protocol"]["sampler"].startswith("Ralston")
    assert found["base"]["metrics"]["after"]["n"] == 4
    for method in ("attention", "delora"):
        assert found[method]["method"] == method
        assert 0 < found[method]["parameters"]["trainable"] < found["base"]["parameters"]["trainable"]
    assert found["tensors"] > 10
    assert "mmd_efflite0" in found["base"]["metrics"]["after"]
    assert {"dit_h_2", "dit_h_4", "dit_h_8"} <= set(found["networks"])
