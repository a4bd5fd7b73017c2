"""Trains the small AutoencoderKL of the emoji, or only its decoder further: `python studies/kl_autoencoder.py`.

The loss is the squared error and a weak KL divergence of the posterior from N(0, I).
"""

import logging
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from ditune.autoencoders import KL
from ditune.autoencoders.kl import load
from ditune.autoencoders.quality import psnr, reconstruct
from ditune.cli import entry_point
from ditune.config.hardware import bare_precision
from ditune.config.instantiate import instantiate
from ditune.config.keys import APART
from ditune.config.kinds import Key
from ditune.data import Pictures, from_uint8, to_uint8
from ditune.data.stream import PictureStream
from ditune.distributed import best_device
from ditune.errors import UserError
from ditune.files.atomic import read_json, write_json
from ditune.rng import Draws

log = logging.getLogger(__name__)

SCALED_ON = 256  # images for the latents' scale
CONFIGS = str(Path(__file__).resolve().parent / "configs")
APART["kl_autoencoder"] = (
    Key("lr", float, above=0),
    Key("widths", int, at_least=1, many=True),
    Key("layers", int, at_least=1),
    Key("channels", int, at_least=1),
    Key("kl_weight", float, at_least=0),
    Key("latent_noise", float, at_least=0),
    Key("decoder_of", str, null=True),
    Key("warmup_steps", int, at_least=0),
    Key("log_every", int, at_least=1),
    Key("limit", int, at_least=1, null=True),
    Key("vendors.*", str),
)


def fit(cfg: DictConfig) -> Path:
    """Train, save in the hub's layout, measure PSNR on unseen images, and return the folder.

    Raises:
        UserError: the settings or a file are wrong.
    """
    if cfg.latent_noise and cfg.decoder_of is None:
        raise UserError("latent_noise is in units of finished latents. Set decoder_of=<folder of an autoencoder>.")
    device, folder = best_device(), Path(cfg.out)
    bf16 = bare_precision(cfg.precision, cfg.bf16)
    pictures = instantiate(cfg.data.pictures, "data")
    pictures.load()
    vae, before = (build(cfg), None) if cfg.decoder_of is None else only_decoder(Path(cfg.decoder_of))
    vae = vae.to(device)
    log.info("%s parameters, %d pictures", f"{sum(p.numel() for p in vae.parameters()):,}", len(pictures))
    trained = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=0.0)
    stream, start = PictureStream(pictures, cfg.seed, flip=False), time.perf_counter()
    for step in range(cfg.max_steps):
        positions = range(step * cfg.batch_size, (step + 1) * cfg.batch_size)
        x = from_uint8(stream.__getitems__(positions)[0].to(device))  # (B, 3, R, R)
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min(1.0, (step + 1) / cfg.warmup_steps) * (1 - step / cfg.max_steps)
        draws = Draws(cfg.seed, step, range(cfg.batch_size), device)
        error, divergence = losses(vae, x, draws, bf16, cfg.latent_noise)
        optimizer.zero_grad()
        (error + cfg.kl_weight * divergence).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if (step + 1) % cfg.log_every == 0:
            rate = (step + 1) * cfg.batch_size / (time.perf_counter() - start)
            log.info("step %d: error %.5f, KL %.1f, %.0f images/s", step + 1, error.item(), divergence.item(), rate)
    seconds = time.perf_counter() - start
    if cfg.decoder_of is None:
        set_scale(vae, pictures)
    vae.eval().save_pretrained(folder)
    values = measure(KL("kl_emoji", folder).to(device).eval(), cfg)
    facts = {"parameters": sum(p.numel() for p in vae.parameters()), "steps": cfg.max_steps, "seconds": seconds}
    facts |= {"data": cfg.data.name} | {key: cfg[key] for key in ("batch_size", "lr", "seed", "latent_noise")}
    write_json(folder / "result.json", facts | {"psnr_db": values, "decoder_of": before})
    for name, value in values.items():
        log.info("%s: %.2f dB", name, value)
    return folder


def build(cfg: DictConfig) -> Any:
    from diffusers import AutoencoderKL  # takes seconds

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        return AutoencoderKL(
            block_out_channels=tuple(cfg.widths),
            layers_per_block=cfg.layers,
            down_block_types=("DownEncoderBlock2D",) * len(cfg.widths),
            up_block_types=("UpDecoderBlock2D",) * len(cfg.widths),
            latent_channels=cfg.channels,
            norm_num_groups=8,
            sample_size=cfg.data.resolution,
            mid_block_add_attention=False,
        )


def only_decoder(folder: Path) -> tuple[Any, dict[str, Any] | None]:
    """The autoencoder of a folder with nothing but the decoder to train, and the facts of its training so far.

    Networks that were trained in its latents stay right.
    """
    vae = load(folder, hub=None)
    vae.register_to_config(_name_or_path="kl_emoji")  # else the folder's path would be written down
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    return vae, read_json(folder / "result.json") if (folder / "result.json").is_file() else None


def losses(vae: Any, x: Tensor, draws: Draws, bf16: bool, latent_noise: float) -> tuple[Tensor, Tensor]:
    """Mean squared error of pixels in [-1, 1], and KL(posterior || N(0, I)) of an image, in nats; both of ().

    Args:
        latent_noise: tau. The decoder sees latents with noise of deviation tau |n|, n ~ N(0, 1), in units of what a
            network learns, because latents from a network differ a little from an encoder's (noise-augmented decoding
            of arXiv 2510.11690).
    """
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * draws.normal("posterior", posterior.mean.shape[1:])
        if latent_noise:
            sigma = latent_noise * draws.normal("sigma", (1, 1, 1)).abs() / vae.config.scaling_factor  # (B, 1, 1, 1)
            z = z + sigma * draws.normal("latent_noise", z.shape[1:])
        decoded = vae.decode(z).sample
    return (decoded.float() - x).square().mean(), posterior.kl().mean()


@torch.no_grad()
def set_scale(vae: Any, pictures: Pictures) -> None:
    """Set the scale in the config that brings the latents' means to unit variance."""
    vae = vae.eval()
    device = next(vae.parameters()).device
    rows = list(range(0, len(pictures), max(1, len(pictures) // SCALED_ON)))
    means = torch.cat(
        [vae.encode(from_uint8(pictures.__getitems__([row])[0].to(device))).latent_dist.mean for row in rows]
    )
    vae.register_to_config(scaling_factor=1 / means.std().item())


def measure(codec: KL, cfg: DictConfig) -> dict[str, float]:
    """PSNR on unseen images, by source."""
    found = {}
    for vendor, source in cfg.vendors.items():
        unseen = Pictures(source, cfg.data.resolution, "test", limit=cfg.limit).load()
        found[vendor] = psnr(to_uint8(reconstruct(codec, from_uint8(unseen))), unseen)
    return found


@entry_point("kl_autoencoder", CONFIGS)
def main(cfg: DictConfig) -> None:
    fit(cfg)


if __name__ == "__main__":
    main()
