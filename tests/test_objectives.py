"""What holds for every objective of the configs, on every kind of network."""

import pytest
import torch
from helpers import ROOT, SMALL_FLOW, compose
from torch.testing import assert_close

from ditune.build import build_parts
from ditune.draws import Draws
from ditune.objectives import State
from ditune.training import train

OBJECTIVES = sorted(path.stem for path in (ROOT / "configs" / "objective").glob("*.yaml"))
NETWORKS = ("tiny", "tiny_moe")
SIZE = 64


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_teaches_every_network(tmp_path, pictures, objective, network):
    """Finite gradients reach every parameter; the loss is the mean over samples and not of how they are cut."""
    overrides = [*SMALL_FLOW[:-1], f"objective={objective}", f"data.root={pictures}", f"network={network}", "peft=full"]
    learned = objective == "diffusion"
    parts = build_parts(compose(tmp_path, *overrides, f"network.learn_sigma={str(learned).lower()}"))
    network = parts.network
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)  # adaLN-Zero lets no gradient through at first
    x0 = torch.randn(SIZE, *parts.autoencoder.latent_shape(16))
    y = torch.arange(SIZE) % 3
    parts.objective.check(SIZE)
    state = State(30, 100, SIZE, network, network)

    def loss(rows):
        return parts.objective.loss(network, (x0[rows], y[rows]), Draws(0, 30, rows), state)

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
    assert parts.objective.denoising(network, (x0, y), Draws(0, 0, range(SIZE))).shape == (SIZE,)


@pytest.mark.parametrize("objective", ["mean_flow", "so_flow"])
def test_a_run_in_bf16_with_micro_steps(tmp_path, pictures, objective):
    overrides = [*SMALL_FLOW[:-1], f"objective={objective}", f"data.root={pictures}", "peft=full", "max_steps=2"]
    assert (
        train(compose(tmp_path, *overrides, "trainer.precision=bf16-mixed", "trainer.accumulate_grad_batches=2")) == 0
    )
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert "train/loss_step_1_128" in header
    assert "train/velocity_rms" in header
