"""The experiments on public data, from miniatures of them: every one starts, and one trains to its end."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ditune.checkpoints import diffusers_dit
from ditune.checkpoints.published import PUBLISHED, locate
from ditune.commands.train import train
from ditune.commands.upcycle import upcycle_file
from ditune.config.instantiate import instantiate
from ditune.errors import UserError
from ditune.networks import build_network
from ditune.peft import METHODS
from ditune.run import load_run
from helpers import ROOT, compose, task
from miniatures import MINIATURES
from small_vae import small_vae

EIGHT = ("food101", "sun397", "df20m_mini", "caltech101", "cub", "artbench10", "flowers102", "stanford_cars")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny network of ten other classes, in a format of others, for latents of 4 x 4."""
    folder = tmp_path_factory.mktemp("base")
    network = build_network("tiny", in_channels=4, input_size=4, num_classes=10, learn_sigma=True)
    save_file(diffusers_dit.to_theirs(network.state_dict()), folder / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": diffusers_dit.CLASS, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
    config |= {"in_channels": 4, "out_channels": 8, "sample_size": 4, "patch_size": 2, "num_embeds_ada_norm": 10}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture
def overrides(base: Path, vae: Path, tmp_path: Path) -> list[str]:
    """What makes an experiment small; data, method, objective, sampler and rates stay its own."""
    return [
        *("network=tiny", "network.learn_sigma=true", f"pretrained={base}", f"autoencoder.folder={vae}"),
        *("trainer=cpu", "trainer.precision=32-true", "trainer.log_every_n_steps=1", "batch_size=4", "max_steps=2"),
        *("data.resolution=32", "data.num_workers=0", "sampler.steps=2", "sampler.batch_size=2"),
        *("callbacks.samples.n=2", "metrics.n=0", f"data.root={tmp_path}/data", f"paths.cache_dir={tmp_path}/cache"),
    ]


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("train/loss")
    return [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]]


def test_difffit_on_cub_from_cache_and_from_pixels(overrides, tmp_path):
    MINIATURES["cub"](tmp_path / "data")
    for name, more in (("cached", []), ("pixels", ["data.latents=false"])):
        assert train(compose(tmp_path / name, "experiment=difffit_cub", *overrides, *more)) == 0
    assert len(losses(tmp_path / "cached")) == 2
    torch.testing.assert_close(losses(tmp_path / "cached"), losses(tmp_path / "pixels"), rtol=2e-3, atol=0)
    run = load_run(tmp_path / "cached")
    assert run.class_names == ["Black footed Albatross", "Laysan Albatross", "Sooty Albatross"]
    assert run.generator.generate(run.network, torch.tensor([0, 2]), seed=0).shape == (2, 3, 32, 32)


@pytest.mark.parametrize("name", EIGHT)
def test_a_dry_run_of_every_experiment(overrides, tmp_path, capsys, name):
    MINIATURES[name](tmp_path / "data")
    cfg = compose(tmp_path / "run", f"experiment=difffit_{name}", *overrides, "dry_run=true")
    assert cfg.data.name == name
    assert train(cfg) == 0
    shown = capsys.readouterr().out
    assert "difffit trains" in shown
    assert "4 x 4 x 4" in shown
    assert not (tmp_path / "data" / "prepared").exists()


@pytest.mark.parametrize("model", ["dit_moe", "shortcut"])
def test_dry_runs_of_the_table_with_other_models(overrides, tmp_path, capsys, base, model):
    """The experiments choose a dense network and DDPM, so a network and a sampler are given beside model=."""
    more = [f"model={model}", "sampler=auto", "sampler.guidance=1"]
    if model == "dit_moe":
        file = tmp_path / "moe.safetensors"
        vae = next(text for text in overrides if text.startswith("autoencoder.folder="))
        upcycle_file(task("upcycle", f"checkpoint={base}", "autoencoder=sd_vae_ema", vae, f"out={file}"))
        overrides = [text for text in overrides if not text.startswith(("network", "pretrained"))]
        more += ["network=as_pretrained", f"pretrained={file}", "trainer.accumulate_grad_batches=1"]
    for name in EIGHT:
        MINIATURES[name](tmp_path / name)
        more_of_it = [f"data.root={tmp_path / name}", "dry_run=true", *more]
        given = [text for text in overrides if not text.startswith("data.root")]
        cfg = compose(tmp_path / "run", "sweep=difffit_table", f"experiment=difffit_{name}", *given, *more_of_it)
        assert train(cfg) == 0, name
        shown = capsys.readouterr().out
        assert "difffit trains" in shown
        assert ("expert" in shown or "router" in shown) == (model == "dit_moe"), shown


def test_every_experiment_is_whole_at_its_own_size(tmp_path):
    """DiT-XL/2 with each experiment's classes takes every method, on a device without memory."""
    vae = small_vae(tmp_path / "vae")
    for name in EIGHT:
        cfg = compose(tmp_path / "run", f"experiment=difffit_{name}", f"autoencoder.folder={vae}")
        assert (cfg.name, cfg.data.name, cfg.pretrained) == (f"difffit_{name}", name, "dit_xl_2_256")
        assert (cfg.batch_size, cfg.max_steps, cfg.metrics.n, cfg.sampler.guidance) == (64, 24000, 10000, 1.5)
        assert (cfg.optimizer.lr, cfg.ema.decay, cfg.scheduler.decay_to) == (1e-3, 0.9999, 1.0)
        channels, side, _ = instantiate(cfg.autoencoder, "autoencoder").latent_shape(cfg.data.resolution)
        with torch.device("meta"):
            network = instantiate(cfg.network, "network", in_channels=channels, input_size=side, num_classes=101)
        instantiate(cfg.peft, "peft", _convert_="all").apply(network)
        assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 703_904  # of 101 classes


@pytest.fixture(scope="module")
def xl():
    with torch.device("meta"):
        return build_network("dit_xl_2", num_classes=101, depth=2)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_fits_every_experiment(tmp_path, xl, method):
    """Of the published re-runs and of its own; what a method makes has no memory either."""
    for name in EIGHT:
        cfg = compose(tmp_path, f"experiment=difffit_{name}", f"peft={method}", "preset=difffit_reruns")
        assert (cfg.data.name, cfg.peft.name) == (name, method)
        assert cfg.batch_size == (64 if method == "difffit" else 32)
        assert cfg.optimizer.lr == cfg.peft.lr
        with torch.device("meta"):
            network = build_network("dit_moe_s_2_8e2a", num_classes=101) if method == "router" else copy.deepcopy(xl)
            instantiate(cfg.peft, "peft", _convert_="all").apply(network)


def test_a_published_network_is_found_by_name_and_remembered(tmp_path):
    assert locate("some/file.pt", tmp_path) == Path("some/file.pt")
    with pytest.raises(UserError, match=r"https://dl.fbaipublicfiles.com/.*DiT-XL-2-256x256.pt at .*networks"):
        locate("dit_xl_2_256", tmp_path / "networks", download=False)
    path = tmp_path / "networks" / "DiT-XL-2-256x256.pt"
    path.parent.mkdir()
    path.write_bytes(b"weights")
    assert locate("dit_xl_2_256", path.parent, download=False) == path
    assert json.loads(path.with_name(path.name + ".json").read_text())["url"] == PUBLISHED["dit_xl_2_256"]
    path.write_bytes(b"another")
    with pytest.raises(UserError, match="not the file that was first used"):
        locate("dit_xl_2_256", path.parent)


def test_a_start_without_files_says_what_to_put_where(overrides, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nor there
    cub = ["experiment=difffit_cub", *overrides, "addresses.archives=['http://127.0.0.1:9']"]  # nobody answers there
    with pytest.raises(UserError, match=r"missing\. No address answers .* Put .*data/CUB_200_2011\.tgz"):
        train(compose(tmp_path / "run", *cub))
    with pytest.raises(UserError, match=r"SUN397 is not in .* Put .*SUN397\.tar\.gz there .*dead since 2025"):
        train(compose(tmp_path / "run", "experiment=difffit_sun397", *overrides))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock"}


@pytest.mark.parametrize("name", EIGHT)
def test_the_head_of_an_experiment_is_evidence(name):
    head = (ROOT / "configs" / "experiment" / f"difffit_{name}.yaml").read_text().partition("\ndefaults:")[0]
    for part in ("arXiv 2304.06648", "Expected:", "not found", "Ours: not run", "Hardware:", "Hours:"):
        assert part in head
    assert f"Command: python src/train.py experiment=difffit_{name}" in head
