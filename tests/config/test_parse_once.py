"""What is remembered of a config file is what stands in it."""

import hydra
import pytest
from hydra.errors import ConfigCompositionException, MissingConfigException

from ditune.config.parse_once import parse_once


def test_a_changed_file_is_parsed_again_and_no_config_shares_values(tmp_path):
    def composed():
        with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
            return hydra.compose("main")

    parse_once()
    (tmp_path / "main.yaml").write_text("list: [1]\n")
    first = composed()
    first.list.append(2)
    assert composed().list == [1]
    (tmp_path / "main.yaml").write_text("list: [3, 4]\n")
    assert composed().list == [3, 4]
    (tmp_path / "main.yaml").unlink()
    with pytest.raises(MissingConfigException):
        composed()


def test_a_choice_may_still_refer_to_another(tmp_path):
    for group, option in (("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")):
        (tmp_path / group).mkdir(exist_ok=True)
        (tmp_path / group / f"{option}.yaml").write_text(f"is: {group}{option}\n")
    (tmp_path / "main.yaml").write_text("defaults: [{a: x}, {b: '${a}'}, _self_]\n")
    parse_once()
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert hydra.compose("main") == {"a": {"is": "ax"}, "b": {"is": "bx"}}
        assert hydra.compose("main", ["a=y"]) == {"a": {"is": "ay"}, "b": {"is": "by"}}
        (tmp_path / "wrong.yaml").write_text("defaults: [{a: x}, {b: '${c}'}, _self_]\n")
        with pytest.raises(ConfigCompositionException, match="possible interpolation keys: a"):
            hydra.compose("wrong")
