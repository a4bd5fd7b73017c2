"""The README's commands, files and figures are real."""

import re
from pathlib import Path

import pytest

from helpers import ROOT, compose_command

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL))
COMMANDS = [line.split("#")[0].strip() for line in BLOCKS.splitlines() if line.startswith("python ")]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_composes(command: str, tmp_path: Path) -> None:
    assert compose_command(command, tmp_path)


def test_every_entry_point_is_shown() -> None:
    for script in ("train", "sample", "evaluate", "report", "dashboard", "prepare", "export"):
        assert f"python src/{script}.py" in BLOCKS


def test_make_targets_exist() -> None:
    targets = re.findall(r"^make (\w+)", BLOCKS, flags=re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets == ["train", "test"]
    assert all(f"\n{target}:" in makefile for target in targets)


def test_first_screen_is_a_screen() -> None:
    """Claim, image, commands, groups, results and links, before the first section."""
    first = README.partition("\n## ")[0]
    assert len(first.splitlines()) <= 40
    assert "docs/images/main_job.png" in first
    assert "](docs/results/" in first


def test_every_figure_is_filled_in() -> None:
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        assert not re.findall(r"\{\{[A-Z_]+\}\}", path.read_text(encoding="utf-8")), path.name
