"""Teachers of any shape, pairs, reflow and flow-guided distillation (SlimFlow)."""

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from ditune.checkpoints import load_network, read_header, save_network
from ditune.commands.prune import prune_file
from ditune.commands.sample import sample
from ditune.commands.train import train
from ditune.config.components import build_components
from ditune.config.sharded import refuse_unspreadable
from ditune.config.training import resume_key
from ditune.errors import UserError
from ditune.objectives import FlowGuided, FlowMatching, Reflow, State, Teacher
from ditune.objectives.consistency import ConsistencyDistillation
from ditune.objectives.pairs import Pairs
from ditune.objectives.reflow import ANNEAL, annealed
from ditune.processes import FlowProcess, GaussianProcess
from ditune.rng import StepRandom
from ditune.run import load_run
from ditune.samplers import Euler, NoiseStream
from ditune.samplers import sample as sample_latents
from helpers import GOLDEN, SMALL_FLOW, compose, open_gates, task

OF_CODE = load_file(GOLDEN / "efficiency_slimflow.safetensors")
CODE = FlowProcess(time_scale=999.0, data_at=1)  # SlimFlow's convention
PLAIN = FlowProcess(time_scale=1.0)


def toy(parameters):
    """The golden toy network p0 x + p1 t + p2 flip(x), of the network's own time."""

    def network(x, t, y):
        p0, p1, p2 = parameters
        return p0 * x + p1 * t.view(-1, 1, 1, 1) / 999 + p2 * x.flip(-1)

    network.num_classes = 1
    network.parameters = lambda: iter([parameters.detach()])
    network.eval = lambda: network
    network.requires_grad_ = lambda _: network
    return network


class Recorded(StepRandom):
    """Random numbers that somebody else has made, by their purpose."""

    def __init__(self, **values):
        super().__init__(0, 0, range(4))
        self.values = values

    def normal(self, purpose, shape):
        return self.values[purpose]

    def uniform(self, purpose):
        return self.values[purpose]

    def integers(self, purpose, high):
        return torch.arange(4)


class GoldenPairs:
    """The golden pairs as those of files."""

    labels = torch.zeros(4, dtype=torch.int64)

    def __len__(self):
        return 4

    def noise(self, rows):
        return OF_CODE["z0"][rows]

    def latents(self, rows):
        return OF_CODE["data"][rows]


def with_pairs(objective):
    objective.pairs = GoldenPairs()
    return objective


def state(base=None, step=0, max_steps=100):
    return State(step, max_steps, 4, base, base, base)


BATCH = torch.zeros(4, 2, 4, 4), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(("ours", "theirs"), [("linear", ""), ("cosine", "_cos"), ("exponential", "_exp")])
def test_the_annealing_is_that_of_slimflow(ours, theirs):
    objective = Reflow(PLAIN, pairs="there", anneal=ours, anneal_share=1.0)
    found = [objective.new_noise(state(step=int(k))) for k in OF_CODE["beta.steps"]]
    assert found == pytest.approx(OF_CODE[f"beta.warmup{theirs}_100"].tolist(), abs=1e-12)
    assert objective.scheduled
    assert Reflow(PLAIN, pairs="there", anneal=ours, anneal_share=0.5).new_noise(state(step=25)) == ANNEAL[ours](0.5)
    assert not Reflow(PLAIN, pairs="there").scheduled


@pytest.mark.parametrize("step", [0, 25, 50, 100])
def test_annealed_reflow_gives_the_losses_of_slimflow(step):
    name, student = f"anneal.step{step}", toy(OF_CODE["toy.student"])
    objective = with_pairs(Reflow(CODE, pairs="there", anneal="linear", anneal_share=1.0))
    random = Recorded(noise=OF_CODE.get(f"{name}.fresh"), t=1 - OF_CODE[f"{name}.t"])
    targets = objective.targets(student, *BATCH, random, state(step=step))
    assert_close(targets.x_t, OF_CODE[f"{name}.xt"], atol=1e-6, rtol=0)
    loss = objective.loss(student, BATCH, random, state(step=step))
    assert_close(loss.total, OF_CODE[f"{name}.loss"], atol=0, rtol=2e-6)


@pytest.mark.parametrize(("first", "name"), [("teacher", "teacher_loss"), ("student", "teacher_loss_new")])
def test_flow_guided_distillation_gives_losses_and_gradients_of_slimflow(first, name):
    """The second term, which is theirs alone; the student is asked at 1e-3 of their time."""
    parameters = OF_CODE["toy.student"].clone().requires_grad_()
    student, objective = toy(parameters), with_pairs(FlowGuided(CODE, pairs="there", teacher="there", first=first))
    objective.start, objective.teacher = 1 - 1e-3, Teacher(toy(OF_CODE["toy.teacher"]), CODE, "")
    noise = OF_CODE[f"{name}.noise"]
    length = OF_CODE[f"{name}.t"]
    target = objective.two_steps(student, noise, BATCH[1], length, state())
    velocity = CODE.velocity(student, noise, torch.full((4,), objective.start), BATCH[1])
    loss = (velocity - target).square().mean()
    assert_close(loss, OF_CODE[f"{name}.loss"], atol=0, rtol=1e-5)
    (gradient,) = torch.autograd.grad(loss, parameters)
    assert_close(gradient, OF_CODE[f"{name}.grad"], atol=1e-5, rtol=1e-5)


def test_one_step_distillation_gives_the_loss_of_slimflow():
    student, objective = toy(OF_CODE["toy.student"]), with_pairs(FlowGuided(CODE, pairs="there", first="none"))
    objective.start = 1 - OF_CODE["distill.t"][0].item()
    targets = objective.targets(student, *BATCH, Recorded(), state())
    assert_close(targets.x_t, OF_CODE["distill.xt"], atol=1e-6, rtol=0)
    loss = objective.loss(student, BATCH, Recorded(), state())
    assert_close(loss.total, OF_CODE["distill.loss"], atol=0, rtol=2e-6)
    assert (objective.needs_base, objective.asks_teacher) == (False, False)


def test_with_new_noise_alone_it_is_flow_matching_on_the_teachers_latents_to_the_bit():
    student, random = toy(OF_CODE["toy.student"]), StepRandom(0, 3, range(4))
    found = with_pairs(Reflow(PLAIN, pairs="there", anneal="linear")).loss(student, BATCH, random, state())
    data = OF_CODE["data"][random.integers("pair", 4)]
    plain = FlowMatching(PLAIN, label_drop=0).loss(student, (data, BATCH[1]), random, state())
    assert torch.equal(found.total, plain.total)
    assert torch.equal(annealed(OF_CODE["z0"], OF_CODE["data"], 1.0), OF_CODE["data"])


def test_without_annealing_the_target_is_the_pairs_difference():
    objective = with_pairs(Reflow(PLAIN, pairs="there"))
    targets = objective.targets(toy(OF_CODE["toy.student"]), *BATCH, StepRandom(0, 3, range(4)), state())
    rows = StepRandom(0, 3, range(4)).integers("pair", 4)  # the golden pairs are found by their numbers
    assert_close(targets.target, (OF_CODE["z0"] - OF_CODE["data"])[rows], atol=0, rtol=0)


def test_the_two_steps_of_a_straight_teacher_are_its_one_step():
    """With all data at 0 the velocity is z along each path; the student is the teacher, so the loss is 0."""

    def straight(x, t, y):
        return x / t.view(-1, 1, 1, 1)  # x_t = t z

    straight.num_classes = 1
    objective = FlowGuided(PLAIN, steps=4)
    for first in ("student", "teacher"):
        objective.first = first
        loss = objective.loss(straight, BATCH, StepRandom(0, 0, range(4)), state(straight))
        assert loss.total < 1e-10
        assert loss.parts["mse_guided"].max() < 1e-10


def test_pairs_are_made_by_the_teacher_where_there_are_none():
    """By Euler steps of the pretrained network, with guidance, as the sampler's."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(2, 2, generator=generator) / 4

    def network(x, t, y):
        return torch.einsum("ij,njhw->nihw", matrix, x) * (1 + y.view(-1, 1, 1, 1)) + t.view(-1, 1, 1, 1)

    network.num_classes = 1
    objective = Reflow(PLAIN, steps=5, guidance=2.0)
    assert (objective.needs_base, objective.needs_null_class) == (True, True)
    random, labels = StepRandom(0, 0, range(4)), torch.zeros(4, dtype=torch.int64)
    z, x, y = objective.pair(BATCH[0], labels, random, state(network), 1)
    assert torch.equal(z, random.normal("pair", (2, 4, 4)))
    expected = sample_latents(network, PLAIN, z, labels, sampler=Euler(), steps=5, guidance=2.0)
    assert_close(x, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(y, labels)


def test_a_consistency_models_teacher_may_have_another_process():
    """The neighbour is one step of the teacher's own velocity away, whatever its time convention."""
    teacher = Teacher(toy(OF_CODE["toy.teacher"]), CODE, "")
    objective = ConsistencyDistillation(FlowProcess(time_scale=1.0, base_steps=8), teacher="there")
    assert not objective.has_teacher
    assert not objective.updates_teacher(0, 100)
    objective.teacher = teacher
    x, t, h = OF_CODE["z0"], torch.full((4,), 0.5), torch.full((4,), 0.125)
    found = objective.neighbour(x, x, x, t, h, BATCH[1], state())
    assert_close(found, x - 0.125 * CODE.velocity(teacher, x, t, BATCH[1]), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda: Reflow(PLAIN, anneal="step"), "none, linear, cosine, exponential"),
        (lambda: Reflow(PLAIN, anneal_share=0.0), "anneal_share"),
        (lambda: Reflow(PLAIN, label_drop=0.1), "labels are kept"),
        (lambda: Reflow(PLAIN, steps=0), "objective.steps"),
        (lambda: FlowGuided(PLAIN, first="base"), "student, teacher, none"),
        (lambda: FlowGuided(PLAIN, low=0.0), "objective.low"),
        (lambda: FlowGuided(PLAIN, low=0.5, high=0.4), "objective.high"),
        (lambda: Pairs("nowhere"), "no pairs are there"),
    ],
)
def test_what_cannot_work_is_refused(work, message):
    with pytest.raises(UserError, match=message):
        work()


# Real runs: a base of two blocks, a deeper teacher, a student of one block, pairs in files


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, pictures):
    """File of a flow of four blocks."""
    folder = tmp_path_factory.mktemp("teacher")
    parts = build_components(compose(folder, *flow(pictures, "objective=flow_matching"), "+network.depth=4"))
    return saved(parts, folder / "teacher.safetensors")


def flow(pictures, *overrides):
    return [*SMALL_FLOW[:-1], f"data.root={pictures}", "peft=full", "callbacks.samples.n=0", *overrides]


def saved(parts, path, **changes):
    open_gates(parts.network)
    facts = {"class_names": parts.images.class_names, "autoencoder": parts.autoencoder.latent_fingerprint}
    facts |= {"data": parts.images.fingerprint, "resolution": 16, "steps": 0} | changes
    save_network(path, parts.network, parts.objective.process.config, **facts)
    return path


def test_a_slim_student_is_distilled_by_a_deeper_teacher(tmp_path, pictures, teacher):
    """Blocks of the teacher begin the student; pairs lie in files; training stops and goes on to the bit."""
    student = prune_file(task("prune", f"checkpoint={teacher}", f"out={tmp_path}/student.safetensors", "depth=2"))
    network = load_network(student)
    assert len(network.blocks) == 2
    for ours, theirs in ((0, 0), (1, 3)):
        whole = load_network(teacher).blocks[theirs].state_dict()
        assert all(torch.equal(value, whole[key]) for key, value in network.blocks[ours].state_dict().items())
    assert read_header(student)["provenance"]["pruned_from"]["file"] == teacher.name

    pairs = [f"checkpoint={teacher}", f"pairs={tmp_path}/pairs", "n=10", "precision=32-true"]
    pairs += ["sampler=euler", "sampler.batch_size=4", "sampler.guidance=1", "steps=3"]
    assert sample(task("sample", *pairs)) == tmp_path / "pairs"
    found = Pairs(tmp_path / "pairs")
    assert torch.equal(found.noise([7]), NoiseStream(0, [7], (3, 16, 16)).next())
    first = found.latents(range(10))
    (tmp_path / "pairs" / "000001.npy").unlink()
    with pytest.raises(UserError, match="lacks 1 of its 3 files"):
        Pairs(tmp_path / "pairs")
    sample(task("sample", *pairs))
    assert torch.equal(Pairs(tmp_path / "pairs").latents(range(10)), first)
    with pytest.raises(UserError, match="made with other settings"):
        sample(task("sample", *pairs, "seed=1"))
    process = FlowProcess()
    expected = sample_latents(
        load_network(teacher), process, found.noise([7]), found.labels[[7]], sampler=Euler(), steps=3
    )
    assert_close(found.latents([7]), expected, atol=1e-5, rtol=1e-5)

    run = flow(pictures, "network=as_pretrained", f"pretrained={student}", "peft=lora", "optimizer.lr=0.01")
    run += ["objective=flow_guided", f"objective.pairs={tmp_path}/pairs", f"objective.teacher={teacher}"]
    run += ["callbacks.checkpoint.every_n_steps=2"]
    assert train(compose(tmp_path / "whole", *run, "max_steps=4")) == 0
    assert train(compose(tmp_path / "halves", *run, "max_steps=2")) == 0
    assert train(compose(tmp_path / "halves", *run, "max_steps=4", "resume=auto")) == 0
    whole, halves = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("whole", "halves"))
    assert all(torch.equal(value, halves[key]) for key, value in whole.items())
    newest = torch.load(tmp_path / "whole" / "checkpoints" / "step_00000004.ckpt", weights_only=True)
    assert newest["teacher"] == {}
    assert all("blocks.3" not in key for key in newest["state_dict"])
    assert set(newest["identity"]["objective"]) >= {"teacher", "pairs"}
    assert str(tmp_path) not in str(newest["identity"]["objective"])  # known by what they are, not where they lie
    assert len(load_run(tmp_path / "whole").network.blocks) == 2


def test_stochastic_samplers_make_no_pairs(tmp_path, base):
    pairs = [f"checkpoint={base}", f"pairs={tmp_path}/pairs", "n=2", "sampler=ddpm", "steps=3", "sampler.guidance=1"]
    with pytest.raises(UserError, match="adds noise on its way"):
        sample(task("sample", *pairs, "precision=32-true"))
    assert not list((tmp_path / "pairs").glob("*[0-9].npy"))


def test_a_teacher_of_other_classes_latents_or_path_is_refused(tmp_path, pictures, teacher):
    def refused(message, path, *overrides):
        run = flow(pictures, "objective=reflow", f"objective.teacher={path}", *overrides)
        with pytest.raises(UserError, match=message):
            build_components(compose(tmp_path / "run", *run))

    parts = build_components(compose(tmp_path, *flow(pictures, "objective=flow_matching")))
    refused("other latents", teacher, "autoencoder.scale=3.0")
    refused(
        "has 3 classes, and the data has 3 or others",
        saved(parts, tmp_path / "a.safetensors", class_names=["x", "y", "z"]),
    )
    parts.objective.process = FlowProcess(bridge="path").on_diffusion(GaussianProcess(variance="fixed_small").config)
    refused("diffusion's own path", saved(parts, tmp_path / "b.safetensors"))
    small = build_components(compose(tmp_path, *flow(pictures, "objective=flow_matching"), "data.resolution=8"))
    refused("latents of 3 x 8 x 8, the training of 3 x 16 x 16", saved(small, tmp_path / "c.safetensors"))
    blind = build_components(
        compose(
            tmp_path,
            *flow(pictures, "objective=flow_matching"),
            "network.class_dropout_prob=0",
            "objective.label_drop=0",
        )
    )
    refused("no null class", saved(blind, tmp_path / "d.safetensors"), "objective.guidance=2")
    refused("There is no network file", tmp_path / "nowhere.safetensors")


def test_teachers_and_pairs_are_in_a_runs_identity_by_hash(tmp_path, pictures, teacher):
    def key(*overrides):
        cfg = compose(tmp_path, *flow(pictures, *overrides))
        return resume_key(cfg, build_components(cfg))

    plain = key("objective=consistency_distillation")["objective"]
    assert "teacher" not in plain
    other = key("objective=consistency_distillation", f"objective.teacher={teacher}")["objective"]
    assert other == plain | {"teacher": other["teacher"]}
    assert len(other["teacher"]) == 64
    assert key("objective=reflow", "objective.anneal=linear")["max_steps"] is not None


def test_shares_allow_a_teacher_of_its_own(tmp_path, pictures, teacher):
    run = flow(pictures, "trainer=fsdp", "objective=reflow")
    with pytest.raises(UserError, match=r"second copy of what trains.*objective\.teacher="):
        refuse_unspreadable(compose(tmp_path, *run))
    refuse_unspreadable(compose(tmp_path, *run, f"objective.teacher={teacher}"))
