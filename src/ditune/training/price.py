"""What a training will take in hours and money before it begins: by a table of devices, or by a few real steps.

A step of fine-tuning costs three forward passes per image, or two where hardly any frozen weight gets a gradient. The
rates of the table are FLOP/s that whole jobs reached, so what surrounds the networks is in them.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ditune.data.stream import ImageStream, micro_batch_size
from ditune.evaluation.protocol import Evaluation
from ditune.files.atomic import write_json
from ditune.generation.generator import ImageGenerator
from ditune.progress import duration
from ditune.training.components import Components
from ditune.training.module import GenerativeModule
from ditune.training.outlook import Outlook
from ditune.training.plan import counts

FILE = "price.json"  # in the folder of a run that has been planned
MEASURE = "measure"  # value of dry_run
STEPS = 3  # that are timed, after one that is not
# torch counts every other kernel of attention
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}
PASSES = {"some": 2.0, "most": 3.0}  # forward passes that a step costs, by the share of the weights that trains


@dataclass(frozen=True)
class Device:
    """A row of the table of measured devices.

    Args:
        name: a part of the device's name.
        precision: of the network.
        training, sampling: FLOP/s of training steps, and of generating and evaluating images.
        date: of the measurement.
        source: who measured it, on what.
    """

    name: str
    precision: str
    training: float
    sampling: float
    date: str
    source: str


DEVICES = (
    Device(
        "H100", "bf16-mixed", 1.22e14, 1.61e14, "2026", "table 5 of MeanFlow Transfer, DiT-XL/2, batch 32, not by us"
    ),
    Device(
        "cpu, 1 threads", "bf16-mixed", 9.7e10, 8.2e10, "2026-11", "docs/results/emoji_table/difffit_0, AVX512-BF16"
    ),
)


@dataclass(frozen=True)
class Pace:
    """Seconds of one device.

    Args:
        step: of training, per image.
        image: of generating one image, and of evaluating it.
        source: where they come from.
    """

    step: float
    image: float
    source: str


def forward_flops(network: nn.Module, latent_shape: tuple[int, ...]) -> float | None:
    """FLOP of one forward pass of one image, counted without memory; None = routing needs values.

    Args:
        network: with its method applied.
        latent_shape: (C, h, w).
    """
    if hasattr(network, "moe_layers"):
        return None
    tensors = (*network.named_parameters(), *network.named_buffers())
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter,
        torch.no_grad(),
    ):
        weights = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors}
        x, ones = torch.empty(1, *latent_shape), torch.zeros(1, dtype=torch.int64)
        step = (ones,) if network.step_embedder is not None else ()
        torch.func.functional_call(network, weights, (x, ones, ones, *step))
    return float(counter.get_total_flops())


def device_name(device: torch.device) -> str:
    """As the table's rows are named."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def expected_pace(c: Components, calls: float, device: str) -> Pace | None:
    """By the table; None = nothing is known of the device, or of the network's cost.

    Args:
        c: what the run is made of.
        calls: forward passes of generating one image.
        device: its name.
    """
    rows = [row for row in DEVICES if row.name in device and row.precision == c.settings.precision]
    flops = forward_flops(c.network, c.autoencoder.latent_shape(c.settings.resolution)) if rows else None
    if flops is None:
        return None
    trained, total = counts(c.network)
    passes = PASSES["most" if trained > total / 2 else "some"] * c.objective.token_share
    row = rows[0]
    source = f"{row.name}, {row.precision}, measured {row.date}: {row.source}"
    return Pace(passes * flops / row.training, calls * flops / row.sampling, source)


def measured_pace(
    module: GenerativeModule,
    trainer: pl.Trainer,
    stream: ImageStream,
    generator: ImageGenerator,
    evaluation: Evaluation | None,
) -> Pace:
    """By a few real steps, one batch of generated images, and its features; weights are not the run's afterwards.

    Args:
        module: of the run.
        trainer: of the run, in its setup.
        stream: of the run's images.
        generator: of the run's images.
        evaluation: of the run; None = nothing is evaluated.
    """
    device = trainer.strategy.root_device
    module.trainer = trainer
    module.to(device).train()
    optimizer = module.make_optimizer(list(module.method.trainable(module.network).items()))
    micro = micro_batch_size(module.batch_size, trainer.accumulate_grad_batches, trainer.world_size)
    for step in range(STEPS + 1):
        if step == 1:
            start = _now(device)
        positions = range(step * module.batch_size, step * module.batch_size + micro)
        batch = tuple(part.to(device) for part in stream.__getitems__(positions))
        with trainer.precision_plugin.train_step_context():
            total, *_ = module.micro_step(batch)
        total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    trained = _now(device) - start
    count = generator.batch_size if evaluation is None else min(generator.batch_size, evaluation.n)
    start = _now(device)
    images = generator.generate(module.network.eval(), torch.zeros(count, dtype=torch.int64), seed=0)
    if evaluation is not None:
        evaluation.suite.extractor.to(device)
        evaluation.suite.features(images)
    generated = _now(device) - start
    source = f"measured now, {STEPS} steps of {micro} images and {count} generated ones on {device_name(device)}"
    return Pace(trained / (STEPS * micro), generated / count, source)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass(frozen=True)
class Price:
    """What a run is expected to take.

    Args:
        seconds: by part of the run; empty = unknown.
        devices: that it occupies.
        per_hour: money for an hour of one of them; None = no price is asked.
        source: of the pace.
    """

    seconds: dict[str, float]
    devices: int
    per_hour: float | None
    source: str

    @property
    def money(self) -> float | None:
        """In the currency of `per_hour`."""
        if self.per_hour is None or not self.seconds:
            return None
        return sum(self.seconds.values()) / 3600 * self.devices * self.per_hour

    def line(self) -> str:
        """For the plan."""
        if not self.seconds:
            return "unknown: this device or network has not been measured; dry_run=measure times a few steps"
        parts = ", ".join(f"{name} {duration(value)}" for name, value in self.seconds.items() if value >= 0.5)
        money = "" if self.money is None else f" = {self.money:.2f} at {self.per_hour:g} an hour"
        devices = f" x {self.devices} devices" if self.devices > 1 else ""
        return f"{duration(sum(self.seconds.values()))}{devices}{money} ({parts}; {self.source})"

    def write(self, folder: Path) -> None:
        """For the summary of a sweep."""
        write_json(folder / FILE, asdict(self) | {"money": self.money})


def price(pace: Pace | None, outlook: Outlook, devices: int, per_hour: float | None) -> Price:
    """What a whole run takes at a pace.

    Args:
        pace: of one device; None = unknown.
        outlook: what the run does.
        devices: that share the training; `outlook` holds one's share of the rest.
        per_hour: see `Price`.
    """
    seconds = {} if pace is None else outlook.parts(0, pace.step / devices, pace.image)
    return Price(seconds, devices, per_hour, "" if pace is None else pace.source)
