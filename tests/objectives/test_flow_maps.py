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


def dit(**inputs: bool):
    torch.manual_seed(0)
    network = build_network("tiny", input_size=4, in_channels=3, num_classes=5, learn_sigma=False, step=True, **inputs)
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


def test_a_central_difference_is_of_second_order():
    """Against forward mode in fp64, through a transformer: half of h has a quarter of the error."""
    network, (x, t, d, y) = dit().double(), points()
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = MeanFlow(PROCESS).derivative(network, x, v, t, d, y)
    errors = [
        (
            MeanFlow(PROCESS, derivative="difference", difference_step=h).derivative(network, x, v, t, d, y) - exact
        ).norm()
        for h in (1e-2, 5e-3)
    ]
    assert (errors[0] / errors[1]).item() == pytest.approx(4, rel=0.01)
    assert errors[1] < 1e-3 * exact.norm()


def test_no_difference_reaches_beyond_the_end_of_a_step():
    """A step of d < h has h = d: the network is never asked for a step below 0, or a time below r."""
    asked = []

    def network(x, t, y, d):
        asked.append((t, d))
        return gaussian(x, t, y, d)

    x, t, _, y = points()
    d = torch.linspace(1e-4, 0.05, len(t), dtype=torch.float64)
    found = MeanFlow(PROCESS, derivative="difference", difference_step=0.01).derivative(network, x, x, t, d, y)
    assert all((step >= 0).all() and (time - step >= -1e-12).all() for time, step in asked)
    assert len(asked) == 2
    assert found.isfinite().all()


def test_the_true_mean_velocity_is_the_target_of_improved_mean_flow():
    """Along the velocity u(x_t, t, t) of the network, whatever velocity the sample has."""
    x, t, d, y = points()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    v = velocity_at(x, t) + noise
    target = MeanFlow(PROCESS, tangent="network").mean_velocity(gaussian, x, v, t, d, y, state())
    assert_close(target - noise, gaussian(x, t, y, d), atol=1e-9, rtol=0)
    plain = MeanFlow(PROCESS).mean_velocity(gaussian, x, v, t, d, y, state())
    assert (plain - target).abs().max() > 0.1  # MeanFlow's derivative has the sample's velocity as its direction


def test_improved_mean_flow_of_a_linear_field():
    """u = a x + b t + c d has du/dt = a u(x, t, 0) + b + c, so the target is v - d (a (a x + b t) + b + c)."""
    a, b, c = 0.7, -0.3, 0.2

    def linear(x, t, y, d):
        return a * x + b * t.view(-1, 1, 1, 1) + c * d.view(-1, 1, 1, 1)

    x, t, d, y = points()
    v, (time, step) = torch.ones_like(x), (value.view(-1, 1, 1, 1) for value in (t, d))
    for derivative in ("jvp", "difference"):
        objective = MeanFlow(PROCESS, tangent="network", derivative=derivative)
        target = objective.mean_velocity(linear, x, v, t, d, y, state())
        assert_close(target, v - step * (a * (a * x + b * time) + b + c), atol=1e-9, rtol=0)


def test_the_regression_of_the_two_papers_is_one():
    """V - v = u - (v - d sg(du/dt)): value and gradient of improved MeanFlow's loss on V are those of the loss on u."""
    network, (x, t, d, y) = dit(), floats(points())
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    objective = MeanFlow(PROCESS, tangent="network")
    u = PROCESS.velocity(network, x, t, y, d)
    slope = objective.derivative(network, x, PROCESS.velocity(network, x, t, y).detach(), t, d, y)
    whole = u + d.view(-1, 1, 1, 1) * slope  # V
    weight = network.final_layer.linear.weight
    (on_v,) = torch.autograd.grad((whole - v).square().mean(), weight, retain_graph=True)
    target = objective.mean_velocity(network, x, v, t, d, y, state())
    (on_u,) = torch.autograd.grad((u - target).square().mean(), weight)
    assert_close(on_u, on_v, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tangent", ["path", "network"])
def test_without_steps_it_is_flow_matching_to_the_bit(tangent):
    """r = t for every sample."""
    network, random = dit(), StepRandom(0, 0, range(6))
    batch = floats(points())[0], torch.arange(6) % 5
    plain = FlowMatching(PROCESS, times="logit_normal", mean=-0.4)
    found = MeanFlow(PROCESS, share=0, power=0, tangent=tangent).loss(network, batch, random, state(network))
    assert torch.equal(found.total, plain.loss(network, batch, random, state(network)).total)


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


# Guidance as an input


def guided_field(x, t, y, d, w=None):
    """v_null + w (v_c - v_null) with v_null = -x and v_c = (y + 1) x, whatever the step."""
    w = torch.ones_like(t) if w is None else w
    shift = torch.where(y == guided_field.num_classes, 0.0, w * (y + 2)).view(-1, 1, 1, 1)
    return -x + shift * x


guided_field.num_classes = 5


@pytest.mark.parametrize("tangent", ["path", "network"])
def test_plain_guidance_is_the_target_of_guidance_as_an_input(tangent):
    """The network that is guided by w already is its own target where v is its velocity without guidance."""
    x, t, d, _ = points()
    y, w = torch.tensor([0, 1, 2, 5, 4, 0]), torch.tensor([1.0, 1.5, 2.0, 1.0, 4.0, 8.0])
    objective = MeanFlow(PROCESS, guidance=8.0, control=True, tangent=tangent)
    v = guided_field(x, t, y, d)
    found = objective.guided_target(guided_field, x, v, t, y, w)
    assert_close(found, guided_field(x, t, y, d, w), atol=1e-6, rtol=1e-6)
    assert torch.equal(found[w == 1], v[w == 1])


def test_the_scales_of_guidance_as_an_input():
    objective, y = MeanFlow(PROCESS, guidance=8.0, control=True), torch.arange(6000) % 6
    w = objective.scales(gaussian, y, StepRandom(0, 0, range(6000)))
    assert (w[y == 5] == 1).all()
    drawn = w[y < 5].log() / np.log(8.0)
    assert (drawn.min() >= 0) & (drawn.max() <= 1)
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.02)  # uniform in log w
    assert drawn.std().item() == pytest.approx(12**-0.5, abs=0.02)
    assert MeanFlow(PROCESS, guidance=8.0).scales(gaussian, y, StepRandom(0, 0, range(6000))) is None


def test_every_call_but_that_of_the_null_class_is_given_the_scales():
    asked = []

    def network(x, t, y, d, w=None):
        asked.append((y, d, w))
        return guided_field(x, t, y, d, w)

    network.num_classes = 5
    objective = MeanFlow(
        PROCESS, share=1.0, guidance=4.0, control=True, tangent="network", derivative="difference", label_drop=0.3
    )
    x, y, random = floats(points(40))[0], torch.arange(40) % 5, StepRandom(0, 0, range(40))
    objective.loss(network, (x, y), random, state(network))
    dropped = asked[-1][0]
    w = objective.scales(network, dropped, random)
    assert 0 < (dropped == 5).sum() < 40
    without = [index for index, call in enumerate(asked) if call[2] is None]
    assert without == [1]  # u(x_t, t, 0 | null class, 1), after u(x_t, t, 0 | c, w)
    assert (asked[1][0] == 5).all()
    assert len(asked) == 6  # the direction, two of the difference, and the network in training
    assert torch.equal(asked[0][2], w[w != 1])
    for _, _, given in asked[2:]:
        assert torch.equal(given, w)


@pytest.mark.parametrize("tangent", ["path", "network"])
def test_without_guidance_the_input_changes_nothing_to_the_bit(tangent):
    network, random = dit(guided=True), StepRandom(0, 0, range(6))
    batch = floats(points())[0], torch.arange(6) % 5
    found = []
    for control in (False, True):
        objective = MeanFlow(PROCESS, share=0.5, tangent=tangent, control=control)
        loss = objective.loss(network, batch, random, state(network)).total
        found.append((loss, torch.autograd.grad(loss, network.final_layer.linear.weight)[0]))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_scale_below_one_is_refused():
    with pytest.raises(UserError, match=r"objective\.guidance is 0\.5"):
        MeanFlow(PROCESS, guidance=0.5, control=True)


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
        (lambda: MeanFlow(PROCESS, derivative="forward"), "jvp, difference"),
        (lambda: MeanFlow(PROCESS, difference_step=0.0), "difference_step"),
        (lambda: MeanFlow(PROCESS, tangent="sample"), "path, network"),
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


# Decoupled time: the last blocks alone are conditioned on the step size


def decoupled(kind, late):
    torch.manual_seed(0)
    sizes = {"input_size": 4, "in_channels": 3, "num_classes": 5, "learn_sigma": False}
    network = build_network(kind, **sizes, step=True, step_blocks=late)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


@pytest.mark.parametrize("kind", ["tiny", "tiny_moe"])
def test_all_blocks_late_is_the_plain_network_to_the_bit(kind):
    x, t, d, y = floats(points())
    plain = decoupled(kind, None)
    depth = len(plain.blocks)
    with torch.no_grad():
        expected = plain(x, t, y, d)
        assert torch.equal(decoupled(kind, depth)(x, t, y, d), expected)
        assert not torch.equal(decoupled(kind, depth - 1)(x, t, y, d), expected)
    assert "step_blocks" not in plain.config  # files of before have none


@pytest.mark.parametrize("kind", ["tiny", "tiny_moe"])
def test_early_blocks_do_not_know_the_step(kind):
    network, (x, t, d, y) = decoupled(kind, 1), floats(points())
    conditions = []
    for block in network.blocks:
        block.register_forward_pre_hook(lambda _, args: conditions.append(args[1]))
    with torch.no_grad():
        outputs = [network(x, t, y, step) for step in (d, d / 2)]
    depth = len(network.blocks)
    changed = [not torch.equal(conditions[i], conditions[depth + i]) for i in range(depth)]
    assert changed == [False] * (depth - 1) + [True]
    assert not torch.equal(*outputs)


def test_the_process_says_how_many_blocks_are_late():
    process = FlowProcess(step="size", step_blocks=2)
    assert process.network == {"step": True, "step_blocks": 2}
    assert process.changed(time_scale=1.0).network == process.network
    assert process.config == FlowProcess(step="size").config
    diffusion = GaussianProcess(variance="fixed_small").config
    for bridge in ("aligned", "path"):
        read = FlowProcess(step="size", step_blocks=2, bridge=bridge).on_diffusion(diffusion)
        assert read.changed(sigma_min=0.0).network == process.network
    with pytest.raises(UserError, match="step_blocks is 2"):
        FlowProcess(step_blocks=2)
    with pytest.raises(UserError, match="step_blocks is 0"):
        FlowProcess(step="size", step_blocks=0)
