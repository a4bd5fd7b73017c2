"""MLflow, Trackio and several loggers at once; those whose package is missing are refused with the command for it."""

import importlib
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ditune.commands.train import train
from ditune.errors import UserError
from ditune.files.atomic import read_json

STEPS = 2
RUN = ["peft=full", f"max_steps={STEPS}", "name=small", "metrics.loss_split=test"]


def needs(module: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(module) is None, reason=f"{module}, an optional package, is not installed")


@needs("mlflow")
def test_mlflow(small, tmp_path):
    assert train(small(*RUN, "logger=mlflow", f"logger.folder={tmp_path}/mlruns")) == 0
    from mlflow import MlflowClient

    client = MlflowClient((tmp_path / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("ditune")
    (run,) = client.search_runs([experiment.experiment_id])
    result = read_json(tmp_path / "run" / "result.json")
    assert (run.info.status, run.info.run_name) == ("FINISHED", "small-full-folder-0")
    assert run.data.tags.keys() >= {"full", "folder", "tiny"}
    assert run.data.params["peft.name"] == "full"
    assert run.data.metrics["result/eval/test_loss"] == result["denoising"]["after"]
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == list(range(STEPS))
    images = [file.path for file in client.list_artifacts(run.info.run_id, "samples")]
    assert images == ["samples/step_0000000.png", "samples/step_0000002.png"]


@needs("trackio")
def test_trackio(small, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    import trackio
    from trackio import sqlite_storage, utils

    for module in (trackio, sqlite_storage, utils):
        if hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    assert train(small(*RUN, "logger=trackio", "logger.project=tests")) == 0
    rows = sqlite_storage.SQLiteStorage.get_logs("tests", "small-full-folder-0")
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(STEPS))
    (summary,) = [row for row in rows if "result/status" in row]
    assert (summary["result/status"], summary["exit_code"]) == ("finished", 0)
    assert len([row for row in rows if "samples" in row]) == 2


def test_several_at_once(small, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert train(small(*RUN, "logger=many", "logger.wandb.project=tests")) == 0
    (events,) = (tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*")
    read = EventAccumulator(str(events))
    read.Reload()
    assert [event.step for event in read.Images("samples")] == [0, STEPS]
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))) == 1
    assert (tmp_path / "run" / "metrics.csv").is_file()


@pytest.mark.parametrize("use", ["[]", "[wandb,wandb]", "[tensorbord]"])
def test_unknown_names_are_refused_before_the_data(small, tmp_path, use):
    with pytest.raises(UserError, match=r"logger\.use is .* Set it to some of wandb, tensorboard, mlflow, trackio"):
        train(small(*RUN, "logger=many", f"logger.use={use}", "data.root=missing"))


@pytest.mark.parametrize(("name", "requirement"), [("mlflow", "mlflow-skinny>=3,<4"), ("trackio", "trackio>=0.40,<1")])
def test_a_missing_package_is_named_with_its_command(small, monkeypatch, name, requirement):
    closing = importlib.import_module("ditune.training.loggers.closing")
    monkeypatch.setattr(closing, "find_spec", lambda module: None)
    with pytest.raises(
        UserError, match=f'logger={name} needs the package {name}. Install it: pip install "{requirement}"'
    ):
        train(small(*RUN, f"logger={name}", "data.root=missing"))
    assert requirement in (Path(__file__).parents[2] / "requirements-extras.txt").read_text(encoding="utf-8")
    assert json.dumps(requirement)[1:-1] in (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
