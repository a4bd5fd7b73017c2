"""Adapters by time while sampling, and adapters merged by weights."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ditune.checkpoints import load_network
from ditune.commands.evaluate import evaluate
from ditune.commands.export import export
from ditune.commands.sample import sample as sample_command
from ditune.commands.train import train
from ditune.errors import UserError
from ditune.evaluation.protocol import weights_of
from ditune.peft import Adapters, merge_adapters
from ditune.processes import FlowProcess, GaussianProcess
from ditune.run import load_run
from ditune.run_experts import load_experts
from ditune.samplers import DDIM, DDPM, Euler, Experts, Fora, Multistep, RungeKutta, sample
from helpers import assert_same_bits, task
from peft_helpers import adapt, build_base, build_method, output, train_steps

METHODS = ("lora", "difffit", "vpt_deep")
FLOW, DIFFUSION = FlowProcess(), GaussianProcess(prediction="v", variance="fixed_small")
WALKS = {
    "euler": (Euler(), FLOW, 4),
    "heun": (RungeKutta("heun"), FLOW, 4),
    "dpm": (Multistep(), FLOW, 4),
    "ddim": (DDIM(), DIFFUSION, 5),
    "ddpm": (DDPM(), DIFFUSION, 5),
}


def adapters(*methods):
    """Of one base, by the name of their method."""
    found = Adapters(build_base("dit"))
    for k, name in enumerate(methods):
        adapted, method = adapt("dit", name)
        train_steps(adapted, method, steps=2)
        found.add(f"{name}_{k}", build_method(name), method.to_file(adapted)[1])
    return found


def images(network, walk, experts=None, guidance=2.0, on_step=None):
    sampler, process, steps = WALKS[walk]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 3, 8, 8, generator=generator)
    return sample(
        network,
        process,
        noise,
        torch.tensor([0, 1]),
        sampler=sampler,
        steps=steps,
        guidance=guidance,
        next_noise=lambda: torch.randn(noise.shape, generator=generator),
        on_step=on_step,
        experts=experts,
    )


@pytest.mark.parametrize("walk", WALKS)
def test_copies_of_one_adapter_are_that_adapter_to_the_bit(walk):
    several = adapters("lora", "lora", "lora")
    with several.used("lora_0") as network:
        expected = images(network, walk)
    assert (images(several.network, walk) - expected).abs().max() > 1e-4
    thirds = Experts(several, {"lora_0": (0, 0.3), "lora_1": (0.3, 0.6), "lora_2": (0.6, 1)})
    assert torch.equal(images(several.network, walk, thirds), expected)
    assert torch.equal(images(several.network, walk, Experts(several, {"lora_0": (0, 1)})), expected)
    assert torch.equal(images(several.network, walk, Experts(several, {})), images(several.network, walk))
    assert several.name is None


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("method", METHODS)
def test_above_the_cut_the_base_runs_alone(walk, method):
    several = adapters(method)
    paths = []
    for experts in (None, Experts(several, {f"{method}_0": (0, 0.5)})):
        path = {}
        images(several.network, walk, experts, on_step=lambda t, x, x0, path=path: path.__setitem__(t, x.clone()))
        paths.append(path)
    base, mixed = paths
    ends = [*list(base)[1:], 0.0]  # a step of two calls ends at the next step's time
    length = WALKS[walk][1].length
    above = [t for t, end in zip(base, ends, strict=True) if min(t, end if walk == "heun" else t) / length >= 0.5]
    assert 0 < len(above) < len(base)
    for t in base:
        assert torch.equal(base[t], mixed[t]) == (t in above), t


def test_the_adapter_of_every_call():
    """Heun's method calls at both ends of a step; a boundary belongs to the upper part."""
    calls = []

    class Recorded(Adapters):
        def use(self, name):
            calls.append(name)
            super().use(name)

    several = Recorded(build_base("dit"))
    adapted, method = adapt("dit", "lora")
    for name in ("data", "noise"):
        several.add(name, build_method("lora"), method.to_file(adapted)[1])
    calls.clear()
    images(several.network, "heun", Experts(several, {"data": (0, 0.5), "noise": (0.5, 1)}), guidance=1)
    inner = calls[1:-1]  # around them: the base, and what was in use before
    #              t = 1, .75 | .75, .5 | .5, .25 | .25
    assert inner == ["noise", "noise", "noise", "noise", "noise", "data", "data"]


def test_parts():
    experts = Experts(None, {"b": (0.5, 0.75), "a": (0.0, 0.25)})
    names = [experts.name_at(t) for t in (0, 0.2, 0.25, 0.5, 0.74, 0.75, 1)]
    assert names == ["a", "a", None, "b", "b", None, None]
    assert Experts(None, {"all": (0, 1)}).name_at(1.0) == "all"
    assert experts.settings == {"a": [0.0, 0.25], "b": [0.5, 0.75]}


def test_mistakes_are_refused():
    with pytest.raises(UserError, match=r"a and b both know the part of the process from 0\.4 to 0\.5"):
        Experts(None, {"a": (0, 0.5), "b": (0.4, 1)})
    with pytest.raises(UserError, match="the part of a"):
        Experts(None, {"a": (0.5, 0.5)})
    several = adapters("lora")
    with pytest.raises(UserError, match="cache=none"):
        sample(
            several.network,
            FLOW,
            torch.zeros(1, 3, 8, 8),
            torch.tensor([0]),
            sampler=Euler(),
            steps=4,
            cache=Fora(2),
            experts=Experts(several, {"lora_0": (0, 1)}),
        )
    with (
        Experts(several, {"lora_0": (0, 1)}).choosing(lambda x, t: x, 1.0) as model,
        pytest.raises(ValueError, match="times"),
    ):
        model(torch.zeros(2), torch.tensor([0.1, 0.2]))


# Merging by weights


def test_one_weight_of_one_is_that_adapter_to_the_bit():
    several = adapters("lora", "difffit", "full")
    for name in several.changes:
        with several.used(name) as network:
            expected = output(network)
        merged = merge_adapters(several, {other: float(other == name) for other in several.changes})
        own = merge_adapters(several, {name: 1.0})
        assert_same_bits(dict(merged.state_dict()), dict(own.state_dict()))
        assert_close(output(merged), expected, atol=2e-5, rtol=1e-4)  # merging rounds
    base = merge_adapters(several, {})
    assert_same_bits(dict(base.state_dict()), dict(several.network.state_dict()))


def test_weights_add_the_changes():
    several = adapters("lora", "full")
    one, other = (merge_adapters(several, {name: 1.0}).state_dict() for name in several.changes)
    base = several.network.state_dict()
    found = merge_adapters(several, {"lora_0": 0.25, "full_1": 0.5}).state_dict()
    for key, value in base.items():
        expected = value + 0.25 * (one[key] - value) + 0.5 * (other[key] - value)
        assert_close(found[key], expected, atol=1e-6, rtol=1e-5)


def test_methods_without_a_merge_are_refused():
    with pytest.raises(UserError, match="merge"):
        merge_adapters(adapters("vpt_deep"), {"vpt_deep_0": 1.0})


# Whole runs


def test_from_two_trainings_to_images_and_one_network(small, base, tmp_path):
    common = [f"pretrained={base}", "peft=lora", "max_steps=2"]
    runs = [tmp_path / "data", tmp_path / "noise"]
    for folder, interval in zip(runs, ("[0,0.5]", "[0.5,1]"), strict=True):
        assert train(small(*common, f"objective.interval={interval}", folder=folder)) == 0
    given = f"experts=[{runs[1]},{runs[0]}]"
    out = tmp_path / "out"
    sample_command(task("sample", given, "n=2", "steps=4", "guidance=1", f"out={out}"))
    facts = json.loads((out / "samples.json").read_text())
    assert facts["experts"] == {str(runs[0]): [0.0, 0.5], str(runs[1]): [0.5, 1.0]}
    assert "cache" not in facts
    assert (out / "grid.png").is_file()

    trained = load_experts(runs)
    images = trained.generator.generate(trained.network, torch.tensor([0, 1]), seed=0)
    assert not torch.equal(
        images, load_run(runs[0]).generator.generate(load_run(runs[0]).network, torch.tensor([0, 1]), 0)
    )

    path = tmp_path / "merged"
    export(task("export", given, "weights=[0,1]", "format=dit", f"out={path}"))
    merged, one = load_network(path / "network.safetensors"), load_run(runs[0]).network
    x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([3.0, 700.0]), torch.tensor([0, 1])
    with torch.no_grad():
        assert_close(merged.eval()(x, t, y), one(x, t, y), atol=1e-4, rtol=1e-3)
    with pytest.raises(UserError, match=r"weights is None.*weights=\[0\.5,0\.5\]"):
        export(task("export", given, f"out={tmp_path / 'no'}"))
    with pytest.raises(UserError, match="stands twice"):
        load_experts([runs[0], runs[0]])
    with pytest.raises(UserError, match="exactly one"):
        sample_command(task("sample", given, f"run={runs[0]}"))


def test_an_adapter_follows_the_network_to_its_device():
    several = adapters("lora", "difffit")
    several.network.to("meta")
    for name in several.changes:
        with several.used(name) as network:
            assert {parameter.device.type for parameter in network.parameters()} == {"meta"}


def test_evaluations_of_experts(small, base, pictures, tmp_path):
    """One expert for the whole process is its run, to the bit; two are what sampling with two gives."""
    common = [
        f"pretrained={base}",
        "peft=lora",
        "max_steps=2",
        "optimizer.lr=0.05",
        "ema.decay=0",
        "sampler.guidance=2",
    ]
    common.append("callbacks.samples.n=0")
    parts = {"whole": "null", "data": "[0,0.5]", "noise": "[0.5,1]"}
    for name, interval in parts.items():
        assert train(small(*common, f"objective.interval={interval}", folder=tmp_path / name)) == 0
    whole, data, noise = (tmp_path / name for name in parts)

    def evaluated(name, *overrides):
        given = ["data=folder", f"data.root={pictures}", "data.resolution=16", f"paths.cache_dir={tmp_path}/cache"]
        metrics = ["metrics.n=6", "metrics.seed=5", "+metrics.judge.batch_size=4"]
        path = evaluate(task("evaluate", *given, *metrics, f"out={tmp_path / ('out_' + name)}", *overrides))
        with np.load(path.parent / "samples.npz") as file:
            return json.loads(path.read_text()), file["arr_0"], file["arr_1"]

    plain, one, two = (
        evaluated("plain", f"adapters=[{whole}:1]"),
        evaluated("one", f"experts=[{whole}]"),
        evaluated("two", f"experts=[{noise},{data}]"),
    )
    assert np.array_equal(one[1], plain[1])
    assert one[0]["metrics"]["values"] == plain[0]["metrics"]["values"]
    assert "experts" not in plain[0]["metrics"]["protocol"]
    assert one[0]["metrics"]["protocol"] == plain[0]["metrics"]["protocol"] | {"experts": [[0.0, 1.0]]}
    assert two[0]["metrics"]["protocol"]["experts"] == [[0.0, 0.5], [0.5, 1.0]]
    assert two[0]["experts"] == {str(data): [0.0, 0.5], str(noise): [0.5, 1.0]}
    trained = load_experts([noise, data])
    images = trained.generator.generate(trained.network, torch.from_numpy(two[2]), seed=5, fixed_batch=True)
    assert np.array_equal(two[1], images.permute(0, 2, 3, 1).numpy())
    assert not np.array_equal(two[1], one[1])
    with pytest.raises(UserError, match=r"strength is 0\.5"):
        evaluate(task("evaluate", f"experts=[{whole}]", "strength=0.5"))
    with pytest.raises(UserError, match="guide=null_class"):
        evaluate(task("evaluate", f"experts=[{whole}]", "guide=base"))


def test_the_images_of_an_evaluation_belong_to_all_experts():
    """The base alone has equal weights, whatever its adapters are."""

    def hash_of(several, parts):
        return weights_of(several.network, SimpleNamespace(experts=Experts(several, parts)))

    several, parts = adapters("lora", "lora"), {"lora_0": (0, 0.5), "lora_1": (0.5, 1)}
    before = hash_of(several, parts)
    assert hash_of(several, parts) == before
    with several.used("lora_1") as network, torch.no_grad():
        next(p for name, p in network.named_parameters() if "lora_A" in name).add_(1)
    assert hash_of(several, parts) != before
    assert hash_of(several, {"lora_0": (0, 0.5)}) not in (before, hash_of(several, parts))
