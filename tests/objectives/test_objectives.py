"""What holds for every objective of the configs, on every kind of network."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from ditune.checkpoints import read_adapter, save_network
from ditune.commands.train import train
from ditune.config import rules
from ditune.config.components import build_components
from ditune.config.training import resume_key
from ditune.errors import UserError
from ditune.moe.balance import Watched
from ditune.networks import DiTMoE
from ditune.objectives import FlowMatching, GaussianDiffusion, MeanFlow, State
from ditune.processes import FlowProcess, GaussianProcess
from ditune.rng import StepRandom
from ditune.run import load_run
from helpers import ROOT, SMALL_FLOW, compose, open_gates

OBJECTIVES = sorted(path.stem for path in (ROOT / "configs" / "objective").glob("[!_]*.yaml"))
NETWORKS = ("tiny", "tiny_moe")
SIZE = 64


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_teaches_every_network(tmp_path, pictures, objective, network):
    """Finite gradients reach every parameter; the loss is the mean over samples and not of how they are cut."""
    overrides = [*SMALL_FLOW[:-1], f"objective={objective}", f"data.root={pictures}", f"network={network}", "peft=full"]
    learned = objective == "diffusion"
    parts = build_components(compose(tmp_path, *overrides, f"network.learn_sigma={str(learned).lower()}"))
    network = parts.network
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)  # adaLN-Zero lets no gradient through at first
    x0 = torch.randn(SIZE, *parts.autoencoder.latent_shape(16))
    y = torch.arange(SIZE) % 3
    parts.objective.check(SIZE)
    state = State(30, 100, SIZE, network, network, network)

    def loss(rows):
        return parts.objective.loss(network, (x0[rows], y[rows]), StepRandom(0, 30, rows), state)

    whole = loss(range(SIZE))
    whole.total.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    told = network.step_embedder is not None
    assert told == bool(parts.objective.process.network)
    if told:
        assert network.step_embedder.mlp[2].weight.grad.abs().max() > 0
    assert_close(whole.parts["loss"].mean(), whole.total.detach())
    assert ((whole.time >= 0) & (whole.time <= 1)).all()
    if isinstance(network, DiTMoE):  # what is recorded of the routing is of the samples of the loss
        watched = Watched(network)
        seen = parts.objective.loss(watched, (x0, y), StepRandom(0, 30, range(SIZE)), state)
        assert watched.y.shape == seen.time.shape
    parts_of_it = [loss(rows) for rows in (range(20), range(20, SIZE))]
    for name in whole.parts:
        assert_close(torch.cat([part.parts[name] for part in parts_of_it]), whole.parts[name], atol=1e-4, rtol=1e-4)
    assert parts.objective.denoising(network, (x0, y), StepRandom(0, 0, range(SIZE))).shape == (SIZE,)


@pytest.mark.parametrize("objective", ["mean_flow", "so_flow"])
def test_a_run_in_bf16_with_micro_steps(tmp_path, pictures, objective):
    overrides = [*SMALL_FLOW[:-1], f"objective={objective}", f"data.root={pictures}", "peft=full", "max_steps=2"]
    assert (
        train(compose(tmp_path, *overrides, "trainer.precision=bf16-mixed", "trainer.accumulate_grad_batches=2")) == 0
    )
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert "train/loss_step_1_128" in header
    assert "train/velocity_rms" in header


def test_a_run_whose_guidance_is_an_input(tmp_path, pictures, base):
    """From a diffusion base, by an adapter: the new input trains and is stored, and sampling chooses it."""
    overrides = [*SMALL_FLOW[:-1], "objective=improved_mean_flow", f"data.root={pictures}", f"pretrained={base}"]
    overrides += ["objective.control=true", "objective.guidance=3", "peft=lora", "max_steps=3", "optimizer.lr=0.01"]
    cfg = compose(tmp_path, *overrides, "sampler.guidance_input=2", "ema.decay=0")
    assert train(cfg) == 0
    run = load_run(tmp_path)
    assert any("guidance_embedder" in name for name in read_adapter(tmp_path / "adapter")[1])
    found = [
        replace(run.generator, guidance_input=w).generate(run.network, torch.tensor([0, 1]), seed=0)
        for w in (None, 1.0, 3.0)
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    plain = resume_key(other := compose(tmp_path, *overrides, "objective.control=false"), build_components(other))
    assert "control" not in plain["objective"]


def test_a_method_without_forward_derivatives_is_refused(tmp_path, pictures):
    """Before the training: alpha-Flow would come to its first derivative only after most of it."""
    flow = [*SMALL_FLOW[:-1], "objective=alpha_flow", f"data.root={pictures}"]
    base, parts = tmp_path / "base.safetensors", build_components(compose(tmp_path, *flow, "peft=full"))
    facts = {"class_names": parts.images.class_names, "autoencoder": parts.autoencoder.latent_fingerprint}
    parts.method.merge(parts.network)
    save_network(base, parts.network, parts.objective.process.config, **facts)
    cfg = compose(tmp_path, *flow, "peft=loha", "peft.r=2", f"pretrained={base}")
    with pytest.raises(UserError, match="differentiates the network by its input"):
        rules.check(build_components(cfg), rules.OF_A_TRAINING)
    other = [*SMALL_FLOW, f"data.root={pictures}", "peft=full", f"pretrained={base}"]
    with pytest.raises(UserError, match=r"another process.*Set objective"):  # and not: choose another network
        build_components(compose(tmp_path, *other))


def test_a_method_without_forward_derivatives_learns_by_differences(tmp_path, pictures):
    """LoHa, after the base's gates have been opened, or nothing of it would reach the output."""
    flow = [*SMALL_FLOW[:-1], "objective=mean_flow", f"data.root={pictures}", "objective.share=1"]
    base, parts = tmp_path / "base.safetensors", build_components(compose(tmp_path, *flow, "peft=full"))
    open_gates(parts.network)
    facts = {"class_names": parts.images.class_names, "autoencoder": parts.autoencoder.latent_fingerprint}
    save_network(base, parts.network, parts.objective.process.config, **facts)
    by = [f"pretrained={base}", "objective.derivative=difference"]
    c = build_components(compose(tmp_path, *flow, "peft=loha", "peft.r=2", *by))
    rules.check(c, rules.OF_A_TRAINING)
    x0, y = torch.randn(8, *c.autoencoder.latent_shape(16)), torch.arange(8) % 3
    loss = c.objective.loss(c.network, (x0, y), StepRandom(0, 0, range(8)), State(0, 9, 8, c.network, c.network))
    loss.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in c.method.trainable(c.network).values())
    plain = build_components(compose(tmp_path, *flow, "peft=full", f"pretrained={base}"))
    forward = plain.objective.loss(
        plain.network, (x0, y), StepRandom(0, 0, range(8)), State(0, 9, 8, plain.network, plain.network)
    )
    assert_close(loss.total, forward.total, atol=0, rtol=1e-3)  # LoHa starts as the base


def test_the_derivatives_form_enters_a_runs_identity_only_if_it_is_new(tmp_path, pictures):
    def key(*overrides):
        flow = [*SMALL_FLOW[:-1], "objective=mean_flow", f"data.root={pictures}", "peft=full", *overrides]
        return resume_key(cfg := compose(tmp_path, *flow), build_components(cfg))["objective"]

    assert not {"derivative", "difference_step", "tangent"} & set(key())
    assert key("objective.derivative=difference") == key() | {"derivative": "difference"}
    assert key("objective.tangent=network") == key() | {"tangent": "network"}


@pytest.mark.parametrize(
    ("objective", "scheduled"), [("alpha_flow", True), ("progressive_distillation", True), ("shortcut", False)]
)
def test_a_schedule_over_the_training_is_not_stretched_by_resuming(tmp_path, pictures, objective, scheduled):
    def marks(steps):
        overrides = [*SMALL_FLOW[:-1], f"objective={objective}", f"data.root={pictures}", "peft=full"]
        cfg = compose(tmp_path, *overrides, f"max_steps={steps}")
        return resume_key(cfg, build_components(cfg))

    assert (marks(5) != marks(6)) == scheduled


@pytest.mark.parametrize(
    ("objective", "needed"),
    [
        (lambda: FlowMatching(FlowProcess(), label_drop=0), False),
        (lambda: FlowMatching(FlowProcess()), True),
        (lambda: MeanFlow(FlowProcess(step="size"), label_drop=0), False),
        (lambda: MeanFlow(FlowProcess(step="size"), label_drop=0, guidance=2.0), True),
        (lambda: GaussianDiffusion(GaussianProcess(), label_drop=0), False),
        (lambda: GaussianDiffusion(GaussianProcess()), True),
    ],
)
def test_dropped_labels_and_guidance_need_a_null_class(objective, needed):
    assert objective().needs_null_class is needed


@pytest.mark.parametrize("method", ["full", "lora"])
def test_decoupled_time_is_trained_saved_and_read_again(tmp_path, pictures, base, method):
    """From a diffusion without a step size; the network of the run has the key, and samples with it."""
    flow = [*SMALL_FLOW[:-1], "objective=mean_flow", "objective.process.step_blocks=1", f"data.root={pictures}"]
    cfg = compose(tmp_path, *flow, f"peft={method}", f"pretrained={base}", "max_steps=2", "optimizer.lr=0.01")
    assert train(cfg) == 0
    run = load_run(tmp_path)
    assert (run.network.config["step_blocks"], run.network.early_blocks) == (1, len(run.network.blocks) - 1)
    x, t, y = torch.randn(2, 3, 16, 16), torch.full((2,), 500.0), torch.tensor([0, 1])
    with torch.no_grad():
        outputs = [run.network(x, t, y, torch.full((2,), d)) for d in (0.0, 500.0)]
    assert not torch.equal(*outputs)
