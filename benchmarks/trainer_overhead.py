"""What the Trainer and its callbacks add to a training step, in ms over a bare loop around the same module.

    python benchmarks/trainer_overhead.py [--steps 200] [--rounds 5] [--every 10] [--profile]

A tiny network (2 blocks of 32, DiffFit, batch 4) in fp32 on one CPU thread, so that nothing but overhead shows. The
bare loop reads the same stream, calls the module's step, clips, updates, moves the learning rate and the EMA, and logs
nothing. Variants are trained in turn, in rounds; the first steps of each are left out. Medians of the steps are shown,
and the median over the rounds of what a variant adds to the bare loop of its round, with its extremes. Where
other work disturbs the times, the number of calls of Python and C functions in a step says more: it is always the same.
"""

import cProfile
import itertools
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import hydra
import pytorch_lightning as pl
import torch
from measuring import deliver, parser
from omegaconf import DictConfig
from PIL import Image
from pytorch_lightning.callbacks import Callback

from ditune import cli
from ditune.config.components import build_components, build_generator
from ditune.config.training import build_module, build_outlook, build_trainer, open_loggers, resume_key
from ditune.data.stream import ImageStream, MicroBatches, training_loader
from ditune.stopping import listen
from ditune.training.callbacks import StepClock
from ditune.training.source import StreamData

FIRST = 20  # steps that are left out
COUNTED = 20  # steps whose calls are counted
BARE = "bare loop"
Moment = tuple[float, float, int]
COLUMNS = {
    "name": ("", "text"),
    "ms": ("ms a step, processor", "float"),
    "over": ("over the bare loop", "float"),
    "least": ("least", "float"),
    "most": ("most", "float"),
    "ratio": ("of the bare loop", "float"),
    "wall_ms": ("ms a step, clock", "float"),
    "calls": ("calls of functions a step", "int"),
    "over_calls": ("over the bare loop", "int"),
}
SMALL = [
    "~experiment",
    "network=tiny",
    "peft=difffit",
    "pretrained=null",
    "data=folder",
    "data.resolution=16",
    "objective.process.prediction=x0",
    "objective.process.variance=fixed_small",
    "trainer.precision=32-true",
    "trainer=cpu",
    "batch_size=4",
    "callbacks.samples.n=0",
    "metrics.n=0",
]


calls = 0  # of Python functions so far, while they are counted


def moment() -> Moment:
    """Now: seconds of the clock and of the process, and calls."""
    return time.perf_counter(), time.process_time(), calls


class Moments(Callback):
    """The moment at which each step begins."""

    def __init__(self) -> None:
        self.seen: list[Moment] = []

    def on_train_batch_start(self, *_: object) -> None:
        self.seen.append(moment())


@contextmanager
def counting() -> Iterator[None]:
    """Calls of Python and C functions in this thread are counted inside of the block, which makes it slow."""

    def count(_: object, event: str, __: object) -> None:
        global calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(None)


def config(folder: Path, steps: int, every: int) -> DictConfig:
    """The config of a training of `steps` steps; images of noise lie beside its run folder."""
    images = folder / "images"
    for i in range(0 if images.is_dir() else 12):
        path = images / "train" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((16, 16), 100).convert("RGB").save(path)
    cli.prepare()
    settings = [f"max_steps={steps}", f"trainer.log_every_n_steps={every}", f"data.root={images}"]
    with hydra.initialize_config_dir(cli.CONFIGS, version_base="1.3"):
        return hydra.compose("train", [*SMALL, *settings, f"paths.output_dir={folder / 'run'}"])


def parts(cfg: DictConfig) -> tuple:
    """Components, module and stream of the config."""
    c = build_components(cfg)
    return c, build_module(cfg, c, resume_key(cfg, c)), ImageStream(c.images, cfg.seed)


def bare(cfg: DictConfig, folder: Path) -> list[Moment]:
    """The loop without a trainer."""
    _, module, stream = parts(cfg)
    module.trainer = pl.Trainer(max_steps=cfg.max_steps, accelerator="cpu", logger=False, enable_checkpointing=False)
    chosen = module.configure_optimizers()
    optimizer, scheduler = chosen["optimizer"], chosen["lr_scheduler"]["scheduler"]
    parameters = list(module.method.trainable(module.network).values())
    moments, loader = [], training_loader(stream, MicroBatches(cfg.batch_size, 1, 0, 1, 0), 0, False)
    module.train()
    for step, batch in zip(range(cfg.max_steps), loader, strict=False):
        moments.append(moment())
        total, *_ = module.micro_step(batch)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, cfg.trainer.gradient_clip_val)
        optimizer.step()
        scheduler.step()
        module.ema.update(step)
    return moments


def trained(cfg: DictConfig, folder: Path, default: bool) -> list[Moment]:
    """By the trainer; with the default callbacks and metrics.csv, or with the clock alone and no logger."""
    c, module, stream = parts(cfg)
    generator = build_generator(cfg, c)
    moments = Moments()
    with listen() as signals:
        trainer, *_ = build_trainer(cfg, c, generator, folder, build_outlook(cfg, c, generator, None), signals)
        if default:
            open_loggers(cfg, trainer, folder, 0, c)
        else:
            trainer.callbacks = [callback for callback in trainer.callbacks if isinstance(callback, StepClock)]
            module.log_every = 0
        trainer.callbacks.insert(0, moments)
        trainer.fit(module, datamodule=StreamData(stream, cfg.batch_size, 0))
    return moments.seen


VARIANTS: dict[str, Callable[[DictConfig, Path], list[Moment]]] = {
    BARE: bare,
    "Trainer, StepClock alone": lambda cfg, folder: trained(cfg, folder, default=False),
    "Trainer, default callbacks and metrics.csv": lambda cfg, folder: trained(cfg, folder, default=True),
}


def per_step(moments: list[Moment]) -> list[Moment]:
    """ms of the clock and of the process, and calls, of every step but the first ones."""
    steps = zip(moments[FIRST:-1], moments[FIRST + 1 :], strict=True)
    return [((b[0] - a[0]) * 1e3, (b[1] - a[1]) * 1e3, b[2] - a[2]) for a, b in steps]


def row_of(name: str, rounds: list[list[Moment]], first: list[list[Moment]]) -> dict:
    """The row of a variant: medians of its steps, and what it adds to the first variant's within each round."""
    wall, process, _ = (statistics.median(values) for values in zip(*itertools.chain(*rounds), strict=True))
    own, loop = ([statistics.median(ms for _, ms, _ in steps) for steps in each] for each in (rounds, first))
    over = sorted(a - b for a, b in zip(own, loop, strict=True))
    row = {"name": name, "rounds": len(rounds), "ms": process, "wall_ms": wall}
    row |= {"over": statistics.median(over), "least": over[0], "most": over[-1]}
    return row | {"ratio": statistics.median(a / b for a, b in zip(own, loop, strict=True))}


def main(arguments: Sequence[str] | None = None) -> dict:
    """Measure, print, and write; returns the result."""
    options = parser(__doc__, seconds=60, rounds=5)
    options.add_argument("--steps", type=int, default=200, help="of each training")
    options.add_argument("--every", type=int, default=10, help="steps between two lines of the log")
    options.add_argument("--profile", action="store_true", help="where the time of the last variant goes, as text")
    given = options.parse_args(arguments)
    given.device = "cpu"  # what is measured is Python
    torch.set_num_threads(1)
    found: dict[str, list[list[Moment]]] = {name: [] for name in VARIANTS}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as top:
        for round_ in range(max(given.rounds, 2)):
            if round_ >= 2 and time.monotonic() - start > given.seconds:
                break
            for name, run in VARIANTS.items():
                folder = Path(top) / f"{round_}_{list(VARIANTS).index(name)}"
                found[name].append(per_step(run(config(folder, given.steps, given.every), folder / "run")))
        if given.profile:
            folder = Path(top) / "profiled"
            with cProfile.Profile() as profile:
                trained(config(folder, given.steps, given.every), folder / "run", default=True)
            pstats.Stats(profile, stream=sys.stdout).sort_stats("tottime").print_stats(45)
        rows = [row_of(name, rounds, found[BARE]) for name, rounds in found.items()]
        for row, run in zip(rows, VARIANTS.values(), strict=True):
            folder = Path(top) / f"calls_{len(row['name'])}"
            with counting():
                steps = per_step(run(config(folder, FIRST + COUNTED, given.every), folder / "run"))
            row["calls"] = statistics.median(n for _, _, n in steps)
            row["over_calls"] = row["calls"] - rows[0]["calls"]
    return deliver("trainer_overhead", given, COLUMNS, rows)


if __name__ == "__main__":
    main()
