"""Every method in every way a training runs: bf16, recomputed blocks, compiled ones, two processes, any objective."""

import json
import sys

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from ditune.checkpoints import read_adapter
from ditune.commands.train import train
from ditune.config.components import build_components, freeze_in_bf16
from ditune.config.instantiate import instantiate
from ditune.errors import UserError
from ditune.evaluation.denoising_loss import denoising_loss
from ditune.evaluation.held_out import EncodedHeldOut
from ditune.objectives.base import State
from ditune.peft import Adapters
from ditune.rng import StepRandom
from ditune.run import load_run
from forked import ranks
from helpers import ROOT, SMALL, assert_same_bits, checkpoint, compose, movement
from peft_helpers import CASES, adapt, build_base, inputs

OBJECTIVES = sorted(path.stem for path in (ROOT / "configs" / "objective").glob("[!_]*.yaml"))
THREE = ("bitfit", "difffit", "lora")
FAMILIES = ("difffit", "adaptformer", "vpt_shallow", "lora", "tlora")  # parameters, modules, tokens; peft's layers


def gradients(network, method) -> dict[str, torch.Tensor]:
    x, t, y = inputs()
    network.zero_grad()
    ((network(x, t, y).float() - x).square().mean() + method.penalty(network)).backward()
    return {name: p.grad.clone() for name, p in method.trainable(network).items()}


@pytest.mark.parametrize(("network", "name"), CASES)
def test_frozen_weights_in_bf16(network, name):
    adapted, method = adapt(network, name)
    expected = gradients(adapted, method)
    freeze_in_bf16(adapted)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(adapted, method)
    assert {p.dtype for p in method.trainable(adapted).values()} == {torch.float32}
    assert found.keys() == expected.keys()
    flat, exact = (torch.cat([g.flatten() for g in part.values()]) for part in (found, expected))
    assert torch.cosine_similarity(flat, exact, dim=0) > 0.95


@pytest.mark.parametrize(("network", "name"), CASES)
def test_blocks_that_are_computed_again(network, name):
    adapted, method = adapt(network, name)
    expected = gradients(adapted, method)
    adapted.gradient_checkpointing = True
    found = gradients(adapted, method)
    for key, gradient in expected.items():
        assert_close(found[key], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("network", "name"), [*(("dit", name) for name in FAMILIES), ("dit_moe", "lora")])
def test_compiled_blocks(network, name):
    """By dynamo and autograd alone, without a compiler for the kernels; in one graph where experts do not break it."""
    adapted, method = adapt(network, name)
    expected = gradients(adapted, method)
    torch._dynamo.reset()
    for block in adapted.blocks[:1]:
        block.compile(backend="aot_eager", fullgraph=network == "dit", dynamic=False)
    found = gradients(adapted, method)
    for key, gradient in expected.items():
        assert_close(found[key], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", THREE)
def test_any_objective(tmp_path, pictures, objective, name):
    settings = [setting for setting in SMALL if not setting.startswith("objective.")]
    settings += [f"data.root={pictures}", f"objective={objective}", f"peft={name}"]
    if objective == "diffusion":
        settings.append("network.learn_sigma=true")
    parts = build_components(compose(tmp_path, *settings))
    network, method = parts.network, parts.method
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    x, _, y = inputs()
    x = x.repeat(1, 1, 2, 2)
    state = State(0, 10, len(x), ema=network, teacher=network, base=network)
    loss = parts.objective.loss(network, (x, y.clamp(max=2)), StepRandom(0, 0, list(range(len(x))), "cpu"), state)
    loss.total.backward()
    assert all(p.grad is not None for p in method.trainable(network).values())
    assert all(p.grad is None for p in network.parameters() if not p.requires_grad)


# Two processes


def train_all_methods(rank: int) -> None:
    """Two steps of each method on this rank's part; both ranks end with the same values."""
    dist.init_process_group("gloo")
    for kind, name in CASES:
        network, method = adapt(kind, name)
        wrapped = DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)
        optimizer = torch.optim.SGD(method.trainable(network).values(), lr=0.1)
        for step in range(1, 3):
            x, t, y = inputs(seed=10 * step + rank)
            optimizer.zero_grad()
            ((wrapped(x, t, y) - x).square().mean() + method.penalty(network)).backward()
            optimizer.step()
            method.after_step(network, step)
        for key, p in method.trainable(network).items():
            both = [torch.empty_like(p) for _ in range(2)]
            dist.all_gather(both, p.detach())
            assert torch.equal(*both), (kind, name, key)
        sys.stdout.write(f"done {kind} {name}\n")
    dist.destroy_process_group()


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_for_all_methods(tmp_path):
    """Every parameter that trains gets a gradient in every step, or DDP would fail in the next one."""
    for written in ranks(train_all_methods, tmp_path):
        assert written.count("done") == len(CASES)


# Whole trainings


@pytest.mark.parametrize("settings", [["peft=adalora", "peft.deltaT=1"], ["peft=pissa"], ["peft=vpt_deep"]], ids=str)
def test_it_goes_on_as_if_it_had_never_stopped(small, base, tmp_path, settings):
    common = [*settings, f"pretrained={base}", "max_steps=4"]
    common += ["callbacks.checkpoint.every_n_steps=2", "callbacks.checkpoint.keep=9"]
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    train(small(*common, folder=whole))
    train(small(*common, folder=halved))
    (halved / "checkpoints" / "step_00000004.ckpt").unlink()
    train(small(*common, "resume=auto", folder=halved))
    assert movement(small(*common), whole) > 1e-3
    one, two = checkpoint(whole), checkpoint(halved)
    for key in ("state_dict", "ema", "method", "optimizer_states"):
        assert_same_bits(one[key], two[key], key)
    if one["method"]:
        assert sum(map(sum, one["method"]["rank_pattern"].values())) == 2 * 8  # of 2 x 12


@pytest.mark.parametrize("name", ["lora", "pissa", "vera", "vpt_deep"])
def test_a_run_in_bf16_is_loaded_as_it_ended(small, base, tmp_path, name):
    settings = [
        f"peft={name}",
        f"pretrained={base}",
        "max_steps=2",
        "optimizer.lr=0.01",
        "trainer.precision=bf16-mixed",
    ]
    settings += ["trainer.precision=bf16-mixed", "callbacks.checkpoint.every_n_steps=2"]
    cfg = small(*settings, folder=tmp_path / "run")
    assert train(cfg) == 0
    run, (_, tensors) = load_run(tmp_path / "run"), read_adapter(tmp_path / "run" / "adapter")
    assert run.generator.generate(run.network, torch.tensor([0, 1]), seed=0).shape == (2, 3, 16, 16)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["method"] == name
    assert result["adapter_bytes"] == (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_size
    assert result["seconds_per_step"] == pytest.approx(cfg.batch_size / result["images_per_second"])
    parts, unseen = build_components(cfg), instantiate(cfg.data.pictures, "data", split="test")
    source = EncodedHeldOut(unseen, parts.autoencoder)
    loss = denoising_loss(run.network, parts.objective, source, cfg.metrics.seed, bf16=True)
    # where a weight is changed and not only added to, what was rounded in training is not rounded here
    assert loss == pytest.approx(result["denoising"]["after"], rel=0 if name in ("lora", "vpt_deep") else 1e-3)
    if name != "pissa":
        trained = checkpoint(tmp_path / "run")["ema"]
        assert sum(t.numel() for t in tensors.values()) == sum(t.numel() for t in trained.values())


@pytest.mark.parametrize("way", ["map"])
def test_new_classes_of_a_run(small, base, tmp_path, way, pictures):
    classes = tmp_path / "classes.txt"
    classes.write_text("eel\ncat\ndog\nfox")
    folder = tmp_path / "run"
    common = [f"pretrained={base}", f"data.classes={classes}", "max_steps=2", "peft=lora"]
    with pytest.raises(UserError, match="adapt its label table"):
        train(small(*common))
    with pytest.raises(UserError, match=r"peft\.train_labels=true"):
        train(small(*common, f"classes={way}", "peft.train_labels=false"))
    assert train(small(*common, f"classes={way}", folder=folder)) == 0
    run = load_run(folder)
    assert run.network.num_classes == 4
    assert run.class_names == ["eel", "cat", "dog", "fox"]
    assert run.reshaped
    assert "before" not in json.loads((folder / "result.json").read_text())["denoising"]


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_another_resolution_of_a_run(small, base, tmp_path, scale):
    folder = tmp_path / "run"
    common = [f"pretrained={base}", "data.resolution=32", f"network.pos_embed_scale={scale}", "max_steps=1"]
    with pytest.raises(UserError, match="new_resolution=true"):
        train(small("peft=difffit", *common))
    assert train(small("peft=difffit", *common, "new_resolution=true", folder=folder)) == 0
    network = load_run(folder).network
    assert network.pos_embed.shape == (1, 256, 32)
    every_second = network.pos_embed.view(16, 16, 32)[:: round(1 / scale), :: round(1 / scale)][:8, :8]
    own = build_base("dit").config | {"input_size": 16}
    assert_close(every_second, type(network)(**own).pos_embed.view(8, 8, 32), atol=1e-6, rtol=0)


def test_adapters_are_switched_in_evaluation_mode(tmp_path):
    network = build_base("dit")
    adapters = Adapters(network)
    adapted, method = adapt("dit", "lora")
    adapters.add("one", type(method)("LORA", r=8), method.to_file(adapted)[1])
    network.train()
    adapters.use("one")
    network.eval()
    assert not any(module.training for module in network.modules())
