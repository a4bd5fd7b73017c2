"""The W&B workspace and report are built and serialised from code, without a network."""

import json
import os
import subprocess
import sys

from ditune.report.wandb_workspace import STEP, SWEPT, build_report, build_workspace, specification
from helpers import ROOT, compose


def spec(group: str | None = "sweep_7") -> dict:
    return specification(
        build_workspace("me", "ditune", group, "fid_10k"), build_report("me", "ditune", group, "fid_10k")
    )


def test_workspace_has_the_panels():
    workspace = spec()["workspace"]["spec"]["section"]
    sections = {section["name"]: section["panels"] for section in workspace["panelBankConfig"]["sections"]}
    assert [name for name in sections if sections[name]] == ["Quality", "Pictures", "Training", "Cost"]
    text = json.dumps(sections)
    for part in (
        "eval/fid_10k",
        "parameters/trained",
        "samples",
        "eval/grid",
        "train/loss",
        "val/loss",
        "^val/fid_[^_]+$",
        STEP,
    ):
        assert part in text
    assert '"sweep_7"' in json.dumps(workspace["runSets"])


def test_report_has_the_panels_under_headings():
    report = spec()["report"]
    assert report["project"] == {"name": "ditune", "entityName": "me"}
    text = json.dumps(report["spec"])
    assert text.count('"panel-grid"') == 4
    for part in ("Quality", "eval/fid_10k", "sweep_7"):
        assert part in text
    assert "sweep_7" not in json.dumps(spec(group=None)["report"]["spec"]["blocks"])


def test_what_is_plotted_is_what_runs_log(tmp_path):
    cfg = compose(tmp_path)
    for name in SWEPT:
        group, _, key = name.rpartition(".")
        assert key in (cfg[group] if group else cfg)


def test_entry_point_sends_nothing_with_spec(tmp_path):
    command = [sys.executable, "src/dashboard.py", "entity=me", "group=table", f"spec={tmp_path}/spec.json"]
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")} | {"HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "spec.json").read_text()).keys() == {"workspace", "report"}
