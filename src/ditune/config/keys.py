"""The values of every config key, as one table; it is asked before anything is built, and imports next to nothing.

The first pattern that fits a key counts, with all rows of that same pattern: one of them must take the value.
"""

from collections.abc import Iterator, Mapping

from omegaconf import DictConfig, ListConfig, OmegaConf, read_write

from ditune.config.data_keys import check_data
from ditune.config.kinds import LARGEST_SEED, Key, first_fit, shown
from ditune.errors import UserError

KEYS = (
    # of train.py
    Key("name", str),
    Key("seed", int, at_least=0, at_most=LARGEST_SEED),
    Key("batch_size", int, at_least=1),
    Key("max_steps", int, at_least=1),
    Key("pretrained", str, null=True),
    Key("pretrained_process", dict, null=True),  # a config of a process
    Key("pretrained_process", str, null=True),  # its name
    Key("classes", str, null=True),
    Key("new_resolution", bool),
    Key("gradient_checkpointing", bool),
    Key("compile", bool),
    Key("resume", str, choices=("auto", "never"), null=True),
    Key("dry_run", bool, also=("measure",)),
    Key("price_per_hour", float, at_least=0, null=True),
    Key("verbose", bool),
    Key("traceback", bool),
    Key("launcher.gpus_per_job", int, at_least=1, null=True),
    Key("launcher.slots", int, at_least=1, null=True),
    Key("launcher.objective", str, null=True),
    Key("tags", str, many=True),
    Key("sweep_name", str),
    Key("sweep_dir", str),
    Key("run_dir", str),
    Key("paths.*", str),
    # of experiments and presets
    Key("rates.new", dict),
    Key("rates.*.*", float, above=0),
    Key("labels_train.*", bool),
    Key("reruns_batch.*", int, at_least=1),
    # trainer
    Key("trainer.accelerator", str, choices=("auto", "cpu", "gpu", "cuda", "mps", "xpu", "tpu")),
    Key("trainer.devices", int, at_least=1, also=("auto", -1, "-1")),
    Key("trainer.devices", int, at_least=0, many=True),  # which ones
    Key("trainer.num_nodes", int, at_least=1),
    Key("trainer.precision", str, choices=("bf16-mixed", "32-true", "auto")),
    Key("trainer.max_epochs", int, at_least=-1),
    Key("trainer.accumulate_grad_batches", int, at_least=1, also=("auto",)),
    Key("trainer.gradient_clip_val", float, above=0, null=True),
    Key("trainer.log_every_n_steps", int, at_least=0),
    Key("trainer.use_distributed_sampler", bool),
    Key("trainer.enable_model_summary", bool),
    Key("trainer.detect_anomaly", bool),
    Key("trainer.strategy", dict),
    Key("trainer.strategy", str),  # Lightning's names of them
    Key("trainer.strategy.broadcast_buffers", bool),
    Key("trainer.strategy.find_unused_parameters", bool),
    Key("trainer.strategy.gradient_as_bucket_view", bool),
    Key("trainer.strategy.bucket_cap_mb", float, above=0),
    Key("trainer.strategy.timeout.minutes", float, above=0),
    # what happens between the steps
    Key("callbacks.samples.n", int, at_least=0),
    Key("callbacks.strips.n", int, at_least=0),
    Key("callbacks.strips.steps", int, at_least=1, many=True),
    Key("callbacks.checkpoint.keep", int, at_least=-1),
    Key("callbacks.samples.every_n_steps", int, at_least=0),
    Key("callbacks.checkpoint.every_n_steps", int, at_least=0),
    Key("callbacks.routing.every_n_steps", int, at_least=0),
    Key("callbacks.held_out.every_n_steps", int, at_least=1, null=True),
    Key("callbacks.held_out.n", int, at_least=1),
    Key("callbacks.metrics.every_n_steps", int, at_least=1, null=True),
    Key("callbacks.metrics.n", int, at_least=1),
    Key("callbacks.checkpoint.best", str, null=True),
    Key("callbacks.checkpoint.keep_finished", bool),
    Key("callbacks.checkpoint.on_full", str, choices=("stop", "continue")),
    Key("callbacks.nonfinite.action", str, choices=("stop", "skip")),
    Key("callbacks.nonfinite.limit", int, at_least=1),
    Key("callbacks.ranks.compare_every_n_steps", int, at_least=0),
    Key("callbacks.early_stopping.patience", int, at_least=1, null=True),
    Key("logger.use", str, many=True),
    Key("logger.*flush_every", int, at_least=1),
    Key("logger.*tracking_uri", str, null=True),
    Key("logger.*space", str, null=True),
    Key("logger.*labels", str, many=True),
    Key("logger.*tags", str, many=True),
    Key("logger.*log_adapter", bool),
    Key("logger.*offline", bool, null=True),
    Key("logger.*group", str, null=True),
    Key("logger.*folder", str),
    Key("logger.*save_dir", str),
    Key("logger.*project", str),
    Key("logger.*version", str, null=True),
    # how it learns
    Key("ema.decay", float, at_least=0, at_most=1),
    Key("optimizer.betas", float, at_least=0, below=1, many=True, length=2),
    Key("optimizer.momentum", float, at_least=0, below=1),
    Key("optimizer.fused", bool),
    Key("scheduler.warmup_steps", int, at_least=0),
    Key("scheduler.decay_to", float, at_least=0),
    Key("balance", dict, null=True),
    Key("balance.scope", str),
    Key("balance.alpha", float),  # Balance itself refuses negative ones
    Key("balance.z", float),
    Key("balance.bias_rate", float),
    # peft
    Key("peft.name", str),
    Key("peft.train_labels", bool),
    Key("peft.gamma_depth", int, at_least=0, null=True),
    Key("peft.gammas", str, many=True),
    Key("peft.affine_norms", bool),
    Key("peft.adaln", bool),
    Key("peft.init_weights", bool),
    Key("peft.target_modules", str),
    Key("peft.target_modules", str, many=True),
    Key("peft.feedforward_modules", str),
    Key("peft.feedforward_modules", str, many=True),
    Key("peft.*alpha", float, above=0),
    Key("peft.scale", float),
    Key("peft.scaling", float),
    Key("peft.orth_reg_weight", float, at_least=0),
    Key("peft.*seed", int, at_least=0, at_most=LARGEST_SEED),
    Key("peft.projection_prng_key", int, at_least=0, at_most=LARGEST_SEED),
    Key("peft.tinit", int, at_least=0),
    Key("peft.tfinal", int, at_least=0),
    Key("peft.deltaT", int, at_least=1),
    Key("peft.r", int, at_least=1),
    Key("peft.min_r", int, at_least=0),
    Key("peft.power", float, above=0),
    Key("peft.times", float, many=True, null=True),
    Key("peft.*_r", int, at_least=1),
    Key("peft.boft_n_butterfly_factor", int, at_least=1),
    Key("peft.*_block_size", int, at_least=1),
    Key("peft.config_A_B", str),
    Key("peft.config_C", str),
    Key("peft.config_D_E", str),
    Key("peft.decomposition_method", str),
    Key("peft.variant", str),
    Key("peft.group_size", int, at_least=1),
    Key("peft.gralora_k", int, at_least=1),
    Key("peft.bottleneck", int, at_least=1),
    Key("peft.num_prompts", int, at_least=1),
    Key("peft.n_frequency", int, at_least=1),
    Key("peft.wavelet_family", str),
    Key("peft.depth", int, at_least=0),
    Key("peft.act_fn", str),
    Key("peft.sparsity", float, above=0, below=1),
    Key("peft.select_top", bool),
    Key("peft.total_step", int, at_least=1),
    # network
    Key("network.class_dropout_prob", float, at_least=0, at_most=1),
    Key("network.learn_sigma", bool),
    Key("network.pos_embed_scale", float, above=0),
    Key("network.choice", str, choices=("token", "expert", "time")),
    Key("network.route_on", str, choices=("modulated", "unmodulated")),
    Key("network.time_range", float, above=0),
    Key("network.checkpoint", str, null=True),
    Key("network.cache_dir", str),
    # objective
    Key("objective.process.timesteps", int, at_least=1),
    Key("objective.process.time_scale", float, above=0),
    Key("objective.process.data_at", int, at_least=0, at_most=1),
    Key("objective.process.sigma_min", float, at_least=0, below=1),
    Key("objective.process.base_steps", int, at_least=2, null=True),
    Key("objective.process.schedule", str),
    Key("objective.process.prediction", str),
    Key("objective.process.variance", str),
    Key("objective.process.step", str),
    Key("objective.process.step_blocks", int, at_least=1, null=True),
    Key("objective.process.bridge", str, choices=("aligned", "path")),
    Key("objective.label_drop", float, at_least=0, at_most=1),
    Key("objective.interval", float, at_least=0, at_most=1, many=True, length=2, ascending=True, null=True),
    Key("objective.share", float, at_least=0, at_most=1),
    Key("objective.begin", float, at_least=0, at_most=1),
    Key("objective.end", float, at_least=0, at_most=1),
    Key("objective.alpha", float, above=0, at_most=1, null=True),
    Key("objective.*_ratio", float, above=0, at_most=1),
    Key("objective.temperature", float, above=0),
    Key("objective.smallest", float, at_least=0),
    Key("objective.*mean", float),
    Key("objective.*std", float, at_least=0),
    Key("objective.guidance", float),
    Key("objective.power", float, at_least=0),
    Key("objective.eps", float, at_least=0),
    Key("objective.gamma", float, above=0),
    Key("objective.clamp", float, above=0, null=True),
    Key("objective.*_every", int, at_least=1),
    Key("objective.steps", int, at_least=1),
    Key("objective.dt_bias", bool),
    Key("objective.stratified", bool),
    Key("objective.weight", str),
    Key("objective.target", str),
    Key("objective.loss", str),
    Key("objective.levels", str),
    Key("objective.times", str),
    Key("objective.teacher", str, null=True),
    Key("objective.pairs", str, null=True),
    Key("objective.anneal", str, choices=("none", "linear", "cosine", "exponential")),
    Key("objective.anneal_share", float, above=0, at_most=1),
    Key("objective.first", str, choices=("student", "teacher", "none")),
    Key("objective.low", float, above=0, below=1),
    Key("objective.high", float, above=0, below=1),
    Key("objective.derivative", str, choices=("jvp", "difference")),
    Key("objective.difference_step", float, above=0, below=1),
    Key("objective.tangent", str, choices=("path", "network")),
    Key("objective.control", bool),
    # transfer
    Key("transfer", dict, null=True),
    Key("transfer.w", float, at_least=1),
    Key("transfer.start", float, at_least=0, at_most=1),
    Key("transfer.cutoff", float, above=0, at_most=1),
    Key("transfer.target", str, choices=("ema", "live")),
    Key("transfer.control", bool),
    Key("transfer.drop", float, at_least=0, at_most=1),
    Key("transfer.k", float, at_least=0),
    Key("transfer.share", float, at_least=0, at_most=1),
    Key("transfer.n", int, at_least=1),
    # patches
    Key("patches", dict, null=True),
    Key("patches.share", float, at_least=0, at_most=1),
    Key("patches.sizes", str, choices=("half", "half_quarter")),
    Key("patches.schedule", str, choices=("stochastic", "progressive")),
    Key("patches.by_area", bool),
    # sparsity
    Key("sparsity", dict, null=True),
    Key("sparsity.pattern", str),
    Key("sparsity.target", str, null=True),
    Key("sparsity.scope", str, choices=("global", "layer")),
    Key("sparsity.way", str, choices=("hard", "ste")),
    Key("sparsity.final", float, at_least=0, at_most=1),
    Key("sparsity.schedule", str, choices=("constant", "cubic", "progressive")),
    Key("sparsity.start", int, at_least=0),
    Key("sparsity.end", int, at_least=0),
    Key("sparsity.every", int, at_least=1),
    Key("sparsity.power", float, above=0),
    Key("sparsity.stages", str, many=True),
    Key("sparsity.decay", float, at_least=0),
    Key("sparsity.teacher", float, at_least=0),
    # sampler
    Key("sampler", dict, null=True),
    Key("sampler.sampler", dict, null=True),
    Key("sampler.sampler.method", str),
    Key("sampler.sampler.eta", float, at_least=0),
    Key("sampler.sampler.clip", float, at_least=0),
    Key("sampler.sampler.clip", bool),  # in runs of before it was a number
    Key("sampler.sampler.told", float, at_least=0, at_most=1),
    Key("sampler.steps", int, at_least=1, null=True),
    Key("sampler.guidance", float, null=True),
    Key("sampler.guidance_interval", float, at_least=0, at_most=1, many=True, length=2, ascending=True),
    Key("sampler.guidance_channels", int, at_least=1, null=True),
    Key("sampler.guidance_rescale", float, at_least=0, at_most=1),
    Key("sampler.guide", str, choices=("null_class", "base", "checkpoint", "interpolated")),
    Key("sampler.guide_checkpoint", str, null=True),
    Key("sampler.guide_strength", float),
    Key("sampler.noise_awareness", float, at_least=0),
    Key("sampler.guidance_input", float, at_least=1, null=True),
    Key("sampler.batch_size", int, at_least=1, at_most=1_000_000),
    Key("cache", dict, null=True),
    Key("cache.interval", int, at_least=1),
    Key("cache.order", int, at_least=0),
    Key("cache.form", str, choices=("taylor", "newton")),
    Key("cache.first", int, at_least=1),
    Key("cache.blocks", float, above=0, at_most=1),
    Key("cache.switch", float, at_least=0, at_most=1),
    # data; a base_reference is written like data.pictures
    Key("*.resolution", int, at_least=1),
    Key("*.num_workers", int, at_least=0),
    Key("*.flip", bool),
    Key("*.latents", bool),
    Key("*.in_memory", bool),
    Key("*.sources", str, many=True),
    Key("*.split", str, null=True),
    Key("*.limit", int, at_least=1, null=True),
    Key("data.subset", dict, null=True),  # its own keys are checked where it is chosen
    Key("data.fraction", float, above=0, at_most=1, null=True),
    Key("*.partition", int, at_least=1, at_most=10, null=True),
    Key("*.class_column", str, null=True),
    Key("*.classes", str, null=True),  # a file
    Key("*.classes", str, many=True),  # or the names
    Key("data.root", str, null=True),  # null where nothing refers to it; see config/data_keys.py
    Key("*.root", str),
    Key("*.prepared", str),
    Key("*.manifest", str, null=True),
    Key("augment", dict, null=True),
    Key("augment.share", float, at_least=0, at_most=1),
    Key("augment.degrees", float, at_least=0),
    Key("augment.scale", float, above=0, many=True, length=2, ascending=True),
    Key("augment.saturation", float, at_least=0, many=True, length=2, ascending=True),
    Key("augment.hue", float, at_least=0, at_most=0.5),
    Key("augment.shift", float, at_least=0),
    Key("augment.shading", float, at_least=0, at_most=1),
    # autoencoder
    Key("*.tiling", bool),
    Key("*.channels", int, at_least=1),
    Key("*.patch", int, at_least=1),
    Key("*.folder", str),
    Key("*.hub", str, null=True),
    Key("autoencoder.scale", float, above=0, null=True),
    # addresses
    Key("addresses.*", str, many=True, null=True),
    # metrics
    Key("metrics.n", int, at_least=0),
    Key("metrics.loss_split", str, null=True),
    Key("metrics.record", str, null=True),
    Key("metrics.keep_images", bool),
    Key("metrics.reference", dict, null=True),
    Key("metrics.base_reference", dict, null=True),
    Key("metrics.judge.statistics", str, null=True),
    Key("metrics.judge.cache", str),
    Key("metrics.judge.extractor.sha256", str),
    Key("metrics.judge.extractor.resize", str, choices=("tensorflow", "torch", "clean")),
    Key("metrics.judge.reference_split", str, choices=("all", "train"), null=True),
    Key("metrics.reference_split", str, choices=("all", "train"), null=True),
    Key("metrics.judge.extractor.architecture", str),
    # whatever the group
    Key("*.weights", str, null=True),
    Key("*.name", str),
    Key("*.bf16", bool),
    Key("*.seed", int, at_least=0, at_most=LARGEST_SEED),
    Key("*.max_steps", int, at_least=1),
    Key("*.shift", float, above=0),
    Key("*.lr", float, above=0),
    Key("*.muon_lr", float, above=0),
    Key("*.weight_decay", float, at_least=0),
    # of several entry points
    Key("run", str, null=True),
    Key("checkpoint", str, null=True),
    Key("adapter", str, null=True),
    Key("experts", str, many=True, null=True),
    Key("weights", float, many=True, null=True),
    Key("out", str, null=True),
    Key("n", int, at_least=1),
    Key("steps", int, at_least=1, null=True),
    Key("guidance", float, null=True),
    Key("guide", str, choices=("null_class", "base", "checkpoint", "interpolated"), null=True),
    Key("guide_checkpoint", str, null=True),
    Key("guide_strength", float),
    Key("strength", float, null=True),
    Key("adapters", str, many=True, null=True),
    Key("precision", str, choices=("auto", "bf16-mixed", "32-true")),
    Key("bf16", bool, null=True),
    Key("process", dict, null=True),  # a config of a process
    Key("process", str, null=True),  # its name
    Key("network_overrides.num_heads", int, at_least=1, null=True),
    Key("network_overrides.input_size", int, at_least=1, null=True),
    Key("network_overrides.pos_embed_scale", float, above=0, null=True),
    Key("network_overrides.num_classes", int, at_least=1, null=True),
    Key("network_overrides.top_k", int, at_least=1, null=True),
    Key("noise", float, at_least=0),
)

# of one entry point alone; they come before those above; the scripts of studies/ add their own
APART = {
    "sample": (
        Key("first", int, at_least=0),
        Key("class_name", str, null=True),
        Key("classes", str, many=True, null=True),
        Key("pairs", str, null=True),
    ),
    "evaluate": (
        Key("runs", str, null=True),
        Key("images", str, null=True),
        Key("npz", str, null=True),
        Key("metrics_of", str),
        Key("processes", int, at_least=1),
        Key("threads", int, at_least=1, null=True),
        Key("record", str, null=True),
    ),
    "prepare": (
        Key("stages", str, many=True),
        Key("again", bool),
        Key("download", bool),
        Key("policy", str, choices=("raise", "skip")),
    ),
    "report": (Key("sweep", str), Key("metric", str, null=True)),
    "export": (Key("format", str), Key("fill_zeros", bool)),
    "app": (
        Key("runs", str),
        Key("sweeps", str),
        Key("host", str),
        Key("port", int, at_least=0, at_most=65535),
    ),
    "publish": (
        Key("repo", str, null=True),
        Key("licence", str, null=True),
        Key("data_licence", str, null=True),
        Key("private", bool),
        Key("push", bool),
    ),
    "upcycle": (
        Key("num_experts", int, at_least=1),
        Key("top_k", int, at_least=1),
        Key("options.shared_ratio", float, at_least=0),
        Key("options.moe_every", int, at_least=1),
        Key("options.moe_from", float, at_least=0, at_most=1),
    ),
    "prune": (
        Key("depth", int, at_least=1, null=True),
        Key("pattern", str),
        Key("target", str, null=True),
        Key("scope", str, choices=("global", "layer")),
        Key("share", float, at_least=0, at_most=1),
    ),
    "federate": (
        Key("clients", int, at_least=1),
        Key("rounds", int, at_least=1),
        Key("share_by", str, choices=("random", "classes")),
        Key("merge", str, choices=("fedavg", "nnz", "majority")),
        Key("purge", str, choices=("global", "local")),
    ),
    "parameters": (
        Key("networks", str, many=True),
        Key("num_classes", int, at_least=1),
        Key("rows", str, many=True),
    ),
    "dashboard": (
        Key("entity", str),
        Key("project", str),
        Key("group", str, null=True),
        Key("metric", str),
        Key("spec", str, null=True),
    ),
}


APART["prepare_training"] = APART["prepare"]


def rows_of(name: str, command: str = "train") -> list[Key]:
    """The rows of the table that say what a key takes; none for a key that the table does not know."""
    for table in (APART.get(command, ()), KEYS):
        first = next((row for row in table if row.matches(name)), None)
        if first is not None:
            return [row for row in table if row.pattern == first.pattern]
    return []


def check(cfg: DictConfig, command: str = "train") -> None:
    """Refuse values of a wrong type or range; whole floats of whole numbers (1e3) become int in the config.

    Keys without a row are those that a user has added; what is built of them refuses what it does not know.

    Args:
        cfg: the config of an entry point, which is changed in place.
        command: the entry point's name.

    Raises:
        UserError: names the key, its value and what it takes.
    """
    with read_write(cfg):
        for name, parent, key in sorted(leaves(cfg), key=lambda leaf: OmegaConf.is_interpolation(leaf[1], leaf[2])):
            _check_leaf(name, parent, key, command)
    check_data(cfg)


def leaves(cfg: DictConfig, path: str = "") -> Iterator[tuple[str, DictConfig, str]]:
    """(dotted name, the config that holds it, its key there) of all values; lists and references are values."""
    for key in cfg:
        name = f"{path}.{key}" if path else str(key)
        if OmegaConf.is_missing(cfg, key) or str(key).startswith("_") or name == "hydra":
            continue  # _target_ and the like belong to Hydra
        yield name, cfg, key
        if not OmegaConf.is_interpolation(cfg, key) and isinstance(cfg[key], DictConfig):
            yield from leaves(cfg[key], name)


def _check_leaf(name: str, parent: DictConfig, key: str, command: str) -> None:
    rows, reference = rows_of(name, command), OmegaConf.is_interpolation(parent, key)
    if reference and (not rows or rows[0].kind is str):
        return  # paths, some of which only a run can resolve; lists of text are values themselves
    value = parent[key]
    if not rows:
        if not isinstance(value, Mapping):
            _check_group(name, value)
        return
    if isinstance(value, DictConfig) and rows[0].kind is dict:
        return
    if isinstance(value, DictConfig | ListConfig):
        value = OmegaConf.to_container(value, resolve=rows[0].kind is not str)
    read = first_fit(name, value, rows)
    if type(read) is not type(value) or repr(read) != repr(value):
        parent[key] = read


def _check_group(name: str, value: object) -> None:
    inside = [row.pattern.removeprefix(f"{name}.") for row in KEYS if row.pattern.startswith(f"{name}.")]
    if inside:
        raise UserError(f"{name} is {shown(value)}, but must be a group of keys: {', '.join(inside)}.")
