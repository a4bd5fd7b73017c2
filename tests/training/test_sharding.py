"""A network that is spread over two gloo processes learns what one process learns, and its files are the same."""

import csv
import gc
import json
import re
import shutil
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from ditune.checkpoints import save_network
from ditune.commands.train import train
from ditune.config.components import build_components
from ditune.errors import UserError
from ditune.training.callbacks import routing
from ditune.training.plan import expected_memory
from helpers import SMALL, SMALL_FLOW, assert_same_bits, compose, open_gates
from trials import finished, pair, poison

EXPERTS = [*SMALL_FLOW, "model=dit_moe", "network=tiny_moe", "balance=global"]
SAVED = "callbacks.checkpoint.every_n_steps=3"
METRICS = ["callbacks.metrics.every_n_steps=3", "callbacks.metrics.n=5", "+metrics.judge.batch_size=5"]
BEST = [*METRICS, "callbacks.held_out.every_n_steps=2", "callbacks.checkpoint.best=loss"]
# the largest network at a fortieth of its width: as many blocks, experts and choices, with norms on queries and keys
G = ["model=dit_moe", "balance=global", "network=dit_moe_g_2_16e2a", "+network.hidden_size=32", "+network.num_heads=4"]
SKIP = "callbacks.nonfinite.action=skip"
BAD = 11  # position of an image: of two processes it is the second one's, in the third step
# every case with one more thing that must not change what is learned
CASES = {
    "dit_full": [*SMALL, "peft=full", "callbacks.held_out.every_n_steps=3"],
    "dit_difffit": [*SMALL, "peft=difffit", "trainer.accumulate_grad_batches=2", *BEST],
    "dit_lora": [*SMALL, "peft=lora", "gradient_checkpointing=true", SKIP],  # and a step whose gradient is NaN
    "moe_full": [*EXPERTS, "peft=full"],
    "moe_difffit": [*EXPERTS, "peft=difffit", "callbacks.samples.n=2"],
    "moe_lora": [*EXPERTS, "peft=lora", "objective=progressive_distillation"],  # a teacher that is kept
    # one process has a sample with a step and the other has none: both call the network equally often
    "dit_flow": [*SMALL_FLOW, "peft=lora", "objective=improved_mean_flow", "objective.derivative=difference"],
    "g": [*SMALL_FLOW, *G, "peft=full", "max_steps=2"],
    # of the two processes one has a bootstrapped sample
    "scratch": [*EXPERTS, "peft=full", "objective=shortcut", "batch_size=4", "balance.bias_rate=0.01", SAVED],
}
COMMON = ["optimizer.lr=1e-3", "max_steps=6", "callbacks.samples.n=0", "callbacks.checkpoint.every_n_steps=0"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory, pictures):
    """Files of tiny networks, by the beginnings of the cases' names."""
    folder = tmp_path_factory.mktemp("bases")
    found = {"scratch": None, "g": None}
    for name, overrides in (("dit", SMALL), ("moe", EXPERTS)):
        parts = build_components(compose(folder, *overrides, f"data.root={pictures}", "peft=full"))
        open_gates(parts.network)
        facts = {"class_names": parts.images.class_names, "autoencoder": parts.autoencoder.latent_fingerprint}
        facts |= {"data": parts.images.fingerprint, "resolution": 16, "steps": 0}
        found[name] = folder / f"{name}.safetensors"
        save_network(found[name], parts.network, parts.objective.process.config, **facts)
    return found


def both(folder, name, run, begun=None):
    """A training by two processes and, where no checkpoint is given, by one beside it."""
    two, one = (folder / f"{name}_{n}" for n in (2, 1))
    if begun is not None:
        shutil.copytree(begun, two / "checkpoints" / begun.name)
    trials = pair(two, run, trainer="fsdp")
    if begun is None:
        assert train(compose(one, *run)) == 0
    assert finished(trials, 120) == [0, 0], "\n".join(trial.output for trial in trials)[-3000:]
    return trials


def losses_of(folder):
    with (folder / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def measured(folder):
    """(step, name): value of all that was measured while a run trained."""
    with (folder / "metrics.csv").open() as file:
        rows = [(int(row["step"]), key, value) for row in csv.DictReader(file) for key, value in row.items()]
    return {(step, key): float(value) for step, key, value in rows if key.startswith("val/") and value}


def checkpoints_are_shares(folder):
    """Each process has written about half, and nothing in the folder is a pickle."""
    newest = folder / "step_00000006.ckpt"
    assert sorted(path.suffix for path in newest.iterdir()) == [".json", ".safetensors", ".safetensors"]
    assert not list(folder.glob(".*"))
    sizes = [path.stat().st_size for path in newest.glob("*.safetensors")]
    assert max(sizes) < 1.2 * min(sizes)


@pytest.mark.ddp
@pytest.mark.slow
def test_shares_learn_as_the_whole(tmp_path, pictures, bases, monkeypatch):
    for name in ("draw_load", "draw_by"):
        monkeypatch.setattr(routing, name, lambda *_: None)
    runs = {}
    for name, case in CASES.items():
        base = bases[name.partition("_")[0]]
        begin = [] if base is None else [f"pretrained={base}"]
        runs[name] = [*case[:1], f"data.root={pictures}", *COMMON, f"paths.cache_dir={tmp_path}", *case[1:], *begin]
    runs["onward"] = [*runs["dit_full"], SAVED]
    assert train(compose(tmp_path / "onward_2", *runs["onward"], "max_steps=3")) == 0  # two go on where one began
    for name, run in runs.items():
        with monkeypatch.context() as patch:
            if name == "dit_lora":
                poison(patch, BAD)
            trials = both(tmp_path, name, run)
        if name == "dit_lora":
            told = rf"not finite at step 2; .*rank 1: position {BAD} .*The step is skipped \(1 of at most 10 in a row\)"
            assert re.search(told, trials[0].output), trials[0].output[-3000:]
    third = tmp_path / "scratch_2" / "checkpoints" / "step_00000003.ckpt"
    both(tmp_path, "again", runs["scratch"], third)
    for name in runs:
        folders = [tmp_path / f"{name}_{n}" for n in (1, 2)]
        experts = name.startswith(("moe", "scratch", "g"))
        written = "network" if name in ("scratch", "g") else "adapter/adapter_model"
        one, spread = (load_file(folder / f"{written}.safetensors") for folder in folders)
        assert one.keys() == spread.keys()
        for key, value in one.items():
            if key.endswith("qkv.bias"):
                continue  # softmax cancels a third of it: its gradient is rounding, which Adam blows up to whole steps
            at, tolerance = (name, key), 1e-5 if experts else 1e-6
            if name == "dit_flow":
                tolerance = 1e-4  # the difference of two outputs is divided by 2h = 0.0002, and with it their rounding
            assert_close(spread[key], value, atol=tolerance, rtol=0, msg=lambda m, at=at: f"{at}: {m}")
        alone, together = (json.loads((folder / "result.json").read_text()) for folder in folders)
        assert together["denoising"] == pytest.approx(alone["denoising"], abs=1e-5)
        if experts:  # shares of tokens, so the choices of experts are equal
            for number in ("max_vio", "cv", "dead"):
                assert together["routing"][number] == pytest.approx(alone["routing"][number], abs=1e-6), name
    checkpoints_are_shares(third.parent)
    again, scratch = (load_file(tmp_path / f"{name}_2" / "network.safetensors") for name in ("again", "scratch"))
    assert_same_bits(again, scratch)
    shutil.copytree(third, tmp_path / "alone" / "checkpoints" / third.name)  # one goes on where two began
    assert train(compose(tmp_path / "alone", *runs["scratch"], "trainer.precision=auto")) == 0
    for key, value in load_file(tmp_path / "alone" / "network.safetensors").items():
        assert_close(value, scratch[key], atol=1e-5, rtol=0)
    losses = [losses_of(tmp_path / name) for name in ("scratch_2", "again_2", "alone")]
    assert losses[1] == losses[0][3:]
    assert losses[2] == pytest.approx(losses[0][3:], abs=1e-5)
    sheets = [tmp_path / f"moe_difffit_{n}" / "samples" / "before_after.png" for n in (1, 2)]
    a, b = (np.asarray(Image.open(path), dtype=np.int64) for path in sheets)
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= 1
    values = [measured(tmp_path / f"dit_difffit_{n}") for n in (1, 2)]
    assert values[0].keys() == values[1].keys()
    assert {"val/loss", "val/kid_efflite0"} <= {name for _, name in values[0]}
    for key, value in values[0].items():
        assert values[1][key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    alone, together = (json.loads((tmp_path / f"dit_difffit_{n}" / "result.json").read_text()) for n in (1, 2))
    assert alone["evaluated"]["checkpoint"] == together["evaluated"]["checkpoint"] == "best"
    assert alone["evaluated"]["step"] == together["evaluated"]["step"]


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["optimizer=muon", "peft=full", "pretrained=null"], "optimizer=muon"),
        (["objective=mean_flow", "pretrained=null"], "jvp"),
        (["objective=alpha_flow", "pretrained=null"], "jvp"),
        (["objective=flow_matching", "transfer=dogfit"], "transfer="),
        (["peft=adalora"], "adalora"),
        (["trainer.accumulate_grad_batches=auto"], "accumulate_grad_batches=auto"),
        (["dry_run=measure"], "dry_run=measure"),
    ],
)
def test_what_shares_cannot_do_is_refused_before_anything_is_built(tmp_path, overrides, reason):
    cfg = compose(tmp_path / "run", *[o for o in SMALL if "objective" not in o], "trainer=fsdp", *overrides)
    cfg.data.root = str(tmp_path / "nowhere")  # nothing of the data is looked at
    with pytest.raises(UserError, match=f"trainer=fsdp cannot be combined with .*{reason}") as refused:
        train(cfg)
    assert str(refused.value).count(". ") == 1  # what, and what instead
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_gradients_are_clipped_as_torch_does():
    from ditune.training.module import clip

    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 5.0)
    ours = [parameter.grad.clone() for parameter in parameters]
    norm = torch.nn.utils.get_total_norm(ours)
    torch.nn.utils.clip_grads_with_norm_(parameters, 1.0, norm)
    clip(ours, 1.0, norm)
    for parameter, gradient in zip(parameters, ours, strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_the_plan_prices_a_share_and_keeps_nothing_of_the_network(tmp_path, pictures):
    parts = build_components(compose(tmp_path, *SMALL, f"data.root={pictures}", "peft=full"))
    network = parts.network
    first, *later = (expected_memory(network, parts.objective, (3, 16, 16), 1, False, shares=n) for n in (1, 2, 4))
    block = sum(p.nbytes for p in network.blocks[0].parameters()) / 2**20
    for n, found in zip((2, 4), later, strict=True):
        assert found["parameters"] == pytest.approx(first["parameters"] / n + block)
        assert found["gradients, optimizer, EMA"] == pytest.approx(first["gradients, optimizer, EMA"] / n)
    left = weakref.ref(network.blocks[0].mlp.fc1.weight)  # a graph that is never freed would hold it
    del parts, network
    gc.collect()
    assert left() is None
