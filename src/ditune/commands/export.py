"""Trained networks in the formats of others: adapters are merged first, so that nothing of this project is needed."""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from safetensors.torch import save_file
from torch import Tensor

from ditune.autoencoders import KL
from ditune.checkpoints import (
    diffusers_dit,
    is_ours,
    locate,
    locate_adapter,
    read_adapter,
    read_header,
    save_network,
)
from ditune.commands.adapted import exactly_one
from ditune.commands.prune import refuse_filled
from ditune.errors import UserError
from ditune.files.atomic import atomic, write_json
from ditune.networks import DiT
from ditune.peft import merge, merge_adapters
from ditune.processes import GaussianProcess
from ditune.run import Trained, load_adapted, load_checkpoint, load_run
from ditune.run_experts import load_experts

log = logging.getLogger(__name__)

FORMATS = ("dit", "diffusers")
PIPELINE = Path(diffusers_dit.__file__).with_name("dit_pipeline.py")  # goes along, and is not imported here


def export(cfg: DictConfig) -> Path:
    """Write what the config of src/export.py names; returns the file or folder.

    Raises:
        UserError: the settings or a file are wrong, or the format has no place for the network.
    """
    if cfg.format not in FORMATS:
        raise UserError(f"format is '{cfg.format}'. Choose one of {', '.join(FORMATS)}.")
    source = exactly_one(cfg, "run", "checkpoint", "experts")
    if source != "checkpoint" and cfg.adapter is not None:
        raise UserError(f"{source}= has its own adapter. Give adapter= with checkpoint=<its base network> instead.")
    if source == "run":
        trained = load_run(cfg.run, as_trained=False)  # merged into the base as it is in its file
    elif source == "experts":
        trained = merged_experts(cfg)
    else:
        checkpoint = locate(cfg.checkpoint, f"{cfg.paths.cache_dir}/networks")
        given = (cfg.process, cfg.network_overrides)
        if cfg.adapter is None:
            trained = load_checkpoint(checkpoint, cfg.autoencoder, cfg.sampler, False, *given)
        else:
            adapter = locate_adapter(cfg.adapter, f"{cfg.paths.cache_dir}/networks")
            trained = load_adapted(checkpoint, adapter, cfg.autoencoder, cfg.sampler, False)
    sparsity, what = sparsity_of(cfg, source), f"{source}={cfg[source]}"
    merge(trained.network)
    sparse = refuse_filled(trained.network, sparsity, what, cfg.fill_zeros)
    out = Path(cfg.out).expanduser()
    kept = sparsity if sparse else None
    path = to_diffusers(trained, out) if cfg.format == "diffusers" else to_dit(trained, out, kept)
    log.info("the network is in %s", path)
    return path


def sparsity_of(cfg: DictConfig, source: str) -> dict[str, Any] | None:
    """What the file of the source says of its zeros; of several runs, the first one's."""
    if source == "checkpoint" and cfg.adapter is None:
        path = locate(cfg.checkpoint, f"{cfg.paths.cache_dir}/networks")
        return read_header(path)["provenance"].get("sparsity") if is_ours(path) else None
    if source == "checkpoint":
        folder = locate_adapter(cfg.adapter, f"{cfg.paths.cache_dir}/networks")
    else:
        run = Path(cfg.run if source == "run" else cfg.experts[0]).expanduser()
        folder = run / "adapter"
        if not folder.is_dir():
            return read_header(run / "network.safetensors")["provenance"].get("sparsity")
    return read_adapter(folder)[0].get("sparsity")


def merged_experts(cfg: DictConfig) -> Trained:
    """One network of several runs, each weighted by one of `weights`.

    Raises:
        UserError: there is not one weight for each run, or they do not fit together.
    """
    names, weights = list(cfg.experts), cfg.weights
    if weights is None or len(weights) != len(names):
        raise UserError(
            f"weights is {weights}, and experts names {len(names)} runs. Give one weight for each, such as "
            f"weights=[{','.join(f'{1 / len(names):.3g}' for _ in names)}]."
        )
    trained = load_experts(names)
    network = merge_adapters(trained.generator.experts.adapters, dict(zip(names, map(float, weights), strict=True)))
    return replace(trained, network=network, generator=replace(trained.generator, experts=None))


def to_dit(trained: Trained, folder: Path, sparsity: dict[str, Any] | None = None) -> Path:
    """One safetensors file with DiT's own keys, position table included; our header says process, classes and zeros."""
    generator = trained.generator
    facts = {
        "class_names": trained.class_names,
        "autoencoder": generator.autoencoder.latent_fingerprint,
        "autoencoder_name": generator.autoencoder.name,
        "resolution": generator.resolution,
    }
    if sparsity is not None:
        facts["sparsity"] = sparsity
    path = folder / "network.safetensors"
    save_network(path, trained.network, generator.process.config, position_table=True, **facts)
    return path


def to_diffusers(trained: Trained, folder: Path) -> Path:
    """A folder for diffusers: transformer/, scheduler/, vae/ where it is one of diffusers, pipeline.py.

    Raises:
        UserError: the network or its process has no counterpart there, or the folder is not empty.
    """
    from diffusers import DDIMScheduler  # takes seconds

    network, generator = trained.network, trained.generator
    process = generator.process
    if type(network) is not DiT or network.config.get("step") or not isinstance(process, GaussianProcess):
        raise UserError("diffusers has a DiT for diffusion only. Export this network with format=dit.")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty. Give another out=, or delete it.")
    config = transformer_config(network)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "transformer" / "config.json", config)
    tensors = diffusers_dit.to_theirs({name: t.detach().float().cpu() for name, t in network.state_dict().items()})
    write_weights(folder / "transformer", tensors)
    full = GaussianProcess(**(process.config | {"respacing": ""}))
    DDIMScheduler(
        num_train_timesteps=full.steps,
        trained_betas=full.tables["betas"].tolist(),
        prediction_type={"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}[process.config["prediction"]],
        clip_sample=False,
        set_alpha_to_one=True,  # the last step goes to the data itself
        steps_offset=0,
    ).save_pretrained(folder / "scheduler")
    codec = generator.autoencoder
    if isinstance(codec, KL):
        codec.vae.register_to_config(scaling_factor=codec.scale[0].item())
        codec.vae.save_config(folder / "vae")
        write_weights(folder / "vae", codec.vae.state_dict())
    else:
        log.warning("diffusers has no %s: the pipeline returns latents", type(codec).__name__)
    shutil.copyfile(PIPELINE, folder / "pipeline.py")
    names = trained.class_names or [str(k) for k in range(network.num_classes)]
    write_json(folder / "model_index.json", index(network, isinstance(codec, KL), names))
    return folder


def write_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """The weights of a model of diffusers; `save_pretrained` would let nobody else read them."""
    with atomic(folder / "diffusion_pytorch_model.safetensors") as temporary:
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata={"format": "pt"})


def transformer_config(network: DiT) -> dict[str, object]:
    """Config of the DiTTransformer2DModel with the same shapes."""
    ours = network.config
    if ours["mlp_ratio"] != 4 or ours["class_dropout_prob"] <= 0:
        raise UserError("diffusers' DiT has MLPs of four times the width and a null class. Export with format=dit.")
    return {
        "_class_name": diffusers_dit.CLASS,
        "num_attention_heads": ours["num_heads"],
        "attention_head_dim": ours["hidden_size"] // ours["num_heads"],
        "in_channels": ours["in_channels"],
        "out_channels": network.out_channels,
        "num_layers": ours["depth"],
        "sample_size": ours["input_size"],
        "patch_size": ours["patch_size"],
        "num_embeds_ada_norm": ours["num_classes"],
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
    }


def index(network: DiT, has_vae: bool, names: list[str]) -> dict[str, object]:
    """What DiffusionPipeline.from_pretrained reads first."""
    return {
        "_class_name": ["pipeline", "DiTunePipeline"],
        "transformer": ["diffusers", diffusers_dit.CLASS],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "vae": ["diffusers", "AutoencoderKL"] if has_vae else [None, None],
        "id2label": dict(enumerate(names)),
        "pos_embed_scale": network.config["pos_embed_scale"],
    }
