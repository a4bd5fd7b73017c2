"""What is measured of single images, what is kept in docs, and that a sweep knows restored runs as finished."""

from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from PIL import Image

from ditune import cli
from ditune.commands.evaluate import evaluate
from ditune.commands.train import train
from ditune.config.instantiate import instantiate, training_images
from ditune.config.roles import job_identity
from ditune.errors import UserError
from ditune.files.atomic import read_json, write_json
from ditune.launch.jobs import Job, place
from ditune.report.results import find_results
from helpers import ROOT, compose, task
from studies.styles import CONFIGS, study
from wandb_files import summary_of, values, wandb_records

STYLES = [path.stem for path in (ROOT / "configs" / "data").glob("emoji_*.yaml")]
BASES = {"emoji_base", "emoji_all", "emoji_styles"}
SMALL = ("metrics.n=8", "data.pictures.limit=40")
SAMPLER = ("sampler.steps=2", "sampler.batch_size=4", "sampler.guidance=5", "sampler.guidance_interval=[0.15,1.0]")


def settings(tmp_path, *overrides: str):
    cli.prepare()
    places = [f"folder={tmp_path}/sweep", f"kept={tmp_path}/kept", f"base={tmp_path}/base"]
    with hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
        return hydra.compose("styles", [*places, f"apart={tmp_path}/apart", "n=4", *overrides])


def job(tmp_path, *overrides: str):
    return compose(
        tmp_path / "sweep" / "0",
        *("sweep=styles_table", "experiment=styles", "data=emoji_streamline", "peft=difffit", "max_steps=1"),
        *("batch_size=4", "data.latents=false", "trainer.log_every_n_steps=1", *SMALL, *SAMPLER[:2]),
        "+metrics.base_reference.limit=300",
        *(f"metrics.record={tmp_path}/record.json", f"paths.cache_dir={tmp_path}/cache", "logger=wandb", *overrides),
    )


@pytest.fixture
def ran(tmp_path, offline):
    """A finished run of one step, and the base's images by the same protocol."""
    evaluate(
        task(
            "evaluate",
            *(f"checkpoint={ROOT}/assets/emoji/base.safetensors", "data=emoji_streamline", "data.resolution=64"),
            *("autoencoder=kl_emoji_styles", "sampler=ddim_stochastic", "precision=32-true", *SMALL, *SAMPLER),
            f"paths.cache_dir={tmp_path}/cache",
            *(f"record={tmp_path}/record.json", f"out={tmp_path}/base/emoji_streamline"),
        )
    )
    cfg = job(tmp_path)
    assert train(cfg) == 0
    return cfg


def test_measured_kept_and_restored(ran, tmp_path):
    folder = tmp_path / "sweep" / "0"
    result = read_json(folder / "result.json")
    assert_wandb_shows(result, folder)
    assert result["metrics"]["before_is"] == "record"  # the command of the docs measures by the runs' own protocol
    with np.load(folder / "samples.npz", allow_pickle=False) as images:
        assert images["arr_0"].shape == (8, 64, 64, 3)

    study(settings(tmp_path, "do=measure"))
    measured = read_json(folder / "measured.json")
    assert len(measured["losses"]) == len(measured["names"]) == 40
    assert np.mean(measured["losses"]) == pytest.approx(result["denoising"]["after"])
    assert 0 < measured["drift"]["mean"] < 0.5  # one step of DiffFit moves the images a little
    assert measured["forgotten"]["classes"] > 10
    assert measured["forgotten"]["before"] != measured["forgotten"]["after"]
    with Image.open(folder / "shown.png") as shown:
        assert shown.size == (4 * 64, 64)

    study(settings(tmp_path, "do=keep"))
    kept = tmp_path / "kept" / "difffit_streamline_0"
    names = {path.name for path in kept.iterdir()}
    assert names == {"result.json", "measured.json", "shown.png", "base_shown.png", "adapter"}
    assert [run.data for run in find_results(tmp_path / "kept")] == ["emoji_streamline"]
    assert str(tmp_path) not in (kept / "result.json").read_text()
    study(settings(tmp_path, "do=keep"))  # once more changes nothing
    study(settings(tmp_path, "do=sheet"))
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 2 * 128
    assert not (tmp_path / "apart" / "sheet.png").exists()

    study(settings(tmp_path, "do=restore", f"folder={tmp_path}/other"))
    found = [Job([], "of another machine", identity=job_identity(ran))]
    place(found, tmp_path / "other")
    assert (found[0].status, found[0].folder.name) == ("skipped", "difffit_streamline_0")
    (tmp_path / "sweep" / "0").rename(tmp_path / "sweep" / "1")
    study(settings(tmp_path, "do=restore"))  # the sweep has the job, in another folder
    assert [path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir()] == ["1"]

    write_json(kept / "result.json", result | {"job_identity": "another"})
    with pytest.raises(UserError, match="holds another job"):
        study(settings(tmp_path, "do=keep"))


def assert_wandb_shows(result: dict, folder: Path) -> None:
    """The sweep's runs are one group, and the columns of the dashboard have a job's values."""
    written, (file,) = wandb_records(folder)
    run = written["run"][0].run
    assert (run.run_group, run.display_name) == ("styles_table", "styles_table-difffit-emoji_streamline-0")
    assert {"difffit", "emoji_streamline"} <= set(run.tags)
    summary = summary_of(written)
    metrics = result["metrics"]
    assert summary["eval/kid_efflite0"] == metrics["after"]["kid_efflite0"]
    assert summary["before/kid_efflite0"] == metrics["before"]["kid_efflite0"]
    assert summary["eval/gap_closed"] == metrics["gap_closed"]
    assert summary["parameters/trained"] == result["parameters"]["trainable"]
    losses = [row["train/loss"] for r in written["history"] if "train/loss" in (row := values(r.history.item))]
    assert len(losses) == 1
    assert list((file.parent / "files" / "media").rglob("eval/grid*.png"))


def test_a_folder_without_finished_runs_is_refused(tmp_path):
    (tmp_path / "sweep").mkdir()
    with pytest.raises(UserError, match="There is no finished run"):
        study(settings(tmp_path, "do=measure"))


def test_the_classes_of_the_sheet_are_trained_in_every_style(tmp_path):
    shown = list(settings(tmp_path, "do=sheet").shown)
    for name in set(STYLES) - BASES:
        cfg = compose(tmp_path, "experiment=styles", f"data={name}")
        images = training_images(cfg)
        assert {images.class_names.index(one) for one in shown} <= set(images.labels.tolist()), name
        # labels of generated images have the style's own frequencies, so a class without an image is never asked for
        reference = instantiate(cfg.metrics.reference, "metrics")
        assert torch.equal(reference.labels, images.labels)
