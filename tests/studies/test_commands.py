"""Every study is a script with a config of its own, whose keys are checked as those of the other commands."""

import importlib

import hydra
import pytest
import yaml

from ditune import cli
from ditune.config.keys import APART, check, rows_of
from ditune.errors import UserError
from helpers import ROOT

STUDIES = ROOT / "studies"
NAMES = sorted(path.stem for path in (STUDIES / "configs").glob("*.yaml"))


def composed(name: str, *overrides: str):
    importlib.import_module(f"studies.{name}")  # adds the rows of its own keys
    cli.prepare()
    with hydra.initialize_config_dir(str(STUDIES / "configs"), version_base="1.3"):
        return hydra.compose(name, list(overrides))


@pytest.mark.parametrize("name", NAMES)
def test_every_key_passes_and_has_a_row(name):
    check(composed(name), name)
    values = yaml.safe_load((STUDIES / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
    plain = [key for key, value in values.items() if not isinstance(value, dict) and key != "defaults"]
    assert all(rows_of(key, name) for key in plain)
    dotted = [*plain, *(f"{key}.x" for key in values), "others.x.scale"]
    assert all(any(row.matches(key) for key in dotted) for row in APART[name])


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("few_steps", "steps=4", "steps is 4, but must be a list of whole numbers of at least 1."),
        ("kl_autoencoder", "lr=0", "lr is 0, but must be a number above 0."),
        ("kl_autoencoder", "log_every=0", "log_every is 0, but must be a whole number of at least 1."),
        ("linear_codecs", "patch=-4", "patch is -4, but must be a whole number of at least 1."),
    ],
)
def test_wrong_values_are_refused(name, override, message):
    with pytest.raises(UserError) as caught:
        check(composed(name, override), name)
    assert str(caught.value) == message


def test_the_package_knows_no_study():
    for file in (ROOT / "src").rglob("*.py"):
        assert "import studies" not in (text := file.read_text(encoding="utf-8")), file
        assert "from studies" not in text, file
