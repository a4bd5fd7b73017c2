"""Masks of weights: the originals' numbers, exact counts, and zeros that stay in trainings, files and merges."""

from pathlib import Path

import pytest
import torch
from comparison import assert_same_end
from injectors import during_training_step, terminate
from torch import nn
from torch.testing import assert_close

from ditune.checkpoints import load_network, read_adapter, read_header
from ditune.commands.export import export
from ditune.commands.prune import prune, prune_file
from ditune.commands.train import train
from ditune.config.components import build_components
from ditune.config.roles import job_identity
from ditune.config.training import resume_key
from ditune.errors import UserError
from ditune.networks import DiTMoE, build_network
from ditune.run import load_run
from ditune.training import Sparsity
from ditune.training.masks import largest, n_of_m, zeros
from helpers import assert_same_bits, checkpoint, golden, task

STEPS = 6
FOUR = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}


@pytest.fixture
def run(small, tmp_path):
    """`run(name, *overrides)` trains six steps of full training in the folder `name`."""

    def start(name: str, *overrides: str) -> Path:
        given = [
            "peft=full",
            f"max_steps={STEPS}",
            "callbacks.checkpoint.every_n_steps=1",
            "callbacks.checkpoint.keep=-1",
        ]
        train(small(*given, *overrides, folder=tmp_path / name))
        return tmp_path / name

    return start


def at(folder: Path, step: int) -> dict:
    return torch.load(folder / "checkpoints" / f"step_{step:08d}.ckpt", weights_only=True)


def matrices(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The targets of a checkpoint's or network's state."""
    named = {name.removeprefix("network."): value for name, value in state.items()}
    return {n: v for n, v in named.items() if n.startswith("blocks.") and n.split(".", 2)[2][: -len(".weight")] in FOUR}


# The originals


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (4, 4), (4, 8), (7, 8)])
def test_sparsedms_masks_outputs_and_gradients(n, m):
    expected = golden("efficiency_sparsedm")
    weight = expected["weight"]
    mask = n_of_m(weight, n, m)
    assert torch.equal(mask.float(), expected[f"{n}_{m}.mask"])  # with ties in row 0 and zeros in row 1
    assert torch.equal(weight * mask, expected[f"{n}_{m}.out"])
    sparsity = Sparsity(f"{n}:{m}", target="w", way="ste")
    trained, average = {"w": nn.Parameter(weight.clone())}, {"w": weight.clone()}
    sparsity.begin(trained, average)
    assert torch.equal(trained["w"], expected[f"{n}_{m}.out"])
    trained["w"].grad = expected["grad_output"].clone()  # of the masked weights
    sparsity.of_gradients(trained)
    assert torch.equal(trained["w"].grad, expected[f"{n}_{m}.grad"])
    sparsity.open(trained, average)
    assert torch.equal(trained["w"], weight)
    assert torch.equal(average["w"], weight)


def test_sparsedms_layer():
    expected = golden("efficiency_sparsedm")
    layer = nn.Linear(16, 6)
    layer.weight.data, layer.bias.data = expected["weight"].clone(), torch.arange(6.0)
    parameters = dict(layer.named_parameters())
    sparsity = Sparsity("2:4", target="weight", way="ste")
    sparsity.begin(parameters, {name: p.detach().clone() for name, p in parameters.items()})
    for mode in ("train", "eval"):
        assert_close(layer.train(mode == "train")(expected["linear.x"]), expected[f"linear.{mode}"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9])
def test_fedsparsifys_masks_of_all_arrays_together(share):
    expected = golden("efficiency_fedsparsify")
    found = largest({str(i): expected[f"w{i}"] for i in range(3)}, share)
    for i in range(3):
        assert torch.equal(found[str(i)].long(), expected[f"mask.s{share}.{i}"])


@pytest.mark.parametrize(
    ("name", "start", "final", "end", "every", "power"),
    [
        ("t01_sf0.9_T20_f1_e3", 1, 0.9, 20, 1, 3),
        ("t05_sf0.8_T20_f1_e3", 5, 0.8, 20, 1, 3),
        ("t01_sf0.9_T20_f4_e3", 1, 0.9, 20, 4, 3),
        ("t01_sf0.95_T20_f1_e1", 1, 0.95, 20, 1, 1),
    ],
)
@pytest.mark.parametrize("way", ["hard", "ste"])
def test_fedsparsifys_schedule(name, start, final, end, every, power, way):
    schedule = {"schedule": "cubic", "start": start, "final": final, "end": end, "every": every, "power": power}
    sparsity = Sparsity("unstructured", target="w", way=way, **schedule)
    weight = torch.arange(1.0, 1001)
    trained, average = {"w": nn.Parameter(weight.clone())}, {"w": weight.clone()}
    sparsity.begin(trained, average)
    kept = [int(trained["w"].count_nonzero())]
    for step in range(1, end + 1):
        sparsity.open(trained, average)
        sparsity.close(trained, average, step)
        kept.append(int(trained["w"].count_nonzero()))
        assert torch.equal(average["w"] == 0, trained["w"] == 0)
    assert kept == golden("efficiency_fedsparsify")[f"kept.{name}"].tolist()


# Masks


def test_experts_are_grouped_along_their_inputs():
    network = DiTMoE(input_size=8, hidden_size=32, depth=1, num_heads=2, num_classes=3, num_experts=4)
    facts = prune(network, "2:4", None, 0.5, "global")
    layer = network.moe_layers[0]
    for weight in (layer.experts.w_gate_EDF, layer.experts.w_down_EFD):
        groups = weight.detach().unflatten(1, (-1, 4))  # (E, in / 4, 4, out)
        assert torch.equal(groups.count_nonzero(dim=2), torch.full_like(groups[:, :, 0], 2, dtype=torch.int64))
    shared = layer.shared_experts.up_proj.weight.detach().unflatten(1, (-1, 4))
    assert (shared.count_nonzero(dim=2) == 2).all()
    assert sum(facts["zeros"].values()) == sum(network.get_parameter(name).numel() for name in facts["zeros"]) // 2
    assert not any("router" in name or "adaLN" in name for name in facts["zeros"])
    assert {name.split(".", 2)[2].split(".")[0] for name in facts["zeros"]} == {"attn", "moe"}


def test_one_threshold_for_all_or_one_for_each():
    weights = {"small": torch.arange(1.0, 11), "large": torch.arange(11.0, 21)}
    assert zeros({k: w * largest(weights, 0.5)[k] for k, w in weights.items()}) == {"small": 10, "large": 0}
    assert zeros({k: w * largest(weights, 0.5, "layer")[k] for k, w in weights.items()}) == {"small": 5, "large": 5}


def test_hard_masks_only_shrink_and_straight_through_ones_may_come_back():
    """The weight that is masked first would later be the largest."""
    for way, back in (("hard", False), ("ste", True)):
        sparsity = Sparsity("1:2", target="w", way=way, decay=0.0)
        trained, average = {"w": nn.Parameter(torch.tensor([[1.0, 2.0]]))}, {"w": torch.tensor([[1.0, 2.0]])}
        sparsity.begin(trained, average)
        assert trained["w"].tolist() == [[0.0, 2.0]]
        trained["w"].grad = torch.tensor([[-4.0, 0.0]])
        sparsity.of_gradients(trained)
        sparsity.open(trained, average)
        trained["w"].data -= trained["w"].grad
        sparsity.close(trained, average, 1)
        assert (trained["w"].tolist() == [[5.0, 0.0]]) is back


def test_progressive_stages():
    sparsity = Sparsity("2:4", schedule="progressive", start=10, end=60)
    patterns = [None, None, (6, 8), (5, 8), (4, 8), (2, 4), (2, 4)]
    assert [sparsity.amount(step) for step in (0, 19, 20, 30, 49, 50, 1000)] == patterns


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        ({"pattern": "5:4"}, "sparsity.pattern is '5:4'"),
        ({"pattern": "half"}, "sparsity.pattern is 'half'"),
        ({"schedule": "cubic"}, "sparsity.schedule is 'cubic'"),
        ({"pattern": "unstructured", "schedule": "progressive"}, "sparsity.schedule is 'progressive'"),
        ({"pattern": "unstructured", "final": 1.0}, "sparsity.final is 1"),
        ({"schedule": "progressive", "stages": ["6:8"], "end": 5}, "sparsity.stages"),
        ({"schedule": "progressive", "stages": ["1:4", "2:4"], "end": 5}, "keep less and less"),
        ({"schedule": "progressive", "start": 9, "end": 9}, "sparsity.end is 9"),
        ({"way": "soft"}, "sparsity.way is 'soft'"),
    ],
)
def test_refuses_what_cannot_be(wrong, part):
    with pytest.raises(UserError, match=part):
        Sparsity(**wrong)


@pytest.mark.parametrize(
    ("target", "part"),
    [("nothing", "matches none"), ("(", "no regular expression"), (r"final_layer\.linear\.bias", "groups of 4")],
)
def test_refuses_targets_that_do_not_suit(target, part):
    network = build_network("tiny", num_classes=3, input_size=8, in_channels=3)
    with pytest.raises(UserError, match=part):
        Sparsity("2:4", target=target).targets(dict(network.named_parameters()))


# Trainings


@pytest.mark.parametrize(
    "options", [["sparsity=n_m", "sparsity.pattern=4:4"], ["sparsity=magnitude", "sparsity.final=0"]]
)
def test_without_zeros_training_is_plain_to_the_bit(run, options):
    plain, sparse = run("plain"), run("sparse", *options)
    for step in (1, STEPS):
        a, b = at(plain, step), at(sparse, step)
        for part in ("state_dict", "ema", "optimizer_states"):
            assert_same_bits(a[part], b[part], part)
    assert "sparsity" not in a


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_checkpoint_and_its_average_have_the_schedules_zeros(run, optimizer):
    folder = run("run", "sparsity=magnitude", "sparsity.final=0.75", f"optimizer={optimizer}", "optimizer.lr=0.01")
    schedule = Sparsity("unstructured", final=0.75, schedule="cubic", end=STEPS)
    for step in range(1, STEPS + 1):
        saved = at(folder, step)
        for part in ("state_dict", "ema"):
            found = matrices(saved[part])
            total = sum(w.numel() for w in found.values())
            assert sum(zeros(found).values()) == int(schedule.amount(step) * total), (step, part)
        masks = saved["sparsity"]["masks"]
        assert all(not found[name][~mask].any() for name, mask in masks.items())
    before = matrices(at(folder, 3)["state_dict"])
    assert all(not found[name][before[name] == 0].any() for name in found)  # what is gone stays gone


def test_straight_through_keeps_the_pattern_everywhere_and_the_dense_weights_in_checkpoints(run):
    folder = run("run", "sparsity=n_m", "optimizer.lr=0.01")
    saved = at(folder, STEPS)
    network = load_network(folder / "network.safetensors")
    for state in (saved["state_dict"], saved["ema"], network.state_dict()):
        for weight in matrices(state).values():
            assert (weight.unflatten(-1, (-1, 4)).count_nonzero(dim=-1) <= 2).all()
    for name, dense in saved["sparsity"]["dense"].items():
        assert torch.equal(dense * n_of_m(dense, 2, 4), saved["state_dict"][f"network.{name}"])
        assert dense.count_nonzero() > 0.99 * dense.numel()
    first, last = (at(folder, step)["sparsity"]["dense"] for step in (1, STEPS))
    changed = [n_of_m(first[name], 2, 4) != n_of_m(last[name], 2, 4) for name in last]
    assert any(c.any() for c in changed)  # weights come back
    zeros_said = read_header(folder / "network.safetensors")["provenance"]["sparsity"]
    assert zeros_said == {"pattern": "2:4", "zeros": zeros(matrices(network.state_dict()))}


@pytest.mark.parametrize("options", [["sparsity=n_m"], ["sparsity=magnitude", "sparsity.every=2"]])
def test_stopped_and_resumed_to_the_bit(run, monkeypatch, options):
    whole = run("whole", *options)
    with monkeypatch.context() as patch:
        during_training_step(patch, 3, terminate)
        stopped = run("stopped", *options)
    assert checkpoint(stopped)["global_step"] == 3
    assert_same_end(run("stopped", *options, "resume=auto"), whole, STEPS)
    assert_same_bits(at(stopped, STEPS)["sparsity"], at(whole, STEPS)["sparsity"])


def test_it_stands_in_identities_only_when_set(small):
    def identities(*overrides: str) -> tuple:
        cfg = small("peft=full", *overrides)
        return job_identity(cfg), resume_key(cfg, build_components(cfg))

    plain = identities()
    assert "sparsity" not in plain[1]
    assert identities("~sparsity") == plain
    for given in (["sparsity=n_m"], ["sparsity=magnitude"]):
        job, key = identities(*given)
        assert job != plain[0]
        assert key["objective"]["sparsity"]["_target_"].endswith("Sparsity")
        assert key.keys() == plain[1].keys()  # inside of a key that every run compares


# Pruned bases


@pytest.fixture
def pruned(base, tmp_path) -> Path:
    return prune_file(task("prune", f"checkpoint={base}", f"out={tmp_path}/pruned.safetensors"))


def test_a_pruned_file_has_the_pattern_and_nothing_else_changed(pruned, base):
    before, after = load_network(base).state_dict(), load_network(pruned).state_dict()
    for name, weight in after.items():
        expected = before[name] * n_of_m(before[name], 2, 4) if name in matrices(after) else before[name]
        assert torch.equal(weight, expected)
    facts = read_header(pruned)["provenance"]
    assert facts["sparsity"]["zeros"] == zeros(matrices(after))
    assert facts["pruned_from"]["file"] == base.name
    assert facts["class_names"] == read_header(base)["provenance"]["class_names"]


@pytest.mark.parametrize(
    ("method", "filled"),
    [
        ("difffit", False),
        ("bitfit", False),
        ("norm", False),
        ("ia3", False),
        ("lora", True),
        ("dora", True),
        ("shira", True),
    ],
)
def test_which_methods_fill_the_zeros_of_a_pruned_base(small, pruned, tmp_path, method, filled):
    folder = tmp_path / "run"
    more = ["optimizer.lr=0.1", f"pretrained={pruned}", f"peft={method}", "max_steps=3", "callbacks.samples.n=0"]
    train(small(*more, folder=folder))
    assert read_adapter(folder / "adapter")[0]["sparsity"] == read_header(pruned)["provenance"]["sparsity"]
    adapted = load_run(folder).network
    base = matrices(load_network(pruned).state_dict())
    given = [f"run={folder}", "format=dit", f"out={tmp_path}/out"]
    if filled:
        with pytest.raises(UserError, match=r"would fill [\d,]+ of the base's [\d,]+ zeros"):
            export(task("export", *given))
        given.append("fill_zeros=true")
    path = export(task("export", *given))
    merged = load_network(path)
    x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([10, 500]), torch.tensor([0, 2])
    with torch.no_grad():
        assert_close(merged.eval()(x, t, y), adapted.eval()(x, t, y), atol=1e-4, rtol=1e-4)
    before = load_network(pruned).state_dict()
    assert any(not torch.equal(w, before[name]) for name, w in merged.state_dict().items() if "y_embedder" not in name)
    kept = all(not w[base[name] == 0].any() for name, w in matrices(merged.state_dict()).items())
    assert kept is not filled
    assert ("sparsity" in read_header(path)["provenance"]) is not filled


def test_full_fine_tuning_of_a_pruned_base_keeps_its_zeros_by_hard_masks(small, pruned, tmp_path):
    folder = tmp_path / "run"
    hard = ["sparsity=n_m", "sparsity.way=hard", "optimizer.lr=0.01", "max_steps=3"]
    train(small("peft=full", f"pretrained={pruned}", *hard, folder=folder))
    network, base = load_run(folder).network, matrices(load_network(pruned).state_dict())
    for name, weight in matrices(network.state_dict()).items():
        assert torch.equal(weight == 0, base[name] == 0)
        assert not torch.equal(weight, base[name])


def test_masks_of_adapters_that_train(small, base, tmp_path):
    """FedSparsify's schedule on the factors of a LoRA: the adapter's file has the zeros."""
    folder = tmp_path / "run"
    options = ["sparsity=magnitude", "sparsity.target='.*lora_.*'", "sparsity.final=0.75", "optimizer.lr=0.01"]
    train(small("peft=lora", f"pretrained={base}", "max_steps=4", *options, folder=folder))
    config, tensors = read_adapter(folder / "adapter")
    factors = {name: w for name, w in tensors.items() if "lora_" in name}
    total = sum(w.numel() for w in factors.values())
    assert sum(zeros(factors).values()) == int(0.75 * total) == sum(config["sparsity"]["zeros"].values())
    path = export(task("export", f"run={folder}", "format=dit", f"out={tmp_path}/out"))  # there are none to be filled
    assert "sparsity" not in read_header(path)["provenance"]


def test_masks_need_weights_that_train(small, base, tmp_path):
    with pytest.raises(UserError, match=r"matches none .* src/prune\.py"):
        train(small("peft=difffit", f"pretrained={base}", "sparsity=n_m", folder=tmp_path / "run"))
