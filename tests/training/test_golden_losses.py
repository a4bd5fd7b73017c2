"""The first 20 losses of every method, kind of network and objective are those written down.

Real trainings in fp32 by Lightning's trainer, on random images, from bases whose blocks all do something. A formula
that changes, on purpose or not, fails here with the names of what changed. Renew the losses on purpose, and read the
diff:

    PYTHONPATH=src:tests/support python tests/training/test_golden_losses.py
"""

import json
import tempfile
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from ditune.checkpoints import save_network
from ditune.commands.prepare import training_source
from ditune.config.components import build_components
from ditune.config.instantiate import instantiate
from ditune.config.options import load_option
from ditune.config.training import build_module
from ditune.data.stream import ImageStream
from ditune.peft import METHODS, MOE_METHODS
from ditune.training.source import StreamData
from helpers import GOLDEN, ROOT, SMALL_FLOW, compose, open_gates

STORED = GOLDEN / "losses.json"
STEPS = 20
TOLERANCE = 1e-4  # of a loss: other CPUs sum in another order

SMALL = [override for override in SMALL_FLOW if not override.startswith(("objective", "network"))]
SMALL += [f"max_steps={STEPS}", "optimizer.lr=0.003", "trainer.log_every_n_steps=0"]
DSMOE = {"score": "sigmoid", "renormalize": "true", "route_scale": 2.0, "moe_every": 2}
NETWORKS = {
    "dit": ["network=tiny", "network.learn_sigma=true", "objective=diffusion"],
    "dit_moe": ["network=tiny_moe", "objective=flow_matching", "balance=batch"],
    "dsmoe": ["network=tiny_moe", "objective=flow_matching", "balance=loss_free"]
    + [f"+network.{key}={value}" for key, value in DSMOE.items()],
    "shortcut": ["network=tiny", "objective=shortcut"],
}
ADAPTED = {  # by which methods, for each network
    name: [*METHODS, *(MOE_METHODS if "moe" in name else ())] for name in NETWORKS
}
# at a small one HiRA's product of two small numbers stays what it was; nothing would tell some methods from others;
# and the few scales of FLOAT's noise do next to nothing
RATES = {"hira": 0.03, "road": 0.03, "supertuning": 0.03, "float": 0.03}
OBJECTIVES = sorted(path.stem for path in (ROOT / "configs" / "objective").glob("[!_]*.yaml"))
FLOW = ("shortcut", "objective=flow_matching")
OPTIONS = {  # further parts that enter a loss: network and overrides, then options of groups, then keys
    "balance=sequence": (["dit_moe"], {"balance": "sequence"}, {}),
    "balance=global": (["dit_moe"], {"balance": "global"}, {"balance.z": 0.01}),
    "optimizer=muon": (FLOW, {"optimizer": "muon"}, {"optimizer.lr": 0.003}),
    "derivative=difference": (["shortcut", "objective=mean_flow"], {}, {"objective.derivative": "difference"}),
    "step_blocks=1": (["shortcut", "objective.process.step_blocks=1"], {}, {}),
    "anneal=linear": (["shortcut", "objective=reflow", "objective.anneal=linear"], {}, {}),
    "accumulated": (FLOW, {}, {"trainer.accumulate_grad_batches": 2}),
}


class Losses(pl.Callback):
    """Keeps what is differentiated, of each micro-step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        self.values.append(outputs["loss"].item())


def losses(cfg: DictConfig) -> list[float]:
    """The losses of a training, (STEPS,) means over micro-steps."""
    c = build_components(cfg)
    if c.base is None:
        open_gates(c.network)
    module, kept = build_module(cfg, c, {}), Losses()
    stream = ImageStream(training_source(cfg, c.images, c.autoencoder), cfg.seed, cfg.data.flip)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = instantiate(cfg.trainer, "trainer", callbacks=[kept], **quiet)
    trainer.fit(module, datamodule=StreamData(stream, cfg.batch_size, 0))
    return torch.tensor(kept.values, dtype=torch.float64).view(STEPS, -1).mean(1).tolist()


class Trainings:
    """All trainings whose losses are written down, each by its name, in a folder of their own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._configs: dict[tuple[str, ...], DictConfig] = {}  # composing takes longer than training
        self._bases: dict[str, Path] = {}
        rng = np.random.default_rng(0)
        for i in range(10):
            path = folder / "images" / "train" / ("cat", "dog", "eel")[i % 3] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)

    def config(self, network: str, *overrides: str) -> DictConfig:
        keys = (network, *overrides)
        if keys not in self._configs:
            common = [*SMALL, f"data.root={self.folder}/images", "peft=full"]
            self._configs[keys] = compose(self.folder / "run", *common, *NETWORKS[network], *overrides)
        return self._configs[keys].copy()

    def base(self, network: str) -> Path:
        """Its file, with values for all that a fresh network has as zeros."""
        if network in self._bases:
            return self._bases[network]
        c, path = build_components(self.config(network)), self.folder / f"{network}.safetensors"
        open_gates(c.network)
        about = {"class_names": c.images.class_names, "autoencoder": c.autoencoder.latent_fingerprint}
        about |= {"data": c.images.fingerprint, "resolution": 16, "steps": 0}
        save_network(path, c.network, c.objective.process.config, **about)
        self._bases[network] = path
        return path

    def adapted(self, network: str, method: str) -> DictConfig:
        cfg = with_options(self.config(network), peft=method)
        cfg.pretrained = str(self.base(network))
        cfg.optimizer.lr = RATES.get(method, cfg.optimizer.lr)
        return cfg

    def all(self) -> Iterator[tuple[str, DictConfig]]:
        for network, methods in ADAPTED.items():
            for method in methods:
                yield f"{network} {method}", self.adapted(network, method)
        for objective in OBJECTIVES:
            network = "dit" if objective == "diffusion" else "shortcut"  # the other network learns no variance
            yield f"objective={objective}", self.config(network, f"objective={objective}")
        for name, (overrides, groups, values) in OPTIONS.items():
            cfg = with_options(self.config(*overrides), **groups)
            for key, value in values.items():
                OmegaConf.update(cfg, key, value)
            yield name, cfg


def with_options(cfg: DictConfig, **groups: str) -> DictConfig:
    """The config with other options of some groups, which takes a fraction of composing it."""
    for group, option in groups.items():
        cfg[group] = load_option(ROOT / "configs" / group / f"{option}.yaml")
    return cfg


def distance(a: list[float], b: list[float]) -> float:
    """The largest relative difference of two curves."""
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(tmp_path_factory.mktemp("losses"))


@pytest.mark.slow
def test_the_first_losses_are_those_written_down(trainings):
    stored = json.loads(STORED.read_text())
    found = {name: losses(cfg) for name, cfg in trainings.all()}
    assert found.keys() == stored.keys()
    far = {name: distance(curve, stored[name]) for name, curve in found.items()}
    assert {name: value for name, value in far.items() if value > TOLERANCE} == {}


def test_the_tolerance_tells_methods_and_objectives_apart():
    """Some are different only in a scale or an initial value."""
    stored = json.loads(STORED.read_text())
    for network in NETWORKS:
        names = [name for name in stored if name.startswith(f"{network} ")]
        near = {(a, b): distance(stored[a], stored[b]) for a, b in combinations(names, 2)}
        assert {pair: value for pair, value in near.items() if value < 3 * TOLERANCE} == {}


CHANGES = {  # of a formula, and what trains by it
    "the learning rate by a hundredth": ("dit full", "optimizer.lr", 0.00303),
    "LoRA's scale": ("dit lora", "peft.lora_alpha", 9),
    "the weight of the balance": ("dit_moe full", "balance.alpha", 0.006),
    "the step of the router's biases": ("dsmoe full", "balance.bias_rate", 0.1),
    "the dropped labels": ("shortcut full", "objective.label_drop", 0.3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_formula_is_noticed(trainings, change):
    name, key, value = CHANGES[change]
    cfg = trainings.adapted(*name.split())
    OmegaConf.update(cfg, key, value)
    assert distance(losses(cfg), json.loads(STORED.read_text())[name]) > 3 * TOLERANCE


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        curves = {name: losses(cfg) for name, cfg in Trainings(Path(folder)).all()}
    lines = [f"{json.dumps(name)}: [{', '.join(f'{v:.7g}' for v in curve)}]" for name, curve in curves.items()]
    STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
