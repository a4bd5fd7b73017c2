"""Flows: the path, its conventions, flow matching, Euler, refusals, a run from its training to its pictures."""

import json

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ditune.commands.train import train
from ditune.errors import UserError
from ditune.objectives import FlowMatching, State
from ditune.processes import FlowProcess, GaussianProcess, build_process, shifted
from ditune.rng import StepRandom
from ditune.run import load_run
from ditune.samplers import DDIM, DDPM, Euler, sample
from helpers import SMALL, SMALL_FLOW, compose, golden

SHAPE = (3, 4, 4)
NULL = 5
CONVENTIONS = {
    "ours": {},
    "dit_moe": {"time_scale": 1.0},
    "shortcut_code": {"time_scale": 1.0, "data_at": 1, "sigma_min": 1e-5, "step": "log2", "base_steps": 128},
}


def batch(n: int = 4):
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, n, *SHAPE, generator=generator)
    return x0, noise, torch.arange(n) % NULL


def state(network, step: int = 0, max_steps: int = 700, batch_size: int = 64) -> State:
    return State(step, max_steps, batch_size, network, network)


class Recorded(nn.Module):
    """A network that says what it is told, and remembers what it was asked."""

    num_classes = NULL

    def __init__(self, output):
        super().__init__()
        self.output, self.asked = output, []

    def forward(self, x, t, y, *step):
        self.asked.append((x, t, y, *step))
        return self.output


def oracle(process: FlowProcess, picture: torch.Tensor):
    """The exact velocity when all data are one picture, by a network in the process's own convention."""

    def network(x, t, y, *step):
        t = t / process.time_scale
        t = (1 - t if process.data_at else t).view(-1, 1, 1, 1)
        noise = (x - (1 - t) * picture) / (process.sigma_min + (1 - process.sigma_min) * t)
        velocity = (1 - process.sigma_min) * noise - picture
        return -velocity if process.data_at else velocity

    network.num_classes = NULL
    return network


# The original of rectified flow in DiT-MoE: zt = (1 - t) x + t noise, target noise - x, t unscaled


def test_losses_of_rectified_flow():
    g = golden("tiny_dit_moe_io")
    process = FlowProcess(time_scale=1.0)
    x, t, noise = g["x"], g["rf_t"], g["rf_noise"]
    assert_close(process.x_t(x, noise, t), g["rf_zt"], atol=1e-6, rtol=0)
    network = Recorded(torch.cat([g["rf_v"], torch.full_like(g["rf_v"], 7.0)], dim=1))  # the variance is no velocity
    velocity = process.velocity(network, g["rf_zt"], t, g["y"])
    assert_close(network.asked[0][1], t, atol=0, rtol=0)
    losses = (velocity - process.target(x, noise)).square().flatten(1).mean(dim=1)
    assert_close(losses, g["rf_loss_per_sample"], atol=2e-5, rtol=1e-6)


def test_logit_normal_times_of_rectified_flow():
    """Ours come through the inverse of the distribution, theirs are sigmoid(z): the same for the same quantile."""
    z = torch.logit(golden("tiny_dit_moe_io")["rf_forward_t_seed99"].double())

    class Quantiles:
        positions = range(len(z))

        def uniform(self, purpose):
            return torch.special.ndtr(z)

    times = FlowMatching(FlowProcess(), times="logit_normal").sample_times(Quantiles(), len(z))
    assert_close(times.float(), golden("tiny_dit_moe_io")["rf_forward_t_seed99"], atol=1e-6, rtol=0)


# The path


@pytest.mark.parametrize("config", CONVENTIONS.values(), ids=CONVENTIONS)
def test_every_convention_ends_at_the_picture(config):
    process = FlowProcess(**config)
    picture, noise, y = batch(1)[0], batch(4)[1], torch.zeros(4, dtype=torch.int64)
    for sampler in (Euler(), Euler(shift=3.0), Euler(eta=0.5)):
        x = sample(oracle(process, picture), process, noise, y, sampler=sampler, steps=20)
        assert_close(x, picture.expand_as(x), atol=1e-4, rtol=0)
    assert build_process(process.config).config == process.config


def test_one_euler_step_with_the_true_velocity_is_the_path():
    process = FlowProcess(sigma_min=1e-2)
    x0, noise, _ = batch()
    t, s = torch.full((4,), 0.75), torch.full((4,), 0.25)
    moved = process.x_t(x0, noise, t) - 0.5 * process.target(x0, noise)
    assert_close(moved, process.x_t(x0, noise, s), atol=1e-6, rtol=0)


def test_what_the_network_is_told():
    x, _, y = batch()
    t, d = torch.tensor([1.0, 0.5, 0.25, 0.125]), torch.tensor([1.0, 0.25, 1 / 128, 0.0])
    cases = {
        ("none", None): (1000 * t, None),
        ("log2", 128): (1000 * t, torch.tensor([0.0, 2.0, 7.0, 7.0])),
        ("size", 128): (1000 * t, torch.tensor([1000.0, 250.0, 0.0, 0.0])),
        ("size", None): (1000 * t, torch.tensor([1000.0, 250.0, 7.8125, 0.0])),
    }
    for (step, base_steps), (time, told) in cases.items():
        network = Recorded(x)
        FlowProcess(step=step, base_steps=base_steps).velocity(network, x, t, y, d)
        assert_close(network.asked[0][1], time)
        assert len(network.asked[0]) == (3 if told is None else 4)
        if told is not None:
            assert_close(network.asked[0][3], told)
    network = Recorded(x)
    reverse = FlowProcess(time_scale=1.0, data_at=1)
    assert_close(reverse.velocity(network, x, t, y), -x)
    assert_close(network.asked[0][1], 1 - t)


def test_noise_of_the_steps_keeps_the_marginals():
    """With the exact velocity of data of N(0, 1/4): the spread at the end is theirs, whatever eta."""
    process = FlowProcess()

    def network(x, t, y):
        t = (t / 1000).view(-1, 1, 1, 1)
        variance = (1 - t) ** 2 / 4 + t**2
        return (t - (1 - t) / 4) / variance * x

    network.num_classes = NULL
    noise, y = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(64).long()
    generator = torch.Generator().manual_seed(1)
    for eta in (0.0, 0.5, 1.0):
        x = sample(
            network,
            process,
            noise,
            y,
            sampler=Euler(eta=eta),
            steps=60,
            next_noise=lambda: torch.randn(noise.shape, generator=generator),
        )
        assert x.std().item() == pytest.approx(0.5, abs=0.02), eta


def test_time_shift():
    t = torch.linspace(0, 1, 11)
    assert_close(shifted(t, 1.0), t)
    assert shifted(torch.tensor(0.5), 3.0).item() == pytest.approx(0.75)
    assert FlowProcess().in_steps(4).times().tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert FlowProcess().in_steps(2).times(3.0).tolist() == [1.0, 0.75, 0.0]


def test_guidance_in_a_part_of_the_flow():
    """The interval is of t = 0 at the data, whatever the network's own time is."""

    class Told(Recorded):
        def forward(self, x, t, y, *step):
            super().forward(x, t, y)
            return x

    x, _, y = batch()
    network = Told(None)
    sampler, process = Euler(), FlowProcess(time_scale=1.0, data_at=1)
    sample(network, process, x, y, sampler=sampler, steps=4, guidance=2.0, guidance_interval=(0.4, 0.8))
    assert [(asked[1][0].item(), len(asked[0])) for asked in network.asked] == [(0, 4), (0.25, 8), (0.5, 8), (0.75, 4)]


# Flow matching


def test_stratified_times_have_one_in_each_part():
    process, n = FlowProcess(), 64
    for times in ("uniform", "logit_normal"):
        objective = FlowMatching(process, times=times, stratified=True)
        drawn = torch.cat([objective.sample_times(StepRandom(0, 3, rows), n) for rows in (range(40), range(40, n))])
        plain = drawn if times == "uniform" else torch.special.ndtr(torch.logit(drawn))
        assert (plain * n).floor().long().tolist() == list(range(n))
    drawn = FlowMatching(process, times="logit_normal", mean=-0.4).sample_times(StepRandom(0, 0, range(4000)), 4000)
    assert torch.logit(drawn).mean().item() == pytest.approx(-0.4, abs=0.05)
    assert torch.logit(drawn).std().item() == pytest.approx(1.0, abs=0.05)


def test_loss_is_the_error_of_the_velocity_and_does_not_depend_on_how_the_batch_is_cut():
    x0, _, y = batch(6)
    objective = FlowMatching(FlowProcess(), times="logit_normal", stratified=True)

    def loss(rows):
        network = Recorded(torch.zeros(len(rows), *SHAPE))
        return objective.loss(network, (x0[rows], y[rows]), StepRandom(0, 0, rows), state(network, batch_size=6))

    whole, parts = loss(range(6)), [loss(rows) for rows in ([0, 1, 2, 3], [4, 5])]
    for name in ("loss", "velocity_rms", "target_rms"):
        assert_close(torch.cat([part.parts[name] for part in parts]), whole.parts[name])
    assert_close(whole.parts["loss"], whole.parts["target_rms"] ** 2)
    assert_close(whole.total, whole.parts["loss"].mean())


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda: FlowProcess(step="exp"), "none, log2, size"),
        (lambda: FlowProcess(base_steps=100), "power of 2"),
        (lambda: FlowProcess(step="log2"), "base_steps=128"),
        (lambda: FlowProcess(time_scale=0), "time_scale"),
        (lambda: FlowMatching(FlowProcess(), times="cosine"), "uniform, logit_normal"),
        (lambda: FlowMatching(FlowProcess(), std=0), "above 0"),
        (lambda: FlowMatching(FlowProcess(), label_drop=2), "between 0 and 1"),
        (lambda: Euler(eta=-1), "eta"),
        (lambda: FlowProcess().in_steps(0), "1 or more"),
    ],
)
def test_impossible_flows_are_refused(work, message):
    with pytest.raises(UserError, match=message):
        work()


@pytest.mark.parametrize(
    ("process", "sampler", "remedy"),
    [(FlowProcess(), DDIM(), "euler"), (FlowProcess(), DDPM(), "euler"), (GaussianProcess(), Euler(), "ddim or ddpm")],
)
def test_samplers_of_another_process_are_refused(process, sampler, remedy):
    x, _, y = batch()
    with pytest.raises(UserError, match=f"sampler={remedy}"):
        sample(Recorded(x), process, x, y, sampler=sampler, steps=2)


# Runs


def test_a_run_from_training_to_pictures(tmp_path, pictures):
    cfg = compose(tmp_path, *SMALL_FLOW, f"data.root={pictures}", "peft=full", "max_steps=2")
    assert train(cfg) == 0
    run = load_run(tmp_path)
    assert run.drawer.process.config == FlowProcess().config
    assert type(run.drawer.sampler) is Euler
    drawn = run.generator.generate(run.network, torch.tensor([0, 1]), seed=0)
    assert drawn.shape == (2, 3, 16, 16)
    assert json.loads((tmp_path / "result.json").read_text())["denoising"]["after"] > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sampler=ddim"], "sampler=auto"),
        (["sampler=jumps"], "sampler=euler"),
        (["sampler.steps=0"], "at least 1"),
    ],
)
def test_what_does_not_suit_a_flow_is_refused_before_training(tmp_path, pictures, overrides, message):
    with pytest.raises(UserError, match=message):
        train(compose(tmp_path, *SMALL_FLOW, f"data.root={pictures}", "peft=full", "max_steps=1", *overrides))


# Diffusion networks read as flows


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_diffusion_network_is_read_as_a_flow(prediction, schedule):
    """All data are one picture; the exact diffusion network then gives the exact velocity, between timesteps too."""
    diffusion = GaussianProcess(schedule, prediction=prediction, variance="fixed_small")
    process = FlowProcess().on_diffusion(diffusion.config)
    picture = batch(1)[0]
    log_ratio = process.diffused.tables["log_ratio"]

    def network(x, timestep, y):
        low = timestep.floor().long().clamp(max=998)
        ratio = torch.lerp(log_ratio[low], log_ratio[low + 1], (timestep - low).double()).view(-1, 1, 1, 1)
        sigma, alpha = torch.sigmoid(2 * ratio) ** 0.5, torch.sigmoid(-2 * ratio) ** 0.5
        noise = (x - alpha * picture) / sigma
        return {"epsilon": noise, "x0": picture.expand_as(x), "v": alpha * noise - sigma * picture}[prediction].float()

    x0, noise = picture.expand(6, -1, -1, -1), batch(6)[1]
    t = torch.tensor([0.05, 0.1234, 0.5, 0.75, 0.9, 0.97])
    velocity = process.velocity(network, process.x_t(x0, noise, t), t, torch.zeros(6).long())
    assert_close(velocity, process.target(x0, noise), atol=2e-3, rtol=0)
    assert build_process(process.config).config == process.config


def test_a_base_of_diffusion_is_adapted_as_a_flow(tmp_path, pictures, base):
    overrides = [f"data.root={pictures}", "peft=difffit", f"pretrained={base}", "max_steps=1"]
    assert train(compose(tmp_path, *SMALL_FLOW, *overrides)) == 0
    run = load_run(tmp_path)
    assert run.drawer.process.config["diffusion"]["prediction"] == "x0"
    assert run.generator.generate(run.network, torch.tensor([0]), seed=0).shape == (1, 3, 16, 16)


def test_a_base_of_a_flow_is_no_diffusion(tmp_path, pictures):
    general = [f"data.root={pictures}", "peft=full", "max_steps=1"]
    assert train(compose(tmp_path / "flow", *SMALL_FLOW, *general)) == 0
    with pytest.raises(UserError, match="trained on a flow, the objective is for a diffusion"):
        train(compose(tmp_path / "run", *SMALL, *general, f"pretrained={tmp_path}/flow/network.safetensors"))
