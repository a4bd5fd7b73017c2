"""The dense network's term in the loss of a sparse one: by hand, in trainings, and where it cannot work."""

import pytest
import torch
from comparison import assert_same_end, logged
from injectors import during_training_step, terminate
from torch.testing import assert_close

from ditune.commands.prune import prune_file
from ditune.commands.train import train
from ditune.config.components import build_components
from ditune.config.roles import job_identity
from ditune.config.training import build_module, resume_key
from ditune.errors import UserError
from ditune.objectives import DenseTeacher, FlowMatching, GaussianDiffusion, Shortcut, State
from ditune.processes import FlowProcess, GaussianProcess
from ditune.rng import StepRandom
from ditune.training.masks import zeros
from helpers import assert_same_bits, checkpoint, task
from peft_helpers import build_base

N = 6
PLAIN = {
    "x0": lambda: GaussianDiffusion(GaussianProcess(prediction="x0", variance="fixed_small"), weight="min_snr"),
    "flow": lambda: FlowMatching(FlowProcess()),
    "diffusion_as_flow": lambda: FlowMatching(FlowProcess(diffusion=GaussianProcess(prediction="v").config)),
}


class Scaled(torch.nn.Module):
    """theta times its input, and as a learned variance whatever it is given: the error is known by hand."""

    num_classes, patch_size = 3, 1

    def __init__(self, theta: float, variance: float | None = None):
        super().__init__()
        self.theta, self.variance = torch.nn.Parameter(torch.tensor(theta)), variance

    def forward(self, x, t, y):
        output = self.theta * x
        return output if self.variance is None else torch.cat([output, torch.full_like(x, self.variance)], dim=1)


def loss_of(objective, network, base):
    generator = torch.Generator().manual_seed(5)
    batch = torch.randn(N, 3, 8, 8, generator=generator), torch.arange(N) % 3
    return objective.loss(network, batch, StepRandom(0, 10, range(N)), State(10, 100, N, network, network, base))


@pytest.mark.parametrize("inner", PLAIN)
def test_the_loss_by_two_calls(inner):
    student, base = build_base("dit"), build_base("dit")
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.9)
    plain = loss_of(PLAIN[inner](), student, base)
    found = loss_of(DenseTeacher(PLAIN[inner](), 0.1), student, base)
    seen = []
    handle = student.register_forward_hook(lambda module, inputs, output: seen.append((inputs, output.detach())))
    loss_of(PLAIN[inner](), student, base)
    handle.remove()
    ((inputs, output),) = seen
    with torch.no_grad():
        difference = (base(*inputs) - output).square().flatten(1).mean(dim=1)  # (N,)
    assert torch.equal(found.parts["teacher"], difference)
    assert difference.min() > 0
    assert_close(found.total, plain.total + 0.1 * difference.mean(), atol=0, rtol=1e-6)
    assert_close(found.parts["loss"], plain.parts["loss"] + 0.1 * difference, atol=0, rtol=1e-6)
    assert torch.equal(found.parts["mse"], plain.parts["mse"])


def test_its_gradient_is_the_students_alone_and_leaves_a_learned_variance_alone():
    """d/dtheta of w mean (theta x - theta_0 x)^2 = 2 w (theta - theta_0) mean x^2."""
    objective = GaussianDiffusion(GaussianProcess(prediction="v"))
    gradients = {}
    for weight, variance in ((0.0, 1.0), (0.5, 1.0), (0.5, 2.0)):
        student, base = Scaled(0.7, 1.0), Scaled(0.2, variance)
        wrapped = DenseTeacher(objective, weight) if weight else objective
        seen = []
        student.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(inputs[0]))
        loss_of(wrapped, student, base).total.backward()
        assert base.theta.grad is None
        gradients[weight, variance] = student.theta.grad
    by_hand = 2 * 0.5 * (0.7 - 0.2) * seen[0].square().mean()
    assert_close(gradients[0.5, 1.0] - gradients[0.0, 1.0], by_hand, atol=1e-5, rtol=1e-5)
    assert torch.equal(gradients[0.5, 1.0], gradients[0.5, 2.0])


def test_of_the_teacher_itself_it_is_plain():
    network = build_base("dit")
    plain, found = (
        loss_of(PLAIN["flow"](), network, None),
        loss_of(DenseTeacher(PLAIN["flow"](), 0.1), network, network),
    )
    assert torch.equal(plain.total, found.total)
    assert not found.parts["teacher"].any()


def test_refuses_objectives_of_several_targets_or_none():
    with pytest.raises(UserError, match=r"sparsity.teacher= cannot be used with Shortcut.*or sparsity.teacher=0\."):
        DenseTeacher(Shortcut(FlowProcess(step="log2", base_steps=8)), 0.1)
    with pytest.raises(UserError, match=r"objective\.loss=kl has none"):
        DenseTeacher(GaussianDiffusion(GaussianProcess(), loss="kl"), 0.1)


# Trainings

TAUGHT = ["sparsity=n_m", "sparsity.teacher=0.1", "optimizer.lr=0.01", "max_steps=4"]


@pytest.fixture
def run(small, base, tmp_path):
    """`run(name, *overrides)` trains four steps on the base in the folder `name`."""

    def start(name, *overrides):
        given = [f"pretrained={base}", *TAUGHT, "callbacks.checkpoint.every_n_steps=1", "callbacks.checkpoint.keep=-1"]
        train(small(*given, *overrides, folder=tmp_path / name))
        return tmp_path / name

    return start


def test_stopped_and_resumed_to_the_bit_and_only_with_its_own_weight(run, monkeypatch):
    whole = run("whole", "peft=full")
    with monkeypatch.context() as patch:
        during_training_step(patch, 2, terminate)
        stopped = run("stopped", "peft=full")
    assert checkpoint(stopped)["global_step"] == 2
    with pytest.raises(UserError, match=r"sparsity.teacher \(0.1 there, 0.2 now\)"):
        run("stopped", "peft=full", "sparsity.teacher=0.2")
    assert_same_end(run("stopped", "peft=full", "resume=auto"), whole, 4)


def test_the_first_steps_teacher_is_the_dense_base(small, base):
    """At step 0 the network has its zeros already, and the teacher has none."""
    cfg = small(f"pretrained={base}", "peft=full", *TAUGHT)
    c = build_components(cfg)
    module = build_module(cfg, c, resume_key(cfg, c))
    c.sparsity.begin(module.trained, module.ema.average)
    count = sum(zeros(c.sparsity.targets(module.trained)).values())
    assert count == sum(w.numel() for w in c.sparsity.targets(module.trained).values()) // 2
    assert not any(zeros(c.sparsity.targets(module.base.first)).values())


def test_factors_of_an_adapter_learn_from_the_base_too(run):
    folder = run("lora", "peft=lora", "sparsity=magnitude", "sparsity.target='.*lora_.*'")
    values = [float(line["train/teacher"]) for line in logged(folder)]
    assert len(values) == 4
    assert values[0] == 0  # LoRA begins as the base
    assert all(value > 0 for value in values[1:])


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["~pretrained", "+pretrained=null"], "there is none"),
        (["classes=reinit"], "other classes or another resolution"),
        (["pretrained=@pruned"], "is pruned itself"),
        (["transfer=dogfit"], "sparsity.teacher= cannot be used with DogFit"),
    ],
)
def test_refused_where_there_is_no_dense_teacher(run, base, tmp_path, overrides, part):
    if "pretrained=@pruned" in overrides:
        pruned = prune_file(task("prune", f"checkpoint={base}", f"out={tmp_path}/pruned.safetensors"))
        overrides = [f"pretrained={pruned}"]
    with pytest.raises(UserError, match=part):
        run("run", "peft=full", *overrides)


def test_without_it_identities_are_those_of_before(small, base):
    given = [f"pretrained={base}", "peft=full", "sparsity=n_m"]
    plain, taught = (small(*given, f"sparsity.teacher={weight}") for weight in (0, 0.1))
    before = small(*given, "~sparsity.teacher")
    assert job_identity(plain) == job_identity(before) != job_identity(taught)
    keys = [resume_key(cfg, build_components(cfg)) for cfg in (plain, before, taught)]
    assert_same_bits(keys[0], keys[1])
    assert keys[2]["objective"]["sparsity"]["teacher"] == 0.1
