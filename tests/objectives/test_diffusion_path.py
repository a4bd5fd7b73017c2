"""A diffusion read as a flow on its own path, where the truth is known."""

import pytest
import torch
from torch.testing import assert_close

from ditune.config.base_network import match_process
from ditune.errors import UserError
from ditune.processes import DiffusionPath, FlowProcess, GaussianProcess, build_process
from ditune.samplers import Euler, sample

DIFFUSIONS = [GaussianProcess(s, prediction=p).config for s in ("linear", "cosine") for p in ("epsilon", "x0", "v")]


def points(n: int = 8):
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(n, 3, 4, 4, generator=generator) for _ in range(2))
    return x0, noise, torch.linspace(0.05, 0.95, n), torch.zeros(n, dtype=torch.int64)


def true_network(process: DiffusionPath, x0, noise):
    """The exact prediction at any fractional timestep, by the interpolated schedule."""

    def network(x, timestep, y):
        _, alpha, sigma, *_ = process.coefficients(timestep / (process.gaussian.steps - 1))
        alpha, sigma = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
        return {"epsilon": noise, "x0": x0, "v": alpha * noise - sigma * x0}[process.gaussian.prediction]

    network.num_classes = 3
    return network


@pytest.mark.parametrize("diffusion", DIFFUSIONS, ids=lambda d: f"{d['schedule']}-{d['prediction']}")
def test_its_points_are_the_diffusions_and_its_velocity_is_theirs(diffusion):
    process, (x0, noise, t, y) = DiffusionPath(diffusion), points()
    whole = (t * 999).round()
    x = process.x_t(x0, noise, whole / 999)
    assert_close(x, process.gaussian.q_sample(x0, whole.long(), noise), atol=2e-5, rtol=1e-4)
    velocity = process.velocity(true_network(process, x0, noise), process.x_t(x0, noise, t), t, y)
    assert_close(velocity, process.target(x0, noise, t), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("diffusion", DIFFUSIONS[::3], ids=lambda d: d["schedule"])
def test_the_velocity_is_the_derivative_of_the_path(diffusion):
    process, (x0, noise, t, _) = DiffusionPath(diffusion), points()
    t = (t * 999).floor() / 999 + 0.5 / 999  # between two timesteps, where the interpolation is smooth
    h = 2e-4
    difference = (process.x_t(x0, noise, t + h) - process.x_t(x0, noise, t - h)) / (2 * h)
    assert_close(difference, process.target(x0, noise, t), atol=2e-2, rtol=2e-2)
    ends = torch.tensor([0.0, 1.0]).repeat(4)
    assert process.target(x0, noise, ends).isfinite().all()


def test_its_samples_follow_the_probability_flow():
    """For data of N(0, s^2) a path multiplies its point by sqrt(alpha^2 s^2 + sigma^2): the end of the ODE is known."""
    process, spread = DiffusionPath(DIFFUSIONS[4]), 0.5  # cosine, x_0
    noise = points()[1]

    def network(x, timestep, y):
        _, alpha, sigma, *_ = process.coefficients(timestep / 999)
        alpha, sigma = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
        return alpha * spread**2 / (alpha**2 * spread**2 + sigma**2) * x

    network.num_classes = 3
    y = torch.zeros(len(noise), dtype=torch.int64)
    _, alpha, sigma, *_ = process.coefficients(torch.tensor([0.0, 1.0]))
    scale = (alpha**2 * spread**2 + sigma**2).sqrt()
    found = sample(network, process, noise, y, sampler=Euler(), steps=500)
    assert_close(found, noise * scale[0] / scale[1], atol=0.02, rtol=0.02)


def test_it_is_stored_and_chosen():
    diffusion = DIFFUSIONS[5]
    process = FlowProcess(step="size", bridge="path").on_diffusion(diffusion)
    assert isinstance(process, DiffusionPath)
    assert process.config["kind"] == "diffusion_path"
    again = build_process(process.config)
    assert isinstance(again, DiffusionPath)
    assert again.config == process.config
    assert isinstance(process.changed(straightened=True), DiffusionPath)
    # what a file was trained on is kept, whatever the config says
    assert isinstance(match_process(FlowProcess(), process.config), DiffusionPath)
    aligned = FlowProcess().on_diffusion(diffusion)
    assert not isinstance(match_process(FlowProcess(bridge="path"), aligned.config), DiffusionPath)
    assert "bridge" not in FlowProcess().config  # stored files stay as they are
    with pytest.raises(UserError, match=r"objective\.process\.bridge"):
        FlowProcess(bridge="raw")
