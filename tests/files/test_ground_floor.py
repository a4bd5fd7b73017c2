"""The ground floor imports nothing of the package but errors and progress; light parts of the package stay light."""

import ast
import subprocess
import sys

import pytest

from helpers import ROOT

PACKAGE = ROOT / "src" / "ditune"


def loaded(module: str) -> set[str]:
    """Names of all modules after `import module` in a new process."""
    code = f"import {module}, sys; print('\\n'.join(sys.modules))"
    start = [sys.executable, "-c", code]
    return set(subprocess.run(start, cwd=ROOT / "src", capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("file", sorted((PACKAGE / "files").glob("*.py")), ids=lambda path: path.stem)
def test_files_know_only_errors_and_progress(file):
    nodes = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    ours = {node.module for node in nodes if (node.module or "").startswith("ditune") or node.level}
    ours = {name for name in ours if not name.startswith("ditune.files")}
    assert ours <= {"ditune.errors", "ditune.progress", "ditune.memory"}


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("ditune.data", ("ditune.peft", "ditune.networks", "ditune.checkpoints")),
        ("ditune.data.prepare", ("ditune.peft", "ditune.networks", "ditune.checkpoints")),
        ("ditune.launch.jobs", ("torch",)),
        ("ditune.launch.run_folder", ("torch", "ditune.cli")),
        ("ditune.files.download", ("torch",)),
    ],
)
def test_a_part_loads_no_more_than_it_needs(module, unwanted):
    assert not loaded(module) & set(unwanted)


def test_launching_knows_no_command():
    """Commands and trainings import `launch`, so it imports none of them."""
    for file in (PACKAGE / "launch").glob("*.py"):
        assert "ditune.cli" not in file.read_text(encoding="utf-8"), file.name
