"""Loggers write what they should, offline; and the trainer's switches change nothing but speed and memory."""

import io
import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.testing import assert_close

from ditune.commands.train import train
from ditune.config.components import build_components
from ditune.config.instantiate import plain
from ditune.errors import UserError
from ditune.files.atomic import read_json
from ditune.networks import build_network
from ditune.report.wandb_workspace import build_report, build_workspace, specification
from ditune.rng import Draws
from ditune.training import GenerativeModule
from ditune.training.loggers.wandb import ID_FILE, NAME, run_id, shortened, tags_of
from ditune.training.loggers.wandb import summary_of as summary_of_result
from helpers import SMALL, compose
from wandb_files import summary_of, values, wandb_records

STEPS = 3


def assert_all_plain(summary: dict) -> None:
    """No number has become an object such as {"min": 1.5}; images and tables are objects with a type."""
    objects = {key for key, value in summary.items() if isinstance(value, dict) and "_type" not in value}
    assert objects <= {"_wandb"}


def assert_panels_have_values(summary: dict, history: list[dict], config: dict) -> None:
    """Each panel of the dashboard asks for keys that the run has."""
    panels, asked = [], {"summary": set(), "history": set(), "config": set()}
    spec = specification(
        build_workspace("me", "ditune", None, "kid_efflite0"), build_report("me", "ditune", None, "kid_efflite0")
    )["workspace"]["spec"]["section"]
    for section in spec["panelBankConfig"]["sections"]:
        panels += [panel["config"] for panel in section["panels"]]
    logged = {key for row in history for key in row}
    for panel in panels:
        axes = [panel[axis] for axis in ("xAxis", "yAxis") if ":" in panel.get(axis, "")]
        for accessor in [*axes, *(column["accessor"] for column in panel.get("columns", []))]:
            place, _, name = accessor.partition(":")
            asked[place].add(name)
        # bars show the summary, lines the history
        asked["history" if "xAxis" in panel else "summary"] |= set(panel.get("metrics", []))
        asked["history"] |= set(panel.get("mediaKeys", []))
        if "metricRegex" in panel:
            assert [key for key in logged if re.search(panel["metricRegex"], key)]
    assert {"eval/kid_efflite0", "parameters/trained", "seconds/fit", "peak_memory_mib"} <= asked["summary"]
    assert {"val/loss", "train/loss", "samples", "eval/grid"} <= asked["history"]
    for name in asked["summary"]:
        assert isinstance(summary[name], int | float), name
    media = {key.rpartition("/")[0] for key in logged}  # W&B writes an image's parts under its name
    assert asked["history"] <= logged | media
    for name in asked["config"]:
        value = config
        for key in name.replace(".value", "").split("."):
            value = value[key]


def test_summaries_of_a_whole_result():
    """A run with a base has values before and after, and of how far the gap between the domains closed."""
    after, before = {"kid_x": 0.5, "kid_x_std": 0.1, "n": 8}, {"kid_x": 1.5}
    metrics = {"protocol": {"n": 8}, "after": after, "before": before, "before_is": "record"}
    metrics |= {"base_domain": {"kid_x": 0.25}, "gap_before": 1.25, "gap_after": 0.25, "gap_closed": 0.8}
    result = {"status": "finished", "name": "a", "metrics": metrics, "denoising": {"before": 3.0, "after": 2.0}}
    result |= {"peft": {"r": 4}, "versions": {"torch": "2"}, "seconds": {"fit": 7.5}, "seconds_per_step": None}
    assert summary_of_result(result) == {
        **{"status": "finished", "seconds/fit": 7.5, "eval/test_loss": 2.0, "before/test_loss": 3.0},
        **{"eval/kid_x": 0.5, "eval/kid_x_std": 0.1, "eval/n": 8, "before/kid_x": 1.5, "base_domain/kid_x": 0.25},
        **{"eval/gap_before": 1.25, "eval/gap_after": 0.25, "eval/gap_closed": 0.8},
    }


def test_wandb_offline(small, tmp_path, offline):
    judged = ["metrics.n=6", "+metrics.judge.batch_size=4", f"paths.cache_dir={tmp_path}/cache"]
    run = ["peft=full", "logger=wandb", f"max_steps={STEPS}", "tags=[tests]", "name=small", "logger.log_adapter=true"]
    run += ["callbacks.held_out.every_n_steps=2", "callbacks.metrics.every_n_steps=2", "callbacks.metrics.n=5"]
    cfg = small(*run, *judged)
    assert train(cfg) == 0
    written, files = wandb_records(tmp_path / "run")
    assert len(files) == 1

    run = written["run"][0].run
    assert (run.project, run.run_group, run.job_type) == ("ditune", "small", "train")
    assert set(run.tags) == {"full", "folder", "tiny", "tests"}
    assert run.display_name == "small-full-folder-0"
    history = [values(r.history.item) for r in written["history"]]
    for name in ("val/loss", "val/kid_efflite0"):
        assert [row["trainer/global_step"] for row in history if name in row] == [0, 2, STEPS]
    losses = [row["train/loss"] for row in history if "train/loss" in row]
    assert len(losses) == STEPS
    assert all(0 < loss < 10 for loss in losses)
    assert [row["trainer/global_step"] for row in history if "train/loss" in row] == list(range(STEPS))
    assert [row["eval/kid_efflite0"] for row in history if "eval/kid_efflite0" in row]
    config = values(run.config.update) | {k: v for r in written["config"] for k, v in values(r.config.update).items()}
    for name in ("peft", "batch_size", "objective"):
        assert config[name] == plain(cfg)[name]

    # every value is plain in every run: a metric that W&B is to call best of would be {"min": ...}
    assert not [r.metric for r in written["metric"] if r.metric.HasField("summary")]
    summary, result = summary_of(written), read_json(tmp_path / "run" / "result.json")
    metrics, denoising = result["metrics"], result["denoising"]
    for name, value in metrics["after"].items():
        assert summary[f"eval/{name}"] == value
    expected = {
        "status": "finished",
        "eval/test_loss": denoising["after"],
        "seconds/fit": result["seconds"]["fit"],
        "seconds/evaluation": result["seconds"]["evaluation"],
        "peak_memory_mib": result["peak_memory_mib"],
        "images_per_second": result["images_per_second"],
        "parameters/trained": result["parameters"]["trainable"],
        "parameters/share": 1,  # everything trains
        "steps": STEPS,
        "evaluated/checkpoint": "last",
        "evaluated/step": STEPS,
        "val/loss": denoising["after"],
    }
    assert {name: summary[name] for name in expected} == expected
    assert_all_plain(summary)
    assert written["exit"][-1].exit.exit_code == 0
    assert_panels_have_values(summary, history, config)

    media = files[0].parent / "files" / "media"
    for name, count in (("samples", 2), ("eval", 1)):  # before and after; the evaluation's
        sheets = list(media.rglob(f"{name}*/*.png") if name == "eval" else media.rglob(f"{name}*.png"))
        assert len(sheets) == count, name
        with Image.open(io.BytesIO(sheets[0].read_bytes())) as image:
            assert image.width > 32
    (table,) = media.rglob("parameters*.table.json")
    rows = json.loads(table.read_text())["data"]
    assert (
        sum(row[1] for row in rows) == json.loads((tmp_path / "run" / "result.json").read_text())["parameters"]["total"]
    )
    assert [r.artifact.type for r in written["artifact"] if r.artifact.type == "model"] == ["model"]


def assert_no_file_holds(folder: Path, *secrets: str) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"config.yaml", "result.json", "metrics.csv"} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        content = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in content], path


def test_wandb_goes_on_in_the_same_run_and_shows_failures(small, tmp_path, offline, monkeypatch, caplog, capfd):
    keys = {"WANDB_API_KEY": "feedc0de" * 5, "HF_TOKEN": "hf_NotToBeWrittenAnywhere"}
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    address = "addresses.inception=['https://ann:s3cr3tOne@127.0.0.1/x?token=s3cr3tTwo${oc.env:HF_TOKEN}']"
    common = ["peft=full", "logger=wandb", "logger.offline=true", "resume=auto", "callbacks.checkpoint.every_n_steps=1"]
    common += [address, "verbose=true"]
    for steps in (2, 4):
        assert train(small(*common, f"max_steps={steps}")) == 0
    written, files = wandb_records(tmp_path / "run")
    assert len(files) == 2
    assert {record.run.run_id for record in written["run"]} == {(tmp_path / "run" / ID_FILE).read_text().strip()}
    history = [values(r.history.item) for r in written["history"]]
    assert [row["trainer/global_step"] for row in history if "train/loss" in row] == [0, 1, 2, 3]
    assert "https://127.0.0.1/x?..." in (tmp_path / "run" / "config.yaml").read_text()
    secrets = (*keys.values(), "s3cr3tOne", "s3cr3tTwo")
    assert_no_file_holds(tmp_path / "run", *secrets)
    printed = "".join(capfd.readouterr()) + caplog.text
    assert not [secret for secret in secrets if secret in printed]

    folder = tmp_path / "failed"
    with pytest.raises(UserError, match="not finite"):
        train(small(*common, "max_steps=5", "optimizer.lr=1e38", "trainer.gradient_clip_val=null", folder=folder))
    failed, _ = wandb_records(folder)
    assert failed["exit"][-1].exit.exit_code == 1
    summary = summary_of(failed)
    assert summary["status"] == "failed"
    assert "not finite" in summary["error"]
    assert_all_plain(summary)
    assert failed["run"][0].run.run_id != written["run"][0].run.run_id


def test_a_stopped_run_is_no_finished_one(small, tmp_path, offline, monkeypatch):
    original = GenerativeModule.training_step

    def stopped(self, batch, batch_idx):
        subprocess.run(["kill", "-TERM", str(os.getpid())], check=True)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(GenerativeModule, "training_step", stopped)
    assert train(small("peft=full", "logger=wandb", "max_steps=3")) == 128 + signal.SIGTERM
    written, _ = wandb_records(tmp_path / "run")
    assert written["exit"][-1].exit.exit_code == 128 + signal.SIGTERM
    summary = summary_of(written)
    assert (summary["status"], summary["steps"]) == ("stopped", 1)


def test_tags_are_texts_that_wandb_takes(caplog):
    long = "x" * 70
    assert tags_of(["a", "b", 1, 2.5, True, None, "", " ", "a", long, long + "y"]) == [
        "a",
        "b",
        "1",
        "2.5",
        "True",
        "x" * 64,
    ]
    assert tags_of("one") == ["one"]
    assert tags_of(7) == ["7"]
    assert tags_of(None) == []
    assert "has more than 64 characters and is cut" in caplog.text
    assert shortened("n" * 130, NAME, "name") == "n" * 128
    assert shortened(None, NAME, "name") is None


@pytest.mark.parametrize("project", ["team/proj", "a:b", "50%", "a#b", "why?", "back\\\\slash", "p" * 129, "''"])
def test_a_project_that_wandb_forbids_shows_before_the_data(small, tmp_path, project):
    quoted = project if project == "''" else f"'{project}'"
    with pytest.raises(UserError, match=r"logger\.project"):
        train(small("peft=full", "logger=wandb", f"logger.project={quoted}", "data.root=missing"))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_long_names_and_tags_of_any_type_train(small, tmp_path, offline):
    odd = ["tags=[a,b,1]", f"data.name={'d' * 70}", f"name={'n' * 130}"]
    assert train(small("peft=full", "logger=wandb", "max_steps=1", *odd)) == 0
    run = wandb_records(tmp_path / "run")[0]["run"][0].run
    assert set(run.tags) == {"full", "d" * 64, "tiny", "a", "b", "1"}
    assert run.run_group == "n" * 128
    assert run.display_name == "n" * 128


def test_the_runs_id_is_kept_in_its_folder(tmp_path):
    folder = tmp_path / "run"
    assert run_id(folder) != run_id(folder)  # a run that is deleted and begun anew is another one
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "step_00000001.ckpt").touch()
    old = folder / "wandb" / "offline-run-20260102_030405-5bb904c30b8c"
    for name in (old.name, "run-20260101_030405-other", "latest-run"):
        (folder / "wandb" / name).mkdir(parents=True)
    assert run_id(folder) == "5bb904c30b8c"  # an earlier version made it of the path
    (folder / ID_FILE).write_text("abcd1234\n")
    assert run_id(folder.rename(tmp_path / "moved")) == "abcd1234"


def test_tensorboard(small, tmp_path):
    assert train(small("peft=full", "logger=tensorboard", f"max_steps={STEPS}")) == 0
    files = list((tmp_path / "run").rglob("events.out.tfevents.*"))
    assert len(files) == 1
    events = EventAccumulator(str(files[0]))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(STEPS))
    assert [event.step for event in events.Images("samples")] == [0, STEPS]
    assert (tmp_path / "run" / "metrics.csv").exists()  # besides


def test_dry_run_shows_the_plan_and_stops(small, base, tmp_path, capsys):
    assert train(small("peft=bitfit", f"pretrained={base}", "dry_run=true")) == 0
    shown = capsys.readouterr().out
    for text in ("bitfit trains 1,260 of 50,156 parameters", "biases", "10 images, 3 classes", "(expected)", "32-true"):
        assert text in shown
    assert len(shown.splitlines()) < 24  # fits a screen
    assert "final_layer" not in shown
    assert (tmp_path / "run" / "config.yaml").exists()
    assert not list((tmp_path / "run").rglob("*.ckpt"))
    assert not (tmp_path / "run" / "result.json").exists()
    assert train(small("peft=bitfit", f"pretrained={base}", "dry_run=true", "verbose=true")) == 0
    shown = capsys.readouterr().out
    for text in ("accumulate_grad_batches: 1", "final_layer.linear.bias"):
        assert text in shown


def test_bf16_freezes_in_bf16_and_trains_in_fp32(tmp_path, pictures, base):
    for precision, frozen in (("bf16-mixed", torch.bfloat16), ("32-true", torch.float32)):
        method = ["peft=difffit", f"pretrained={base}", f"trainer.precision={precision}"]
        parts = build_components(compose(tmp_path, *SMALL, f"data.root={pictures}", *method))
        for parameter in parts.network.parameters():
            assert parameter.dtype == (torch.float32 if parameter.requires_grad else frozen)


def test_bf16_learns_what_fp32_learns(small, tmp_path, base):
    for name, precision in (("fp32", "32-true"), ("bf16", "bf16-mixed")):
        overrides = ["peft=difffit", f"pretrained={base}", f"trainer.precision={precision}", f"max_steps={STEPS}"]
        assert train(small(*overrides, folder=tmp_path / name)) == 0
    losses = []
    for name in ("fp32", "bf16"):
        header, *rows = (tmp_path / name / "metrics.csv").read_text().splitlines()
        column = header.split(",").index("train/loss")
        losses.append(torch.tensor([float(row.split(",")[column]) for row in rows if row.split(",")[column]]))
    assert len(losses[0]) == STEPS
    assert_close(losses[0], losses[1], rtol=0.02, atol=0)


def gradients(parts, prepare) -> dict[str, torch.Tensor]:
    """Of one loss of a network whose zero initial layers have been filled."""
    torch.manual_seed(0)
    network = build_network(
        "tiny", **{k: parts.network.config[k] for k in ("in_channels", "input_size", "num_classes", "learn_sigma")}
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    prepare(network)
    x0 = torch.randn(4, parts.network.in_channels, 16, 16)
    loss = parts.objective.loss(network, (x0, torch.tensor([0, 1, 2, 0])), Draws(0, 0, range(4)))
    loss.total.backward()
    return {name: p.grad for name, p in network.named_parameters()}


@pytest.fixture
def parts(tmp_path, pictures):
    return build_components(compose(tmp_path, *SMALL, f"data.root={pictures}", "peft=full"))


def test_gradient_checkpointing_changes_no_gradient(parts):
    plainly = gradients(parts, lambda network: None)
    again = gradients(parts, lambda network: setattr(network, "gradient_checkpointing", True))
    assert all(torch.equal(again[name], gradient) for name, gradient in plainly.items())


@pytest.mark.slow
def test_compiling_changes_gradients_by_rounding_only(parts):
    plainly = gradients(parts, lambda network: None)
    compiled = gradients(parts, lambda network: network.compile_blocks())
    assert compiled.keys() == plainly.keys()  # no key changes its name
    for name, gradient in plainly.items():
        assert_close(compiled[name], gradient, atol=1e-5, rtol=1e-3)
