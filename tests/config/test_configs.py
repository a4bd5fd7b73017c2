"""Every config composes, builds and explains itself; the package's arrows point one way."""

import ast
import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from ditune.checkpoints import save_network
from ditune.config.components import build_components
from ditune.config.instantiate import instantiate
from ditune.config.options import load_option
from ditune.errors import UserError
from ditune.peft import METHODS, build_peft
from helpers import ROOT, SMALL, compose
from miniatures import MINIATURES

CONFIGS = ROOT / "configs"
PACKAGE = ROOT / "src" / "ditune"
GROUPS = ("network", "model", "peft", "optimizer", "scheduler", "ema", "data", "autoencoder", "sampler", "metrics")
GROUPS += ("trainer", "callbacks", "logger", "paths", "objective", "debug", "balance", "augment", "transfer", "patches")
# those on public data, which is not here, are in test_experiments.py
PUBLIC = {f"difffit_{path.stem}" for path in (CONFIGS / "data").glob("[!_]*.yaml")}
EXPERIMENTS = sorted({path.stem for path in (CONFIGS / "experiment").glob("[!_]*.yaml")} - PUBLIC)
FILES = sorted(CONFIGS.rglob("*.yaml"))


def options(group: str) -> list[str]:
    """Without the base files, whose names start with an underscore."""
    return sorted(p.stem for p in (CONFIGS / group).glob("[!_]*.yaml"))


@pytest.mark.parametrize(("group", "option"), [(g, o) for g in GROUPS for o in options(g)])
def test_every_option_of_every_group_composes(tmp_path, group, option):
    cfg = compose(tmp_path, f"{group}={option}", *(["data.root=pictures"] if option == "folder" else []))
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_builds_with_any_method(tmp_path, experiment):
    """With a small network; its base file is written in the shape that the experiment asks for."""
    overrides = [f"experiment={experiment}", "network=tiny", "network.name=tiny", "data.pictures.in_memory=false"]
    cfg = compose(tmp_path, *overrides, "peft=full", "pretrained=null")
    if cfg.data.name in MINIATURES:
        MINIATURES[cfg.data.name](tmp_path / "data")
        overrides += [f"data.root={tmp_path}/data", "data.latents=false", "autoencoder=none"]
    if cfg.network.learn_sigma != ("learned" in cfg.objective.process.get("variance", "")):
        overrides.append(f"network.learn_sigma={not cfg.network.learn_sigma}")
    parts = build_components(compose(tmp_path, *overrides, "peft=full", "pretrained=null"))
    parts.method.merge(parts.network)
    base = tmp_path / "base.safetensors"
    names = {"class_names": parts.images.class_names, "autoencoder": parts.autoencoder.latent_fingerprint}
    save_network(base, parts.network, parts.objective.process.config, **names)
    assert build_components(compose(tmp_path, *overrides, "peft=difffit", f"pretrained={base}")).base.path == base
    for name in ("full", "bitfit", "lora"):
        cfg = compose(tmp_path, *overrides, f"peft={name}", f"pretrained={base}")
        method = instantiate(cfg.peft, "peft")
        method.apply(copy.deepcopy(parts.network))
        assert method.title == name
        assert instantiate(cfg.optimizer, "optimizer").keywords["lr"] == cfg.optimizer.lr
        instantiate(cfg.scheduler, "scheduler")


@pytest.mark.parametrize("path", [f for f in FILES if f.parent.name in ("experiment", "model")], ids=lambda p: p.stem)
def test_experiments_leave_methods_to_their_own_configs(path):
    """Or peft=... would swap the method and keep keys of another one; the label table is every method's."""
    assert set(OmegaConf.load(path).get("peft", {})) <= {"train_labels"}


@pytest.mark.parametrize("name", options("peft"))
def test_every_method_can_leave_the_label_table_alone(name):
    assert "train_labels" in load_option(CONFIGS / "peft" / f"{name}.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("group", ["peft", "sampler"])
def test_an_option_read_without_hydra_is_what_hydra_composes(tmp_path, group):
    for name in options(group):
        composed = compose(tmp_path, "~experiment", f"{group}={name}")[group]
        read = load_option(CONFIGS / group / f"{name}.yaml")
        assert OmegaConf.to_container(composed) == OmegaConf.to_container(read)


@pytest.mark.parametrize("path", [f for f in FILES if f.name.startswith("_")], ids=lambda p: f"{p.parent.name}{p.stem}")
def test_every_base_file_is_a_base(path):
    lines = [line for file in FILES for line in file.read_text(encoding="utf-8").splitlines()]
    assert any(re.fullmatch(rf"  - (process/)?{path.stem}", line) for line in lines)


@pytest.mark.parametrize("key", ["balance", "augment", "transfer", "patches"])
def test_none_is_null(tmp_path, key):
    for choice in (f"{key}=none", f"~{key}"):
        assert compose(tmp_path, choice)[key] is None


@pytest.mark.parametrize("method", METHODS)
def test_a_method_brings_its_own_keys_and_rate(tmp_path, method):
    cfg = compose(tmp_path, "~experiment", f"peft={method}")
    assert instantiate(cfg.peft, "peft").title == method
    assert ("gamma_depth" in cfg.peft) == (method == "difffit")
    assert cfg.optimizer.lr == cfg.peft.lr
    with pytest.raises(TypeError, match="unknown_key"):
        build_peft(method, lr=1e-3, unknown_key=1)


@pytest.mark.parametrize(
    ("overrides", "lr", "train_labels"),
    [
        ([], 1e-2, False),
        (["classes=reinit"], 3e-3, True),
        (["peft=full"], 1e-3, False),
        (["peft=full", "classes=mean"], 3e-4, True),
        (["peft=lora"], 1e-3, False),
        (["experiment=difffit_pixels", "peft=lora"], 1e-2, True),
        (["experiment=difffit_pixels", "peft=lora", "classes=map"], 1e-2, True),
    ],
)
def test_the_main_jobs_rate_belongs_to_the_method_and_to_what_trains(tmp_path, overrides, lr, train_labels):
    cfg = compose(tmp_path, *overrides)
    assert (cfg.optimizer.lr, cfg.peft.train_labels) == (lr, train_labels)


@pytest.mark.parametrize("override", ["batchsize=1", "trainer.devces=2", "peft.rank=4", "data.pictures.size=3"])
def test_unknown_keys_are_refused(tmp_path, override):
    with pytest.raises(ConfigCompositionException, match="Could not override"):
        compose(tmp_path, override)


def test_unknown_options_are_refused(tmp_path):
    with pytest.raises(Exception, match="peft/lora_of_another_world"):
        compose(tmp_path, "peft=lora_of_another_world")


def test_constructors_refuse_unknown_keys(tmp_path, pictures):
    for group in ("network", "objective", "autoencoder", "optimizer", "scheduler", "logger"):
        cfg = compose(tmp_path, *SMALL, f"data.root={pictures}", f"+{group}.unknown_key=1")
        with pytest.raises(UserError, match="unknown_key"):
            instantiate(cfg[group], group)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_no_key_has_the_name_of_a_group(path):
    """Hydra would take key=value on the command line for a choice of that group."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    chosen = {name.split("/")[-1] for entry in content["defaults"] if isinstance(entry, dict) for name in entry}
    groups = {folder.name for folder in CONFIGS.iterdir() if folder.is_dir()} - {"hydra"}
    assert not (content.keys() & groups) - chosen


# Configs are documentation

PLAIN = ("_target_", "_partial_", "defaults", "- ", "# ")
# groups whose head line, or the library that is called, explains every key
EXPLAINED_BY_THEIR_HEAD = {"experiment", "sweep", "hydra", "debug", "logger"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_file_and_key_is_explained(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    head = next(line for line in lines if line != "# @package _global_")
    assert head.startswith("# "), "the first line says what the file is"
    assert head.endswith("."), "the first line is a sentence"
    if path.parent.name in EXPLAINED_BY_THEIR_HEAD:
        return
    leaves = [line for line in lines if line.strip() and not line.strip().startswith(PLAIN) and line[-1] != ":"]
    silent = [line for line in leaves if "#" not in line and "${" not in line]  # a reference is explained at its end
    assert not silent, f"keys without a comment: {silent}"


# The arrows of the design: which parts of the package a part may import

# everything may import these
GROUND = {"ahead", "errors", "progress", "distributed", "rng", "memory", "files", "stopping"}
ALLOWED = {
    "ahead": set(),
    "errors": set(),
    "progress": set(),
    "distributed": set(),
    "rng": set(),
    "stopping": set(),
    "memory": {"errors"},
    "files": {"errors", "progress", "memory"},
    "networks": {"rng"},
    "processes": GROUND,
    "objectives": {*GROUND, "processes", "samplers.guidance"},
    "samplers": {*GROUND, "processes", "networks.block"},
    "peft": {*GROUND, "networks"},
    "autoencoders": {*GROUND, "checkpoints.weight_files"},
    "data": {*GROUND, "autoencoders"},
    "metrics": GROUND,
    "checkpoints": {*GROUND, "networks", "peft"},
    "moe": {*GROUND, "networks", "checkpoints", "processes"},
    "generation": {*GROUND, "autoencoders", "data", "processes", "samplers", "metrics.features"},
    "evaluation": {
        *GROUND,
        "config.roles",
        "autoencoders",
        "checkpoints",
        "data",
        "generation",
        "metrics",
        "objectives",
    },
    "launch": {*GROUND, "config.grammar", "config.keys", "config.roles", "config.swept"},
    "report": {*GROUND, "config.roles", "generation.grids", "metrics.names"},
    "training": {
        *GROUND,
        "autoencoders",
        "checkpoints",
        "data",
        "evaluation",
        "generation",
        "metrics",
        "moe",
        "networks",
        "objectives",
        "peft",
        "processes",
        "samplers",
    },
}


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, without 'ditune.'; relative imports are of its own part."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("ditune"):
            module = (node.module or "").removeprefix("ditune").lstrip(".")
            found |= {module} if module else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("ditune.") for a in node.names if a.name.startswith("ditune.")}
    return found


@pytest.mark.parametrize("part", ALLOWED)
def test_arrows_point_one_way(part):
    files = list((PACKAGE / part).rglob("*.py")) or [PACKAGE / f"{part}.py"]
    for file in files:
        for module in imported(file):
            allowed = {part, *ALLOWED[part]}
            assert module in allowed or module.split(".")[0] in allowed, f"{file.name} imports {module}"


def test_only_the_trainer_knows_lightning():
    for file in PACKAGE.rglob("*.py"):
        if "pytorch_lightning" in file.read_text(encoding="utf-8"):
            assert "training" in file.parts or file.name == "cli.py" or file.parent.name in ("config", "commands"), file


@pytest.mark.slow
def test_every_part_can_be_imported_first():
    """Each in a process of its own: a circle of imports shows only in some orders."""
    starts = [
        subprocess.Popen([sys.executable, "-c", f"import ditune.{part}"], cwd=ROOT / "src", stderr=subprocess.PIPE)
        for part in ("data", "checkpoints", "files.download", "launch.jobs")
    ]
    for start in starts:
        error = start.communicate(timeout=240)[1]
        assert start.returncode == 0, error.decode()
