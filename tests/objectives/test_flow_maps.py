"""MeanFlow, alpha-Flow and SoFlow, weights, and the samplers of second order, where the truth is known."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from torch.testing import assert_close

from ditune.errors import UserError
from ditune.networks import build_network
from ditune.objectives import AlphaFlow, FlowMatching, GaussianDiffusion, MeanFlow, SoFlow, State
from ditune.processes import FlowProcess, GaussianProcess
from ditune.rng import StepRandom
from ditune.samplers import Euler, Multistep, RungeKutta, ShortcutSampler, sample

PROCESS = FlowProcess(time_scale=1.0, step="size")
SPREAD = 0.5  # of the data N(0, SPREAD^2), whose flow is known in closed form


def scale_at(t):
    """x_t of the flow of Gaussian data is scale_at(t) times a constant."""
    return ((1 - t) ** 2 * SPREAD**2 + t**2) ** 0.5


def gaussian(x, t, y, d):
    """The exact mean velocity u(x, t, d) for data of N(0, SPREAD^2): (x_t - x_r) / d, at d = 0 its limit."""
    t, d = t.view(-1, 1, 1, 1), d.view(-1, 1, 1, 1)
    instant = (t - (1 - t) * SPREAD**2) / scale_at(t) ** 2 * x
    mean = (1 - scale_at(t - d) / scale_at(t)) / d.clamp(min=1e-6) * x
    return torch.where(d > 1e-3, mean, instant)


gaussian.num_classes = 5


def state(network=gaussian, step: int = 0, max_steps: int = 100) -> State:
    return State(step, max_steps, 8, network, network)


def points(n: int = 6):
    """x, t, d and labels, in double precision."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.4, 1.0, n, dtype=torch.float64)
    return x, t, t * torch.linspace(0.2, 1.0, n, dtype=torch.float64), torch.zeros(n, dtype=torch.int64)


def velocity_at(x, t):
    return gaussian(x, t, None, torch.zeros_like(t))


def test_the_true_mean_velocity_is_the_target_of_mean_flow():
    x, t, d, y = points()
    target = MeanFlow(PROCESS).mean_velocity(gaussian, x, velocity_at(x, t), t, d, y, state())
    assert_close(target, gaussian(x, t, y, d), atol=1e-9, rtol=0)


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.1])
def test_the_true_mean_velocity_is_the_mean_of_its_parts(alpha):
    """With the true mean velocity of the first part in place of v: the equation that alpha-Flow begins with."""
    x, t, d, y = points()
    first = gaussian(x, t, y, alpha * d)
    target = AlphaFlow(PROCESS, alpha=alpha).two_parts(gaussian, x, first, t, d, y, alpha)
    assert_close(target, gaussian(x, t, y, d), atol=1e-9, rtol=0)


def floats(values):
    return [value.float() if value.is_floating_point() else value for value in values]


def dit():
    torch.manual_seed(0)
    network = build_network("tiny", input_size=4, in_channels=3, num_classes=5, learn_sigma=False, step=True)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def test_half_an_alpha_is_a_shortcut_whose_first_half_is_the_path():
    """For any network: where its first half step says v, shortcut models have the target of alpha = 1/2."""
    network, (x, t, d, y) = dit(), floats(points())
    first = PROCESS.velocity(network, x, t, y, d / 2)
    half = d.view(-1, 1, 1, 1) / 2
    shortcut = (first + PROCESS.velocity(network, x - half * first, t - d / 2, y, d / 2)) / 2
    target = AlphaFlow(PROCESS, alpha=0.5).two_parts(network, x, first, t, d, y, 0.5)
    assert_close(target, shortcut, atol=1e-6, rtol=0)


def test_a_vanishing_alpha_is_mean_flow():
    network, (x, t, d, y) = dit(), floats(points())
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    u, mean_flow = PROCESS.velocity(network, x, t, y, d), MeanFlow(PROCESS)
    wanted = mean_flow.mean_velocity(network, x, v, t, d, y, state()) - u
    errors = []
    for alpha in (5e-2, 5e-3):
        target = mean_flow.two_parts(network, x, v, t, d, y, alpha)
        errors.append(((target - u) / alpha - wanted).abs().max().item())
    assert errors[1] < errors[0] / 5  # of first order in alpha
    assert errors[1] < 2e-2 * wanted.abs().max().item()


def test_the_derivative_of_a_transformer():
    """Forward mode through attention against a difference, whatever back end is preferred."""
    network, (x, t, d, y) = dit(), floats(points())
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    found = MeanFlow(PROCESS).derivative(network, x, v, t, d, y)
    ahead, behind = (PROCESS.velocity(network, x + e * v, t + e, y, d + e) for e in (3e-3, -3e-3))
    assert (found - (ahead - behind) / 6e-3).norm() < 1e-3 * found.norm()
    assert not found.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        rough = MeanFlow(PROCESS).derivative(network, x, v, t, d, y)
    assert (rough - found).norm() < 0.1 * found.norm()


def test_alpha_falls_and_the_ratio_shrinks():
    objective = AlphaFlow(PROCESS)
    alphas = [objective.alpha(state(step=step)) for step in range(101)]
    assert (alphas[0], alphas[50], alphas[100]) == (1.0, 0.5, 0.0)
    assert alphas == sorted(alphas, reverse=True)
    ratios = [SoFlow(PROCESS).scale(state(step=step)) for step in (0, 50, 100)]
    assert ratios == pytest.approx([0.1, (0.1 * 0.002) ** 0.5, 0.002])


@pytest.mark.parametrize("kind", [MeanFlow, AlphaFlow, SoFlow])
def test_ends_and_shares(kind):
    objective = kind(PROCESS, share=0.25)
    t, d = objective.sample_interval(StepRandom(0, 0, range(4000)))
    assert (d > 0).float().mean().item() == pytest.approx(
        0.2 if kind is SoFlow else 0.25, abs=0.03
    )  # where s is not below t
    assert ((d >= 0) & (d <= t) & (t < 1)).all()
    mean = {SoFlow: 0.2}.get(kind, -0.4)
    assert torch.logit(t[d == 0]).mean().item() == pytest.approx(mean, abs=0.06)


def test_guidance_is_learned_where_a_class_is_given():
    x, t, _, _ = points()
    y, v = torch.tensor([0, 1, 2, 5, 5, 0]), torch.ones_like(x)
    found = MeanFlow(PROCESS, guidance=3.0).guided_target(gaussian, x, v, t, y)
    expected = 3 * v - 2 * velocity_at(x, t)
    assert_close(found[y < 5], expected[y < 5])
    assert_close(found[y == 5], v[y == 5])


def test_weights_of_the_successors():
    """MeanFlow 1 / (e + c); SoFlow (e / r^2 + c)^-1/2 / r for steps, (e + c)^-1/2 for flow matching."""
    mse = torch.tensor([0.5, 0.02])

    class Targets:
        d = torch.tensor([0.3, 0.0])

    assert_close(MeanFlow(PROCESS).weights(mse, Targets, state()), 1 / (mse + 1e-3))
    r = 0.1
    expected = torch.stack([(mse[0] / r**2 + 1e-2) ** -0.5 / r, (mse[1] + 1e-2) ** -0.5])
    assert_close(SoFlow(PROCESS).weights(mse, Targets, state()), expected)


def test_flow_weights_are_exact():
    t = torch.tensor([0.9, 0.5, 0.25, 0.1])
    snr = ((1 - t) / t) ** 2
    cases = {
        "none": torch.ones(4),
        "x0": t**2,
        "epsilon": (1 - t) ** 2,
        "truncated_snr": torch.maximum(t, 1 - t) ** 2,
        "min_snr": snr.clamp(max=5) * t**2,
    }
    for weight, expected in cases.items():

        class Targets:
            pass

        Targets.t = t
        assert_close(FlowMatching(FlowProcess(), weight=weight).weights(torch.ones(4), Targets, state()), expected)


def test_diffusion_weights_are_exact():
    abar = GaussianProcess().tables["alphas_cumprod"]
    snr = abar / (1 - abar)
    on_x0 = {"x0": torch.ones_like(snr), "epsilon": snr, "truncated_snr": snr.clamp(min=1), "min_snr": snr.clamp(max=5)}
    divisors = {"x0": torch.ones_like(snr), "epsilon": snr, "v": snr + 1}
    for weight, value in on_x0.items():
        for prediction, divisor in divisors.items():
            process = GaussianProcess(prediction=prediction, variance="fixed_small")
            found = GaussianDiffusion(process, weight=weight).weights["weight"]
            assert_close(found, value / divisor, rtol=1e-12, atol=0)


# Samplers


SAMPLERS = {
    "euler": Euler(),
    "heun": RungeKutta("heun"),
    "midpoint": RungeKutta("midpoint"),
    "dpm_solver": Multistep("dpm_solver"),
    "unipc": Multistep("unipc"),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_method_comes_to_the_end_of_the_flow(name):
    """x_0 = SPREAD x_1 for Gaussian data; errors fall as the order says."""
    noise = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(4, dtype=torch.int64)

    def error(steps: int) -> float:
        x = sample(gaussian, PROCESS, noise, y, sampler=SAMPLERS[name], steps=steps)
        return (x - SPREAD * noise).abs().mean().item()

    coarse, fine = error(16), error(64)
    assert fine < coarse / (6 if isinstance(SAMPLERS[name], RungeKutta) else 3)
    assert fine < (0.02 if name == "euler" else 0.002)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [2, 7])
def test_unipc_gives_the_numbers_of_diffusers_own_loop(steps, shift):
    noise = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(steps, sigmas=np.linspace(1, 0, steps + 1)[:-1])
    x = noise
    for sigma, timestep in zip(scheduler.sigmas[:-1], scheduler.timesteps, strict=True):
        x = scheduler.step(velocity_at(x, sigma.expand(len(x))), timestep, x, return_dict=False)[0]
    found = sample(
        gaussian, PROCESS, noise, torch.zeros(4).long(), sampler=Multistep("unipc", shift=shift), steps=steps
    )
    assert Multistep("unipc", shift).scheduler(PROCESS.in_steps(steps).times(shift).numpy()).sigmas[0] == 1 - 1e-6
    assert_close(found, x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_dpm_solver_gives_the_numbers_of_its_paper(shift):
    """DPM-Solver++(2M), algorithm 2 of arXiv 2211.01095, in float64; the first step and the last are of order 1."""
    noise = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    times = PROCESS.in_steps(6).times(shift).clamp(max=1 - 1e-6)
    half_log_snr = ((1 - times) / times).log()
    x, before = noise.double(), None
    for i, (t, s) in enumerate(pairwise(times)):
        x0 = x - t * velocity_at(x, t.expand(len(x)))
        if s == 0:
            x = x0
            break
        h, direction = half_log_snr[i + 1] - half_log_snr[i], x0
        if before is not None:
            ratio = (half_log_snr[i] - half_log_snr[i - 1]) / h
            direction = x0 + (x0 - before) / (2 * ratio)
        x, before = s / t * x - (1 - s) * (-h).expm1() * direction, x0
    found = sample(gaussian, PROCESS, noise, torch.zeros(4).long(), sampler=Multistep(shift=shift), steps=6)
    assert_close(found, x.float(), atol=2e-5, rtol=1e-5)


def test_one_jump_with_the_true_mean_velocity_is_the_whole_flow():
    noise = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for steps in (1, 3, 8):
        x = sample(gaussian, PROCESS, noise, torch.zeros(4).long(), sampler=ShortcutSampler(), steps=steps)
        assert_close(x, SPREAD * noise, atol=1e-5, rtol=0)


def test_rescaled_guidance_has_the_spread_of_none():
    x, y = torch.randn(4, 3, 4, 4), torch.tensor([0, 1, 2, 3])

    def network(x, t, y, d):
        return x * (1 + y.view(-1, 1, 1, 1))

    network.num_classes = 5
    one_step = {"sampler": Euler(), "steps": 1}
    plain, pushed, rescaled = (
        x - sample(network, PROCESS, x, y, guidance=scale, guidance_rescale=rescale, **one_step)
        for scale, rescale in ((1.0, 0.0), (3.0, 0.0), (3.0, 1.0))
    )
    assert_close(rescaled.std(dim=(1, 2, 3)), plain.std(dim=(1, 2, 3)))
    assert not torch.allclose(pushed.std(dim=(1, 2, 3)), plain.std(dim=(1, 2, 3)))


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda: MeanFlow(FlowProcess()), "step=size"),
        (lambda: MeanFlow(FlowProcess(step="log2", base_steps=128)), "base_steps=null"),
        (lambda: MeanFlow(PROCESS, share=2), "objective.share"),
        (lambda: AlphaFlow(PROCESS, begin=0.8, end=0.5), "objective.end is"),
        (lambda: SoFlow(PROCESS, first_ratio=0), "first_ratio"),
        (lambda: RungeKutta("rk4"), "heun, midpoint"),
        (lambda: Multistep("ddim"), "dpm_solver, unipc"),
        (lambda: FlowMatching(FlowProcess(), weight="p2"), "min_snr"),
    ],
)
def test_what_cannot_work_is_refused(work, message):
    with pytest.raises(UserError, match=message):
        work()
