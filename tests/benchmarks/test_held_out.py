"""benchmarks/held_out.py: runs, a network file and experts by time on the same noised images."""

import json
import sys

import pytest

from ditune.commands.train import train
from helpers import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import held_out


def test_rows_are_of_the_same_images_and_experts_of_their_own_parts(small, base, tmp_path, capsys):
    given = ["peft=difffit", f"pretrained={base}", "max_steps=2", "optimizer.lr=0.1", "metrics.n=0"]
    for name, part in (("low", "[0,0.5]"), ("high", "[0.5,1]")):
        assert train(small(*given, f"objective.interval={part}", folder=tmp_path / name)) == 0
    low, high = tmp_path / "low", tmp_path / "high"
    capsys.readouterr()
    given = [f"low={low},{low}", f"high={high}", f"both={low}+{high}", f"base={base}"]
    rows = held_out.main([*given, "--split", "train", "--n", "8", "--out", str(tmp_path / "rows.json")])
    found = {row["name"]: row for row in rows}
    assert list(found) == ["low", "high", "both", "base"]
    assert found["both"]["quarters"] == found["low"]["quarters"][:2] + found["high"]["quarters"][2:]
    assert len({row["mean"] for row in rows}) == 4
    assert (found["low"]["difference"], found["low"]["error"]) == (0, 0)
    assert found["low"]["loss"][0] == found["low"]["loss"][1] == pytest.approx(found["low"]["mean"])
    for row in rows:
        assert row["difference"] == pytest.approx(row["mean"] - found["low"]["mean"], abs=1e-6)
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[2:]] == [f"| {n}" for n in found]
    written = json.loads((tmp_path / "rows.json").read_text())
    assert (written["images"], written["rows"]) == (8, rows)
