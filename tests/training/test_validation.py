"""What is measured while a training runs changes no bit of it, and chooses the weights that are saved."""

import csv
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ditune.checkpoints import read_header
from ditune.commands.train import train
from ditune.config.roles import job_hash
from ditune.errors import UserError
from ditune.files.atomic import read_json
from ditune.training import GenerativeModule
from ditune.training.callbacks import validation
from ditune.training.checkpoint_io import BEST
from helpers import SMALL, assert_same_bits, checkpoint, compose
from trials import finished, pair

STEPS = 5
STOPPED = 128 + signal.SIGTERM
LOSS = ["callbacks.held_out.every_n_steps=2"]
KID = ["callbacks.metrics.every_n_steps=3", "callbacks.metrics.n=5", "+metrics.judge.batch_size=5"]


def column(folder: Path, name: str) -> dict[int, float]:
    """Step -> value in metrics.csv."""
    with (folder / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")  # the features of the reference are computed once


@pytest.fixture
def run(small, tmp_path, cache):
    """`run(name, *overrides)` trains all parameters in the folder `name`; folder and exit code."""

    def start(name: str, *overrides: str) -> tuple[Path, int]:
        common = [f"paths.cache_dir={cache}", f"max_steps={STEPS}", f"callbacks.checkpoint.every_n_steps={STEPS}"]
        folder = tmp_path / name
        return folder, train(small("peft=full", "optimizer.lr=1e-3", *common, *overrides, folder=folder))

    return start


@pytest.fixture
def series(monkeypatch):
    """`series([...])`: the loss on held-out images is one of these at each measurement, in their order."""

    def of(values: list[float]) -> list[float]:
        left = iter(values)
        monkeypatch.setattr(validation.MeasuredLoss, "__call__", lambda *_: {"loss": next(left)})
        return values

    return of


def stop_during(monkeypatch, call: int) -> None:
    """SIGTERM in the `call`-th forward of the training, counted from 1."""
    original, calls = GenerativeModule.training_step, iter(range(1, 1000))

    def training_step(self, batch, batch_idx):
        if next(calls) == call:
            subprocess.run(["kill", "-TERM", str(os.getpid())], check=True)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(GenerativeModule, "training_step", training_step)


# What is measured, and where it goes


def test_curves_of_the_loss_and_of_the_metrics(run):
    folder, code = run("run", *LOSS, *KID, "logger=tensorboard")
    assert code == 0
    loss, kid = column(folder, "val/loss"), column(folder, "val/kid_efflite0")
    assert list(loss) == [0, 2, 4, STEPS]
    assert list(kid) == [0, 3, STEPS]
    assert set(column(folder, "val/precision_efflite0")) == set(kid)
    result = read_json(folder / "result.json")
    assert loss[STEPS] == result["denoising"]["after"]  # of the same images: the split has two
    assert result["evaluated"] == {"checkpoint": "last", "step": STEPS}
    (file,) = folder.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    for name, values in (("val/loss", loss), ("val/kid_efflite0", kid)):
        shown = {event.step: event.value for event in events.Scalars(name)}
        assert shown == pytest.approx(values, rel=1e-6)
    assert not (folder / "checkpoints" / BEST).exists()


def test_nothing_is_measured_unless_it_is_asked_for(run):
    folder, _ = run("run")
    assert "val/" not in (folder / "metrics.csv").read_text()


def test_held_out_images_are_of_all_classes():
    assert validation.evenly_spread(10, 4) == [0, 2, 5, 7]
    assert validation.evenly_spread(3, 256) == [0, 1, 2]


@pytest.mark.parametrize(
    "case", [["trainer.accumulate_grad_batches=2", "data.num_workers=1"], ["network=tiny_moe", "balance=loss_free"]]
)
def test_measuring_changes_no_bit(run, case):
    torch.manual_seed(0)
    off, _ = run("off", *case)
    after_off = torch.get_rng_state()
    torch.manual_seed(0)
    on, _ = run("on", *case, *LOSS, *KID)
    assert torch.equal(torch.get_rng_state(), after_off)
    a, b = checkpoint(on), checkpoint(off)
    for part in ("state_dict", "ema", "optimizer_states", "lr_schedulers", "balance", "identity", "loops"):
        assert_same_bits(a[part], b[part], part)
    assert column(on, "train/loss") == column(off, "train/loss")
    assert (on / "network.safetensors").read_bytes() == (off / "network.safetensors").read_bytes()


def test_stopped_by_a_signal_and_resumed(run, monkeypatch):
    call = 3  # the step after which the chosen metric is measured
    asked = [*LOSS, *KID, "callbacks.checkpoint.best=val/kid_efflite0"]
    whole, _ = run("whole", *asked)
    with monkeypatch.context() as patch:
        stop_during(patch, call)
        stopped, code = run("stopped", *asked)
    assert code == STOPPED
    assert checkpoint(stopped)["global_step"] == call
    assert run("stopped", *asked, "resume=auto") == (stopped, 0)
    for part in ("state_dict", "ema", "optimizer_states"):
        assert_same_bits(checkpoint(stopped)[part], checkpoint(whole)[part], part)
    assert (stopped / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    assert (stopped / "network.safetensors").read_bytes() == (whole / "network.safetensors").read_bytes()
    best = [torch.load(folder / "checkpoints" / BEST, weights_only=True) for folder in (stopped, whole)]
    assert_same_bits(*best)
    assert read_json(stopped / "result.json")["evaluated"] == read_json(whole / "result.json")["evaluated"]


# The best weights


def test_the_best_weights_are_saved_and_evaluated(run):
    """At this rate the loss falls, then rises: the weights of the best step are those of a training of so many."""
    asked = [*LOSS, "optimizer.lr=0.05", "max_steps=8", "callbacks.checkpoint.every_n_steps=8"]
    folder, code = run("run", *asked, "callbacks.checkpoint.best=loss")
    assert code == 0
    losses = column(folder, "val/loss")
    trained = {step: value for step, value in losses.items() if step}
    best = min(trained, key=trained.get)
    assert best != 8
    result = read_json(folder / "result.json")
    assert result["steps"] == 8
    assert result["evaluated"] == {"checkpoint": "best", "step": best, "metric": "val/loss", "value": losses[best]}
    assert result["denoising"]["after"] == losses[best]
    shorter, _ = run("shorter", "optimizer.lr=0.05", f"max_steps={best}")
    assert_same_bits(*(load_file(f / "network.safetensors") for f in (folder, shorter)))
    assert read_header(folder / "network.safetensors")["provenance"]["steps"] == best
    last, _ = run("last", *asked)
    assert_same_bits(checkpoint(folder)["state_dict"], checkpoint(last)["state_dict"])  # the last ones are kept beside


def test_a_metric_of_which_more_is_better(run, monkeypatch):
    values = iter([0.9, 0.5, 0.75, 0.25])
    monkeypatch.setattr(validation.SmallEvaluation, "__call__", lambda *_: {"recall_x": next(values)})
    small = ["callbacks.metrics.every_n_steps=2", "callbacks.metrics.n=5", "callbacks.checkpoint.best=recall_x"]
    folder, _ = run("run", *small)
    evaluated = read_json(folder / "result.json")["evaluated"]
    assert (evaluated["step"], evaluated["value"]) == (4, 0.75)  # before the first step it is no training's


def test_what_is_no_number_is_never_the_best(run, series):
    series([1.0, float("nan"), 2.0, 3.0])
    folder, _ = run("run", *LOSS, "callbacks.checkpoint.best=loss")
    assert read_json(folder / "result.json")["evaluated"]["step"] == 4
    series([1.0, *[float("nan")] * 3])
    folder, _ = run("none", *LOSS, "callbacks.checkpoint.best=loss")
    assert read_json(folder / "result.json")["evaluated"] == {"checkpoint": "last", "step": STEPS}


def test_the_best_of_an_adapter(run, base, series):
    series([9.0, 1.0, 2.0, 3.0])
    method = [
        "peft=adalora",
        "peft.tinit=1",
        "peft.tfinal=1",
        "peft.deltaT=1",
        f"pretrained={base}",
        "peft.total_step=5",
    ]
    folder, code = run("run", *LOSS, *method, "callbacks.checkpoint.best=loss")
    assert code == 0
    assert read_json(folder / "result.json")["evaluated"]["step"] == 2
    saved = torch.load(folder / "checkpoints" / BEST, weights_only=True)
    assert (saved["step"], saved["value"], saved["metric"]) == (2, 1.0, "loss")
    assert set(saved["state_dict"]) == set(checkpoint(folder)["ema"])  # nothing of the base


def test_a_run_that_ends_and_goes_on_keeps_its_best(run, series):
    asked = [*LOSS, "callbacks.checkpoint.best=loss"]
    series([9.0, 1.0, 2.0, 3.0])
    folder, _ = run("run", *asked)
    series([5.0, 4.0, 3.5])
    run("run", *asked, "max_steps=10", "resume=auto")
    assert read_json(folder / "result.json")["evaluated"] == {
        **{"checkpoint": "best", "step": 2, "metric": "val/loss", "value": 1.0}
    }
    (folder / "checkpoints" / BEST).write_bytes(b"damaged")
    series([0.5])
    run("run", *asked, "max_steps=11", "resume=auto")
    assert read_json(folder / "result.json")["evaluated"]["step"] == 11


def test_a_new_training_knows_no_best_of_another(run, series, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    old = {"metric": "loss", "value": -1.0, "step": 2, "state_dict": {}, "method": {}, "balance": {}}
    torch.save(old, tmp_path / "run" / "checkpoints" / BEST)
    series([9.0, 3.0, 2.0, 4.0])
    folder, _ = run("run", *LOSS, "callbacks.checkpoint.best=loss")
    assert read_json(folder / "result.json")["evaluated"]["step"] == 4


# Early stopping


def test_patience_ends_the_training(run, series, monkeypatch):
    asked = [*LOSS, "callbacks.checkpoint.best=loss", "callbacks.early_stopping.patience=2", "max_steps=20"]
    asked += ["callbacks.checkpoint.every_n_steps=2"]
    series([9.0, 3.0, 2.0, 2.5, 2.25])
    with monkeypatch.context() as patch:  # the evaluation is stopped, and resumed: the training is at its end already
        patch.setattr("ditune.commands.train.denoising", lambda *_: subprocess.run(["kill", str(os.getpid())]))
        folder, code = run("run", *asked)
    assert code == STOPPED
    assert checkpoint(folder)["global_step"] == 8
    assert run("run", *asked, "resume=auto")[1] == 0
    result = read_json(folder / "result.json")
    assert (result["status"], result["steps"], result["max_steps"]) == ("finished", 8, 20)
    assert result["evaluated"] == {
        **{"checkpoint": "best", "step": 4, "metric": "val/loss", "value": 2.0},
        "ended_early_at": 8,
    }
    assert (folder / "samples" / "step_0000008.png").exists()  # of the last step
    assert list(column(folder, "val/loss")) == [0, 2, 4, 6, 8]


# Two processes


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path, pictures, cache):
    asked = [*LOSS, *KID, "callbacks.checkpoint.best=loss", "callbacks.early_stopping.patience=9"]
    common = [*SMALL, f"data.root={pictures}", "peft=full", f"max_steps={STEPS}", "optimizer.lr=0.05", *asked]
    common += [f"paths.cache_dir={cache}", "callbacks.checkpoint.every_n_steps=2"]
    alone, both = tmp_path / "alone", tmp_path / "both"
    assert train(compose(alone, *common)) == 0
    trials = pair(both, common)
    assert finished(trials, 120) == [0, 0], trials[0].output[-3000:]
    for name in ("val/loss", "val/kid_efflite0", "val/recall_efflite0"):
        one, two = column(alone, name), column(both, name)
        assert one[0] == two[0]  # the same weights: the same images to the bit, whichever process generates them
        assert two == pytest.approx(one, rel=0.02)
    evaluated = [read_json(folder / "result.json")["evaluated"] for folder in (alone, both)]
    assert evaluated[0]["step"] == evaluated[1]["step"]
    assert evaluated[1]["value"] == read_json(both / "result.json")["denoising"]["after"]


# Disk, identity and refusals


def test_checkpoints_of_a_finished_run_are_removed_where_that_is_asked_for(run, caplog, monkeypatch):
    caplog.set_level("INFO")
    asked = [*LOSS, "callbacks.checkpoint.best=loss", "callbacks.checkpoint.keep_finished=false"]
    with monkeypatch.context() as patch:
        stop_during(patch, 3)
        folder, _ = run("run", *asked)
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert left == [str(BEST), "step_00000003.ckpt"]  # a stopped one goes on from them
    assert run("run", *asked, "resume=auto")[1] == 0
    assert not list((folder / "checkpoints").iterdir())
    assert "3 files of its checkpoints are removed, " in caplog.text
    assert " MB (callbacks.checkpoint.keep_finished)" in caplog.text
    assert (folder / "network.safetensors").is_file()
    assert read_json(folder / "result.json")["status"] == "finished"
    with pytest.raises(UserError, match="holds a finished run"):
        run("run", *asked, "resume=auto")


def test_a_job_is_the_same_whatever_is_measured_beside_it(tmp_path):
    def key(*overrides: str) -> str:
        return job_hash(compose(tmp_path, "~experiment", "peft=full", "paths.root_dir=/ditune", *overrides))

    known = "91e97588563fe214"  # of a version without these keys
    assert key() == key(*LOSS, *KID[:2], "callbacks.checkpoint.keep_finished=false") == known
    chosen = key(*LOSS, "callbacks.checkpoint.best=loss")
    patient = key(*LOSS, "callbacks.checkpoint.best=loss", "callbacks.early_stopping.patience=3")
    assert len({known, chosen, patient, key(*KID[:2], "callbacks.checkpoint.best=kid_efflite0")}) == 4


REFUSED = {
    "callbacks.checkpoint.best=loss": r"needs measurements\. Set callbacks\.held_out\.every_n_steps",
    "callbacks.checkpoint.best=kid_efflite0": r"needs measurements\. Set callbacks\.metrics\.every_n_steps",
    "callbacks.checkpoint.best=nearest_mean": "by which weights cannot be compared",
    "callbacks.early_stopping.patience=3": r"Set callbacks\.checkpoint\.best=loss",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_cannot_be_chosen_shows_before_the_data(small, override):
    with pytest.raises(UserError, match=REFUSED[override]):
        train(small("peft=full", override, "data.root=missing"))


def test_what_cannot_be_measured_is_refused_with_the_remedy(run):
    with pytest.raises(UserError, match=r"kid_dinov2, but no such metric is measured\. Set one of kid_efflite0"):
        run("a", *KID, "callbacks.checkpoint.best=kid_dinov2")
    with pytest.raises(UserError, match=r"has no split train\.nothing"):
        run("b", *LOSS, "metrics.loss_split=train.nothing")
    with pytest.raises(UserError, match="need at least 4 images"):
        run("c", *KID, "callbacks.metrics.n=3")
