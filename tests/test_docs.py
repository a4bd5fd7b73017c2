"""Every relative link of the documentation leads to a file and a heading; every page that the code names exists."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import ROOT, compose_command

PAGES = [ROOT / "README.md", ROOT / "assets" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = ("configs", "src", "benchmarks", "tests", "studies")
BLOCK = re.compile(r"^```.*?^```", flags=re.DOTALL | re.MULTILINE)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    """A page without its code blocks."""
    return BLOCK.sub("", path.read_text(encoding="utf-8"))


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them: lower case, no punctuation, blanks become hyphens."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(path), flags=re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        number = sum(1 for other in found if re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", other))
        found.add(f"{anchor}-{number}" if number else anchor)
    return found


def links(path: Path) -> Iterator[tuple[str, str]]:
    """(file, anchor) of every relative link."""
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if "://" not in link and not link.startswith("mailto:"):
            file, _, anchor = link.partition("#")
            yield file, anchor


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for file, anchor in links(page):
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{file} is not there"
        if anchor:
            assert anchor in anchors(target), f"{file} has no heading #{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_name_entry_points(page: Path) -> None:
    """`python <folder>/<name>.py` of a page is a file of the repository."""
    scripts = re.findall(
        r"(?:python|torchrun[^\n`]*?) ((?:src|studies|benchmarks)/\w+\.py)", page.read_text(encoding="utf-8")
    )
    missing = sorted({script for script in scripts if not (ROOT / script).is_file()})
    assert not missing


def commands() -> Iterator[str]:
    """Commands of the guide that start an entry point, without comments; continued lines are joined."""
    for page in sorted((ROOT / "docs" / "guide").glob("*.md")):
        for block in re.findall(
            r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
        ):
            for line in block.replace("\\\n", "").splitlines():
                command = line.split("#")[0].strip()
                if command.startswith("python src/") and " ... " not in f"{command} ":
                    yield command


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_commands_of_the_guide_compose(command: str, tmp_path: Path) -> None:
    compose_command(command, tmp_path)


@pytest.mark.parametrize("folder", SOURCES)
def test_pages_that_the_code_names_exist(folder: str) -> None:
    missing = []
    for path in sorted((ROOT / folder).rglob("*")):
        if path.suffix in (".py", ".yaml") and path != Path(__file__):
            named = re.findall(r"\bdocs/[\w/.-]*?\.md\b", path.read_text(encoding="utf-8"))
            missing += [f"{name_of(path)}: {page}" for page in named if not (ROOT / page).is_file()]
    assert not missing


def test_every_page_is_linked() -> None:
    """A page that no other page links to is not found by anybody."""
    reached = {(page.parent / file).resolve() for page in PAGES for file, _ in links(page) if file}
    lost = [name_of(page) for page in PAGES[1:] if page not in reached and page.name != "table.md"]
    assert not lost
