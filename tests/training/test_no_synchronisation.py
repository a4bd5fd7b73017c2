"""No step waits for its device, but on logged ones, and sampling never does.

The device here is torch's meta device: it has no values that could be read, so whoever asks for one fails. Work is
handed to it as to a GPU. What is copied to it must not block.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ditune.config.components import build_components, build_generator
from ditune.config.training import build_module, build_outlook, build_trainer
from ditune.data.stream import ImageStream
from ditune.networks import build_network
from ditune.processes import FlowProcess, GaussianProcess
from ditune.samplers import (
    DDIM,
    DDPM,
    ConsistencySampler,
    Euler,
    Fora,
    NoiseStream,
    RungeKutta,
    ShortcutSampler,
    Taylor,
    sample,
)
from ditune.samplers.guidance import at_time, guided
from ditune.stopping import listen
from ditune.training import GenerativeModule, nonfinite, random_ahead
from ditune.training.source import StreamData
from helpers import SMALL, SMALL_FLOW, compose, open_gates

ARRIVING = nonfinite.Arriving
META = torch.device("meta")


class NothingBlocks(TorchDispatchMode):
    """Fails at copies to the device that the CPU waits for, as long as it is armed."""

    armed = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not self.armed:
            return result
        if func is torch.ops.aten._to_copy.default and result.is_meta and not args[0].is_meta:
            assert kwargs.get("non_blocking"), "a blocking copy to the device"
        if func is torch.ops.aten.copy_.default and args[0].is_meta and not args[1].is_meta:
            assert args[1].ndim == 0 or args[2:] == (True,), "a blocking copy to the device"
        return result


@pytest.fixture(autouse=True)
def meta_is_a_device(monkeypatch) -> None:
    """What torch has for every GPU and not for its meta device; the flag of a step is read as good."""
    autocast, enabled = torch.autocast, torch.is_autocast_enabled

    def known(kind, *arguments, **more):
        return nullcontext() if kind == "meta" else autocast(kind, *arguments, **more)

    monkeypatch.setattr(torch, "autocast", known)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *kind: kind != ("meta",) and enabled(*kind))
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: None)
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *_: None)
    monkeypatch.setattr(nonfinite, "ASYNCHRONOUS", ("meta",))
    monkeypatch.setattr(random_ahead, "AHEAD", ("meta",))
    monkeypatch.setattr(nonfinite, "Arriving", Unread)


class Unread:
    def __init__(self, value: Tensor):
        assert value.is_meta

    def read(self) -> float:
        return 0.0


# A training


class Meta(CPUAccelerator):
    """Lightning's accelerator of the meta device, which needs no preparation."""

    def setup_device(self, device: torch.device) -> None:
        pass


class OnMeta(SingleDeviceStrategy):
    """A training on the meta device, of which nothing can be copied back at its end."""

    def __init__(self) -> None:
        super().__init__(META, Meta())

    def teardown(self) -> None:
        pass


class StopAt(pl.Callback):
    """Ends the training before its last step, which is logged. Tables are copied in the first step."""

    def __init__(self, copies: NothingBlocks):
        self.copies = copies

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        trainer.should_stop = trainer.global_step == 4
        self.copies.armed = 1 <= trainer.global_step < 4


OBJECTIVES = ("shortcut", "mean_flow", "alpha_flow", "so_flow", "live_reflow", "consistency_training", "flow_matching")
FLOWS = {name: [*SMALL_FLOW[:-1], f"objective={name}", "peft=full"] for name in OBJECTIVES}
CASES = {name: case for name, case in FLOWS.items() if name not in ("shortcut", "live_reflow")} | {
    "diffusion": [*SMALL, "peft=full", "trainer.accumulate_grad_batches=2"],
    "guided bootstrap": [*FLOWS["shortcut"], "objective.guidance=2", "objective.levels=uniform"],
    "guided reflow": [*FLOWS["live_reflow"], "objective.guidance=2"],
    "stratified": [*FLOWS["flow_matching"], "objective.stratified=true", "objective.times=logit_normal"],
    "difffit": [*SMALL, "peft=difffit", "pretrained=@base"],
    "lora": [*SMALL, "peft=lora", "pretrained=@base", "data.flip=true"],
}


def fit(cfg: DictConfig) -> GenerativeModule:
    """Steps with the default callbacks."""
    c = build_components(cfg)
    c.network.to(META)  # which makes new parameters, as a move to a GPU does not
    module, generator, copies = build_module(cfg, c, {}), build_generator(cfg, c), NothingBlocks()
    copies.armed = False
    with listen() as signals:
        folder = Path(cfg.paths.output_dir)
        plain, *_ = build_trainer(cfg, c, generator, folder, build_outlook(cfg, c, generator, None), signals)
        trainer = pl.Trainer(
            strategy=OnMeta(),
            callbacks=[*plain.callbacks, StopAt(copies)],
            logger=False,
            max_steps=cfg.max_steps,
            accumulate_grad_batches=cfg.trainer.accumulate_grad_batches,
            log_every_n_steps=cfg.trainer.log_every_n_steps,
            gradient_clip_val=1.0,
            enable_model_summary=False,
        )
        data = StreamData(ImageStream(c.images, cfg.seed, cfg.data.flip), cfg.batch_size, 0)
        with copies:
            trainer.fit(module, datamodule=data)
    assert trainer.global_step == 4
    return module


def settings(base: Path, folder: Path, pictures: Path, case: list[str], *more: str) -> DictConfig:
    filled = [override.replace("@base", str(base)) for override in case if "log_every" not in override]
    common = [f"data.root={pictures}", "max_steps=9", "callbacks.samples.n=0", "callbacks.strips.n=0"]
    return compose(folder, *filled, *common, *more)


@pytest.mark.parametrize("case", CASES)
def test_no_step_waits(base, tmp_path, pictures, case):
    module = fit(settings(base, tmp_path, pictures, CASES[case], "trainer.log_every_n_steps=100"))
    assert module.masks
    assert next(iter(module.trained.values())).is_meta


@pytest.mark.parametrize("case", ["logged", "unfused", "muon"])
def test_what_waits_is_found(base, tmp_path, pictures, monkeypatch, case):
    """The test of the test: steps that must read something of the device."""
    monkeypatch.setattr(nonfinite, "Arriving", nonfinite.Arriving if case == "logged" else ARRIVING)
    more = {
        "logged": ["trainer.log_every_n_steps=3"],
        "unfused": ["trainer.log_every_n_steps=100", "optimizer.fused=false"],
        "muon": ["trainer.log_every_n_steps=100", "optimizer=muon"],
    }
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        fit(settings(base, tmp_path, pictures, CASES["diffusion"], *more[case]))


# Sampling

SAMPLERS = {
    "ddim": (DDIM(), GaussianProcess(prediction="x0", variance="fixed_small")),
    "ddim, fora": (DDIM(), GaussianProcess(prediction="x0", variance="fixed_small"), Fora(2)),
    "ddim, taylor": (DDIM(), GaussianProcess(prediction="x0", variance="fixed_small"), Taylor(2)),
    "ddim, random": (DDIM(eta=1.0), GaussianProcess(prediction="x0", variance="fixed_small")),
    "ddpm": (DDPM(), GaussianProcess(prediction="x0", variance="fixed_small")),
    "euler": (Euler(eta=1.0), FlowProcess()),
    "heun": (RungeKutta(), FlowProcess()),
    "shortcut": (ShortcutSampler(), FlowProcess(step="log2", base_steps=128)),
    "consistency": (ConsistencySampler(), FlowProcess(step="size")),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampling_does_not_wait(name):
    sampler, process, *cached = SAMPLERS[name]
    cache = cached[0] if cached else None
    network = build_network("tiny", input_size=8, in_channels=3, num_classes=3, learn_sigma=False, **process.network)
    network.to(META).eval()
    stream, y = NoiseStream(0, [3, 4], (3, 8, 8)), torch.zeros(2, dtype=torch.int64, device=META)
    arguments = {"sampler": sampler, "steps": 4, "guidance": 2.0, "guidance_interval": (0.3, 0.8), "cache": cache}
    sample(
        network,
        process,
        stream.next().to(META),
        y,
        next_noise=lambda: torch.empty(2, 3, 8, 8, device=META),
        **arguments,
    )
    with stream.on(META) as next_noise, NothingBlocks():  # tables of the process have been moved by now
        found = sample(network, process, torch.empty(2, 3, 8, 8, device=META), y, next_noise=next_noise, **arguments)
    assert found.shape == (2, 3, 8, 8)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_guidance_by_the_shared_time_is_guidance_by_the_samples_times(scale):
    network = build_network("tiny", input_size=8, in_channels=3, num_classes=3, learn_sigma=False).eval()
    open_gates(network)
    x, y = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2])
    for interval, length, times in (
        ((0.15, 0.7), 1.0, (0.1, 0.15, 0.4, 0.7, 0.71)),
        ((0.25, 1.0), 1000, (249, 250, 999)),
    ):
        model_fn = guided(network, y, 3, scale, interval=interval, timesteps=length)
        for time in times:
            t = torch.full((2,), time)
            assert torch.equal(at_time(model_fn, time)(x, t), model_fn(x, t))
    assert at_time(network, 0.5) is network


def test_noise_made_ahead_is_the_same():
    plain, ahead, seen = NoiseStream(5, [0, 7], (2, 3)), NoiseStream(5, [0, 7], (2, 3)), []
    make = ahead.next
    ahead.next = lambda: seen.append(make()) or seen[-1]
    with ahead.on(META) as next_noise:
        assert all(next_noise().is_meta for _ in range(3))
    assert len(seen) == 4  # one is ready that nobody needed
    for noise in seen:
        assert torch.equal(noise, plain.next())
