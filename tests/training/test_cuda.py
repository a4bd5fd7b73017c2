"""What only a GPU shows: the same results as on the CPU, compiled, in bf16, through nccl and grouped_mm."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from ditune.commands.train import train
from ditune.config.components import build_components, build_generator
from ditune.networks.moe import Experts, back_end, by_grouped_mm, by_slices
from helpers import SMALL, checkpoint, compose

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

FULL = ["peft=full", "optimizer.lr=1e-3", "max_steps=4", "callbacks.checkpoint.every_n_steps=4"]
ON_GPU = ["trainer=gpu"]
ON_CPU = ["trainer=cpu"]


def trained(small, folder, *overrides: str) -> dict[str, torch.Tensor]:
    assert train(small(*overrides, folder=folder)) == 0
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "finished"
    return load_file(folder / "network.safetensors")


def assert_same_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], atol: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if not name.endswith("qkv.bias"):  # a third of it has no gradient but rounding, which Adam blows up
            assert_close(ours[name], value, atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(scope="module")
def on_cpu(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpu")
    return trained(lambda *o, folder: compose(folder, *SMALL, f"data.root={pictures}", *o), folder, *ON_CPU, *FULL)


@pytest.mark.parametrize("launch", [ON_GPU, ["trainer=ddp", "trainer.devices=1"]], ids=["one", "nccl"])
def test_gpu_learns_what_the_cpu_learns(launch, small, on_cpu, tmp_path):
    assert_same_weights(trained(small, tmp_path / "gpu", *launch, *FULL), on_cpu, atol=1e-5)
    if launch != ON_GPU:
        assert torch.distributed.get_backend() == "nccl"
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("peft", ["full", "difffit", "lora"])
def test_compiled_bf16_learns_what_fp32_learns(peft, small, base, tmp_path):
    common = [
        *ON_GPU,
        f"peft={peft}",
        f"pretrained={base}",
        "optimizer.lr=1e-3",
        "max_steps=4",
        "callbacks.checkpoint.every_n_steps=4",
    ]
    assert train(small(*common, folder=tmp_path / "fp32")) == 0
    assert train(small(*common, "compile=true", "trainer.precision=bf16-mixed", folder=tmp_path / "bf16")) == 0
    exact, quick = (checkpoint(tmp_path / name)["ema"] for name in ("fp32", "bf16"))
    for name, value in exact.items():
        assert_close(quick[name], value, atol=8e-3, rtol=0)  # twice the way that four steps of AdamW can go


def test_pictures_are_those_of_the_cpu(small, base):
    cfg = small("peft=difffit", f"pretrained={base}", "sampler=ddpm", "sampler.steps=4")
    parts = build_components(cfg)
    generator, labels = build_generator(cfg, parts), torch.tensor([0, 1, 2])
    network = parts.network.eval()
    here = generator.generate(network, labels, seed=0)
    there = generator.generate(network.cuda(), labels, seed=0)
    assert (here.int() - there.int()).abs().max() <= 1


@pytest.mark.parametrize("form", ["swiglu", "gelu"])
def test_grouped_mm_gives_what_slices_give(form):
    torch.manual_seed(0)
    experts = Experts(4, 32, 64, form).cuda()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    counts = torch.tensor([5, 0, 20, 7], device="cuda")  # one expert without a token
    x = torch.randn(32, 32, device="cuda").bfloat16()
    weights = [getattr(experts, name) for name in experts.names]
    assert back_end(x, weights) is by_grouped_mm
    found = []
    for run in (by_slices, by_grouped_mm):
        own = x.clone().requires_grad_()
        out = run(experts.form, own, counts, weights)
        gradients = torch.autograd.grad(out.float().square().sum(), [own, *weights])
        found.append([out, *gradients])
    for a, b in zip(*found, strict=True):
        error = (a.float() - b.float()).norm() / a.float().norm()
        assert error < 2e-2, error
