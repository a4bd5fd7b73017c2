"""The files around the code agree with each other: lock, Dockerfile, workflow, templates, changelog, site."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from helpers import ROOT

SOURCES = ("requirements.txt", "requirements-extras.txt")


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def requirements(name: str) -> list[Requirement]:
    lines = (line.split("#")[0].strip() for line in text(name).splitlines())
    return [Requirement(line) for line in lines if line]


def plain(name: str) -> str:
    """The name of a package as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def disagreements(lock: list[Requirement], sources: list[Requirement]) -> list[str]:
    """What in the lock is not what the requirements ask for."""
    here = default_environment()
    pins = {plain(r.name): next(iter(r.specifier)).version for r in lock if r.marker is None or r.marker.evaluate(here)}
    return [
        f"{r}: the lock has {pins.get(plain(r.name), 'none')}; run make lock"
        for r in sources
        if plain(r.name) not in pins or not r.specifier.contains(pins[plain(r.name)], prereleases=True)
    ]


def test_the_lock_has_what_the_requirements_ask_for():
    lock = requirements("requirements.lock")
    assert all(str(r.specifier).startswith("==") for r in lock)
    assert len(lock) > 100
    assert not disagreements(lock, [r for name in SOURCES for r in requirements(name)])


def test_a_lock_that_disagrees_is_noticed():
    lock = requirements("requirements.lock")
    (wrong,) = disagreements(lock, [Requirement("torch<2")])
    assert wrong.startswith("torch<2: the lock has 2.")
    assert disagreements(lock, [Requirement("no-such-package>=1")])


def test_uv_locks_the_same_versions():
    packages = tomllib.loads(text("uv.lock"))["package"]
    versions = {(package["name"], package.get("version")) for package in packages}
    pins = {(plain(r.name), next(iter(r.specifier)).version) for r in requirements("requirements.lock")}
    assert not sorted(pins - versions), "uv.lock has others than requirements.lock; run make lock"
    names = {name for name, _ in pins}
    assert not sorted(name for name, version in versions - pins if name in names), "run make lock"
    assert {package["source"].get("registry", "https://pypi.org/simple") for package in packages} == {
        "https://pypi.org/simple"
    }


def test_uv_locks_what_the_requirements_ask_for():
    (own,) = (package for package in tomllib.loads(text("uv.lock"))["package"] if package["name"] == "ditune")
    asked = {(d["name"], SpecifierSet(d.get("specifier", ""))) for d in own["metadata"]["requires-dist"]}
    wanted = {(plain(r.name), r.specifier) for name in SOURCES for r in requirements(name)}
    assert wanted <= asked, "run make lock"
    extras = tomllib.loads(text("pyproject.toml"))["project"]["optional-dependencies"].values()
    optional = {(plain(r.name), r.specifier) for group in extras for r in map(Requirement, group)}
    assert asked == wanted | optional, "run make lock"


def test_extras_are_the_same_in_both_files():
    extras = requirements("requirements-extras.txt")
    assert {plain(r.name) for r in extras} == {"gradio", "mlflow-skinny", "trackio"}
    for requirement in text("requirements-extras.txt").splitlines()[1:]:
        assert f'"{requirement.split("#")[0].strip()}"' in text("pyproject.toml")


def test_the_dockerfile_calls_the_commands_of_the_readme():
    dockerfile, readme = text("Dockerfile"), text("README.md")
    assert dockerfile.startswith("# not built here")
    (command,) = re.findall(r'^CMD \["make", "(\w+)"\]', dockerfile, flags=re.MULTILINE)
    assert f"make {command} " in readme
    assert "ARG BASE=" in dockerfile  # CPU or CUDA
    for name in re.search(r"^COPY (.+) \./$", dockerfile, flags=re.MULTILINE)[1].split():
        assert (ROOT / name).is_file(), name
    assert "-r requirements.lock" in dockerfile
    # what `make` would install again is marked as there
    marks = dict(re.findall(r"^(READY|EXTRAS) = \$\(VENV\)/(\S+)$", text("Makefile"), flags=re.MULTILINE))
    assert all(f".venv/{mark}" in dockerfile for mark in marks.values())


def test_the_workflow_runs_what_ci_runs():
    workflow = yaml.safe_load(text(".github/workflows/ci.yml"))
    steps = [step.get("run") for step in workflow["jobs"]["test"]["steps"]]
    assert ".ci/run" in steps
    for command in re.findall(r"run: make (\w+)", text(".github/workflows/ci.yml")):
        assert f"\n{command}: " in text("Makefile")
    assert workflow["permissions"] == {"contents": "read"}
    versions = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert all((3, 11) <= tuple(map(int, version.split("."))) < (3, 14) for version in versions)


def test_pre_commit_uses_the_ruff_of_the_requirements():
    (ruff,) = [line.split("#")[0].strip() for line in text("requirements.txt").splitlines() if line.startswith("ruff")]
    hooks = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"][0]["hooks"]
    assert [hook["additional_dependencies"] for hook in hooks] == [[ruff], [ruff]]


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda p: p.stem)
def test_issue_templates_are_forms(path: Path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.stem != "config":
        assert form.keys() >= {"name", "description", "body"}
        assert len({part["id"] for part in form["body"]}) == len(form["body"])


def test_the_citation_and_the_changelog_have_the_packages_version():
    version = re.search(r'^version = "([^"]+)"', text("pyproject.toml"), flags=re.MULTILINE)[1]
    citation = yaml.safe_load(text("CITATION.cff"))
    assert citation["version"] == version
    assert citation["license"] == "Apache-2.0"
    assert f"## {version}" in text("CHANGELOG.md")


def test_every_page_of_the_site_exists_and_every_guide_is_in_it():
    site = text("mkdocs.yml")
    named = re.findall(r": (\S+\.md)$", site, flags=re.MULTILINE)
    assert all((ROOT / "docs" / page).is_file() for page in named)
    guides = {f"guide/{path.name}" for path in (ROOT / "docs" / "guide").glob("*.md")}
    assert guides <= set(named)


def test_agents_md_names_what_is_there():
    for name in re.findall(r"`((?:src|tests|docs|configs|studies|benchmarks)/[\w/.]*)`", text("AGENTS.md")):
        assert (ROOT / name).exists(), name
    for command in re.findall(r"^make (\w+)", text("AGENTS.md"), flags=re.MULTILINE):
        assert f"\n{command}: " in text("Makefile")
