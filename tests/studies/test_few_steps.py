"""Runs judged at several numbers of steps: what is measured, what is left out, what is not measured twice."""

import hydra
import pytest

from ditune import cli
from ditune.commands.train import train
from ditune.errors import UserError
from ditune.files.atomic import read_json, write_json
from helpers import SMALL_FLOW, compose
from studies.few_steps import CONFIGS, study


def test_table_curve_and_strips(tmp_path, pictures, caplog):
    caplog.set_level("INFO")
    general = [*SMALL_FLOW[:-1], f"data.root={pictures}", "peft=full", "max_steps=1"]
    for name in ("flow_matching", "shortcut"):
        assert train(compose(tmp_path / name, *general, f"objective={name}")) == 0
    cli.prepare()
    with hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
        cfg = hydra.compose(
            "few_steps",
            [
                f"runs=[{tmp_path}/flow_matching,{tmp_path}/shortcut]",
                "data=folder",
                f"data.root={pictures}",
                "data.resolution=16",
                "steps=[1,3]",
                "metrics.n=5",
                "shown=2",
                f"paths.cache_dir={tmp_path}/cache",
                f"out={tmp_path}/out",
            ],
        )
    out = study(cfg)
    content = read_json(out / "result.json")
    assert {name: list(entry["values"]) for name, entry in content["runs"].items()} == {
        "FlowMatching_0": ["1", "3"],
        "Shortcut_0": ["1"],
    }
    assert "not trained for 3 steps" in caplog.text
    rows = (out / "table.md").read_text().splitlines()
    assert len(rows) == 4
    assert rows[3].startswith("| Shortcut | 1 | 1 |")
    assert rows[3].endswith("| not run |")
    assert {path.name for path in out.glob("*.png")} == {"curve.png", "FlowMatching_0.png", "Shortcut_0.png"}
    content["runs"]["Shortcut_0"]["values"]["1"]["kid_efflite0"] = 0.123
    write_json(out / "result.json", content)
    assert "| 0.123 |" in (study(cfg) / "table.md").read_text()
    content["runs"]["Shortcut_0"]["facts"]["max_steps"] = 7
    write_json(out / "result.json", content)
    with pytest.raises(UserError, match="another run called Shortcut_0"):
        study(cfg)
