"""A dense network becomes one with experts and computes the same; published files are drawn as their authors do."""

import json
import math
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import DictConfig
from torch.testing import assert_close

from ditune import cli
from ditune.checkpoints import load_network, read_header, save_network
from ditune.checkpoints.official_dit_moe import to_theirs
from ditune.commands.analyze_routing import analyse
from ditune.commands.evaluate import evaluate
from ditune.commands.train import train
from ditune.commands.upcycle import upcycle_file
from ditune.errors import UserError
from ditune.moe.statistics import RoutingStatistics, mutual_information
from ditune.moe.upcycling import upcycle
from ditune.networks import DiT, DiTMoE
from ditune.peft import build_peft
from ditune.processes import FlowProcess, GaussianProcess
from ditune.run import load_checkpoint
from ditune.samplers import DDPM, Euler
from helpers import GOLDEN, SMALL, compose, golden


def config(name: str, *overrides: str) -> DictConfig:
    cli.prepare()
    with hydra.initialize_config_dir(cli.CONFIGS, version_base="1.3"):
        return hydra.compose(name, list(overrides))


def dense() -> DiT:
    network = DiT(**json.loads((GOLDEN / "tiny_dit_config.json").read_text()))
    network.load_state_dict(golden("tiny_dit_weights"))
    return network.eval()


@pytest.mark.parametrize("options", [{}, {"shared_ratio": 0.0}, {"moe_every": 2}, {"moe_from": 0.5}])
@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 2), (3, 1)])
def test_a_dense_network_keeps_its_function(options, num_experts, top_k):
    expected = golden("tiny_dit_forward")
    network = upcycle(dense(), num_experts, top_k, **options)
    routing = []
    out = network(expected["x"], expected["t"], expected["y"], routing=routing)
    assert_close(out, expected["out"], atol=1e-5, rtol=1e-5)
    assert len(routing) == len(network.moe_layers) > 0
    assert all(layer.chosen_NTE.any(dim=(0, 1)).sum() > 1 for layer in routing)  # routers do choose


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_one_expert_becomes_several(score):
    torch.manual_seed(0)
    shape = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    one = DiTMoE(**shape, num_experts=1, top_k=1, score=score, renormalize=score == "sigmoid", route_scale=2.0).eval()
    for parameter in one.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    inputs = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 10.0, 999.0]), torch.tensor([0, 1, 3])
    many = upcycle(one, num_experts=5, top_k=2)
    assert_close(many(*inputs), one(*inputs), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="5 experts already"):
        upcycle(many, num_experts=8, top_k=2)


def test_a_file_keeps_what_its_release_meant_by_renormalize(tmp_path):
    """Once a single expert's weight was divided too; new networks say 'always' for that, and false for their scores."""
    network = upcycle(dense(), num_experts=3, top_k=1)
    assert network.config["renormalize"] == "always"
    assert DiTMoE(**(network.config | {"renormalize": True})).config["renormalize"] is False
    expected = golden("tiny_dit_forward")
    for renormalize in ("always", True):
        network.config["renormalize"] = renormalize  # True: as the earlier release wrote it
        save_network(tmp_path / "x.safetensors", network, GaussianProcess().config)
        out = load_network(tmp_path / "x.safetensors").eval()(*(expected[key] for key in "xty"))
        assert_close(out, expected["out"], atol=1e-5, rtol=1e-5)


def test_noise_breaks_the_tie():
    expected = golden("tiny_dit_forward")
    inputs = [expected[key] for key in "xty"]
    network = upcycle(dense(), 4, 2, noise=0.01)
    copies = network.moe_layers[0].experts.w_in_EDF
    assert (copies[0] - copies[1]).abs().max() > 0
    error = (network(*inputs) - expected["out"]).norm() / expected["out"].norm()
    assert 1e-6 < error < 0.05


def test_file_to_file_and_on_to_a_training(base, pictures, tmp_path):
    out = tmp_path / "made.safetensors"
    upcycle_file(config("upcycle", f"checkpoint={base}", f"out={out}", "num_experts=4"))
    header = read_header(out)
    assert header["class"] == "DiTMoE"
    assert header["provenance"]["upcycled_from"]["file"] == base.name
    assert header["process"] == read_header(base)["process"]
    old, new = load_network(base).eval(), load_network(out).eval()
    inputs = torch.randn(2, 3, 16, 16), torch.tensor([0, 500]), torch.tensor([0, 3])
    assert_close(new(*inputs), old(*inputs), atol=1e-5, rtol=1e-5)
    like = ["network=as_pretrained", f"pretrained={out}"]
    common = [*SMALL, f"data.root={pictures}", *like, "balance=batch", "peft=full"]
    assert train(compose(tmp_path / "run", *common, "max_steps=2")) == 0
    folder = analyse(config("analyze_routing", f"run={tmp_path / 'run'}", "n=4", "steps=2"))
    written = json.loads((folder / "routing.json").read_text())
    assert sum(written["load"][0]) == pytest.approx(4.0)
    assert all((folder / f"{name}.png").stat().st_size > 1000 for name in ("load", "time", "position", "class"))
    with pytest.raises(UserError, match="no experts"):
        analyse(config("analyze_routing", f"checkpoint={base}"))


def test_mutual_information():
    independent = torch.tensor([[2.0, 4.0], [1.0, 2.0]])
    decided = torch.tensor([[5.0, 0.0], [0.0, 5.0]])
    found = mutual_information(torch.stack([independent, decided]).double())
    assert_close(found, torch.tensor([0.0, math.log(2)], dtype=torch.float64))


# Files of the original: process, sampler, steps and guidance of their authors


def published(folder: Path, qk_norm: bool) -> Path:
    shape = {"input_size": 16, "patch_size": 8, "in_channels": 3, "hidden_size": 384, "depth": 1, "num_heads": 6}
    shape["num_classes"] = 3
    network = DiTMoE(**shape, num_experts=3, expert_ratio=0.25, shared_ratio=0.5, qk_norm=qk_norm)
    path = folder / "DiT-MoE.pt"
    torch.save(to_theirs(network.state_dict(), fused_attention=qk_norm), path)
    return path


def load(path: Path, *overrides: str):
    cfg = config("evaluate", *overrides)
    return load_checkpoint(path, cfg.autoencoder, cfg.sampler, bf16=False)


def test_the_published_flow_is_drawn_by_euler_and_refuses_ddpm(tmp_path):
    path = published(tmp_path, qk_norm=True)
    generator = load(path).generator
    assert generator.process.config == FlowProcess(time_scale=1.0).config
    assert (type(generator.sampler), generator.steps, generator.guidance) == (Euler, 50, 1.5)
    assert load(path, "sampler.guidance=4.0").generator.guidance == 4.0
    with pytest.raises(UserError, match="trained on a flow, and DDPM samples from a diffusion"):
        load(path, "sampler=ddpm")


def test_a_published_file_is_judged_by_one_command(pictures, tmp_path):
    common = [f"checkpoint={published(tmp_path, qk_norm=True)}", f"out={tmp_path}", "metrics.n=4", "sampler.steps=2"]
    evaluate(config("evaluate", *common, "data=folder", f"data.root={pictures}", "data.resolution=16"))
    metrics = json.loads((tmp_path / "result.json").read_text())["metrics"]
    assert (metrics["protocol"]["sampler"][:5], metrics["protocol"]["guidance"]) == ("Euler", 1.5)
    assert metrics["values"]["n"] == 4
    assert math.isfinite(metrics["values"]["kid_efflite0"])
    assert (tmp_path / "grid.png").is_file()


def test_the_published_diffusion_is_drawn_by_ddpm(tmp_path):
    path = published(tmp_path, qk_norm=False)
    generator = load(path).generator
    assert generator.process.config == GaussianProcess().config
    assert (type(generator.sampler), generator.steps, generator.guidance_channels) == (DDPM, 250, 3)
    with pytest.raises(UserError, match="trained on a diffusion, and Euler samples from a flow"):
        load(path, "sampler=euler")


def test_files_of_ours_are_drawn_as_before(base):
    generator = load(base).generator
    assert (type(generator.sampler).__name__, generator.steps, generator.guidance) == ("DDIM", 25, 1.5)


def test_prompts_have_no_position():
    """Visual prompts are routed as tokens are, and the statistics count them everywhere but by position."""
    network = upcycle(dense(), num_experts=4, top_k=2)
    build_peft("vpt_deep", lr=1e-3, num_prompts=3).apply(network)
    expected, routing = golden("tiny_dit_forward"), []
    network(expected["x"], expected["t"], expected["y"], routing=routing)
    statistics = RoutingStatistics(network)
    statistics.add(routing, torch.zeros(len(expected["x"])), expected["y"])
    tokens = network.pos_embed.shape[1]
    assert statistics.counts["position"][0].sum() == len(expected["x"]) * tokens * 2
    assert statistics.counts["time"][0].sum() == len(expected["x"]) * (tokens + 3) * 2
