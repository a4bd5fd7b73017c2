"""Shortcut models, their baselines and their sampling give the numbers of kvfrans/shortcut-models."""

import json
import pickle
import sys
from collections import namedtuple
from functools import cache
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.testing import assert_close

from ditune.checkpoints import load_network
from ditune.checkpoints.shortcut_jax import PROCESS, UNUSED, convert_shortcut
from ditune.errors import UserError
from ditune.networks import DiT, build_network
from ditune.objectives import (
    ConsistencyDistillation,
    ConsistencyTraining,
    FlowMatching,
    LiveReflow,
    ProgressiveDistillation,
    Shortcut,
    State,
)
from ditune.objectives.shortcut import code_levels
from ditune.processes import build_process
from ditune.samplers import ConsistencySampler, Euler, ShortcutSampler, sample
from ditune.training import Ema
from helpers import GOLDEN, golden

TOLERANCE = {"atol": 2e-5, "rtol": 0}
PROCESS_OF_THE_CODE = build_process(PROCESS)
TINY = {"input_size": 8, "hidden_size": 64, "depth": 2, "num_heads": 4, "num_classes": 10, "learn_sigma": False}
N = 64  # batch of the golden files


def chw(x: Tensor) -> Tensor:
    return x.movedim(-1, -3).contiguous()


# ours, where it begins as the original's: name there
INITIAL = {
    "x_embedder.proj": "PatchEmbed_0/Conv_0",
    "t_embedder.mlp.0": "TimestepEmbedder_0/Dense_0",
    "t_embedder.mlp.2": "TimestepEmbedder_0/Dense_1",
    "step_embedder.mlp.0": "TimestepEmbedder_1/Dense_0",
    "step_embedder.mlp.2": "TimestepEmbedder_1/Dense_1",
    "blocks.0.attn.proj": "DiTBlock_0/Dense_4",
    "blocks.0.mlp.fc1": "DiTBlock_0/MlpBlock_0/Dense_0",
    "blocks.0.mlp.fc2": "DiTBlock_0/MlpBlock_0/Dense_1",
    "final_layer.adaLN_modulation.1": "FinalLayer_0/Dense_0",
    "final_layer.linear": "FinalLayer_0/Dense_1",
}


def test_initial_values_are_the_originals_but_where_the_docs_say():
    """docs/guide/few_steps.md names the two kinds of layers that begin as DiT's."""
    theirs = json.loads((GOLDEN / "shortcut_init_stats.json").read_text())
    torch.manual_seed(0)
    own = DiT(hidden_size=768, depth=1, num_heads=12, learn_sigma=False, step=True).state_dict()
    names = {f"{ours}.weight": f"{name}/kernel" for ours, name in INITIAL.items()}
    names |= {f"{ours}.bias": f"{name}/bias" for ours, name in INITIAL.items()}
    names["y_embedder.embedding_table.weight"] = "LabelEmbedder_0/Embed_0/embedding"
    for ours, name in names.items():
        assert own[ours].std().item() == pytest.approx(theirs[name]["std"], rel=0.02), ours
    other = {UNUSED, *(f"DiTBlock_0/Dense_{k}/{kind}" for k in range(4) for kind in ("kernel", "bias"))}
    assert theirs.keys() - set(names.values()) == other
    assert not own["blocks.0.adaLN_modulation.1.weight"].any()
    assert theirs["DiTBlock_0/Dense_0/kernel"]["std"] == pytest.approx((2 / (7 * 768)) ** 0.5, rel=0.01)
    assert own["blocks.0.attn.qkv.weight"].std().item() == pytest.approx((2 / (4 * 768)) ** 0.5, rel=0.01)
    assert theirs["DiTBlock_0/Dense_1/kernel"]["std"] == pytest.approx((1 / 768) ** 0.5, rel=0.01)


@cache
def network(which: str = "") -> DiT:
    tiny = DiT(**TINY, step=True)
    tiny.load_state_dict(convert_shortcut(golden(f"shortcut_tiny_params{which}"), TINY["num_heads"]))
    return tiny.eval()


def metadata(name: str) -> dict[str, str]:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return file.metadata()


class Recorded:
    """Draws of a golden file: what a purpose is answered, for rows that are all of the global batch."""

    def __init__(self, **answers: Tensor):
        self.answers = answers
        self.positions, self.on_cpu = range(N), self

    def __getattr__(self, kind: str):
        return lambda purpose, *_: self.answers[purpose]


def never_one(u: Tensor) -> Tensor:
    """Uniform numbers lie below 1."""
    return u * (1 - 2.0**-20)


def always_telling(tiny: DiT, told: float):
    """The original tells baselines a step of zero."""

    def call(x, t, y, step):
        return tiny(x, t, y, torch.full_like(step, told))

    call.num_classes = tiny.num_classes
    return call


# The network


def test_forward():
    g = golden("shortcut_forward")
    x, t, step, y = chw(g["x"]), g["t"], g["dt_base"], g["labels"].long()
    for which, expected in (("", "v"), ("_ema", "v_ema_params")):
        assert_close(network(which)(x, t, y, step), chw(g[expected]), **TOLERANCE)
    assert_close(network()(x, t, y, torch.zeros_like(step)), chw(g["v_ignore_dt"]), **TOLERANCE)
    assert_close(network().step_embedder(step), g["act_dt_embed"], **TOLERANCE)
    assert_close(network().t_embedder(t), g["act_time_embed"], **TOLERANCE)


# Targets and losses


def interleaved(bootstrapped: Tensor, flow: Tensor, every: int) -> Tensor:
    """Rows of the original (bootstrapped ones first) at our positions: every so many-th is bootstrapped."""
    count = len(bootstrapped)
    rows, rest = [], iter(flow[: N - count])
    for position in range(N):
        k, remainder = divmod(position, every)
        rows.append(bootstrapped[k] if remainder == 0 and k < count else next(rest))
    return torch.stack(rows)


def order(count: int, every: int) -> Tensor:
    """At which of our positions each row of the original stands."""
    back = interleaved(torch.arange(count), torch.arange(count, N), every)
    return back.argsort()


CASES = ("plain", "cfg", "cfg_bias", "live_uncond", "tiny_bootstrap", "clip")


def shortcut_case(case: str):
    """Objective, batch, recorded draws and order of a golden file."""
    g, flags = golden(f"shortcut_targets_{case}"), metadata(f"shortcut_targets_{case}")
    every, count, cfg = int(flags["bootstrap_every"]), int(flags["n_bootstrap"]), float(flags["cfg_scale"])
    objective = Shortcut(
        PROCESS_OF_THE_CODE,
        bootstrap_every=every,
        levels="code",
        dt_bias=flags["bootstrap_dt_bias"] == "1",
        target="ema" if flags["bootstrap_ema"] == "1" else "live",
        guidance=cfg if flags["bootstrap_cfg"] == "1" else 1.0,
        clamp=4.0,
        label_drop=1.0 if cfg == 0 else float(flags["class_dropout_prob"]),
    )
    images, labels = golden("shortcut_batch").values()
    images = chw(images) * float(flags["im_scale"])
    levels = torch.cat([g["dt_base"][:count], torch.full((N - count,), 7.0)])
    t = torch.cat([g["t"][:count], g["t_flow"][: N - count]])
    u = (t * 2**levels + 0.5) / 2**levels  # any number that rounds down to the recorded time

    def rows(bootstrapped, flow):
        return interleaved(bootstrapped[:count], flow[: N - count], every)

    draws = Recorded(
        t=rows(u, u[count:]).double(),
        noise=rows(chw(g["x0_bootstrap"]), chw(g["x0_flow"])),
        drop=never_one(1 - rows(torch.zeros(count), g["label_drop_mask"].float())),
    )
    batch = rows(images, images), rows(labels.long(), labels.long())
    return objective, batch, draws, order(count, every), g


@pytest.mark.parametrize("case", CASES)
def test_targets_and_loss(case):
    objective, (x0, y), draws, back, g = shortcut_case(case)
    state = State(0, 700, N, ema=network("_ema"), teacher=network("_ema"))
    targets = objective.targets(network(), x0, y, draws, state)
    process = PROCESS_OF_THE_CODE
    assert_close(targets.x_t[back], chw(g["x_t"]), atol=1e-6, rtol=0)
    assert_close(process.network_time(targets.t)[back], g["t"], atol=0, rtol=0)
    assert_close(process.network_step(targets.d)[back], g["dt_base"].float(), atol=0, rtol=0)
    assert_close(targets.y[back], g["labels_eff"].long(), atol=0, rtol=0)
    assert_close(-targets.target[back], chw(g["v_t"]), **TOLERANCE)
    velocity = process.velocity(network(), targets.x_t, targets.t, targets.y, targets.d)
    assert_close(-velocity[back], chw(g["v_pred"]), **TOLERANCE)
    loss = objective.loss(network(), (x0, y), draws, state)
    assert_close(loss.parts["loss"][back], g["mse_per_sample"], **TOLERANCE)
    assert_close(loss.total.detach(), g["loss"][0], **TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_levels_of_the_code(case):
    g, flags = golden(f"shortcut_targets_{case}"), metadata(f"shortcut_targets_{case}")
    count = int(flags["n_bootstrap"])
    assert code_levels(count, 7, flags["bootstrap_dt_bias"] == "1") == g["dt_base"][:count].long().tolist()


def test_one_step_of_adamw_and_average():
    """Folding 1/sqrt(d) into the queries scales their gradient, to which Adam's first step is blind: they apart."""
    objective, batch, draws, _, _ = shortcut_case("plain")
    g, lr, decay = golden("shortcut_train_step"), 1e-4, 0.1
    tiny = DiT(**TINY, step=True)
    tiny.load_state_dict(network().state_dict())
    parameters = dict(tiny.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr, betas=(0.9, 0.999), weight_decay=decay, fused=True)
    ema = Ema(parameters, decay=0.999)
    ema.average = {name: network("_ema").state_dict()[name].clone() for name in parameters}
    loss = objective.loss(tiny, batch, draws, State(0, 700, N, network("_ema"), network("_ema")))
    loss.total.backward()
    assert_close(loss.total.detach(), g["loss"][0], **TOLERANCE)
    grads = {name: p.grad.clone() for name, p in parameters.items()}
    optimizer.step()
    ema.update(step=10**6)  # past its warm-up, which the reference does not have

    scale = (TINY["hidden_size"] // TINY["num_heads"]) ** -0.5
    zeros = {name: torch.zeros_like(value) for name, value in golden("shortcut_tiny_params").items()}
    for part, ours in (("grad", grads), ("new_param", parameters), ("new_ema", ema.average)):
        for key in (key for key in g if key.startswith(f"{part}/")):
            name = key.removeprefix(f"{part}/")
            if name == UNUSED:
                continue
            theirs = convert_shortcut(zeros | {name: g[key]}, TINY["num_heads"])
            mark = convert_shortcut(zeros | {name: torch.ones_like(g[key])}, TINY["num_heads"])
            ((target, where),) = ((n, value != 0) for n, value in mark.items() if value.any())
            expected, found = theirs[target][where], ours[target].detach()[where]
            if name.endswith("Dense_2/kernel") and name.startswith("DiTBlock"):  # the queries
                if part == "grad":
                    expected = expected / scale**2
                else:
                    moved = -lr * grads[target][where].sign() if part == "new_param" else 0
                    expected = before[target][where] * (1 - lr * decay) + moved if part == "new_param" else found
            assert_close(found, expected, atol=2e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


# Baselines

BASELINES = {
    "naive": lambda: FlowMatching(PROCESS_OF_THE_CODE),
    "progressive": lambda: ProgressiveDistillation(PROCESS_OF_THE_CODE, clamp=4.0),
    "progressive_cfg": lambda: ProgressiveDistillation(PROCESS_OF_THE_CODE, guidance=1.5, clamp=4.0),
    "consistency_distillation": lambda: ConsistencyDistillation(PROCESS_OF_THE_CODE, clamp=4.0),
    "consistency_training": lambda: ConsistencyTraining(PROCESS_OF_THE_CODE),
    "livereflow": lambda: LiveReflow(PROCESS_OF_THE_CODE, guidance=1.5),
}


@pytest.mark.parametrize("name", BASELINES)
def test_baselines(name):
    g, flags = golden(f"shortcut_baseline_{name}"), metadata(f"shortcut_baseline_{name}")
    objective, (images, labels) = BASELINES[name](), golden("shortcut_batch").values()
    images, labels, noise, t = chw(images), labels.long(), chw(g["x0"]), g["t"]
    live, ema, teacher = (network(which) for which in ("", "_ema", "_teacher"))
    if flags["ignore_dt"] == "True":
        live, ema, teacher = (always_telling(tiny, 0) for tiny in (live, ema, teacher))
    state = State(int(flags["step"]), int(flags["max_steps"]), N, ema, teacher)
    dropped = (g["labels_eff"] == 10).float()
    back = torch.arange(N)
    u = 1 - t if name == "naive" else t + 2.0**-9  # the grid's cell; flow matching takes our t = 1 - theirs as it is
    if name == "livereflow":
        count, every = 8, 8
        back = order(count, every)
        images, labels, noise = (interleaved(value[:count], value, every) for value in (images, labels, noise))
        u, dropped = (interleaved(value[:count], value[count:], every) for value in (u, dropped))
    draws = Recorded(t=u.double(), noise=noise, drop=never_one(1 - dropped))
    targets = objective.targets(live, images, labels, draws, state)
    assert_close(1 - targets.t[back], t, atol=1e-6, rtol=0)
    assert_close(targets.x_t[back], chw(g["x_t"]), **TOLERANCE)
    assert_close(targets.y[back], g["labels_eff"].long(), atol=0, rtol=0)
    assert_close(-targets.target[back], chw(g["v_t"]), **TOLERANCE)
    if name == "livereflow":
        assert_close(PROCESS_OF_THE_CODE.network_step(targets.d)[back], g["dt_base"].float(), atol=0, rtol=0)
    if name.startswith("progressive"):
        assert objective.level(state.step, state.max_steps) == int(g["dt_base"][0])


# Sampling


@pytest.mark.parametrize(
    ("steps", "scale"), [(1, 0.0), (1, 1.0), (1, 1.5), (4, 0.0), (4, 1.0), (4, 1.5), (128, 1.0), (128, 1.5)]
)
def test_sampling(steps, scale):
    g, states = golden("shortcut_sampling"), []
    y = g["labels"].long() if scale else torch.full((4,), 10)  # the original's scale 0 is: without classes
    x = sample(
        network(),
        PROCESS_OF_THE_CODE,
        chw(g["eps"]),
        y,
        sampler=ShortcutSampler(),
        steps=steps,
        guidance=scale or 1.0,
        on_step=lambda t, x, x0: states.append(x),
    )
    assert_close(x, chw(g[f"x_T{steps}_cfg{scale}"]), **TOLERANCE)
    if scale == 1 and steps < 128:
        assert_close(torch.stack(states), chw(g[f"traj_T{steps}_cfg1.0"])[1:], **TOLERANCE)


def test_sampling_of_baselines():
    g = golden("shortcut_sampling")
    noise = iter(chw(g["consistency_eps_T4"]))
    arguments = (PROCESS_OF_THE_CODE, chw(g["eps"]), g["labels"].long())
    x = sample(network(), *arguments, sampler=Euler(), steps=4)
    assert_close(x, chw(g["x_T4_naive_dt7"]), **TOLERANCE)
    told_four = always_telling(network(), 2)  # log2(4)
    x = sample(told_four, *arguments, sampler=ConsistencySampler(), steps=4, next_noise=lambda: next(noise))
    assert_close(x, chw(g["x_T4_consistency"]), **TOLERANCE)


# Checkpoints


def nested(parameters: dict[str, np.ndarray]) -> dict:
    tree: dict = {}
    for name, value in parameters.items():
        *path, last = name.split("/")
        at = tree
        for part in path:
            at = at.setdefault(part, {})
        at[last] = value
    return tree


@pytest.fixture
def pickled(tmp_path):
    """A checkpoint as the original writes it, whose parameters and average differ."""
    live, ema = (nested({k: v.numpy() for k, v in golden(f"shortcut_tiny_params{w}").items()}) for w in ("", "_ema"))
    content = {"train_state": {"params": live, "params_ema": ema, "opt_state": None, "step": 7}, "_timestamp": "now"}
    path = tmp_path / "celeba.tmp"

    def write(**changes):
        path.write_bytes(pickle.dumps(content | {"train_state": content["train_state"] | changes}))
        return path

    return write


def test_pickled_checkpoints_are_read(pickled):
    loaded = load_network(pickled(), num_heads=4, input_size=8)
    assert loaded.config == network().config
    for name, value in network("_ema").state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_optimizer_and_frozen_dicts_need_no_jax(pickled, monkeypatch):
    """The classes exist while the file is written, and are gone when it is read."""
    state = namedtuple("ScaleByAdamState", "count mu nu")
    frozen = type("FrozenDict", (dict,), {"__reduce__": lambda self: (type(self), (dict(self),))})
    with monkeypatch.context() as patch:
        for module, kind in (("optax._src.transform", state), ("flax.core.frozen_dict", frozen)):
            kind.__module__ = module
            packages = module.split(".")
            for depth in range(1, len(packages) + 1):
                name = ".".join(packages[:depth])
                patch.setitem(sys.modules, name, ModuleType(name))
            setattr(sys.modules[module], kind.__name__, kind)
        average = {k: v.numpy() for k, v in golden("shortcut_tiny_params_ema").items()}
        path = pickled(opt_state=(state(np.int32(7), frozen(), {}),), params_ema=frozen(nested(average)))
    assert "optax._src.transform" not in sys.modules
    loaded = load_network(path, num_heads=4, input_size=8)
    assert torch.equal(loaded.blocks[0].attn.qkv.weight, network("_ema").blocks[0].attn.qkv.weight)


def test_code_in_a_pickle_is_not_executed(pickled, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    with pytest.raises(UserError, match="more than weights"):
        load_network(pickled(opt_state=Evil()), num_heads=4, input_size=8)
    assert not (tmp_path / "executed").exists()
    path = tmp_path / "other.pkl"
    path.write_bytes(pickle.dumps({"weights": 1}))
    with pytest.raises(UserError, match="no train_state"):
        load_network(path)


SIZES = {
    "celebahq256_dit_b2 (num_classes=1)": ("dit_b_2", 1, 130_324_496),
    "imagenet256_dit_b2 (num_classes=1000)": ("dit_b_2", 1000, 131_091_728),
    "imagenet256_dit_xl2 (num_classes=1000)": ("dit_xl_2", 1000, 676_440_848),
}


@pytest.mark.parametrize("size", SIZES)
def test_keys_of_every_published_size(size):
    listed = json.loads((GOLDEN / "shortcut_keys_all_sizes.json").read_text())[size]
    name, num_classes, count = SIZES[size]
    with torch.device("meta"):
        parameters = {key: torch.empty(spec["shape"]) for key, spec in listed.items()}
        expected = build_network(name, num_classes=num_classes, learn_sigma=False, step=True).state_dict()
    assert sum(value.numel() for value in parameters.values()) == count
    found = convert_shortcut(parameters, expected["blocks.0.attn.proj.bias"].numel() // (64 if "b_2" in name else 72))
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items() if k != "pos_embed"}
