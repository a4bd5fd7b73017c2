"""objective.interval: an objective learns a part of the process."""

import pytest
import torch
from omegaconf import OmegaConf
from torch.testing import assert_close

from ditune.config.components import build_components
from ditune.config.roles import job_identity
from ditune.config.training import resume_key
from ditune.errors import UserError
from ditune.objectives import DiffTuning, FlowMatching, GaussianDiffusion, State
from ditune.objectives.weighting import flow_weights
from ditune.processes import FlowProcess, GaussianProcess
from ditune.rng import StepRandom
from helpers import SMALL, SMALL_FLOW, assert_same_bits, compose
from peft_helpers import build_base

N = 64
PROCESS = GaussianProcess(prediction="v", variance="fixed_small")
PLAIN = {
    "diffusion": lambda **more: GaussianDiffusion(PROCESS, **more),
    "flow": lambda **more: FlowMatching(FlowProcess(), **more),
    "stratified": lambda **more: FlowMatching(FlowProcess(), times="logit_normal", stratified=True, shift=3, **more),
}


def batch():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(N, 3, 8, 8, generator=generator), torch.arange(N) % 3


def loss_of(objective):
    network = build_base("dit")
    with torch.no_grad():
        return objective.loss(network, batch(), StepRandom(0, 3, range(N)), State(3, 9, N, network, network))


@pytest.mark.parametrize("name", PLAIN)
def test_the_whole_process_is_plain_training_to_the_bit(name):
    plain, whole = loss_of(PLAIN[name]()), loss_of(PLAIN[name](interval=[0, 1]))
    assert_same_bits(plain._asdict(), whole._asdict())
    assert PLAIN[name]().part is None
    assert PLAIN[name](interval=[0, 1]).part == (0.0, 1.0)


@pytest.mark.parametrize("name", PLAIN)
def test_times_and_held_out_loss(name):
    """Times stay in the part. What is measured on held-out images is of the whole process."""
    plain, network = PLAIN[name](), build_base("dit")
    measured = plain.denoising(network, batch(), StepRandom(0, 3, range(N)))
    for interval in ([0, 0.25], [0.25, 0.5], [0.7, 1]):
        objective = PLAIN[name](interval=interval)
        low, high = objective.part
        time = loss_of(objective).time
        assert ((low <= time) & (time <= high)).all()
        assert time.unique().numel() > N / 2
        assert torch.equal(objective.denoising(network, batch(), StepRandom(0, 3, range(N))), measured)


@pytest.mark.parametrize("name", ["flow", "stratified"])
def test_quantiles_of_two_halves_are_those_of_the_whole(name):
    """Half u of the lower interval and half u of the upper one have the plain distribution, exactly."""
    u = (torch.arange(N, dtype=torch.float64) + 0.5) / N

    class Grid(StepRandom):
        def uniform(self, purpose):
            return u

    def times(**more):
        objective = PLAIN[name](**more)
        objective.stratified = False
        return objective.sample_times(Grid(0, 0, range(N)), N)

    halves = torch.cat([times(interval=[0, 0.5]), times(interval=[0.5, 1])])
    finer = PLAIN[name]().time_of((torch.arange(2 * N, dtype=torch.float64) + 0.5) / (2 * N))
    assert_close(halves, finer, atol=1e-12, rtol=0)


def test_two_halves_of_the_timesteps_are_all_of_them():
    def first_and_last(low, high):
        objective, ends = PLAIN["diffusion"](interval=[low, high]), []
        for u in (0.0, 1 - 2.0**-53):
            objective.losses = lambda network, x0, t, y, noise: {"loss": ends.append(t[0].item()) or t.float()}

            class Fixed(StepRandom):
                def uniform(self, purpose, u=u):
                    return torch.full((N,), u, dtype=torch.float64)

            objective.loss(build_base("dit"), batch(), Fixed(0, 0, range(N)))
        return ends

    assert first_and_last(0, 0.5) == [0, 499]
    assert first_and_last(0.5, 1) == [500, 999]
    assert first_and_last(1 / 3, 2 / 3) == [333, 666]  # floor(low T) .. ceil(high T) - 1


def test_weights_are_those_of_the_whole_process():
    found = loss_of(PLAIN["flow"](weight="min_snr", interval=[0.5, 0.75]))
    assert_close(found.parts["loss"], flow_weights("min_snr", found.time, 5.0).float() * found.parts["mse"])


def test_an_objective_around_it_has_the_same_part():
    objective = DiffTuning(PLAIN["flow"](interval=[0.5, 1]), k=1, share=0)
    assert objective.part == (0.5, 1.0)
    assert (loss_of(objective).time >= 0.5).all()


@pytest.mark.parametrize("interval", [[0.5, 0.5], [0.6, 0.4], [-0.1, 1], [0, 1.1], [0.5]])
def test_parts_outside_of_the_process_are_refused(interval):
    for name in PLAIN:
        with pytest.raises(UserError, match=r"objective\.interval is .*null"):
            PLAIN[name](interval=interval)


@pytest.mark.parametrize("settings", [SMALL, SMALL_FLOW], ids=["diffusion", "flow"])
def test_it_is_part_of_a_run_only_if_it_is_set(tmp_path, pictures, settings):
    def known(*overrides, without=False):
        cfg = compose(tmp_path, *settings, f"data.root={pictures}", "peft=full", *overrides)
        OmegaConf.set_struct(cfg, False)
        if without:
            del cfg.objective["interval"]  # as in a run of before
        return job_identity(cfg), resume_key(cfg, build_components(cfg))

    before, none, half = known(without=True), known(), known("objective.interval=[0,0.5]")
    assert before == none
    assert half[0] != none[0]
    assert half[1]["objective"]["interval"] == [0, 0.5]
