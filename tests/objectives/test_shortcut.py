"""Shortcut models and their rivals: levels, conversion of trained networks, teachers in checkpoints, refusals."""

from collections import Counter

import pytest
import torch
from torch.testing import assert_close

from ditune.checkpoints import load_network, save_network
from ditune.commands.train import train
from ditune.config.components import build_components
from ditune.errors import UserError
from ditune.networks import build_network
from ditune.objectives import LiveReflow, MeanFlow, ProgressiveDistillation, Shortcut, State
from ditune.processes import FlowProcess, GaussianProcess, build_process
from ditune.rng import StepRandom
from ditune.run import load_run
from ditune.samplers import ShortcutSampler, default_sampler, sample
from helpers import SMALL_FLOW, assert_same_bits, checkpoint, compose

TOLD = FlowProcess(step="log2", base_steps=128)
SMALL_SHORTCUT = [*SMALL_FLOW[:-1], "objective=shortcut"]


def tiny(seed: int = 0, **kwargs):
    torch.manual_seed(seed)
    network = build_network("tiny", input_size=8, in_channels=3, num_classes=5, learn_sigma=False, **kwargs)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # else much of it is zero
    return network.eval()


def state(network, step=0, batch_size=8, max_steps=70) -> State:
    return State(step, max_steps, batch_size, network, network)


@pytest.mark.parametrize("batch_size", [1, 4, 6, 8, 64])
@pytest.mark.parametrize("every", [1, 4, 8])
def test_every_level_is_trained_equally_often_at_every_batch_size(batch_size, every):
    objective, counts = Shortcut(TOLD, bootstrap_every=every), Counter()
    steps = 7 * every * 8  # of a batch of one: every level eight times
    for step in range(steps):
        counts.update(
            objective.sample_levels(StepRandom(0, step, range(batch_size)), state(None, step, batch_size)).tolist()
        )
    bootstrapped = steps * batch_size // every
    assert counts == dict.fromkeys(range(7), bootstrapped // 7) | (
        {7: steps * batch_size - bootstrapped} if every > 1 else {}
    )


def test_levels_do_not_depend_on_how_the_batch_is_cut():
    for levels in ("spread", "uniform", "code"):
        objective = Shortcut(TOLD, levels=levels)
        whole = objective.sample_levels(StepRandom(0, 3, range(64)), state(None, 3, 64))
        parts = [
            objective.sample_levels(StepRandom(0, 3, rows), state(None, 3, 64)) for rows in (range(10), range(10, 64))
        ]
        assert torch.equal(torch.cat(parts), whole)
        assert set(whole.tolist()) >= {0, 6, 7}, levels


def test_a_shortcut_that_is_consistent_has_no_error():
    """All data are one picture: the exact velocity is the mean one over every step, and its own target."""
    picture = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def oracle(x, t, y, step):
        return (x - picture) / (t / 1000).view(-1, 1, 1, 1)

    oracle.num_classes = 5
    x0, y = picture.expand(64, -1, -1, -1), torch.zeros(64, dtype=torch.int64)
    objective = Shortcut(TOLD, bootstrap_every=2)
    loss = objective.loss(oracle, (x0, y), StepRandom(0, 0, range(64)), state(oracle, batch_size=64))
    assert loss.total.item() < 1e-8
    for steps in (1, 2, 128):
        x = sample(oracle, TOLD, torch.randn(2, 3, 4, 4), y[:2], sampler=ShortcutSampler(), steps=steps)
        assert_close(x, picture.expand_as(x), atol=1e-4, rtol=0)


def test_guidance_is_bootstrapped_at_the_finest_half_steps_only():
    """Two networks that differ for the null class only: coarser targets do not see it."""
    x0, y = torch.randn(64, 3, 8, 8), torch.arange(64) % 5
    network, draws = tiny(step=True), StepRandom(0, 0, range(64))
    without, twice = (
        Shortcut(TOLD, bootstrap_every=2, guidance=g, label_drop=0.0).targets(
            network, x0, y, draws, state(network, batch_size=64)
        )
        for g in (1.0, 2.0)
    )
    changed = (without.target != twice.target).flatten(1).any(dim=1)
    assert torch.equal(changed, without.d == 1 / 64)


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda: Shortcut(FlowProcess(base_steps=128)), "step to log2"),
        (lambda: Shortcut(FlowProcess(step="size")), "base_steps=128"),
        (lambda: Shortcut(TOLD, levels="random"), "spread, uniform, code"),
        (lambda: Shortcut(TOLD, dt_bias=True), "levels=code"),
        (lambda: Shortcut(TOLD, levels="code", bootstrap_every=8).check(55), "batch_size to 56"),
        (lambda: LiveReflow(FlowProcess(base_steps=128)), "step=log2"),
        (lambda: ProgressiveDistillation(FlowProcess()), "base_steps=128"),
        (lambda: ProgressiveDistillation(FlowProcess(base_steps=128), label_drop=0.1), "label_drop=0"),
        (lambda: ShortcutSampler().check(TOLD.in_steps(3)), "one of 1, 2, 4, 8, 16, 32, 64, 128"),
        (lambda: ShortcutSampler().check(FlowProcess().in_steps(4)), "sampler=euler"),
        (lambda: ShortcutSampler().check(LiveReflow(TOLD).process.in_steps(4)), "one of 1, 128"),
    ],
)
def test_what_cannot_work_is_refused(work, message):
    with pytest.raises(UserError, match=message):
        work()


def test_the_straightened_flow_is_drawn_by_itself():
    process = LiveReflow(TOLD).process
    assert default_sampler(process).told == 1.0
    assert build_process(process.config).config == process.config
    assert type(default_sampler(TOLD)) is ShortcutSampler


# Networks without a step size as input


def test_a_converted_network_begins_as_it_was(tmp_path):
    network = tiny()
    save_network(tmp_path / "flow.safetensors", network, FlowProcess().config)
    told = load_network(tmp_path / "flow.safetensors", step=True).eval()
    x, t, y = torch.randn(3, 3, 8, 8), torch.tensor([0.0, 500.0, 1000.0]), torch.tensor([0, 1, 5])
    for step in (0.0, 3.0, 7.0):
        assert torch.equal(told(x, t, y, torch.full((3,), step)), network(x, t, y))
    assert told.new_parameter_prefixes == ("step_embedder.",)
    save_network(tmp_path / "told.safetensors", told, TOLD.config)
    assert load_network(tmp_path / "told.safetensors").fresh == ()


@pytest.fixture(scope="module")
def flow(tmp_path_factory, pictures):
    folder = tmp_path_factory.mktemp("flow")
    assert train(compose(folder, *SMALL_FLOW, f"data.root={pictures}", "peft=full", "max_steps=2")) == 0
    return folder / "network.safetensors"


def test_a_method_trains_its_weights_and_the_step_embedder(tmp_path, pictures, flow):
    overrides = [*SMALL_SHORTCUT, f"data.root={pictures}", "peft=bitfit", f"pretrained={flow}", "max_steps=3"]
    assert train(compose(tmp_path, *overrides, "sampler.steps=4", "callbacks.checkpoint.every_n_steps=3")) == 0
    trained = checkpoint(tmp_path)["state_dict"]
    run = load_run(tmp_path)
    assert (tmp_path / "samples" / "strips_0000003.png").is_file()
    assert "samples/step_dependence" in (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert all("bias" in n or "_embedder." in n for n in trained)
    assert run.network.step_embedder.mlp[2].weight.abs().max() > 0
    assert run.generator.generate(run.network, torch.tensor([0]), seed=0).shape == (1, 3, 16, 16)


def test_an_official_diffusion_network_becomes_a_shortcut_network(tmp_path, pictures):
    """Its file says nothing of its process, which is DiT's: epsilon with a learned variance."""
    torch.manual_seed(0)
    official = build_network("dit_s_8", input_size=16, in_channels=3, num_classes=3)
    torch.save(official.state_dict(), tmp_path / "dit.pt")
    overrides = [*SMALL_SHORTCUT, f"data.root={pictures}", "network=dit_s_8", "peft=bitfit"]
    parts = build_components(compose(tmp_path, *overrides, f"pretrained={tmp_path}/dit.pt"))
    process = parts.objective.process
    assert process.config["diffusion"] == GaussianProcess().config
    assert parts.network.step_embedder.mlp[2].weight.requires_grad
    x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([0.9, 0.2]), torch.tensor([0, 3])
    flow = FlowProcess().on_diffusion(GaussianProcess().config)
    expected = flow.velocity(official, x, t, y)
    assert_close(process.velocity(parts.network, x, t, y, torch.tensor([0.5, 0.1])), expected)


# Teachers


@pytest.mark.parametrize("name", ["shortcut", "mean_flow", "live_reflow"])
def test_targets_of_the_live_network_take_no_gradient_away_under_autocast(name):
    """As they do in torch 2.10, where autocast gives the weights that it cast for them to the loss as well."""
    told = TOLD if name != "mean_flow" else FlowProcess(step="size")
    objective = {"shortcut": Shortcut, "mean_flow": MeanFlow, "live_reflow": LiveReflow}[name](told)
    gradients = []
    for bf16 in (True, False):
        network = tiny(step=True)
        batch = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 5
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = objective.loss(network, batch, StepRandom(0, 0, range(64)), state(network, batch_size=64))
        loss.total.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


@pytest.mark.parametrize("objective", ["progressive_distillation", "consistency_distillation", "shortcut"])
def test_teachers_and_averages_survive_a_resume(tmp_path, pictures, flow, objective):
    def run(name: str, steps: int, *overrides: str):
        cfg = compose(
            tmp_path / name,
            *SMALL_FLOW[:-1],
            f"objective={objective}",
            f"data.root={pictures}",
            "peft=full",
            f"pretrained={flow}",
            "callbacks.checkpoint.every_n_steps=2",
            "optimizer.lr=0.01",
            f"max_steps={steps}",
            *overrides,
        )
        assert train(cfg) == 0
        return checkpoint(tmp_path / name)

    whole = run("whole", 14)
    assert bool(whole["teacher"]) == (objective != "shortcut")
    if whole["teacher"]:
        assert whole["teacher"].keys() == whole["ema"].keys()
        name = "blocks.0.attn.qkv.weight"
        assert not torch.equal(whole["teacher"][name], whole["ema"][name])
    keep = ("state_dict", "ema", "teacher", "optimizer_states")
    stop_after(tmp_path, run, 5)
    resumed = run("stopped", 14, "resume=auto")
    for part in keep:
        assert_same_bits(resumed[part], whole[part], part)


def stop_after(tmp_path, run, steps: int) -> None:
    """A training whose process dies in a step; its levels depend on max_steps, so it cannot just be a shorter one."""
    from ditune.training import GenerativeModule

    original, calls = GenerativeModule.training_step, iter(range(1, 100))

    def training_step(self, batch, batch_idx):
        if next(calls) > steps:
            raise RuntimeError("the machine fails")
        return original(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GenerativeModule, "training_step", training_step)
        with pytest.raises(RuntimeError, match="the machine fails"):
            run("stopped", 14)
