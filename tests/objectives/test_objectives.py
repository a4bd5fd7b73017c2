"""What holds for every objective of the configs, on every kind of network."""

import pytest
import torch
from torch.testing import assert_close

from ditune.checkpoints import save_network
from ditune.commands.train import train
from ditune.config import rules
from ditune.config.components import build_components
from ditune.config.training import resume_key
from ditune.errors import UserError
from ditune.objectives import FlowMatching, GaussianDiffusion, MeanFlow, State
from ditune.processes import FlowProcess, GaussianProcess
from ditune.rng import StepRandom
from helpers import ROOT, SMALL_FLOW, compose

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
    state = State(30, 100, SIZE, network, network)

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
