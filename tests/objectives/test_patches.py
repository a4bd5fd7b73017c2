"""Patch training: windows of the token grid with their own rows of the position table."""

from itertools import accumulate

import pytest
import torch
from omegaconf import OmegaConf
from torch.testing import assert_close

from ditune.commands.train import train
from ditune.config import rules
from ditune.config.components import build_components
from ditune.config.roles import job_identity
from ditune.config.training import resume_key
from ditune.errors import UserError
from ditune.moe.statistics import RoutingStatistics
from ditune.objectives import DiffTuning, FlowMatching, GaussianDiffusion, Patches, Shortcut, State
from ditune.objectives.patches import crop, spread
from ditune.processes import FlowProcess, GaussianProcess
from ditune.rng import StepRandom
from helpers import SMALL, assert_same_bits, checkpoint, compose, golden
from peft_helpers import build_base, inputs

N, SIDE = 8, 4  # of the grid: 8 x 8 latents, patches of 2
PLAIN = {
    "v": lambda: GaussianDiffusion(GaussianProcess(prediction="v", variance="fixed_small")),
    "flow": lambda: FlowMatching(FlowProcess()),
    "diffusion_as_flow": lambda: FlowMatching(FlowProcess(diffusion=GaussianProcess(prediction="v").config)),
}


def batch():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(N, 3, 8, 8, generator=generator), torch.arange(N) % 3


def loss_of(objective, network, rows=range(N), step=10, max_steps=100):
    x0, y = batch()
    state = State(step, max_steps, N, network, network, network)
    return objective.loss(network, (x0[list(rows)], y[list(rows)]), StepRandom(0, step, rows), state)


def size_at(objective, step, seed=0, max_steps=100):
    return objective.size(SIDE, StepRandom(seed, step, range(N)), State(step, max_steps, N, None, None))


# The golden numbers of the authors' code


@pytest.mark.parametrize("s", [8, 5, 4, 2])
def test_windows_and_their_places_are_the_originals(s):
    """`pos` are the coordinates x, y in [-1, 1] of the pixels; here the same are rows of the table."""
    numbers = golden("efficiency_patch_diffusion")
    images, i, j = numbers["images"], numbers[f"s{s}.i"], numbers[f"s{s}.j"]
    assert torch.equal(crop(images, i, j, s), numbers[f"s{s}.patch"])
    x, y = numbers[f"s{s}.pos"].unbind(1)
    assert_close((spread(j, s) / 7 - 0.5) * 2, x[:, 0], atol=1e-6, rtol=0)
    assert_close((spread(i, s) / 7 - 0.5) * 2, y[:, :, 0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_shares_of_the_sizes_are_the_originals(share):
    objective = Patches(PLAIN["v"](), share=share, sizes="half_quarter")
    assert list(objective.probabilities) == [4, 2, 1]
    expected = golden("efficiency_patch_diffusion")[f"p_list.real_p{share}"].tolist()
    assert list(objective.probabilities.values()) == pytest.approx(expected, abs=1e-15)


def test_the_cost_in_tokens():
    assert Patches(PLAIN["v"]()).token_share == pytest.approx(0.625)
    assert Patches(PLAIN["v"](), sizes="half_quarter").token_share == pytest.approx(0.5875)
    assert Patches(PLAIN["v"](), share=1).token_share == 1 == PLAIN["v"]().token_share


# What a window is


@pytest.mark.parametrize("kind", ["dit", "dit_moe"])
def test_the_whole_grid_as_a_window_is_the_plain_network_to_the_bit(kind):
    network = build_base(kind)
    everything = torch.arange(SIDE**2).expand(4, -1)
    with torch.no_grad():
        assert torch.equal(network(*inputs(), window=everything), network(*inputs()))


def test_a_window_has_its_own_rows_of_the_table():
    """The tokens of a window are those that the whole image has there."""
    network = build_base("dit")
    x, t, y = inputs(n=N)
    tokens = network.embed(x, t, y)[0]
    seen = {}

    def call(x, t, y, window=None):
        seen["window"], seen["tokens"] = window, network.embed(x, t, y, window=window)[0]
        return network(x, t, y, window=window)

    call.num_classes, call.patch_size = 3, 2
    objective = Patches(PLAIN["v"](), share=0)
    given = objective.given(call, (x, y), StepRandom(0, 3, range(N)), State(3, 9, N, call, call))
    assert given.batch[0].shape == (N, 3, 4, 4)
    given.network(given.batch[0], t, y)
    rows = torch.arange(N)[:, None]
    assert_close(seen["tokens"], tokens[rows, seen["window"]])
    corners = seen["window"][:, 0]
    assert (corners // SIDE).unique().tolist() == (corners % SIDE).unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("inner", PLAIN)
def test_a_share_of_one_is_plain_training_to_the_bit(inner):
    network, plain = build_base("dit"), PLAIN[inner]()
    expected, found = loss_of(plain, network), loss_of(Patches(PLAIN[inner](), share=1), network)
    tokens = found.parts.pop("tokens")
    assert_same_bits(expected._asdict(), found._asdict())
    assert tokens.tolist() == [SIDE**2] * N


@pytest.mark.parametrize("inner", PLAIN)
def test_the_loss_on_held_out_images_is_of_whole_images(inner):
    network, random = build_base("dit"), StepRandom(0, 3, range(N))
    expected = PLAIN[inner]().denoising(network, batch(), random)
    assert torch.equal(Patches(PLAIN[inner](), share=0).denoising(network, batch(), random), expected)


@pytest.mark.parametrize("by_area", [False, True])
def test_the_loss_by_hand(by_area):
    """A network of one number w: out = w, so the loss is mean (w - target)^2 over the window."""
    process, w = FlowProcess(), torch.tensor(0.3, requires_grad=True)
    objective = Patches(FlowMatching(process, label_drop=0), share=0, sizes="half", by_area=by_area)

    def network(x, t, y, window):
        assert window.shape == (N, 4)
        return w.expand_as(x)

    network.num_classes, network.patch_size = 3, 2
    found = loss_of(objective, network)
    random, (x0, _) = StepRandom(0, 10, range(N)), batch()
    row, column = (2 * random.integers(name, 3) for name in ("patch_row", "patch_column"))
    windows = torch.stack([x0[k, :, i : i + 4, j : j + 4] for k, (i, j) in enumerate(zip(row, column, strict=True))])
    target = random.normal("noise", (3, 4, 4)) - windows
    factor = 0.25 if by_area else 1.0
    assert_close(found.parts["loss"], factor * (w.detach() - target).square().mean(dim=(1, 2, 3)))
    found.total.backward()
    assert_close(w.grad, factor * 2 * (w.detach() - target).mean())
    assert found.parts["tokens"].tolist() == [4] * N


# One size for a whole step


def test_the_size_is_a_function_of_seed_and_step():
    objective = Patches(PLAIN["v"](), sizes="half_quarter")
    for step in range(20):
        sizes = {
            objective.size(SIDE, StepRandom(0, step, rows), State(step, 100, N, None, None))
            for rows in ([0, 1], [2, 3], [4, 5, 6, 7])  # micro-steps and ranks
        }
        assert len(sizes) == 1
    assert [size_at(objective, step) for step in range(30)] != [size_at(objective, step, seed=1) for step in range(30)]


def test_sizes_of_ten_thousand_steps():
    objective = Patches(PLAIN["v"](), sizes="half_quarter")
    counts = torch.tensor([size_at(objective, step) for step in range(10_000)]).bincount(minlength=5) / 10_000
    assert_close(counts[[1, 2, 4]], torch.tensor([0.2, 0.3, 0.5]), atol=0.015, rtol=0)  # 3 standard deviations


def test_progressive_sizes_grow_at_the_cumulated_shares():
    objective = Patches(PLAIN["v"](), sizes="half_quarter", schedule="progressive")
    assert objective.scheduled
    assert not Patches(PLAIN["v"]()).scheduled
    found = [size_at(objective, step, max_steps=10) for step in range(10)]
    assert found == [1, 1, 2, 2, 2, 4, 4, 4, 4, 4]
    assert list(accumulate(objective.probabilities.values()))[:2] == [0.2, 0.5]


def test_odd_grids_are_rounded_down():
    objective = Patches(PLAIN["v"](), share=0)
    state = State(0, 1, N, None, None)
    assert objective.size(7, StepRandom(0, 0, [0]), state) == 3


@pytest.mark.parametrize("kind", ["dit", "dit_moe"])
def test_it_does_not_depend_on_how_the_batch_is_cut(kind):
    network, objective = build_base(kind), Patches(PLAIN["v"](), share=0)
    whole = loss_of(objective, network)
    cut = [loss_of(objective, network, rows) for rows in (range(3), range(3, N))]
    assert_close(torch.cat([part.parts["loss"] for part in cut]), whole.parts["loss"], atol=1e-4, rtol=1e-4)


def test_routing_statistics_leave_windows_out():
    network = build_base("dit_moe")
    statistics, routing = RoutingStatistics(network), []
    x, t, y = inputs()
    network(x[..., :4, :4], t, y, window=torch.arange(4).expand(4, -1), routing=routing)
    statistics.add(routing, t / 1000, y)
    assert statistics.counts["position"].sum() == 0
    routing.clear()
    network(x, t, y, routing=routing)
    statistics.add(routing, t / 1000, y)
    assert statistics.counts["position"].sum() > 0


# What is refused, and whole trainings


def test_mistakes_are_refused(tmp_path, pictures):
    for inner in (Shortcut(FlowProcess(step="log2", base_steps=8)), DiffTuning(PLAIN["v"]())):
        with pytest.raises(UserError, match=r"patches= cannot be used with \w+.*patches=none"):
            Patches(inner)
    for wrong in ({"share": 2}, {"sizes": "third"}, {"schedule": "reverse"}):
        with pytest.raises(UserError, match=rf"patches\.{next(iter(wrong))}"):
            Patches(PLAIN["v"](), **wrong)
    settings = [*SMALL, f"data.root={pictures}", "peft=full", "patches=windows", "+network.patch_size=8"]
    with pytest.raises(UserError, match=r"2 x 2 tokens.*patches=none"):
        rules.check(build_components(compose(tmp_path, *settings)), rules.OF_A_TRAINING)


def test_it_is_part_of_a_run_only_if_it_is_set(tmp_path, pictures):
    def known(*overrides, without=False):
        cfg = compose(tmp_path, *SMALL, f"data.root={pictures}", "peft=full", *overrides)
        OmegaConf.set_struct(cfg, False)
        if without:
            del cfg["patches"]  # as in a run of before
        return job_identity(cfg), resume_key(cfg, build_components(cfg))

    before, none, windows = known(without=True), known(), known("patches=windows")
    assert before == none
    assert windows[0] != none[0]
    assert windows[1]["objective"]["patches"]["share"] == 0.5


def test_a_run_goes_on_as_if_it_had_never_stopped(small, tmp_path):
    common = ["patches=windows", "patches.sizes=half_quarter", "peft=full", "max_steps=6"]
    common += ["callbacks.checkpoint.every_n_steps=3", "callbacks.checkpoint.keep=9"]
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    train(small(*common, folder=whole))
    train(small(*common, "trainer.accumulate_grad_batches=1", folder=halved))
    (halved / "checkpoints" / "step_00000006.ckpt").unlink()
    train(small(*common, "resume=auto", folder=halved))
    assert_same_bits(checkpoint(whole)["state_dict"], checkpoint(halved)["state_dict"])
    lines = (whole / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("train/tokens")
    tokens = [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]]
    side = 8  # of the grid: 16 pixels, patches of 2
    objective = Patches(PLAIN["v"](), sizes="half_quarter")
    state = [State(step, 6, 4, None, None) for step in range(6)]
    assert tokens == [objective.size(side, StepRandom(0, s.step, [0]), s) ** 2 for s in state]
    assert len(set(tokens)) > 1
