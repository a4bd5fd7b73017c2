"""Steps that nobody waits for: on a device they are skipped by a mask, and its flag is read one step later.

A GPU does it so. Here the CPU is told to; it has the same fused update.
"""

from pathlib import Path
from zlib import crc32

import pytest
import torch

from ditune.commands.train import train
from ditune.errors import UserError
from ditune.peft import build_peft
from ditune.rng import StepRandom, mix, mix_each
from ditune.training import Ema, GenerativeModule, nonfinite, random_ahead
from ditune.training.muon import MuonAdamW
from helpers import SMALL, assert_same_bits, compose

STEP, BATCH, STEPS = 3, 4, 6  # the bad step; images in a step
BAD = STEP * BATCH + 2  # position of the bad image
PARTS = ("state_dict", "ema", "optimizer_states", "balance", "method", "teacher")
MOE = ["network=tiny_moe", "balance=loss_free"]


@pytest.fixture
def common(pictures: Path) -> list[str]:
    save = ["callbacks.checkpoint.every_n_steps=1", "callbacks.checkpoint.keep=-1", "trainer.log_every_n_steps=100"]
    return [*SMALL, f"data.root={pictures}", "peft=full", f"max_steps={STEPS}", "callbacks.samples.n=0", *save]


@pytest.fixture
def asynchronous(monkeypatch):
    """The CPU is treated as a GPU is: steps are masked, and random numbers are made ahead."""
    monkeypatch.setattr(nonfinite, "ASYNCHRONOUS", ("cpu",))
    monkeypatch.setattr(random_ahead, "AHEAD", ("cpu",))


def poison(monkeypatch: pytest.MonkeyPatch, *positions: int) -> None:
    """The latents of the images at these positions are NaN."""
    micro_step = GenerativeModule.micro_step
    latents = GenerativeModule.latents

    def remember(module, batch):
        module.at = batch[2]
        return micro_step(module, batch)

    def bad(module, *arguments):
        x = latents(module, *arguments)
        return torch.where(torch.isin(module.at, torch.tensor(positions))[:, None, None, None], torch.nan, x)

    monkeypatch.setattr(GenerativeModule, "micro_step", remember)
    monkeypatch.setattr(GenerativeModule, "latents", bad)


def saved(folder: Path, step: int) -> dict:
    return torch.load(folder / "checkpoints" / f"step_{step:08d}.ckpt", weights_only=True)


CASES = {
    "accumulated": ["trainer.accumulate_grad_batches=2", "scheduler=linear", "scheduler.warmup_steps=3"],
    "experts": MOE,
    "teacher": ["objective=shortcut", "sampler.steps=1"],
}


@pytest.mark.parametrize("case", CASES)
def test_it_learns_the_same_bits(common, tmp_path, monkeypatch, case, request):
    if case == "teacher":  # a flow has no schedule
        common = [override for override in common if not override.startswith("objective.")]
    assert train(compose(tmp_path / "waiting", *common, *CASES[case])) == 0
    request.getfixturevalue("asynchronous")
    used = []
    monkeypatch.setattr(random_ahead.RandomAhead, "of", counted(random_ahead.RandomAhead.of, used))
    assert train(compose(tmp_path / "masked", *common, *CASES[case])) == 0
    for step in range(1, STEPS + 1):
        for part in PARTS:
            assert_same_bits(saved(tmp_path / "masked", step)[part], saved(tmp_path / "waiting", step)[part], part)
    micro_steps = STEPS * (2 if case == "accumulated" else 1)
    assert [bool(random.made) for random in used] == [False] + [True] * (micro_steps - 1)


def counted(function, results: list):
    def call(*arguments):
        results.append(function(*arguments))
        return results[-1]

    return call


@pytest.mark.parametrize("case", [["trainer.accumulate_grad_batches=2"], MOE, ["scheduler=linear"]])
def test_a_skipped_step_changes_nothing(common, tmp_path, monkeypatch, asynchronous, case):
    poison(monkeypatch, BAD)
    assert train(compose(tmp_path / "run", *common, *case, "callbacks.nonfinite.action=skip")) == 0
    before, after, later = (saved(tmp_path / "run", STEP + k) for k in (0, 1, 2))
    for part in ("state_dict", "ema", "balance"):
        assert_same_bits(after[part], before[part], part)
    assert_same_bits(after["optimizer_states"][0]["state"], before["optimizer_states"][0]["state"])
    assert (before["skipped"], after["skipped"], later["skipped"]) == (0, 1, 0)
    assert not torch.equal(*(next(iter(c["state_dict"].values())) for c in (after, later)))


@pytest.mark.parametrize("due", [1, 0])
def test_it_stops_with_image_and_tensor_of_that_step(common, tmp_path, monkeypatch, asynchronous, due):
    poison(monkeypatch, BAD)
    told = rf"not finite at step {STEP}; .*the gradient of .*rank 0: position {BAD} \(train/\w+/\d+\.png\)"
    with pytest.raises(UserError, match=told):
        train(compose(tmp_path / "run", *common, f"callbacks.checkpoint.every_n_steps={due}"))
    steps = sorted(int(path.stem[5:]) for path in (tmp_path / "run" / "checkpoints").glob("*.ckpt"))
    assert steps == (list(range(1, STEP + 1)) if due else [])


@pytest.mark.parametrize("last", [STEPS - 1, STEPS - 2])
def test_no_bad_step_is_forgotten_at_the_end(common, tmp_path, monkeypatch, asynchronous, last):
    poison(monkeypatch, last * BATCH)
    with pytest.raises(UserError, match=f"not finite at step {last};"):
        train(compose(tmp_path / "run", *common, "callbacks.checkpoint.every_n_steps=0"))


def test_too_many_skipped_steps_stop_it(common, tmp_path, monkeypatch, asynchronous):
    poison(monkeypatch, *range(BATCH, STEPS * BATCH))
    skip = ["callbacks.nonfinite.action=skip", "callbacks.nonfinite.limit=2", "callbacks.checkpoint.every_n_steps=0"]
    with pytest.raises(UserError, match=r"not finite at step 3; .*3 steps in a row"):
        train(compose(tmp_path / "run", *common, *skip))


def test_only_where_nothing_needs_to_be_known_on_the_cpu(asynchronous):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    weights = [("blocks.0.w", torch.nn.Parameter(torch.ones(2, 2))), ("b", torch.nn.Parameter(torch.ones(2)))]
    plain, pruning = build_peft("difffit", lr=1e-3), build_peft("adalora", lr=1e-3, init_r=4, target_r=2, total_step=9)
    fused, loop = (torch.optim.AdamW(weights, fused=fused) for fused in (True, False))
    assert nonfinite.is_maskable(fused, plain, {cpu})
    assert not nonfinite.is_maskable(fused, plain, {cpu, cuda})
    assert not nonfinite.is_maskable(loop, plain, {cpu})
    assert not nonfinite.is_maskable(fused, pruning, {cpu})
    assert not nonfinite.is_maskable(MuonAdamW(weights, 1e-3, 1e-3), plain, {cpu})


def test_a_cpu_waits_as_ever():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    assert not nonfinite.is_maskable(optimizer, build_peft("difffit", lr=1e-3), {parameter.device})


def test_the_masked_average_has_the_bits_of_the_plain_one():
    generator = torch.Generator().manual_seed(0)
    parameters = {f"{n}": torch.nn.Parameter(torch.randn(n, 3, generator=generator)) for n in (1, 40, 7)}
    plain, masked = Ema(parameters, 0.9), Ema(parameters, 0.9)
    with torch.no_grad():
        for step in range(30):
            for parameter in parameters.values():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
            before = masked.state_dict()
            masked.update(step, torch.tensor(1.0))
            assert_same_bits(masked.state_dict(), before)
            plain.update(step)
            masked.update(step, torch.tensor(0.0))
            assert_same_bits(masked.state_dict(), plain.state_dict())


def test_norms_are_torchs():
    gradients = [torch.randn(n, n, generator=torch.Generator().manual_seed(n)) for n in range(1, 30)]
    norm, norms = nonfinite.norms_of(gradients)
    assert torch.equal(norm, torch.nn.utils.get_total_norm(gradients))
    assert norms.shape == (29,)


# Random numbers


def test_hashes_of_many_values_are_those_of_each():
    values = [0, 1, 7, 2**40, 2**63 - 1, -1]
    assert mix_each(3, -5, 1 << 63, last=values).tolist() == [mix(3, -5, 1 << 63, value) for value in values]
    assert mix_each(last=[9]).tolist() == [mix(9)]
    assert mix_each(1, last=[]).tolist() == []


def test_numbers_are_those_of_one_generator_for_each_sample():
    """As they were made before they were made at once: old runs must go on with the same."""
    random = StepRandom(5, 17, [3, 0, 900])
    seeds = [mix(5, crc32(b"noise"), 17, position) for position in (3, 0, 900)]
    expected = [torch.randn(3, 5, generator=torch.Generator().manual_seed(seed >> 1)) for seed in seeds]
    assert torch.equal(random.normal("noise", (3, 5)), torch.stack(expected))
    assert random.uniform("noise").tolist() == [(seed >> 11) * 2.0**-53 for seed in seeds]


def test_numbers_made_ahead_are_the_same_and_move_no_global_generator(asynchronous):
    ahead, device, before = random_ahead.RandomAhead(0, 8), torch.device("cpu"), torch.get_rng_state()
    first = ahead.of([4, 5, 6, 7], device)
    first.normal("noise", (2, 3))
    first.integers("t", 1000)
    ahead.prepare(first, [8, 9, 10, 11])
    second, plain = ahead.of([8, 9, 10, 11], device), StepRandom(0, 1, [0, 1, 2, 3])
    assert second.made.keys() == {("noise", (2, 3)), ("t", None)}
    assert torch.equal(second.normal("noise", (2, 3)), plain.normal("noise", (2, 3)))
    assert torch.equal(second.integers("t", 1000), plain.integers("t", 1000))
    assert torch.equal(second.normal("noise", (5,)), plain.normal("noise", (5,)))  # which nobody expected
    ahead.prepare(second, [12, 13, 14, 15])
    assert not ahead.of([0, 1, 2, 3], device).made  # another micro-batch than expected
    ahead.close()
    assert torch.equal(torch.get_rng_state(), before)
