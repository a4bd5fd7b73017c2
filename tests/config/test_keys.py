"""Values of config keys are of the right type and range, and wrong overrides say what was meant."""

import subprocess
import sys
from pathlib import Path

import hydra
import pytest
import yaml
from omegaconf import OmegaConf

import forked
from ditune import cli
from ditune.commands.sample import sample
from ditune.commands.train import train
from ditune.config.keys import APART, KEYS, check, rows_of
from ditune.config.overrides import current, nearest
from ditune.errors import UserError
from helpers import ROOT, SMALL, compose

CONFIGS = ROOT / "configs"
COMMANDS = {path.stem: path.parent for path in [*CONFIGS.glob("*.yaml"), *CONFIGS.glob("reporting/*.yaml")]}
GLOBAL = ("experiment", "sweep", "preset", "model", "debug", "foreign")  # groups whose keys stand at the top


def composed(command: str, *overrides: str):
    cli.prepare()
    with hydra.initialize_config_dir(str(COMMANDS[command]), version_base="1.3"):
        return hydra.compose(command, list(overrides))


# The table is complete, and takes all that stands in the configs


def leaves(values: dict, path: str = "") -> list[str]:
    found = []
    for key, value in values.items():
        name = f"{path}.{key}" if path else str(key)
        if str(key).startswith("_") or key in ("defaults", "hydra"):
            continue
        found += leaves(value, name) if isinstance(value, dict) else [name]
    return found


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_key_of_the_configs_has_a_row(path):
    group = ".".join(path.relative_to(CONFIGS).parts[:-1])
    if group.startswith("hydra"):
        return  # Hydra has its own
    command = path.stem if path.parent == COMMANDS.get(path.stem) else "train"
    at_the_top = command == path.stem or group in GLOBAL
    names = leaves(yaml.safe_load(path.read_text(encoding="utf-8")) or {}, "" if at_the_top else group)
    assert not [name for name in names if not rows_of(name, command)]


def test_every_row_is_of_a_key():
    """A row that no config needs would hide a typo."""
    names = {"train": set()}
    for path in CONFIGS.rglob("*.yaml"):
        group = ".".join(path.relative_to(CONFIGS).parts[:-1])
        command = path.stem if path.parent == COMMANDS.get(path.stem) else "train"
        at_the_top = command == path.stem or group in GLOBAL
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        names.setdefault(command, set()).update(leaves(values, "" if at_the_top else group))
    everything = set().union(*names.values())
    unused = [row.pattern for row in KEYS if not any(row.matches(name) for name in everything)]
    for command in names.keys() & APART.keys():  # studies add theirs when they are imported
        rows = APART[command]
        unused += [row.pattern for row in rows if not any(row.matches(name) for name in names[command])]
    # groups that are chosen, not written, and ways of routing that are added with +
    routing = {"network.choice", "network.route_on", "network.time_range"}
    assert set(unused) <= {"sampler.sampler", "trainer.strategy", *routing}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("experiment/[!_]*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_passes(tmp_path, path):
    cfg = compose(tmp_path, f"experiment={path.stem}")
    before = OmegaConf.to_container(cfg)
    check(cfg)
    assert OmegaConf.to_container(cfg) == before


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_entry_point_passes(command):
    check(composed(command), command)


@pytest.mark.parametrize(
    "group", ["peft", "objective", "sampler", "metrics", "logger", "balance", "augment", "trainer"]
)
def test_every_option_passes(tmp_path, group):
    for path in sorted((CONFIGS / group).glob("[!_]*.yaml"))[::3]:  # every third: each costs a composition
        check(compose(tmp_path, f"{group}={path.stem}"))


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("config.yaml")), ids=lambda path: path.parent.name)
def test_configs_of_earlier_runs_pass(path):
    check(OmegaConf.load(path))


# Values

WHOLE = "must be a whole number of at least"
WRONG = {
    "seed=1000.5": f"seed is 1000.5, but {WHOLE} 0.",
    "seed=-1": f"seed is -1, but {WHOLE} 0.",
    "seed=true": f"seed is true, but {WHOLE} 0.",
    "seed=null": f"seed is null, but {WHOLE} 0.",
    "seed=1e30": "seed is 1e+30, but must be a whole number between 0",
    "seed=[1,2]": f"seed is [1, 2], but {WHOLE} 0.",
    "seed={a:1}": f"seed is {{'a': 1}}, but {WHOLE} 0.",
    "batch_size=0": f"batch_size is 0, but {WHOLE} 1.",
    "batch_size=4.5": f"batch_size is 4.5, but {WHOLE} 1.",
    "batch_size=": f"batch_size is '', but {WHOLE} 1.",
    "max_steps=-1": f"max_steps is -1, but {WHOLE} 1.",
    "max_steps=inf": f"max_steps is inf, but {WHOLE} 1.",
    "data.resolution=0": f"data.resolution is 0, but {WHOLE} 1.",
    "data.num_workers=-1": f"data.num_workers is -1, but {WHOLE} 0.",
    "data.flip=no": "data.flip is no, but must be true or false.",
    "data.pictures.sources=abc": "data.pictures.sources is abc, but must be a list of texts.",
    "optimizer.lr=high": "optimizer.lr is high, but must be a number above 0.",
    "optimizer.lr=-1": "optimizer.lr is -1, but must be a number above 0.",
    "optimizer.lr=0": "optimizer.lr is 0, but must be a number above 0.",
    "optimizer.lr=nan": "optimizer.lr is nan, but must be a number above 0.",
    "optimizer.betas=[0.9]": "optimizer.betas is [0.9], but must be a list of 2 numbers of at least 0 and below 1.",
    "optimizer.weight_decay=-0.1": "optimizer.weight_decay is -0.1, but must be a number of at least 0.",
    "peft.lr=fast": "peft.lr is fast, but must be a number above 0.",
    "peft.gamma_depth=-1": f"peft.gamma_depth is -1, but {WHOLE} 0, or null.",
    "ema.decay=1.5": "ema.decay is 1.5, but must be a number between 0 and 1.",
    "ema.decay=-0.1": "ema.decay is -0.1, but must be a number between 0 and 1.",
    "trainer.log_every_n_steps=-1": f"trainer.log_every_n_steps is -1, but {WHOLE} 0.",
    "trainer.accumulate_grad_batches=0": f"trainer.accumulate_grad_batches is 0, but {WHOLE} 1, or auto.",
    "trainer.gradient_clip_val=0": "trainer.gradient_clip_val is 0, but must be a number above 0, or null.",
    "trainer.devices=0": f"trainer.devices is 0, but {WHOLE} 1, or auto, or -1",
    "trainer.devices=all": f"trainer.devices is all, but {WHOLE} 1, or auto, or -1",
    "trainer.accelerator=gpuu": "trainer.accelerator is gpuu, which it cannot be. Set one of auto, cpu, gpu",
    "trainer.precision=16": "trainer.precision is 16, which it cannot be. Set one of bf16-mixed, 32-true, auto.",
    "objective.label_drop=2": "objective.label_drop is 2, but must be a number between 0 and 1.",
    "objective.process.timesteps=1e1000": f"objective.process.timesteps is inf, but {WHOLE} 1.",
    "sampler.steps=2.5": f"sampler.steps is 2.5, but {WHOLE} 1, or null.",
    "sampler.guidance=.inf": "sampler.guidance is .inf, but must be a finite number, or null.",
    "sampler.guidance_interval=[0.5,0.1]": "but must be a list of 2 numbers between 0 and 1, in ascending order.",
    "sampler.guidance_interval=[0,2]": "sampler.guidance_interval is [0, 2], but must be a list of 2 numbers between",
    "metrics.n=-1": f"metrics.n is -1, but {WHOLE} 0.",
    "metrics.n=many": f"metrics.n is many, but {WHOLE} 0.",
    "callbacks.samples=3": "callbacks.samples is 3, but must be a group of keys: n, every_n_steps.",
    "callbacks.samples.n=half": f"callbacks.samples.n is half, but {WHOLE} 0.",
    "callbacks.strips.steps=[1,0]": "callbacks.strips.steps is [1, 0], but must be a list of whole numbers of at least",
    "pretrained=true": "pretrained is true, but must be text, or null.",
    "name=[a]": "name is ['a'], but must be text.",
    "launcher.slots=0": f"launcher.slots is 0, but {WHOLE} 1, or null.",
    "scheduler.warmup_steps=-5": f"scheduler.warmup_steps is -5, but {WHOLE} 0.",
    "compile=0.5": "compile is 0.5, but must be true or false.",
}


@pytest.mark.parametrize("override", WRONG)
def test_wrong_values_are_named_with_what_they_must_be(tmp_path, override):
    with pytest.raises(UserError) as caught:
        check(compose(tmp_path, override))
    assert WRONG[override] in str(caught.value)
    assert str(caught.value).startswith(override.partition("=")[0])
    assert str(caught.value).endswith(".")


WRONG_ELSEWHERE = {
    "sample n=2.5": f"n is 2.5, but {WHOLE} 1.",
    "sample n=two": f"n is two, but {WHOLE} 1.",
    "sample first=0.5": f"first is 0.5, but {WHOLE} 0.",
    "sample guidance=high": "guidance is high, but must be a finite number, or null.",
    "sample guidance=.nan": "guidance is .nan, but must be a finite number, or null.",
    "sample guidance=nan": "guidance is nan, but must be a finite number, or null.",
    "sample steps=0": f"steps is 0, but {WHOLE} 1, or null.",
    "sample classes=cat": "classes is cat, but must be a list of texts, or null.",
    "evaluate processes=0": f"processes is 0, but {WHOLE} 1.",
    "evaluate threads=1.5": f"threads is 1.5, but {WHOLE} 1, or null.",
    "evaluate metrics.n=x": f"metrics.n is x, but {WHOLE} 0.",
    "prepare policy=ignore": "policy is ignore, which it cannot be. Set one of raise, skip.",
    "prepare data.resolution=big": f"data.resolution is big, but {WHOLE} 1.",
    "upcycle num_experts=0": f"num_experts is 0, but {WHOLE} 1.",
    "upcycle options.moe_from=2": "options.moe_from is 2, but must be a number between 0 and 1.",
    "analyze_routing n=-1": f"n is -1, but {WHOLE} 1.",
    "parameters num_classes=ten": f"num_classes is ten, but {WHOLE} 1.",
    "dashboard project=true": "project is true, but must be text.",
    "export run=[a]": "run is ['a'], but must be text, or null.",
    "report metric=true": "metric is true, but must be text, or null.",
}


@pytest.mark.parametrize("line", WRONG_ELSEWHERE)
def test_wrong_values_of_other_entry_points(line):
    command, override = line.split(" ")
    with pytest.raises(UserError) as caught:
        check(composed(command, override), command)
    assert str(caught.value) == WRONG_ELSEWHERE[line]


RIGHT = {
    "seed=1e3": 1000,
    "batch_size=4.0": 4,
    "max_steps=1e1": 10,
    "data.resolution=16.0": 16,
    "trainer.log_every_n_steps=0": 0,
    "trainer.gradient_clip_val=null": None,
    "trainer.devices=auto": "auto",
    "trainer.devices=-1": -1,
    "trainer.devices=[0,1.0]": [0, 1],
    "trainer.precision=auto": "auto",
    "sampler.guidance=-0.5": -0.5,
    "sampler.guidance=3": 3,
    "ema.decay=1": 1,
    "optimizer.lr=1e-3": 1e-3,
    "data.flip=1": True,
    "name=7": "7",
    "callbacks.strips.steps=[1.0,2]": [1, 2],
    "data.pictures.classes=[cat,7]": ["cat", "7"],
    "data.num_workers=${oc.decode:'2'}": 2,
    "data.num_workers=${oc.env:KEYS_WORKERS}": 2,
    "metrics.n=1e2": 100,
}


@pytest.mark.parametrize("override", RIGHT)
def test_values_come_in_their_own_type(tmp_path, monkeypatch, override):
    monkeypatch.setenv("KEYS_WORKERS", "2")
    cfg = compose(tmp_path, override)
    check(cfg)
    value = OmegaConf.select(cfg, override.partition("=")[0])
    value = OmegaConf.to_object(value) if OmegaConf.is_config(value) else value
    assert value == RIGHT[override]
    assert type(value) is type(RIGHT[override])


def test_what_refers_to_a_whole_float_is_whole_too(tmp_path):
    cfg = compose(tmp_path, "peft=adalora", "max_steps=1e1", "data.resolution=64.0")
    check(cfg)
    for name in ("max_steps", "trainer.max_steps", "scheduler.max_steps", "peft.total_step"):
        assert repr(OmegaConf.select(cfg, name)) == "10"
    assert repr(cfg.data.pictures.resolution) == "64"


def test_keys_that_a_user_adds_are_left_to_what_is_built_of_them(tmp_path):
    check(compose(tmp_path, "+peft.unknown=high", "+trainer.num_sanity_val_steps=2", "+mine.of.mine=[1,a]"))


def test_values_are_refused_from_python_too(small, tmp_path):
    with pytest.raises(UserError, match="batch_size is 0, but must be"):
        train(small("peft=full", "batch_size=0"))
    with pytest.raises(UserError, match="first is -1, but must be"):
        sample(composed("sample", f"run={tmp_path}", "first=-1"))


def test_whole_floats_train_and_stand_in_the_result_as_int(small, tmp_path):
    overrides = ["seed=1e1", "batch_size=4.0", "max_steps=2e0", "data.resolution=16.0", "trainer.log_every_n_steps=0"]
    cfg = small("peft=full", *overrides, "callbacks.checkpoint.every_n_steps=0")
    assert train(cfg) == 0
    text = (tmp_path / "run" / "result.json").read_text(encoding="utf-8")
    for line in ('"max_steps": 2,', '"batch_size": 4,', '"seed": 10,'):
        assert line in text
    assert "loss" not in (tmp_path / "run" / "metrics.csv").read_text(encoding="utf-8")


# Overrides

OVERRIDES = {
    "batchsize=8": "There is no key 'batchsize'. Did you mean batch_size?",
    "max_step=8": "There is no key 'max_step'. Did you mean max_steps?",
    "pft=lora": "There is no key 'pft'. Did you mean peft?",
    "trainer.devces=2": "There is no key 'trainer.devces'. Did you mean trainer.devices?",
    "guidance=2": "There is no key 'guidance'. Did you mean sampler.guidance?",
    "trainer.num_workers=2": "There is no key 'trainer.num_workers'. Did you mean data.num_workers?",
    "peft.lora_alpha=8": "There is no key 'peft.lora_alpha'. The keys of peft are lr, weight_decay,",
    "seed.x=1": "There is no key 'seed.x'. Did you mean seed?",
    "~batchsize": "There is no key 'batchsize'. Did you mean batch_size?",
    "xyzzy=1": "There is no key 'xyzzy'. --cfg job shows all keys.",
    "peft=difft": "There is no peft=difft. Did you mean difffit? Choose one of adalora, adapter,",
    "experiment=difffit_emojj": "There is no experiment=difffit_emojj. Did you mean difffit_emoji? Choose one of",
    "network=dit_xl_3": "There is no network=dit_xl_3. Did you mean dit_xl_",
    "ema=null": "The group 'ema' cannot be empty. Choose one of default.",
    "+peft=lora": "The group 'peft' is there already. Leave out the + to choose its option: peft=...",
    "++peft=lora": "The group 'peft' is there already. Leave out the + to choose its option: peft=...",
    "+experiment=difffit_emoji": "The group 'experiment' is there already.",
    "+seed=3": "The key 'seed' is there already. Leave out the + to set it.",
    "max_steps": "'max_steps' is no override, for it has no value. Write key=value, and quote a value with spaces.",
    "max_steps=[1": "The value of 'max_steps=[1' cannot be read.",
    "name=a=b": "Quote a value with special characters twice: 'name=\"a=b\"'.",
    "seed=1,2": "'seed=1,2' has several values. Add -m to sweep over them",
    "run_dir=${foo}": "The config is wrong: Interpolation key 'foo' not found.",
    "-m peft=difffit,bitfitt": "There is no peft=bitfitt. Did you mean bitfit? Choose one of",
    "-m sedd=1,2": "There is no key 'sedd'. Did you mean seed?",
    "-m seed=1,2 batchsze=3": "There is no key 'batchsze'. Did you mean batch_size?",
    "--help batchsize=8": "There is no key 'batchsize'. Did you mean batch_size?",
    "--cfg job batchsize=8": "There is no key 'batchsize'. Did you mean batch_size?",
    "seed=1.5": f"seed is 1.5, but {WHOLE} 0.",
    "traceback=high": "traceback is high, but must be true or false.",
}


def in_this_process(monkeypatch, capsys, script: str, line: str) -> tuple[int, str]:
    """(exit code, what it wrote) of an entry point, which is run without its own start of a process."""
    monkeypatch.setattr(sys, "argv", [str(ROOT / "src" / script), *line.split(" ")])
    code = compile((ROOT / "src" / script).read_text(encoding="utf-8"), str(ROOT / "src" / script), "exec")
    with pytest.raises(SystemExit) as ended:
        exec(code, {"__name__": "__main__"})
    out, err = capsys.readouterr()
    return ended.value.code, out + err


@pytest.mark.parametrize("line", OVERRIDES)
def test_wrong_overrides_end_in_a_sentence(monkeypatch, capsys, tmp_path, line):
    monkeypatch.chdir(tmp_path)
    code, written = in_this_process(monkeypatch, capsys, "train.py", line)
    assert code == 2
    assert written.startswith("\nError: ")
    assert OVERRIDES[line] in written
    assert written.count("\n") == 2
    assert "HYDRA_FULL_ERROR" not in cli.os.environ


@pytest.mark.parametrize(
    ("script", "line", "message"),
    [
        ("sample.py", "rum=x", "There is no key 'rum'. Did you mean run?"),
        ("evaluate.py", "image=x", "There is no key 'image'. Did you mean images?"),
        ("report.py", "swep=x", "There is no key 'swep'. Did you mean sweep?"),
        ("export.py", "fromat=dit", "There is no key 'fromat'. Did you mean format?"),
        ("prepare.py", "data=cubs", "There is no data=cubs. Did you mean cub?"),
        ("dashboard.py", "enitty=me", "There is no key 'enitty'. Did you mean entity?"),
        ("parameters.py", "num_classes=0", f"num_classes is 0, but {WHOLE} 1."),
    ],
)
def test_other_entry_points_answer_likewise(monkeypatch, capsys, tmp_path, script, line, message):
    monkeypatch.chdir(tmp_path)
    code, written = in_this_process(monkeypatch, capsys, script, line)
    assert (code, written) == (2, written)
    assert message in written


def test_nearest_keys():
    known = ["seed", "data.seed", "sampler", "sampler.steps", "sampler.sampler", "sampler.sampler.eta", "hydra.run.dir"]
    assert nearest("sampler.step", known) == ["sampler.steps"]
    assert nearest("eta", known) == ["sampler.sampler.eta"]
    assert nearest("hydra.run.dirr", known) == ["hydra.run.dir"]
    assert nearest("nothing_like_it", known) == []
    assert nearest("seeed", known) == ["seed"]


@pytest.mark.slow
def test_a_sweep_refuses_the_jobs_whose_values_are_wrong(tmp_path, pictures):
    """Before they start: the other job is planned, and the refused one says why."""
    command = ["src/train.py", "-m", *SMALL, f"data.root={pictures}", "peft=full", "dry_run=true"]
    done = forked.run(tmp_path, *command, f"sweep_dir={tmp_path}/sweep", "launcher.slots=1", "ema.decay=0.9,1.5")
    assert done.returncode == 1
    summary = (tmp_path / "sweep" / "summary.json").read_text(encoding="utf-8")
    assert "ema.decay is 1.5, but must be a number between 0 and 1." in summary
    assert "planned" in summary
    assert not Path(tmp_path / "sweep" / "1").exists()


@pytest.mark.slow
def test_hydras_own_options_work(tmp_path):
    for arguments, text in ((["--help"], "== Configuration groups =="), (["--cfg", "job", "-p", "ema"], "decay: 0.99")):
        done = subprocess.run(
            [sys.executable, str(ROOT / "src" / "train.py"), *arguments], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert text in done.stdout


# Imports wait until they are needed

HEAVY = ("timm", "wandb", "diffusers", "peft", "tensorboard", "transformers", "torchvision", "scipy", "matplotlib")
# metrics of torchmetrics that need the last four, and Lightning's own
METRICS = """
import torch
from pytorch_lightning.trainer.connectors.logger_connector.result import _ResultMetric
from torchmetrics import MeanMetric, Metric
from torchmetrics.functional.multimodal import clip_score
from torchmetrics.image import FrechetInceptionDistance, LearnedPerceptualImagePatchSimilarity
assert issubclass(_ResultMetric, Metric) and issubclass(MeanMetric, Metric)
mean = MeanMetric()
mean.update(torch.ones(2))
assert type(mean.plot()[0]).__module__ == "matplotlib.figure"
images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
extractor = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 4)).double()
extractor.num_features = 4
fid = FrechetInceptionDistance(extractor, input_img_size=(3, 16, 16), normalize=True)
for real in (True, False):
    fid.update(images.double() / 255, real=real)
assert abs(fid.compute()) < 1e-3
"""


def test_what_a_mistake_needs_imports_no_torch():
    script = "import ditune.cli, ditune.config.keys, ditune.config.overrides, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT / "src").returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "without", "afterwards"),
    [
        ("ditune.commands.train", HEAVY, METRICS),
        ("ditune.commands.sample", (*HEAVY, "pytorch_lightning", "torch._dynamo"), ""),
    ],
)
def test_what_few_runs_need_is_imported_by_those(module, without, afterwards):
    """What is imported later than by itself works then."""
    script = f"import ditune.cli, sys; ditune.cli.prepare(); import {module}\n"
    script += f"print(*(m for m in {without} if m in sys.modules))\n{afterwards}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT / "src", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


@pytest.mark.parametrize(
    ("argument", "stored"),
    [
        ("callbacks.step_grids.n=4", "callbacks.strips.n=4"),
        ("++callbacks.step_grids.steps=[1,2]", "++callbacks.strips.steps=[1,2]"),
        ("sampler.sampler.step_size=1", "sampler.sampler.told=1"),
        ("~callbacks.step_grids", "~callbacks.strips"),
        ("name=callbacks.step_grids.n=4", "name=callbacks.step_grids.n=4"),
        ("callbacks.step_grids_of_mine=4", "callbacks.step_grids_of_mine=4"),
        ("-m", "-m"),
    ],
)
def test_aliases_are_read_as_the_stored_keys(argument, stored):
    assert current(argument) == stored


@pytest.mark.slow
def test_an_alias_composes_to_the_stored_key(tmp_path):
    command = ["src/train.py", "--cfg", "job", "~experiment", "callbacks.step_grids.n=3"]
    done = forked.run(tmp_path, *command, "sampler=euler", "sampler.sampler.step_size=0.5")
    assert done.returncode == 0, done.stderr
    cfg = yaml.safe_load(done.stdout)
    assert (cfg["callbacks"]["strips"]["n"], cfg["sampler"]["sampler"]["told"]) == (3, 0.5)
    assert "step_grids" not in cfg["callbacks"]
