"""Processes, the diffusion objective and samplers: conversions, weights, respacing, guidance, noise, refusals."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ditune.errors import UserError
from ditune.objectives import GaussianDiffusion, drop_labels
from ditune.processes import FlowProcess, GaussianProcess, kept_timesteps
from ditune.rng import StepRandom
from ditune.samplers import (
    DDIM,
    DDPM,
    ConsistencySampler,
    Euler,
    Multistep,
    NoiseStream,
    ShortcutSampler,
    check,
    guided,
    sample,
)

SHAPE = (3, 4, 4)
NULL = 5


class Linear1x1(nn.Module):
    """A smallest network: a 1x1 convolution shifted by time and label, that counts the rows it is asked for."""

    num_classes = NULL

    def __init__(self, out_channels: int = 3):
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Conv2d(3, out_channels, 1)
        self.label = nn.Embedding(NULL + 1, out_channels)
        self.rows: list[int] = []

    def forward(self, x, t, y):
        self.rows.append(len(x))
        return self.mix(x) + self.label(y)[:, :, None, None] + (t / 1000).view(-1, 1, 1, 1)


def fixed(**kwargs) -> GaussianProcess:
    return GaussianProcess(variance="fixed_small", **kwargs)


def batch(n: int = 4):
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, n, *SHAPE, generator=generator)
    return x0, noise, torch.arange(n) % NULL


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_true_prediction_gives_back_data_and_noise(prediction, schedule):
    process = fixed(schedule=schedule, prediction=prediction)
    x0, noise = (tensor.double() for tensor in batch(6)[:2])
    t = torch.tensor([0, 1, 250, 500, 990, 998])
    x_t = process.q_sample(x0, t, noise)
    predicted = process.predict(process.target(x0, noise, t), x_t, t)
    assert_close(predicted.x0, x0, atol=1e-8, rtol=0)
    assert_close(predicted.epsilon, noise, atol=1e-8, rtol=0)
    mean, _, log_variance = process.q_posterior(x0, x_t, t)
    assert_close(predicted.mean, mean, atol=1e-8, rtol=0)
    assert torch.equal(predicted.log_variance, log_variance)


def test_learned_variance_lies_between_its_bounds():
    process = GaussianProcess()
    x_t, _, _ = batch()
    t = torch.tensor([0, 10, 500, 999])
    for fraction, name in [(-1.0, "posterior_log_variance_clipped"), (1.0, "log_betas")]:
        output = torch.cat([x_t, torch.full_like(x_t, fraction)], dim=1)
        expected = process.at(name, t, x_t).expand_as(x_t)
        assert_close(process.predict(output, x_t, t).log_variance, expected)


def test_config_rebuilds_the_process():
    process = GaussianProcess("cosine", 100, "v", "fixed_large").respaced("ddim20")
    again = GaussianProcess(**process.config)
    assert again.config == process.config
    assert torch.equal(again.timestep_map, torch.arange(0, 100, 5))
    assert torch.equal(again.tables["betas"], process.tables["betas"])


@pytest.mark.parametrize("respacing", ["", "50", "ddim25", "10,20,30", "1", "1000"])
def test_respacing_keeps_the_cumulative_alphas(respacing):
    full, short = GaussianProcess(), GaussianProcess(respacing=respacing)
    kept = full.tables["alphas_cumprod"][short.timestep_map]
    assert_close(short.tables["alphas_cumprod"], kept, rtol=1e-12, atol=0)
    assert all(torch.isfinite(short.tables[name]).all() for name in ("log_betas", "posterior_log_variance_clipped"))


@pytest.mark.parametrize("steps", range(2, 1001, 37))
def test_a_number_of_steps_reaches_from_end_to_end(steps):
    kept = kept_timesteps(str(steps), 1000)
    assert len(np.unique(kept)) == steps
    assert (kept[0], kept[-1]) == (0, 999)


@pytest.mark.parametrize("respacing", ["0", "-3", "1001", "fifty", "10,,20", "ddim", "ddim0", "ddim300", "600,1"])
def test_respacing_that_does_not_fit_is_refused(respacing):
    with pytest.raises(UserError, match="does not fit"):
        GaussianProcess(respacing=respacing)


@pytest.mark.parametrize(
    "config",
    [{"schedule": "sigmoid"}, {"prediction": "score"}, {"variance": "learned"}, {"timesteps": 0}, {"timesteps": 20}],
)
def test_unknown_process_is_refused(config):
    with pytest.raises(UserError):
        GaussianProcess(**config)


def test_channels_that_do_not_suit_the_variance_are_refused():
    x_t, _, y = batch()
    with pytest.raises(UserError, match="learn_sigma"):
        GaussianProcess().predict(x_t, x_t, y)


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_weight_v_measures_the_error_of_v(prediction):
    process = fixed(prediction=prediction)
    x0, noise, _ = batch()
    t = torch.tensor([100, 400, 600, 800])
    weights = GaussianDiffusion(process, weight="v", max_weight=1e9).weights["weight"]
    x_t = process.q_sample(x0, t, noise)
    predicted = process.predict(process.target(x0, noise, t) + 0.1, x_t, t)  # the same error everywhere
    alpha, sigma = process.at("alpha", t, x0), process.at("sigma", t, x0)
    error = (alpha * (predicted.epsilon - noise) - sigma * (predicted.x0 - x0)).square().flatten(1).mean(dim=1)
    assert_close(weights[t] * 0.01, error.double(), rtol=1e-4, atol=0)


def test_weights_are_exact():
    abar = GaussianProcess().tables["alphas_cumprod"]
    snr = abar / (1 - abar)
    cases = {
        ("none", "epsilon"): torch.ones_like(abar),
        ("v", "epsilon"): (1 / abar).clamp(max=400),
        ("v", "x0"): (1 / (1 - abar)).clamp(max=400),
        ("v", "v"): torch.ones_like(abar),
        ("min_snr", "epsilon"): snr.clamp(max=5) / snr,
        ("min_snr", "x0"): snr.clamp(max=5),
        ("min_snr", "v"): snr.clamp(max=5) / (snr + 1),
    }
    for (weight, prediction), expected in cases.items():
        objective = GaussianDiffusion(fixed(prediction=prediction), weight=weight)
        assert_close(objective.weights["weight"], expected, rtol=1e-12, atol=0)


def test_loss_is_its_parts():
    process = GaussianProcess(prediction="x0")
    objective = GaussianDiffusion(process, weight="min_snr", vb_weight=0.25)
    network = Linear1x1(out_channels=6)
    x0, _, y = batch(8)
    loss = objective.loss(network, (x0, y), StepRandom(seed=0, step=3, positions=range(8)))
    loss.total.backward()
    assert network.mix.weight.grad.isfinite().all()
    assert {name: part.shape for name, part in loss.parts.items()} == dict.fromkeys(("mse", "vb", "loss"), (8,))
    assert not any(part.requires_grad for part in loss.parts.values())
    t = (loss.time * 1000).round().long()
    expected = objective.weights["weight"][t].float() * loss.parts["mse"] + 0.25 * loss.parts["vb"]
    assert_close(loss.parts["loss"], expected)
    assert_close(loss.parts["loss"].mean(), loss.total.detach())


def test_loss_does_not_depend_on_how_the_batch_is_cut():
    objective, network = GaussianDiffusion(fixed()), Linear1x1()
    x0, _, y = batch(6)
    whole = objective.loss(network, (x0, y), StepRandom(0, 0, range(6)))
    parts = [objective.loss(network, (x0[rows], y[rows]), StepRandom(0, 0, rows)) for rows in ([0, 1], [2, 3], [4, 5])]
    assert_close(torch.cat([part.parts["loss"] for part in parts]), whole.parts["loss"])


def test_bound_of_the_hybrid_loss_teaches_the_variance_only():
    objective, network = GaussianDiffusion(GaussianProcess()), Linear1x1(out_channels=6)
    x0, noise, y = batch()
    losses = objective.losses(network, x0, torch.tensor([0, 5, 500, 999]), y, noise)
    losses["vb"].sum().backward()
    assert network.mix.weight.grad[:3].abs().max() == 0
    assert network.mix.weight.grad[3:].abs().max() > 0


def test_labels_are_dropped_at_their_rate():
    y = torch.zeros(4000, dtype=torch.int64)
    dropped = drop_labels(y, StepRandom(0, 0, range(4000)), 0.1, NULL)
    assert set(dropped.tolist()) == {0, NULL}
    assert (dropped == NULL).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert torch.equal(drop_labels(y, StepRandom(0, 0, range(4000)), 0.0, NULL), y)


@pytest.mark.parametrize(
    "config",
    [{"loss": "l1"}, {"weight": "p2"}, {"loss": "kl", "weight": "v"}, {"label_drop": 1.5}, {"vb_weight": -1}],
)
def test_unknown_objective_is_refused(config):
    with pytest.raises(UserError):
        GaussianDiffusion(fixed(), **config)


@pytest.mark.parametrize("sampler", [DDPM(), DDIM(), DDIM(eta=1.0)], ids=["ddpm", "ddim", "ddim_eta1"])
def test_an_image_does_not_depend_on_its_company(sampler):
    network, y = Linear1x1(), torch.arange(5)

    def draw(indices):
        stream = NoiseStream(7, indices, SHAPE)
        return sample(
            network, fixed(), stream.next(), y[indices], sampler=sampler, steps=8, guidance=2.0, next_noise=stream.next
        )

    assert_close(draw([3]), draw([0, 1, 2, 3, 4])[3:4], atol=1e-4, rtol=1e-5)


def test_noise_stream_is_a_function_of_seed_and_index():
    a, b = NoiseStream(7, [0, 1, 2], SHAPE), NoiseStream(7, [2, 0], SHAPE)
    for _ in range(3):
        ours, theirs = a.next(), b.next()
        assert torch.equal(ours[[2, 0]], theirs)
        assert not torch.equal(ours[0], ours[1])
    assert not torch.equal(NoiseStream(8, [0], SHAPE).next(), NoiseStream(7, [0], SHAPE).next())


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_ddim_finds_the_only_picture_it_is_taught(prediction):
    process = fixed(prediction=prediction)
    picture = batch(1)[0].clamp(-1, 1)

    def oracle(x, t, y):  # the exact prediction when all data are one picture
        alpha, sigma = process.at("alpha", t, x), process.at("sigma", t, x)
        return process.target(picture.expand_as(x), (x - alpha * picture) / sigma, t)

    oracle.num_classes = NULL
    noise = batch(4)[1]
    for sampler in (DDIM(), DDPM()):
        x = sample(oracle, process, noise, torch.zeros(4, dtype=torch.int64), sampler=sampler, steps=50)
        assert_close(x, picture.expand_as(x), atol=0.02, rtol=0)


def test_reverse_ddim_comes_back():
    """With the exact noise prediction for data of N(0, 1/4), whose noise must be standard normal."""
    process = fixed(respacing="250")
    alphas_cumprod = GaussianProcess().tables["alphas_cumprod"].float()

    def model_fn(x, t):
        abar = alphas_cumprod[t].view(-1, 1, 1, 1)
        return (1 - abar).sqrt() * x / (abar / 4 + 1 - abar)

    x0 = batch()[0] / 2
    noise = DDIM().reverse(model_fn, process, x0)
    assert_close(noise, 2 * x0, atol=0.1, rtol=0)
    assert_close(DDIM()(model_fn, process, noise, None), x0, atol=0.05, rtol=0)


def test_ddim_is_finite_where_float32_cancels():
    x, y = batch()[0], torch.zeros(4, dtype=torch.int64)
    for steps in (2, 3, 7, 10, 20, 100):
        assert sample(Linear1x1(), fixed(), x, y, sampler=DDIM(eta=1.0, clip=True), steps=steps).isfinite().all()


def test_guidance_runs_the_network_no_more_than_it_must():
    x, _, y = batch()
    for scale, interval, rows in [(1.0, (0.0, 1.0), 4), (3.0, (0.0, 1.0), 8), (3.0, (0.2, 0.4), 4)]:
        network = Linear1x1()
        out = guided(network, y, NULL, scale, interval)(x, torch.full((4,), 500))
        assert network.rows == [rows]
        if rows == 4:
            assert torch.equal(out, network(x, torch.full((4,), 500), y))


def test_guidance_interval_holds_per_row():
    x, _, y = batch()
    network, t = Linear1x1(), torch.tensor([100, 200, 400, 900])
    out = guided(network, y, NULL, 3.0, (0.2, 0.4))(x, t)
    conditional, unconditional = network(x, t, y), network(x, t, torch.full_like(y, NULL))
    everywhere = unconditional + 3 * (conditional - unconditional)
    assert_close(out[[1, 2]], everywhere[[1, 2]])
    assert torch.equal(out[[0, 3]], conditional[[0, 3]])


def test_steps_are_spaced_and_reported():
    seen = []
    x, y = batch()[0], torch.zeros(4, dtype=torch.int64)
    network = Linear1x1(out_channels=6)
    for sampler, steps in [(DDIM(), 4), (DDIM(), 3), (DDPM(), 4)]:
        sample(network, GaussianProcess(), x, y, sampler=sampler, steps=steps, on_step=lambda t, x, x0: seen.append(t))
    assert seen == [*(999, 666, 333, 0), *(999, 500, 0), *(999, 666, 333, 0)]


def test_training_goes_on_after_sampling():
    """Tables first placed while sampling, in inference mode, also serve autograd."""
    process, network = fixed(), Linear1x1()
    x0, _, y = batch()
    sample(network, process, x0, y, sampler=DDPM(), steps=1000)
    GaussianDiffusion(process).loss(network, (x0, y), StepRandom(0, 0, range(4))).total.backward()
    assert network.mix.weight.grad.isfinite().all()


@pytest.mark.parametrize("steps", [0, 1001])
def test_impossible_steps_are_refused(steps):
    with pytest.raises(UserError, match="between 1 and 1000"):
        sample(Linear1x1(), fixed(), batch()[0], batch()[2], sampler=DDPM(), steps=steps)


@pytest.mark.parametrize("sampler", [DDIM(), DDIM(eta=1.0), DDPM()])
def test_one_step_of_a_diffusion_is_refused(sampler):
    """It stands at t = 0, where the network expects an image and no noise."""
    with pytest.raises(UserError, match="cannot make an image from noise"):
        sample(Linear1x1(), fixed(), batch()[0], batch()[2], sampler=sampler, steps=1)
    sample(Linear1x1(), fixed(), batch()[0], batch()[2], sampler=sampler, steps=2)


def test_a_diffusion_of_one_timestep_has_its_noise_there():
    """The only step stands where all the noise is."""
    process = GaussianProcess("cosine", timesteps=1, prediction="x0", variance="fixed_small")
    assert process.tables["sigma"].item() > 0.99
    check(DDIM(), process, 1)


@pytest.mark.parametrize("method", ["dpm_solver", "unipc"])
def test_one_step_of_a_multistep_method_is_refused(method):
    with pytest.raises(UserError, match="needs an earlier step"):
        check(Multistep(method), FlowProcess(), 1)
    for few in (Euler(), ConsistencySampler()):  # networks that are made for it do it with these
        check(few, FlowProcess(), 1)
    check(ShortcutSampler(), FlowProcess(step="log2", base_steps=128), 1)


def test_impossible_eta_is_refused():
    with pytest.raises(UserError, match="eta"):
        DDIM(eta=2.0)
