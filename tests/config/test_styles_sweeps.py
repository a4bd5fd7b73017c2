"""The sweeps over drawing styles: their jobs, dry runs of them, and kept results that are jobs of today's configs."""

import math
from collections.abc import Iterator

import pytest
import torch
import yaml

from ditune.commands.train import train
from ditune.commands.upcycle import upcycle_file
from ditune.config.roles import job_identity
from ditune.files.atomic import read_json
from helpers import ROOT, compose, task

KEPT = ROOT / "docs" / "results" / "styles"
STYLES = {path.stem for path in (ROOT / "configs" / "data").glob("emoji_*.yaml")}
STYLES -= {"emoji_base", "emoji_all", "emoji_styles"}
SEVEN = {"full", "difffit", "bitfit", "lora", "adaptformer", "vpt_deep", "adapter"}
COUNTS = {"styles_table": 56, "styles_search": 28, "styles_few": 72, "styles_classes": 9, "styles_networks": 12}
COUNTS |= {"guides": 9, "guides_dogfit": 9}


def params_of(name: str) -> dict[str, list[str]]:
    text = (ROOT / "configs" / "sweep" / f"{name}.yaml").read_text(encoding="utf-8")
    params = yaml.safe_load(text)["hydra"]["sweeper"]["params"]
    return {key: [part.strip() for part in str(value).split(",")] for key, value in params.items()}


@pytest.mark.parametrize("name", COUNTS)
def test_how_many_jobs_a_sweep_has(name):
    assert math.prod(map(len, params_of(name).values())) == COUNTS[name]


def test_every_method_of_the_table_sees_the_same_batches_noise_and_budget(tmp_path):
    params = params_of("styles_table")
    assert set(params["data"]) == STYLES
    assert set(params["peft"]) == set(params_of("styles_search")["peft"]) == SEVEN
    seen = []
    for method in params["peft"]:
        cfg = compose(tmp_path, "sweep=styles_table", "experiment=styles", "data=emoji_fxemoji", f"peft={method}")
        assert cfg.optimizer.lr == cfg.rates.keep[method]
        assert (cfg.max_steps, cfg.batch_size, cfg.metrics.n, cfg.trainer.precision) == (200, 64, 256, "32-true")
        assert not cfg.peft.train_labels  # the base's own classes, at rest
        seen.append({key: cfg[key] for key in ("seed", "batch_size", "max_steps", "metrics", "sampler", "ema", "data")})
    assert all(other == seen[0] for other in seen)


def dry_run(tmp_path, capsys, *overrides: str) -> str:
    assert train(compose(tmp_path / "run", *overrides, "dry_run=true")) == 0
    return capsys.readouterr().out


def test_dry_runs_of_the_smaller_tables(tmp_path, capsys):
    shown = dry_run(
        tmp_path, capsys, "sweep=styles_few", "experiment=styles", "data=emoji_openmoji", "data.fraction=0.03"
    )
    assert "emoji_openmoji, 56 images, 98 classes" in shown
    shown = dry_run(tmp_path, capsys, "sweep=styles_classes", "experiment=styles", "data=emoji_fxemoji", "peft=lora")
    assert "label embeddings             19,008" in shown


def test_dry_runs_of_other_networks_from_the_base(tmp_path, capsys):
    file = tmp_path / "styles_moe.safetensors"
    given = ("checkpoint=assets/emoji/base.safetensors", "autoencoder=kl_emoji", f"out={file}", "num_experts=4")
    upcycle_file(task("upcycle", given[0].replace("assets", f"{ROOT}/assets"), *given[1:]))
    sweep = ("sweep=styles_networks", "data=emoji_openmoji")
    for method in params_of("styles_networks")["peft"]:
        shown = dry_run(tmp_path, capsys, *sweep, "experiment=styles_moe", f"pretrained={file}", f"peft={method}")
        assert "styles_moe.safetensors" in shown
        assert f"{method} trains" in shown
    shown = dry_run(tmp_path, capsys, *sweep, "experiment=styles_shortcut", "peft=difffit")
    assert "difffit trains" in shown


def kept() -> Iterator[tuple[str, dict]]:
    for path in sorted(KEPT.glob("*/*/result.json")):
        yield f"{path.parent.parent.name}/{path.parent.name}", read_json(path)


def test_kept_results_are_finished_jobs_of_the_table(tmp_path):
    """So that a sweep into whose folder they are restored runs none of them again."""
    for name, result in kept():
        keys = {"data": result["data"]["name"], "peft": result["peft"]["name"], "seed": result["seed"]}
        cfg = compose(tmp_path, "sweep=styles_table", "experiment=styles", *(f"{k}={v}" for k, v in keys.items()))
        assert result["status"] == "finished", name
        assert job_identity(cfg) == result["job_identity"], name
        assert (name.split("/")[0] == "openmoji") == (keys["data"] == "emoji_openmoji"), name


def test_images_of_the_kept_runs_are_as_many_as_their_losses():
    for path in KEPT.glob("*/*/measured.json"):
        values, result = read_json(path), read_json(path.with_name("result.json"))
        assert len(values["losses"]) == len(values["names"])
        mean = torch.tensor(values["losses"], dtype=torch.float64).mean().item()
        assert mean == pytest.approx(result["denoising"]["after"], rel=1e-5)
