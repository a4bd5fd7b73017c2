"""Images of a trained network as files."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from ditune.checkpoints import locate, locate_adapter
from ditune.cli import CONFIGS
from ditune.commands.adapted import exactly_one, load_parts, load_weighted, ready, refuse_strength
from ditune.commands.pairs import make_pairs
from ditune.config import hardware
from ditune.config.guides import build_guide, build_sampling, needs_base
from ditune.config.hardware import AUTO, BF16, FP32, bare_precision
from ditune.config.instantiate import instantiate
from ditune.config.keys import check
from ditune.config.options import load_option
from ditune.distributed import best_device
from ditune.errors import UserError
from ditune.files.atomic import write_json
from ditune.generation.generator import ImageGenerator
from ditune.generation.grids import save_grid
from ditune.progress import meter
from ditune.rng import generator
from ditune.run import Trained, load_adapted, load_checkpoint

log = logging.getLogger(__name__)


def sample(cfg: DictConfig) -> Path:
    """Draw images `first` .. `first + n - 1` of a seed; returns the folder of the files.

    Writes pictures/<number>.png, and grid.png and samples.json of what was generated at once.

    Raises:
        UserError: the settings or a file are wrong.
    """
    check(cfg, "sample")
    source = exactly_one(cfg, "run", "checkpoint", "adapters", "experts")
    trained = load(cfg, source)
    generator = with_settings(trained.generator, cfg)
    names = trained.class_names or [str(k) for k in range(trained.network.num_classes)]
    indices = list(range(cfg.first, cfg.first + cfg.n))
    labels = balanced_labels(chosen_classes(cfg, names), cfg.seed, indices)
    network = ready(trained, cfg.compile)
    if cfg.pairs is not None:
        trained = replace(trained, network=network, generator=generator)
        return make_pairs(cfg, trained, labels, settings_of(cfg, generator))
    with meter(f"generating in {generator.steps} steps", cfg.n) as progress:
        images = generator.generate(network, labels, cfg.seed, indices, on_batch=progress.update)
    facts = {
        "source": str(cfg[source]),
        **settings_of(cfg, generator),
        "pictures": [
            {"file": file_name(i), "label": label, "class_name": names[label]}
            for i, label in zip(indices, labels.tolist(), strict=True)
        ],
    }
    folder = Path(cfg.out).expanduser()
    write(folder, images, facts, suffix=f"_{cfg.first:05d}" if cfg.first else "")
    log.info("%d images are in %s", cfg.n, folder)
    return folder


def settings_of(cfg: DictConfig, generator: ImageGenerator) -> dict:
    """What decides the images, besides the network."""
    return {
        **({} if generator.experts is None else {"experts": generator.experts.settings}),
        **({} if cfg.adapter is None else {"adapter": cfg.adapter}),
        **({} if cfg.strength is None else {"strength": cfg.strength}),
        "seed": cfg.seed,
        "sampler": generator.sampler.kind,
        "steps": generator.steps,
        "guidance": generator.guidance,
        **({} if generator.guide is None else {"guide": generator.guide.kind, **generator.guide.settings}),
        **({} if generator.cache is None else {"cache": generator.cache.kind, **generator.cache.settings}),
        "precision": BF16 if generator.bf16 else FP32,
    }


def load(cfg: DictConfig, source: str) -> Trained:
    if source != "checkpoint":
        if cfg.adapter is not None:
            raise UserError(f"{source}= has its own adapter. Give adapter= with checkpoint=<its base network> instead.")
        run = load_parts(cfg) if source == "experts" else load_weighted(cfg)
        return replace(run, generator=in_precision(run.generator, cfg))
    refuse_strength(cfg)
    if needs_base(cfg) or needs_base(cfg.sampler or {}):
        raise UserError(
            f"A guide needs the base of {cfg.checkpoint}, a network without an adapter that could be taken out. "
            "Give run=<run>, or set guide=null_class or checkpoint."
        )
    # a bare network has no sampler of its own, as a run has; this is the one that all configs begin with
    sampler = load_option(Path(CONFIGS) / "sampler" / "auto.yaml")
    checkpoint = locate(cfg.checkpoint, f"{cfg.paths.cache_dir}/networks")
    bf16 = bare_precision(cfg.precision, cfg.bf16)
    if cfg.adapter is not None:
        return load_adapted(checkpoint, adapter_of(cfg), cfg.autoencoder, sampler, bf16)
    return load_checkpoint(checkpoint, cfg.autoencoder, sampler, bf16, cfg.process, cfg.network_overrides)


def adapter_of(cfg: DictConfig) -> Path:
    """Folder of the adapter that the config names; one of the hub is fetched."""
    return locate_adapter(cfg.adapter, Path(cfg.paths.cache_dir) / "networks")


def in_precision(generator: ImageGenerator, cfg: DictConfig) -> ImageGenerator:
    """The generator of a run in the run's own precision, or in what `precision` asks for; auto leaves emulated bf16."""
    if cfg.precision != AUTO or cfg.bf16 is not None:
        return replace(generator, bf16=bare_precision(cfg.precision, cfg.bf16))
    if generator.bf16 and not hardware.multiplies_bf16(best_device().type):
        log.info("the run is in bf16, which this device only emulates: images are generated in fp32")
        return replace(generator, bf16=False)
    return generator


def with_settings(generator: ImageGenerator, cfg: DictConfig) -> ImageGenerator:
    """The generator with what the config sets of sampler, steps, guidance and guide."""
    if cfg.sampler is not None:
        generator = replace(generator, **build_sampling(cfg.sampler, cfg.paths.cache_dir))
    if cfg.guide is not None:
        generator = replace(generator, guide=build_guide(cfg, cfg.paths.cache_dir))
    if cfg.cache is not None:
        generator = replace(generator, cache=instantiate(cfg.cache, "cache"))
    return replace(generator, **{key: cfg[key] for key in ("steps", "guidance") if cfg[key] is not None})


def chosen_classes(cfg: DictConfig, names: list[str]) -> list[int]:
    """Labels to draw.

    Raises:
        UserError: a name is unknown.
    """
    if cfg.class_name is not None and cfg.classes is not None:
        raise UserError("class_name= and classes= are both given. Give one of them, or none to draw all classes.")
    if cfg.class_name is None and cfg.classes is None:
        return list(range(len(names)))
    wanted = [str(name) for name in ([cfg.class_name] if cfg.classes is None else cfg.classes)]
    unknown = [name for name in wanted if name not in names]
    if unknown or not wanted:
        near = get_close_matches(unknown[0], names) if unknown else []
        remedy = f"Did you mean {' or '.join(near)}?" if near else f"Choose of these: {', '.join(names[:20])} ..."
        raise UserError(f"The network knows no class {', '.join(unknown) or '[]'}. {remedy}")
    return [names.index(name) for name in wanted]


def balanced_labels(classes: Sequence[int], seed: int, indices: Sequence[int]) -> Tensor:  # (N,)
    """Labels of images: each run of len(classes) numbers holds every class once, in an order of its own."""
    count = len(classes)
    blocks = {i // count for i in indices}
    orders = {block: torch.randperm(count, generator=generator(seed, block, 3)) for block in blocks}
    return torch.tensor([classes[orders[i // count][i % count]] for i in indices], dtype=torch.int64)


def file_name(i: int) -> str:
    return f"{i:05d}.png"


def write(folder: Path, images: Tensor, facts: dict, suffix: str) -> None:
    """`suffix` keeps the sheets of several machines apart that draw into one folder."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for image, entry in zip(images, facts["pictures"], strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / "pictures" / entry["file"])
    save_grid(folder / f"grid{suffix}.png", images, columns=8)
    write_json(folder / f"samples{suffix}.json", facts)
