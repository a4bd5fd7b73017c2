"""What a training is made of, as objects."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ditune.autoencoders import Autoencoder
from ditune.data import ImageDataset
from ditune.networks import DiT
from ditune.objectives import Objective
from ditune.peft import PeftMethod
from ditune.training.sparsity import Sparsity


@dataclass(frozen=True)
class Base:
    """The file that a training begins with.

    Args:
        path: of the file.
        sha256: of its bytes.
        config: of the network in it, before a new label table or resolution.
        process: config of the process that it was trained on.
        header: what a file of ours says about itself; None = a file of others.
        reshaped: whether the run's network has other classes or another resolution.
        differences: of its config from that of `network=`, as text; "" = none.
    """

    path: Path
    sha256: str
    config: dict[str, Any]
    process: dict[str, Any]
    header: dict[str, Any] | None
    reshaped: bool
    differences: str


@dataclass(frozen=True)
class Settings:
    """Plain values of a training that are no object's own."""

    name: str
    seed: int
    batch_size: int  # global
    max_steps: int
    lr: float
    precision: str  # resolved
    resolution: int  # pixels
    classes: str | None  # how the label table is adapted
    data_name: str
    latents: bool  # encoded once
    augmented: bool
    metrics_seed: int
    frozen_weights: str | None = None  # "int8"; None = in the training's precision
    compiled: bool = False

    @property
    def bf16(self) -> bool:
        """Whether networks run under bf16 autocast."""
        return self.precision.startswith("bf16")


@dataclass(frozen=True)
class Processes:
    """How a training is spread.

    Args:
        world_size: processes.
        accumulate: micro-steps of an optimizer step.
        starts_others: whether a job of a sweep would have to start the other processes itself.
        searched: whether `accumulate` is only the least, and the device decides before the first step.
        shares: parts that the network, its gradients, optimizer state and EMA are cut into; 1 = each process has all.
    """

    world_size: int
    accumulate: int
    starts_others: bool
    searched: bool = False
    shares: int = 1


@dataclass
class Components:
    """What a run is made of."""

    images: ImageDataset
    autoencoder: Autoencoder
    network: DiT  # with the method applied to it
    method: PeftMethod
    objective: Objective
    base: Base | None  # None = the network starts from scratch
    balance: Any | None  # a ditune.moe.balance.Balance, for networks with experts
    settings: Settings
    sparsity: Sparsity | None = None  # None = no weight is masked
    processes: Processes | None = field(default=None)  # None = not known yet

    @property
    def base_to_compare(self) -> Path | None:
        """The base that the trained network is compared with: one of another shape is no better or worse than it."""
        return None if self.base is None or self.base.reshaped else self.base.path
