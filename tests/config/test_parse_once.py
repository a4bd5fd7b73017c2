"""What is remembered of a config file is what stands in it."""

import hydra
import pytest
from hydra.errors import MissingConfigException

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
