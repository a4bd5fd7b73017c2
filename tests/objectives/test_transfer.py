"""Objectives for transfer around every objective that takes them, with every method."""

import json

import pytest
import torch
from torch.testing import assert_close

from ditune.checkpoints import read_adapter
from ditune.commands.train import train
from ditune.config import rules
from ditune.config.components import build_components, build_generator
from ditune.errors import UserError
from ditune.objectives import DiffTuning, DogFit, FlowMatching, GaussianDiffusion, NoiseAwareness, Shortcut, State
from ditune.objectives.diff_tuning import Skewed
from ditune.peft import Off
from ditune.processes import FlowProcess, GaussianProcess
from ditune.rng import StepRandom
from ditune.run import load_run
from ditune.samplers import Euler, sample
from ditune.samplers.noise_awareness import noise_aware, untimed
from helpers import SMALL, assert_same_bits, checkpoint, compose
from peft_helpers import CASES, NETWORKS, adapt, build_base, build_method, inputs, output, train_steps

N = 12
PLAIN = {
    "v": lambda: GaussianDiffusion(GaussianProcess(prediction="v", variance="fixed_small")),
    "x0": lambda: GaussianDiffusion(GaussianProcess(prediction="x0", variance="fixed_small"), weight="min_snr"),
    "flow": lambda: FlowMatching(FlowProcess()),
    "backwards": lambda: FlowMatching(FlowProcess(data_at=1, time_scale=1.0)),
    "diffusion_as_flow": lambda: FlowMatching(FlowProcess(diffusion=GaussianProcess(prediction="v").config)),
}
WRAPPED = {
    "dogfit": lambda inner: DogFit(inner, w=2.0),
    "noise_awareness": lambda inner: NoiseAwareness(inner, drop=0.5),
    "diff_tuning": lambda inner: DiffTuning(inner, share=0.5),
}
NEUTRAL = {
    "dogfit": lambda inner: DogFit(inner, w=1.0),
    "late": lambda inner: DogFit(inner, w=2.0, start=0.5),
    "noise_awareness": lambda inner: NoiseAwareness(inner, drop=0.0),
    "diff_tuning": lambda inner: DiffTuning(inner, k=0.0, share=0.0),
}


def network_for(objective, kind="dit"):
    """One whose blocks all do something, with the inputs of the objective."""
    network = build_base(kind)
    if not objective.inputs:
        return network
    other = type(network)(**(network.config | objective.inputs))
    other.load_state_dict(network.state_dict(), strict=False)
    other.add_inputs(objective.inputs)
    for name, parameter in other.named_parameters():
        if name.startswith(other.new_parameter_prefixes):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(3))
    return other


def batch():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(N, 3, 8, 8, generator=generator), torch.arange(N) % 3


def loss_of(objective, network, rows=range(N), base=None, step=10):
    x0, y = batch()
    state = State(step, 100, N, network, network, base or network)
    return objective.loss(network, (x0[list(rows)], y[list(rows)]), StepRandom(0, step, rows), state)


@pytest.mark.parametrize("inner", PLAIN)
@pytest.mark.parametrize("name", NEUTRAL)
def test_its_neutral_value_is_plain_training_to_the_bit(name, inner):
    network, plain = build_base("dit"), PLAIN[inner]()
    expected, found = loss_of(plain, network), loss_of(NEUTRAL[name](PLAIN[inner]()), network)
    assert torch.equal(expected.total, found.total)
    assert_same_bits(expected.parts, found.parts)
    assert torch.equal(expected.time, found.time)
    assert NEUTRAL[name](PLAIN[inner]()).inputs == plain.inputs


@pytest.mark.parametrize("inner", PLAIN)
@pytest.mark.parametrize("name", WRAPPED)
def test_it_does_not_depend_on_how_the_batch_is_cut(name, inner):
    objective = WRAPPED[name](PLAIN[inner]())
    objective.samples = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    network, base = network_for(objective), build_base("dit_moe")
    whole = loss_of(objective, network, base=base)
    cut = [loss_of(objective, network, rows, base=base) for rows in (range(5), range(5, N))]
    assert_close(torch.cat([part.parts["loss"] for part in cut]), whole.parts["loss"], atol=1e-4, rtol=1e-4)
    assert abs(whole.total - loss_of(PLAIN[inner](), network).total) > 1e-4  # it changes something


@pytest.mark.parametrize(("kind", "method_name"), CASES)
@pytest.mark.parametrize("name", WRAPPED)
def test_every_method_learns_by_it(name, kind, method_name):
    """Finite gradients reach everything that trains, and nothing else."""
    objective = WRAPPED[name](PLAIN["v"]())
    objective.samples = torch.zeros(2, 3, 8, 8)
    network = network_for(objective, kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETWORKS, kind, lambda: network)
        adapted, method = adapt_as_it_is(kind, method_name)
    off = Off(adapted)
    loss_of(objective, adapted, base=off).total.backward()
    for key, parameter in adapted.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
        assert parameter.grad is None or parameter.grad.isfinite().all(), key
    new = [key for key in method.trainable(adapted) if key.startswith(("no_time.", "guidance_embedder."))]
    assert len(new) == (1 if name == "noise_awareness" else 0)


def adapt_as_it_is(kind, method_name):
    network, method = NETWORKS[kind](), build_method(method_name)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        method.apply(network)
    return network, method


@pytest.mark.parametrize(("kind", "method_name"), CASES)
def test_the_base_stays_inside_of_the_adapted_network(kind, method_name):
    adapted, method = adapt(kind, method_name)
    off, before = Off(adapted), output(build_base(kind))
    train_steps(adapted, method, steps=2)
    assert (output(adapted) - before).abs().max() > 1e-4
    assert_close(off(*inputs()), before, atol=1e-5, rtol=1e-5)
    assert not off(*inputs()).requires_grad


# DogFit


@pytest.mark.parametrize("inner", PLAIN)
def test_the_target_moves_by_the_guided_difference(inner):
    """Its gradient is that of the moved target, computed by hand from predictions."""
    objective, plain = DogFit(PLAIN[inner](), w=3.0, target="live"), PLAIN[inner]()
    network, base = build_base("dit"), build_base("dit_moe")
    loss_of(objective, network, base=base).total.backward()
    found = network.final_layer.linear.weight.grad.clone()
    network.zero_grad()

    def call(x, t, y):
        moved = (y != network.num_classes).float().view(-1, 1, 1, 1)
        with torch.no_grad():
            guided = network(x, t, y) - base(x, t, torch.full_like(y, network.num_classes))
        return network(x, t, y) - 2.0 * moved * guided

    call.num_classes = network.num_classes
    loss_of(plain, call).total.backward()
    assert_close(found, network.final_layer.linear.weight.grad, atol=1e-6, rtol=1e-4)


def test_epsilon_of_the_paper():
    """eps + (w - 1) (eps_theta(x, c) - eps_base(x, null)), by the loss of one sample at known values."""
    process = GaussianProcess(prediction="epsilon", variance="fixed_small")
    objective = DogFit(GaussianDiffusion(process, label_drop=0), w=2.5, target="ema")
    network, theta, base = (lambda x, t, y, k=k: torch.full_like(x, k) + 0 * x for k in (0.5, 0.25, -1.0))
    network.num_classes = 3
    x0, y = batch()
    random = StepRandom(0, 0, range(N))
    loss = objective.loss(network, (x0, y), random, State(0, 1, N, theta, theta, base))
    target = random.normal("noise", x0.shape[1:]) + 1.5 * (0.25 - -1.0)
    assert_close(loss.parts["mse"], (0.5 - target).square().mean(dim=(1, 2, 3)))


def test_the_cut_off_and_dropped_labels_leave_targets_alone():
    network, base = build_base("dit"), build_base("dit_moe")
    inner = PLAIN["flow"]()
    plain, cut = loss_of(inner, network), loss_of(DogFit(PLAIN["flow"](), w=3.0, cutoff=0.5), network, base=base)
    moved = (plain.parts["loss"] - cut.parts["loss"]).abs() > 1e-6
    dropped = StepRandom(0, 10, range(N)).uniform("drop") < 0.1
    assert moved.tolist() == ((plain.time <= 0.5) & ~dropped).tolist()
    assert moved.any()


def test_the_late_start_counts_from_its_share_of_the_training():
    objective, network = DogFit(PLAIN["flow"](), w=3.0, start=0.5), build_base("dit")
    base, plain = build_base("dit_moe"), PLAIN["flow"]()
    for step, same in ((49, True), (50, False)):
        found = loss_of(objective, network, base=base, step=step).total
        assert torch.equal(found, loss_of(plain, network, step=step).total) == same


def test_the_scale_as_an_input():
    objective = DogFit(PLAIN["v"](), w=3.0, control=True)
    network = network_for(objective)
    seen = []

    def call(x, t, y, w=None):
        seen.append(w)
        return network(x, t, y, w=w)

    call.num_classes = network.num_classes
    loss_of(objective, call, base=build_base("dit_moe"))
    w = next(value for value in seen if value is not None)
    assert ((w >= 1) & (w <= 3)).all()
    assert len(w.unique()) > N / 2
    x, t, y = inputs()
    with torch.no_grad():
        assert torch.equal(network(x, t, y), network(x, t, y, w=torch.ones(len(x))))
        assert (network(x, t, y) - network(x, t, y, w=torch.full((len(x),), 2.0))).abs().max() > 1e-4
        arguments = (x, y.clamp(max=2))
        process = FlowProcess()
        one, two = (sample(network, process, *arguments, sampler=Euler(), steps=2, guidance_input=w) for w in (1, 2.0))
        assert torch.equal(one, sample(network, process, *arguments, sampler=Euler(), steps=2))
        assert not torch.equal(one, two)


# Noise-awareness guidance


def test_dropped_times_are_not_seen():
    """One vector for all of them; the others see their own time, to the bit."""
    objective = NoiseAwareness(PLAIN["v"](), drop=0.5)
    network, (x, t, y) = network_for(objective), inputs()
    missing = torch.tensor([True, False, True, False])
    with torch.no_grad():
        found = network(x, torch.where(missing, torch.nan, t), y)
        assert torch.equal(found, network(x, torch.where(missing, torch.nan, t + missing * 50), y))
        assert_close(found[~missing], network(x, t, y)[~missing], atol=1e-6, rtol=0)
        assert (found[missing] - network(x, t, y)[missing]).abs().max() > 1e-3
    seen = []

    def call(x, t, y):
        seen.append(t)
        return network(x, t, y)

    call.num_classes = network.num_classes
    loss_of(objective, call)
    assert seen[0].isnan().tolist() == (StepRandom(0, 10, range(N)).uniform("drop_time") < 0.5).tolist()


def test_sampling_pushes_away_from_the_prediction_without_time():
    network = network_for(NoiseAwareness(PLAIN["flow"]()))
    x, t, y = inputs()
    t = t / 1000
    for process in (FlowProcess(), FlowProcess(diffusion=GaussianProcess(prediction="v").config)):
        bound, timeless = process.bind(network), process.bind(untimed(network))
        with torch.no_grad():
            found = noise_aware(bound, timeless, 3, 0.7)(x, t, y)
            expected = bound(x, t, y) + 0.7 * (bound(x, t, y) - timeless(x, t, y))
            expected[-1] = bound(x, t, y)[-1]  # the null class stays
        assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert noise_aware(bound, timeless, 3, 0.0) is bound
    arguments = {"sampler": Euler(), "steps": 2, "guidance": 2.0}
    plain = sample(network, FlowProcess(), x, y, **arguments)
    assert torch.equal(plain, sample(network, FlowProcess(), x, y, noise_awareness=0.0, **arguments))
    assert not torch.equal(plain, sample(network, FlowProcess(), x, y, noise_awareness=1.0, **arguments))


# Diff-Tuning


@pytest.mark.parametrize("k", [0.0, 1.0, 3.0])
def test_densities_of_the_times(k):
    rows = range(4000)
    retained = torch.arange(4000) % 2 == 1
    random = StepRandom(0, 0, rows)
    t = Skewed(random, k, retained).uniform("t")
    edges = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    for values in (t[~retained], 1 - t[retained]):  # the second density is the first one, mirrored
        found = (values[:, None] <= edges).double().mean(dim=0)
        assert_close(found, edges ** (k + 1), atol=0.03, rtol=0)
    assert ((t >= 0) & (t < 1)).all()
    assert torch.equal(Skewed(random, k, retained).uniform("noise"), random.uniform("noise"))
    assert Skewed(random, k, retained).integers("t", 1000).max() <= 999


def test_images_of_the_base_have_the_null_class():
    objective = DiffTuning(PLAIN["v"](), share=0.5)
    objective.samples = torch.full((3, 3, 8, 8), 7.0)
    x0, y = batch()
    network = build_base("dit")
    given = objective.given(network, (x0, y), StepRandom(0, 0, range(N)), State(0, 1, N, network, network, network))
    kept = (given.batch[0] == 7).all(dim=(1, 2, 3))
    assert 0 < kept.sum() < N
    assert kept.tolist() == (given.batch[1] == network.num_classes).tolist()
    assert torch.equal(given.batch[0][~kept], x0[~kept])


# What is refused, and whole trainings


def test_mistakes_are_refused():
    with pytest.raises(UserError, match=r"transfer=.*Shortcut.*objective=diffusion"):
        DogFit(Shortcut(FlowProcess(step="log2", base_steps=8)))
    with pytest.raises(UserError, match=r"objective\.loss=kl"):
        DogFit(GaussianDiffusion(GaussianProcess(), loss="kl"))
    for wrong in ({"w": 0.5}, {"start": 2}, {"cutoff": 0}, {"target": "teacher"}):
        with pytest.raises(UserError, match=rf"transfer\.{next(iter(wrong))}"):
            DogFit(PLAIN["v"](), **wrong)
    with pytest.raises(UserError, match=r"transfer\.drop"):
        NoiseAwareness(PLAIN["v"](), drop=2)
    with pytest.raises(UserError, match=r"transfer\.k"):
        DiffTuning(PLAIN["v"](), k=-1)


def test_from_scratch_and_without_the_input_it_is_refused(tmp_path, pictures):
    settings = [*SMALL, f"data.root={pictures}", "peft=full"]
    with pytest.raises(UserError, match=r"transfer=.*pretrained"):
        rules.check(build_components(compose(tmp_path, *settings, "transfer=dogfit")), rules.OF_A_TRAINING)
    for key, value in (("noise_awareness", 1), ("guidance_input", 2)):
        cfg = compose(tmp_path, *settings, f"sampler.{key}={value}")
        with pytest.raises(UserError, match=rf"sampler\.{key} is {value}.*Train it with"):
            build_generator(cfg, build_components(cfg))


@pytest.mark.parametrize(
    ("transfer", "sampler", "peft"),
    [
        (["transfer=dogfit", "transfer.control=true"], "sampler.guidance_input=1.5", "lora"),
        (["transfer=noise_awareness", "transfer.drop=0.5"], "sampler.noise_awareness=1", "difffit"),
        (["transfer=diff_tuning", "transfer.n=3"], "sampler.guidance=1", "full"),
    ],
    ids=["dogfit", "noise_awareness", "diff_tuning"],
)
def test_a_run_goes_on_as_if_it_had_never_stopped(small, base, tmp_path, transfer, sampler, peft):
    common = [*transfer, sampler, f"peft={peft}", f"pretrained={base}", "max_steps=4"]
    common += ["callbacks.checkpoint.every_n_steps=2", "callbacks.checkpoint.keep=9"]
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    train(small(*common, folder=whole))
    train(small(*common, folder=halved))
    (halved / "checkpoints" / "step_00000004.ckpt").unlink()
    train(small(*common, "resume=auto", folder=halved))
    one, two = checkpoint(whole), checkpoint(halved)
    assert_same_bits(one["state_dict"], two["state_dict"])
    run = load_run(whole)
    assert run.generator.generate(run.network, torch.tensor([0, 1]), seed=0).shape == (2, 3, 16, 16)
    new = {"dogfit": "guidance_embedder", "noise_awareness": "no_time"}.get(transfer[0].partition("=")[2])
    assert any(new in key for key in read_adapter(whole / "adapter")[1]) if new else True
    assert json.loads((whole / "result.json").read_text())["status"] == "finished"
    del common[: len(transfer)], common[0]
    with pytest.raises(UserError, match="checkpoint"):  # another objective is another run
        train(small(*common, "resume=auto", "max_steps=5", folder=whole))
