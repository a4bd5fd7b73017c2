"""Schedules, losses and samplers give the numbers of facebookresearch/DiT, every entry of the golden files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from ditune.networks import DiT
from ditune.objectives import GaussianDiffusion
from ditune.objectives.variational_bound import (
    approximate_normal_cdf,
    bound_term,
    discretized_gaussian_log_likelihood,
    normal_kl,
)
from ditune.processes import GaussianProcess
from ditune.samplers import DDIM, DDPM, guided

GOLDEN = Path(__file__).parents[1] / "golden"
PROCESS = GaussianProcess()
SCHEDULES = {
    "full": PROCESS,
    "r250": PROCESS.respaced("250"),
    "r50": PROCESS.respaced("50"),
    "r10": PROCESS.respaced("10"),
    "ddim50": PROCESS.respaced("ddim50"),
    "ddim25": PROCESS.respaced("ddim25"),
    "s10_20_30": PROCESS.respaced("10,20,30"),
    "cosine": GaussianProcess("cosine"),
    "linear100": GaussianProcess(timesteps=100),
}
LOSSES = {
    "default": GaussianDiffusion(PROCESS),
    "rescale_learned_sigmas": GaussianDiffusion(PROCESS, "rescaled_mse"),
    "use_kl": GaussianDiffusion(PROCESS, "kl"),
    "predict_xstart": GaussianDiffusion(GaussianProcess(prediction="x0")),
    "cosine": GaussianDiffusion(GaussianProcess("cosine")),
    "nosigma": GaussianDiffusion(GaussianProcess(variance="fixed_large")),
    "respaced50": GaussianDiffusion(PROCESS.respaced("50")),
    "respaced50_rescale": GaussianDiffusion(PROCESS.respaced("50"), "rescaled_mse"),
}
RUNS = {
    "ddpm10": DDPM(),
    "ddpm10_clip": DDPM(clip=True),
    "ddpm10_cfg4": DDPM(),
    "ddpm10_cfg4_clip": DDPM(clip=True),
    "ddpm10_nosigma": DDPM(),
    "ddpm10_nosigma_clip": DDPM(clip=True),
    "ddim10_eta0": DDIM(),
    "ddim10_eta0_clip": DDIM(clip=True),
    "ddim10_eta0_cfg1.5": DDIM(),
    "ddim10_eta1": DDIM(eta=1.0),
    "ddim10_eta1_clip": DDIM(eta=1.0, clip=True),
}


def golden(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def tiny_dit(weights: str, learn_sigma: bool) -> DiT:
    config = json.loads((GOLDEN / "tiny_dit_config.json").read_text()) | {"learn_sigma": learn_sigma}
    network = DiT(**config)
    network.load_state_dict(golden(weights))
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def network() -> DiT:
    return tiny_dit("tiny_dit_weights", learn_sigma=True)


@pytest.fixture(scope="module")
def network_nosigma() -> DiT:
    return tiny_dit("tiny_dit_nosigma_weights", learn_sigma=False)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5) -> None:
    """Equal but for a share of the largest value: unclipped samples of random weights grow to a thousand."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() < relative * expected.abs().max()


def assert_near_x0(actual: torch.Tensor, expected: torch.Tensor, process: GaussianProcess, t: torch.Tensor) -> None:
    """Equal within 1e-4, or within 1e-5 of the epsilon behind it (half of what a forward pass may differ by).

    x_0 is read from epsilon with the factor sigma / alpha, 158 at t = 999, which magnifies the network's rounding.
    """
    factor = process.tables["sqrt_recipm1_alphas_cumprod"][t].float()
    tolerance = (1e-5 * factor).clamp(min=1e-4).view(-1, *[1] * (actual.ndim - 1))
    assert actual.shape == expected.shape
    assert ((actual - expected).abs() <= tolerance).all()


@pytest.mark.parametrize("key", sorted(golden("schedules")))
def test_schedule(key):
    tag, name = key.split(".")
    expected = golden("schedules")[key]
    assert_close(SCHEDULES[tag].tables[name], expected, rtol=0 if expected.dtype == torch.int64 else 1e-12, atol=0)


@pytest.mark.parametrize("tag", LOSSES)
def test_losses(tag, network, network_nosigma):
    g = golden("diffusion_losses")
    t = g["t_respaced50"] if tag.startswith("respaced50") else g["t"]
    losses = LOSSES[tag].losses(network_nosigma if tag == "nosigma" else network, g["x_start"], t, g["y"], g["noise"])
    expected = {key.removeprefix(f"{tag}."): value for key, value in g.items() if key.startswith(f"{tag}.")}
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        # the bound of an untrained network reaches 5000 bits, where one float32 step is 5e-4
        assert_close(losses[name], value, atol=2e-5, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_posteriors(network):
    g = golden("diffusion_losses")
    x0, t = g["x_start"], g["t"]
    x_t = PROCESS.q_sample(x0, t, g["noise"])
    mean, variance, log_variance = PROCESS.q_posterior(x0, x_t, t)
    output = network(x_t, PROCESS.network_time(t), g["y"])
    plain, clipped = PROCESS.predict(output, x_t, t), PROCESS.predict(output, x_t, t, clip=True)
    actual = {
        "x_t": x_t,
        "q_post_mean": mean,
        "q_post_logvar": log_variance.expand_as(mean),
        "p_mean": plain.mean,
        "p_logvar": plain.log_variance,
        "p_mean_clipped": clipped.mean,
        "vb_direct": bound_term(PROCESS, plain, x0, x_t, t),
    }
    for name, value in actual.items():
        assert_close(value, g[name], atol=2e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    assert_near_x0(plain.x0, g["p_pred_xstart"], PROCESS, t)
    assert_near_x0(clipped.x0, g["p_pred_xstart_clipped"], PROCESS, t)
    assert_close(variance.flatten(), PROCESS.tables["posterior_variance"][t].float())
    tested = {*actual, "p_pred_xstart", "p_pred_xstart_clipped", "x_start", "t", "y", "noise", "t_respaced50"}
    assert {key for key in g if "." not in key} == tested


def test_likelihood_helpers():
    g = golden("diffusion_utils")
    x, means, log_scales = g["x"], g["means"], g["log_scales"]
    assert_close(discretized_gaussian_log_likelihood(x, means, log_scales), g["dgll"], atol=2e-5, rtol=0)
    assert_close(normal_kl(means, log_scales, means.flip(0), log_scales.flip(0)), g["kl"], atol=2e-5, rtol=0)
    assert_close(approximate_normal_cdf(3 * x), g["cdf"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [1.0, 1.5, 4.0])
def test_guidance(scale, network):
    g = golden("tiny_dit_cfg")
    x, t, y = g["x"][:3], g["t"][:3], g["y"][:3]
    out = guided(network, y, 10, scale, channels=3)(x, t)
    expected = g[f"out_cfg{scale}"]
    assert_close(out, expected[:3], atol=2e-5, rtol=0)
    assert_close(out[:, :3], expected[3:, :3], atol=2e-5, rtol=0)  # the original returns the guided part twice
    null = network(x, t, torch.full_like(y, 10))
    assert_close(null[:, 3:], expected[3:, 3:], atol=2e-5, rtol=0)


def test_guidance_of_all_channels(network):
    g = golden("tiny_dit_cfg")
    x, t, y = g["x"][:3], g["t"][:3], g["y"][:3]
    out = guided(network, y, 10, 4.0)(x, t)
    expected = g["allchannel_cfg4.0"]
    assert_close(out, expected[:3], atol=2e-5, rtol=0)
    assert_close(out[:, :4], expected[3:, :4], atol=2e-5, rtol=0)
    assert_close(network(g["x"], g["t"], g["y"]), g["raw_forward"], atol=2e-5, rtol=0)
    assert torch.equal(g["out_cfg4.0"], g["out_cfg4.0_junk_second_half"])


@pytest.mark.parametrize("tag", RUNS)
def test_sampler(tag, network, network_nosigma):
    g = golden("sampling")
    z, y = g["z"], g["y"]
    process = PROCESS.respaced("10")
    if "nosigma" in tag:
        network, process = network_nosigma, GaussianProcess(variance="fixed_large", respacing="10")
    scale = float(tag.split("cfg")[1].split("_")[0]) if "cfg" in tag else 1.0
    rows = len(z)  # guided runs of the original double the batch; its first half is what is drawn
    noise = iter(g[f"{tag}.noise"][:, :rows])
    samples, x0s = [], []

    def record(t, x, x0):
        samples.append(x)
        x0s.append(x0)

    final = RUNS[tag](guided(network, y, 10, scale, channels=3), process, z, lambda: next(noise), record)
    samples, x0s = torch.stack(samples), torch.stack(x0s)
    expected = {name: g[f"{tag}.{name}"][:, :rows] for name in ("samples", "pred_xstart")}
    assert torch.equal(final, samples[-1])
    assert torch.equal(g[f"{tag}.final"][:rows], expected["samples"][-1])
    if tag.endswith("clip"):
        assert_close(samples, expected["samples"], atol=1e-4, rtol=0)
        assert_near_x0(x0s, expected["pred_xstart"], process, torch.arange(10).flip(0))
    else:
        assert_near(samples, expected["samples"])
        assert_near(x0s, expected["pred_xstart"])


def test_every_sampling_run_is_tested():
    assert {key.rpartition(".")[0] for key in golden("sampling")} == {"", *RUNS}


def test_fifty_steps(network):
    g = golden("sampling_long")
    model_fn = guided(network, g["y"], 10, 1.0)
    noise = iter(g["ddpm50.noise"])
    assert_near(DDPM()(model_fn, PROCESS.respaced("50"), g["z"], lambda: next(noise)), g["ddpm50.final"])
    noise = iter(g["ddim50.noise"])
    assert_near(DDIM()(model_fn, PROCESS.respaced("ddim50"), g["z"], lambda: next(noise)), g["ddim50.final"])
    assert_close(next(noise), g["ddim50.noise"][0])  # nothing was drawn


def test_ddim_reverse(network):
    g = golden("sampling_long")
    samples = []
    model_fn = guided(network, g["y"], 10, 1.0)
    DDIM().reverse(model_fn, PROCESS.respaced("10"), g["ddim_reverse10.x0"], lambda t, x, x0: samples.append(x))
    assert_near(torch.stack(samples), g["ddim_reverse10.samples"])


def test_bits_per_dim(network):
    g = golden("sampling_long")
    noise = iter(g["bpd10.noise"])
    objective = GaussianDiffusion(PROCESS.respaced("10"))
    bits = objective.bits_per_dim(network, g["ddim_reverse10.x0"], g["y"], lambda: next(noise), clip=True)
    names = {"total": "total_bpd", "prior": "prior_bpd", "vb": "vb", "x0_mse": "xstart_mse", "mse": "mse"}
    for ours, theirs in names.items():
        assert_close(bits[ours], g[f"bpd10.{theirs}"], atol=2e-5, rtol=2e-5, msg=lambda text, n=ours: f"{n}: {text}")
