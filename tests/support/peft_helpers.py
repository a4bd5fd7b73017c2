"""Every method as its config builds it, on small networks whose blocks all do something."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from ditune.config.options import load_option
from ditune.networks import build_network
from ditune.peft import METHODS, MOE_METHODS, PeftMethod, build_peft
from helpers import ROOT

NAMES = list(METHODS)
STEPS = 5
CLASSES = 3

SIZE = {"input_size": 8, "in_channels": 3, "num_classes": CLASSES, "learn_sigma": False}
# A network joins every test of every method by its line here.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "dit": lambda: build_network("tiny", **SIZE),
    "dit_moe": lambda: build_network("tiny_moe", **SIZE),
}
CASES = [(network, name) for network in NETWORKS for name in NAMES] + [("dit_moe", name) for name in MOE_METHODS]
SMALLER = {
    "vera": {"r": 8},
    "fourierft": {"n_frequency": 50},
    "waveft": {"n_frequency": 50},
    "vpt_deep": {"num_prompts": 3},
}


def build_base(network: str) -> nn.Module:
    """Always the same values, none of them zero: a fresh DiT gives zeros whatever its blocks do."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = NETWORKS[network]()
        for parameter in base.parameters():
            nn.init.normal_(parameter, std=0.1)
    return base.eval()


def build_method(name: str, **overrides: object) -> PeftMethod:
    """By configs/peft/<name>.yaml."""
    peft = load_option(ROOT / "configs" / "peft" / f"{name}.yaml")
    cfg = OmegaConf.create({"max_steps": STEPS, "peft": peft})
    arguments = OmegaConf.to_container(cfg.peft, resolve=True)
    del arguments["_target_"]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build_peft(**(arguments | SMALLER.get(name, {}) | overrides))


def adapt(network: str, name: str, **overrides: object) -> tuple[nn.Module, PeftMethod]:
    base, method = build_base(network), build_method(name, **overrides)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        method.apply(base)
    return base, method


def inputs(seed: int = 0, n: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """x, t and y; the last y is the null class."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 8, 8, generator=generator)
    t = torch.rand(n, generator=generator) * 999
    y = torch.randint(CLASSES, (n,), generator=generator)
    y[-1] = CLASSES
    return x, t, y


def output(network: nn.Module) -> Tensor:
    with torch.no_grad():
        return network(*inputs())


@dataclass
class Trained:
    """A method after five steps on one network, with what there was before."""

    network: nn.Module
    method: PeftMethod
    base: Tensor  # output of the network before the method
    start: Tensor  # output of the method before its first step
    before: dict[str, Tensor]  # parameters and buffers after the method was applied


def train_steps(network: nn.Module, method: PeftMethod, steps: int = STEPS) -> None:
    """AdamW on noise as target."""
    optimizer = torch.optim.AdamW(method.trainable(network).values(), lr=0.01)
    for step in range(1, steps + 1):
        x, t, y = inputs(seed=step)
        loss = (network(x, t, y) - x).square().mean() + method.penalty(network)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(network, step)


def train(network: str, name: str) -> Trained:
    base = output(build_base(network))
    adapted, method = adapt(network, name)
    start = output(adapted)
    before = {key: value.detach().clone() for key, value in everything(adapted).items()}
    train_steps(adapted, method)
    return Trained(adapted, method, base, start, before)


def everything(network: nn.Module) -> dict[str, Tensor]:
    return dict(network.named_parameters()) | dict(network.named_buffers())
