"""The critic of consistency objectives: its losses by hand, whose gradients are whose, and trainings with it."""

import math

import pytest
import torch
from comparison import assert_same_end, saved
from injectors import during_training_step, terminate
from omegaconf import OmegaConf
from torch import nn
from torch.testing import assert_close

from ditune.commands.prepare import training_source
from ditune.commands.train import train
from ditune.config.components import build_components
from ditune.config.instantiate import instantiate
from ditune.config.sharded import refuse_unspreadable
from ditune.config.training import build_module, resume_key
from ditune.data.stream import ImageStream
from ditune.errors import UserError
from ditune.networks import DiT
from ditune.objectives import ConsistencyTraining, Critic, State
from ditune.objectives.critic import critic_of
from ditune.processes import FlowProcess
from ditune.rng import StepRandom
from ditune.training.source import StreamData
from helpers import SMALL_FLOW, assert_same_bits, compose, open_gates

N, LOG2 = 6, math.log(2)
SIZE = {"input_size": 8, "patch_size": 2, "in_channels": 3}


class Linear(nn.Module):
    """D(x) = a . x at any time: its slope is a."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(0.1 * torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1)))

    def forward(self, x, t):
        return (self.a * x).sum(dim=(1, 2, 3))


def dit(seed: int = 0, **sizes) -> DiT:
    torch.manual_seed(seed)
    network = DiT(**SIZE, hidden_size=32, depth=1, num_heads=1, num_classes=3, learn_sigma=False, **sizes)
    open_gates(network)
    return network


def images(seed: int) -> torch.Tensor:
    return torch.randn(N, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def critic_with(network: nn.Module, **settings) -> Critic:
    critic = Critic(**settings)
    critic.network = network
    return critic


def loss_of(objective, network, step=0):
    batch = images(3), torch.arange(N) % 3
    state = State(step, 100, N, network, network)
    return objective.loss(network, batch, StepRandom(0, step, range(N)), state)


def test_it_begins_at_zero_where_both_losses_are_known():
    critic = Critic(width=32, depth=1)
    critic.build(SIZE)
    found = critic.losses(images(0), images(1), torch.rand(N), step=0)
    assert_close(found.generator, torch.full((N,), LOG2))
    assert_close(found.critic, torch.full((N,), 2 * LOG2))


def test_the_losses_of_a_linear_critic_by_hand():
    """softplus(-D) for the network; for the critic softplus(D) + softplus(-D) and, every 4 steps, gamma / 2 |a|^2."""
    real, fake, time = images(0), images(1), torch.zeros(N)
    critic = critic_with(Linear(), r1=10.0, every=4)
    a = critic.network.a.detach()
    on_real, on_fake = ((a * x).sum(dim=(1, 2, 3)) for x in (real, fake))
    plain = (1 + on_fake.exp()).log() + (1 + (-on_real).exp()).log()
    slope = 5 * a.square().sum()
    for step, more in ((0, slope), (1, 0), (3, 0), (4, slope)):
        found = critic.losses(real, fake, time, step)
        assert_close(found.generator, (1 + (-on_fake).exp()).log())
        assert_close(found.critic.detach(), plain + more)
    (gradient,) = torch.autograd.grad(critic.losses(real, fake, time, 0).critic.mean(), critic.network.a)
    without = critic_with(critic.network, r1=0.0)
    (rest,) = torch.autograd.grad(without.losses(real, fake, time, 0).critic.mean(), critic.network.a)
    assert_close(gradient - rest, 10.0 * a, atol=1e-6, rtol=1e-4)


def test_the_share_of_the_critic_is_the_papers():
    """0.6 t^(log_{1/2}(0.2 / 0.6)): none at the data, 0.2 in the middle, 0.6 at the noise; or one number."""
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert Critic(weight=0.6, mid=0.2).weights(t).tolist() == pytest.approx([0.0, 0.2, 0.6], abs=1e-12)
    assert Critic(weight=0.3).weights(t).tolist() == pytest.approx([0.3] * 3)


@pytest.mark.parametrize("settings", [{"weight": 0.3}, {"weight": 0.6, "mid": 0.2}])
def test_the_loss_is_a_mean_of_both_and_each_side_has_its_own_gradient(settings):
    """Of the network and of the critic, by what each would have alone."""
    network, plain = dit(), ConsistencyTraining(FlowProcess(base_steps=8))
    objective = ConsistencyTraining(FlowProcess(base_steps=8), critic={**settings, "r1": 2.0, "width": 32, "depth": 1})
    objective.critic.build(SIZE)
    open_gates(objective.critic.network)
    whole, without = loss_of(objective, network), loss_of(plain, network)
    targets = plain.targets(
        network, images(3), torch.arange(N) % 3, StepRandom(0, 0, range(N)), State(0, 100, N, network, network)
    )
    velocity = plain.predicted(network, targets)
    w = objective.critic.weights(targets.t)
    end = targets.x_t - targets.t.view(-1, 1, 1, 1) * velocity
    on_end = objective.critic.score(end, targets.t)
    mse = (velocity - targets.target).square().mean(dim=(1, 2, 3))
    of_network = ((1 - w) * mse + w * nn.functional.softplus(-on_end)).mean()
    parameters = list(network.parameters())
    found = torch.autograd.grad(whole.total, parameters, retain_graph=True)
    for one, other in zip(found, torch.autograd.grad(of_network, parameters, retain_graph=True), strict=True):
        assert_close(one, other, atol=1e-7, rtol=1e-4)
    weights = list(objective.critic.network.parameters())
    found = objective.critic.losses(images(3), end.detach(), targets.t, step=0)
    for one, other in zip(
        torch.autograd.grad(whole.total, weights, allow_unused=True),
        torch.autograd.grad((w * found.critic).mean(), weights, allow_unused=True),
        strict=True,
    ):
        assert_close(one, other, atol=1e-7, rtol=1e-4)
    assert torch.equal(mse, without.parts["mse"])
    assert set(whole.parts) == {*without.parts, "generator", "critic"}


def test_a_weight_of_zero_is_no_critic():
    network = dit()
    plain, off = (ConsistencyTraining(FlowProcess(base_steps=8), critic=c) for c in (None, {"weight": 0}))
    assert off.critic is None
    assert torch.equal(loss_of(plain, network).total, loss_of(off, network).total)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"weight": 1.5}, r"critic\.weight"),
        ({"weight": 0.3, "mid": 0.3}, r"below objective\.critic\.weight"),
        ({"width": 40}, "multiple of 32"),
        ({"every": 0}, r"critic\.every"),
        ({"share": 1}, "takes weight, mid"),
    ],
)
def test_settings_that_cannot_be(settings, part):
    with pytest.raises(UserError, match=part):
        critic_of(settings)


# In a training

STEPS = 4
SETTINGS = "objective.critic={weight: 0.3, width: 32, depth: 1, every: 2, lr: 0.01}"
FLOW = [override for override in SMALL_FLOW if not override.startswith("objective")]


@pytest.fixture
def config(pictures, tmp_path):
    def make(*overrides, folder="run", critic=SETTINGS):
        given = ["objective=consistency_training", "peft=full", f"max_steps={STEPS}", "optimizer.lr=0.01"]
        given += ["sampler=euler", f"data.root={pictures}", *([critic] if critic else [])]
        return compose(tmp_path / folder, *FLOW, *given, *overrides)

    return make


def test_it_trains_beside_the_network_and_goes_on_to_the_bit(config, monkeypatch, tmp_path):
    assert train(config(folder="whole")) == 0
    content = saved(tmp_path / "whole", STEPS)
    assert train(config(folder="plain", critic=None)) == 0
    plain = saved(tmp_path / "plain", STEPS)
    assert content["state_dict"].keys() == plain["state_dict"].keys()
    assert content["ema"].keys() == plain["ema"].keys()
    assert "critic" not in plain
    assert any(value.any() for name, value in content["critic"].items() if "score.weight" in name)
    groups = content["optimizer_states"][0]["param_groups"]
    assert [(group["lr"], tuple(group["betas"])) for group in groups] == [(0.01, (0.9, 0.999)), (0.01, (0.0, 0.99))]
    assert "critic" not in plain["identity"]["objective"]
    with monkeypatch.context() as patch:
        during_training_step(patch, 3, terminate)
        assert train(config(folder="stopped")) == 143
    assert train(config(folder="stopped")) == 0
    assert_same_end(tmp_path / "stopped", tmp_path / "whole", STEPS)
    again = saved(tmp_path / "stopped", STEPS)
    assert_same_bits(again["critic"], content["critic"])
    assert_same_bits(again["optimizer_states"], content["optimizer_states"])
    with pytest.raises(UserError, match=r"objective\.critic"):
        train(config("max_steps=6", folder="stopped", critic="objective.critic={weight: 0.2}"))
    with pytest.raises(UserError, match=r"objective\.critic"):
        train(config("max_steps=6", folder="stopped", critic=None))


def stepped(cfg, change=lambda critic: None):
    """The module after training from gates that are open, without evaluation."""
    c = build_components(cfg)
    open_gates(c.network)
    open_gates(c.objective.critic.network)
    change(c.objective.critic)
    module = build_module(cfg, c, resume_key(cfg, c))
    stream = ImageStream(training_source(cfg, c.images, c.autoencoder), cfg.seed, False)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = instantiate(cfg.trainer, "trainer", **quiet)
    trainer.fit(module, datamodule=StreamData(stream, cfg.batch_size, 0))
    return module


def louder(critic):
    critic.r1 = 1e6


def test_a_loud_critic_does_not_slow_down_the_network(config):
    """The gradients of the two are clipped apart."""
    options = ["max_steps=1", "trainer.gradient_clip_val=1e-3", "trainer.log_every_n_steps=0"]
    one, other = stepped(config(*options)), stepped(config(*options), louder)
    assert_same_bits(dict(one.network.state_dict()), dict(other.network.state_dict()))
    moved = [not torch.equal(a, b) for a, b in zip(one.critic.parameters(), other.critic.parameters(), strict=True)]
    assert any(moved)


def test_the_gradients_of_two_micro_batches_are_those_of_one(config):
    one, two = (
        stepped(config("max_steps=1", f"trainer.accumulate_grad_batches={k}", "trainer.log_every_n_steps=0"))
        for k in (1, 2)
    )
    states = [module.trainer.optimizers[0].state_dict()["state"] for module in (one, two)]
    assert len(states[0]) == len([*one.network.parameters(), *one.critic.parameters()])
    for number, state in states[0].items():
        assert_close(state["exp_avg"], states[1][number]["exp_avg"], atol=1e-6, rtol=1e-4)
        assert state["exp_avg"].any()


def test_a_critic_that_is_not_finite_stops_the_training(config):
    def broken(critic):
        critic.r1 = math.inf

    with pytest.raises(UserError, match="gradient is not finite at step 0"):
        stepped(config("max_steps=2", "trainer.log_every_n_steps=1"), broken)


def test_what_a_critic_does_not_go_with(config):
    with pytest.raises(UserError, match="optimizer=adamw"):
        train(config("optimizer=muon"))
    cfg = config("trainer=fsdp")
    with pytest.raises(UserError, match=r"objective\.critic=null"):
        refuse_unspreadable(cfg)


def test_runs_of_before_have_the_same_identity(config):
    cfg = config(critic=None)
    known = resume_key(cfg, build_components(cfg))
    OmegaConf.set_struct(cfg, False)
    del cfg.objective["critic"]
    assert resume_key(cfg, build_components(cfg)) == known
    assert "critic" not in known["objective"]
