"""From a composed config to the objects of a run. Below this folder and the commands nothing sees a config."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ditune.config import rules
from ditune.config.base_network import build_network, match_process
from ditune.config.distillation import read_sources
from ditune.config.guides import build_sampling, needs_base
from ditune.config.instantiate import instantiate, refuse_missing, training_images
from ditune.config.references import reference_images
from ditune.data import ImageDataset
from ditune.errors import UserError
from ditune.evaluation.comparison import Comparison
from ditune.evaluation.protocol import Evaluation, Record
from ditune.generation.generator import ImageGenerator
from ditune.networks import DiT
from ditune.networks.int8 import quantise
from ditune.networks.unread import ReadWhole
from ditune.objectives import DenseTeacher, Objective
from ditune.peft.slots import slots
from ditune.rng import seeded
from ditune.samplers import BaseGuide, check
from ditune.training.components import Components, Settings


def build_components(cfg: DictConfig) -> Components:
    """Dataset, autoencoder, network, method and objective of a config, checked against each other and the base network.

    Raises:
        UserError: something is missing or does not fit.
    """
    refuse_missing(cfg)
    images = training_images(cfg)
    autoencoder = instantiate(cfg.autoencoder, "autoencoder")
    objective = build_objective(cfg)
    method = instantiate(cfg.peft, "peft", _convert_="all")
    network, base = build_network(cfg, images.class_names, autoencoder, objective.inputs)
    if base is not None:
        objective.process = match_process(objective.process, base.process)
    read_sources(cfg, objective, images.class_names, autoencoder)
    if objective.critic is not None:
        with seeded(cfg.seed):
            objective.critic.build(network.config)
    method.bind(objective.process.part)
    components = Components(
        images=images,
        autoencoder=autoencoder,
        network=network,
        method=method,
        objective=objective,
        base=base,
        balance=instantiate(cfg.balance, "balance"),
        sparsity=instantiate(cfg.get("sparsity"), "sparsity"),
        settings=settings_of(cfg),
    )
    rules.check(components, rules.OF_THE_BASE)
    before = slots(network) if base is not None and needs_base(cfg.sampler) else None
    with seeded(cfg.seed), ReadWhole(network.unread) if network.unread else nullcontext():
        method.apply(network, before, new_classes=cfg.classes is not None)
    store_frozen(network, components.settings)
    network.gradient_checkpointing = cfg.gradient_checkpointing
    rules.check(components, rules.OF_THE_LABELS)
    return components


def build_objective(cfg: DictConfig) -> Objective:
    """The objective of a config, inside of the one of `transfer=`, `patches=` or `sparsity.teacher=`."""
    objective = instantiate(cfg.objective, "objective")
    for group in ("transfer", "patches"):
        if cfg.get(group) is not None:
            objective = instantiate(cfg[group], group, objective=objective)
    weight = (cfg.get("sparsity") or {}).get("teacher")
    return DenseTeacher(objective, weight) if weight else objective


def settings_of(cfg: DictConfig) -> Settings:
    """The plain values of a training's config."""
    return Settings(
        name=cfg.name,
        seed=cfg.seed,
        batch_size=cfg.batch_size,
        max_steps=cfg.max_steps,
        lr=cfg.optimizer.lr,
        precision=str(cfg.trainer.precision),
        resolution=cfg.data.resolution,
        classes=cfg.classes,
        data_name=cfg.data.name,
        latents=cfg.data.latents,
        augmented=cfg.augment is not None,
        metrics_seed=cfg.metrics.seed,
        frozen_weights=cfg.get("frozen_weights"),
        compiled=cfg.compile,
    )


def store_frozen(network: DiT, settings: Settings) -> None:
    """Keep frozen weights in int8 where that is asked for, and the others in bf16 where the training runs in it."""
    if settings.frozen_weights == "int8":
        quantise(network)
    if settings.bf16:
        freeze_in_bf16(network)


def freeze_in_bf16(network: DiT) -> None:
    """Keep frozen weights in bf16, as autocast would round them in every step; what trains stays in fp32.

    Trainable parameters in bf16 would lose AdamW's small updates. Routers compute in fp32 under autocast too.
    """
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad and parameter.is_floating_point() and ".router." not in name:
            values = parameter.data
            parameter.data = values.bfloat16() if network.unread is None else network.unread.as_bf16(values)


def build_generator(cfg: DictConfig, components: Components, sampler: DictConfig | None = None) -> ImageGenerator:
    """What generates the run's images, by the config's sampler or another.

    Raises:
        UserError: the sampler or its steps do not suit the objective's process.
    """
    generator = ImageGenerator(
        process=components.objective.process,
        autoencoder=components.autoencoder,
        resolution=components.settings.resolution,
        bf16=components.settings.bf16,
        cache=instantiate(cfg.cache, "cache"),
        **build_sampling(cfg.sampler if sampler is None else sampler, cfg.paths.cache_dir),
    )
    check(generator.sampler, generator.process, generator.steps, generator.cache, generator.guide)
    if isinstance(generator.guide, BaseGuide) and components.base is None:
        raise UserError(
            f"sampler.guide is {generator.guide.kind}, and the network starts from scratch. Set pretrained=<file>, or "
            "sampler.guide=null_class or checkpoint."
        )
    if generator.guidance != 1 and components.network.config["class_dropout_prob"] <= 0:
        raise UserError("The network has no null class to be guided away from. Set sampler.guidance=1.")
    refuse_missing_inputs(generator, components.network.config)
    return generator


def refuse_missing_inputs(generator: ImageGenerator, network: Mapping[str, Any]) -> None:
    """Refuse guidance by an input that the network was not trained with.

    Args:
        generator: its settings.
        network: config of the network.

    Raises:
        UserError: the network has no such input, or a cache would mix two calls of one step.
    """
    for key, neutral, name, remedy in (
        ("noise_awareness", 0, "untimed", "transfer=noise_awareness"),
        ("guidance_input", None, "guided", "transfer.control=true or objective.control=true"),
    ):
        value = getattr(generator, key)
        if value != neutral and not network.get(name):
            raise UserError(
                f"sampler.{key} is {value}, and the network has not learned this input. Train it with {remedy}, or set "
                f"sampler.{key}={'null' if neutral is None else neutral}."
            )
    if generator.noise_awareness and generator.cache is not None:
        raise UserError(
            "sampler.noise_awareness calls the network twice in each step, and a cache would mix the calls. "
            "Set cache=none, or sampler.noise_awareness=0."
        )


def build_evaluation(
    cfg: DictConfig,
    generator: ImageGenerator,
    reference: ImageDataset,
    suite: object | None = None,
    store: Path | None = None,
) -> Evaluation:
    """The fixed protocol of the config's metrics, against a reference; the suite of metrics may be shared."""
    suite = suite or instantiate(cfg.metrics.judge, "metrics")
    return Evaluation(suite, reference, generator, n=cfg.metrics.n, seed=cfg.metrics.seed, store=store)


def build_comparison(cfg: DictConfig, generator: ImageGenerator, store: Path | None = None) -> Comparison:
    """The protocol of a run's `metrics`; built before a training, so that what is missing shows before it."""
    evaluation = build_evaluation(cfg, generator, reference_images(cfg), store=store)
    own = None
    if cfg.metrics.base_reference is not None:
        reference = instantiate(cfg.metrics.base_reference, "metrics")
        own = build_evaluation(cfg, generator, reference, suite=evaluation.suite, store=store)
    return Comparison(evaluation, own, Record(cfg.metrics.record))
