"""A run between its base and its adapter, with guides, and sums of runs: from the command line and from Python."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ditune.commands.adapted import weights
from ditune.commands.evaluate import evaluate
from ditune.commands.sample import sample
from ditune.commands.train import train
from ditune.errors import UserError
from ditune.evaluation.protocol import Evaluation
from ditune.files.atomic import read_json
from ditune.run import load_run, load_sum
from helpers import SMALL, compose, task

EVALUATED = ("metrics.n=5", "+metrics.judge.batch_size=4", "sampler.batch_size=4", "sampler.guidance=3")
LABELS = torch.tensor([0, 1, 2, 1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, pictures: Path, base: Path) -> Callable[..., Path]:
    """`trained(name, *overrides)`: folder of a run of two steps from the tiny base."""

    def run(name: str, *overrides: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        general = [*SMALL, f"data.root={pictures}", f"pretrained={base}", "max_steps=2", "optimizer.lr=0.05"]
        cfg = compose(folder, *general, "ema.decay=0", f"paths.cache_dir={folder.parent}/cache", *overrides)
        assert train(cfg) == 0
        return folder

    return run


@pytest.fixture(scope="module")
def guided(trained) -> Path:
    return trained("guided", "sampler.guide=base", *EVALUATED)


@pytest.fixture(scope="module")
def plain(trained) -> Path:
    return trained("plain", "sampler.guidance=3", "seed=1")


def images(run, **settings) -> torch.Tensor:
    return run.generator.generate(run.network, LABELS, seed=0, **settings)


def test_a_training_is_guided_by_its_base(guided, base):
    result = read_json(guided / "result.json")
    assert result["metrics"]["protocol"]["guide"] == "base {}"
    assert (guided / "samples" / "before_after.png").is_file()
    run = load_run(guided)
    run.network.to("cpu")
    with_guide = images(run, fixed_batch=True)
    some = run.generator.generate(run.network, LABELS[2:], 0, [2, 3], fixed_batch=True)  # the share of a process
    assert torch.equal(with_guide[2:], some)


def test_the_guide_changes_no_weight(trained, guided):
    other = trained("unguided", *EVALUATED)
    ours, theirs = load_run(guided).network.state_dict(), load_run(other).network.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert "guide" not in read_json(other / "result.json")["metrics"]["protocol"]


def test_strengths_and_guides_on_the_command_line(plain, tmp_path):
    def pictures_of(name: str, *overrides: str) -> list[bytes]:
        general = [f"run={plain}", "n=4", f"out={tmp_path / name}", "precision=32-true"]
        folder = sample(task("sample", *general, *overrides))
        return [path.read_bytes() for path in sorted((folder / "pictures").iterdir())]

    as_it_is = pictures_of("plain")
    assert pictures_of("one", "strength=1") == as_it_is
    half = pictures_of("half", "strength=0.5")
    assert half != as_it_is
    assert pictures_of("sum", "run=null", f"adapters=[{plain}:0.5]") == half
    assert pictures_of("base", "strength=0") == pictures_of("none", "run=null", f"adapters=[{plain}:0]")
    by_base = pictures_of("guide", "guide=base")
    assert by_base != as_it_is
    assert pictures_of("interpolated", "guide=interpolated", "guide_strength=0") == by_base
    weaker = pictures_of("checkpoint", "guide=checkpoint", f"guide_checkpoint={plain}", "guidance=5")
    assert weaker == pictures_of("unguided", "guidance=1"), "a network guides itself nowhere"
    assert read_json(tmp_path / "half" / "samples.json")["strength"] == 0.5
    assert read_json(tmp_path / "guide" / "samples.json")["guide"] == "base"


def test_evaluations_of_strengths_and_guides_stand_beside_the_runs_own(guided, tmp_path):
    own = read_json(guided / "result.json")["metrics"]
    for overrides in (["strength=0.5"], ["guide=null_class"], ["guidance=2"]):
        evaluate(task("evaluate", f"run={guided}", *overrides))
    result = read_json(guided / "result.json")
    assert result["metrics"] == own
    others = result["other_protocols"]
    assert len(others) == 3
    assert [other.get("strength") for other in others.values()] == [0.5, None, None]
    assert len({other["after"]["kid_efflite0"] for other in others.values()} | {own["after"]["kid_efflite0"]}) == 4


def test_the_bases_values_by_a_guide_come_from_a_record(trained, tmp_path, monkeypatch):
    run, record = trained("recorded", *EVALUATED), tmp_path / "record.json"
    kinds = []

    def counted(evaluation, *arguments):
        kinds.append(getattr(evaluation.generator.guide, "kind", None))
        return measure(evaluation, *arguments)

    measure = Evaluation.__call__
    monkeypatch.setattr(Evaluation, "__call__", counted)
    given = (f"run={run}", f"record={record}")
    for guide in ("null_class", "base", "interpolated"):
        evaluate(task("evaluate", *given, f"guide={guide}"))
    # the base is measured once: guided by itself, it is plainly guided
    assert kinds == [None, None, "base", "interpolated"]
    (known,) = read_json(record)["metrics"].values()
    result = read_json(run / "result.json")
    found = result["other_protocols"].values()
    assert [metrics["before_is"] for metrics in found] == ["measured", "record", "record"]
    assert {metrics["before"]["kid_efflite0"] for metrics in found} == {
        entry["values"]["kid_efflite0"] for entry in known.values()
    }


def test_sums_from_python(plain, trained):
    other = trained("other", "sampler.guidance=3", "seed=2")
    run = load_sum({plain: 0.7, other: 0.3})
    assert not torch.equal(images(run), images(load_run(plain)))
    assert torch.equal(images(load_sum({plain: 0.0, other: 0.0})), images(load_run(plain, strength=0)))


def test_what_is_refused(plain, trained, tmp_path, base):
    out = f"out={tmp_path / 'out'}"
    with pytest.raises(UserError, match=r"strength is 0\.5"):
        sample(task("sample", f"checkpoint={base}", "strength=0.5", out))
    with pytest.raises(UserError, match="without an adapter"):
        sample(task("sample", f"checkpoint={base}", "guide=base", out))
    for entries in (["a"], ["a:b"], ["a:1", "a:2"]):
        with pytest.raises(UserError, match=r"<run>:0.7"):
            weights(entries)
    scratch = trained("scratch", "pretrained=null", "peft=full")
    with pytest.raises(UserError, match="trained from scratch"):
        load_run(scratch, strength=0.5)
    with pytest.raises(UserError, match="starts from scratch"):
        trained("refused", "pretrained=null", "peft=full", "sampler.guide=base")
