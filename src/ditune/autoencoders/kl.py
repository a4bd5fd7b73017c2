"""The variational autoencoder of latent diffusion (Rombach et al., arXiv 2112.10752), by diffusers' AutoencoderKL."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditune.autoencoders.base import Autoencoder
from ditune.checkpoints.weight_files import find_weights, listed
from ditune.errors import UserError
from ditune.files.atomic import read_json
from ditune.files.needs import Addresses, Need, published_need
from ditune.files.published import HUB_CONFIG, HUB_WEIGHTS, PUBLISHED, on_the_hub

STEM = "diffusion_pytorch_model"
FILES = (HUB_CONFIG, HUB_WEIGHTS)
SD_SHAPE = (4, 8)  # channels, pixels per latent along each side, of the autoencoders of Stable Diffusion
# Pixels at once, whatever the size of the batch; the largest tensors are 1 GB then. A convolution's kernel is chosen by
# the number of images: these are as many as keep the values of 64 px in batches up to 256, and on CPUs those of 256 px.
DECODED, ENCODED = 2**20, 2**21  # 16 and 32 images of 256 px, 4 and 8 of 512 px
CHANNELS_LAST = ("cuda",)  # kinds of devices whose convolutions are faster so; on CPUs latents keep their bits


class KL(Autoencoder):
    """A Gaussian posterior (mean and log-variance); its latents are multiplied by one scale.

    Args:
        name: name in the file names of caches.
        folder: with config.json and diffusion_pytorch_model.safetensors in the hub's layout, if it exists. A variant
            (fp16) or sharded weights with an index are also read; all are computed in fp32.
        hub: repository on huggingface.co, if the folder does not exist; None = only the folder.
        scale: factor on the latents, 0.18215 for Stable Diffusion; None = the scaling_factor of config.json.
        tiling: compute each image in overlapping tiles: less memory, and slightly different numbers. Images are
            computed a few at a time anyway, so one of 512 px needs none.
        bf16: decode in bf16. Encoding stays in fp32: it runs once, and its error would remain in every epoch.

    Raises:
        UserError: the files are missing and cannot be fetched, or are damaged.
    """

    kind = "KL"

    moments = 2

    def __init__(
        self,
        name: str,
        folder: str | Path,
        hub: str | None = None,
        scale: float | None = None,
        tiling: bool = False,
        bf16: bool = False,
    ) -> None:
        vae = load(Path(folder), hub)
        super().__init__(vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1))
        self.vae, self._name, self.bf16 = vae, name, bf16
        self.scale.fill_(vae.config.scaling_factor if scale is None else scale)
        if tiling:
            vae.enable_tiling()

    @classmethod
    def needs(cls, config: Mapping[str, Any], addresses: Addresses) -> list[Need]:
        """Weights, and last the config, which stands for the whole; see `ditune.files.needs`."""
        folder, hub, name = Path(config["folder"]), config.get("hub"), config["name"]
        what = f"autoencoder {name}"
        there = (folder / FILES[0]).is_file() and find_weights(folder, STEM) is not None
        if there or (hub is not None and is_cached(hub)):
            return [Need(what, folder if there else Path(hub), present=True)]
        if hub is None:
            remedy = f"{' and '.join(FILES)} are expected in {folder}. Set autoencoder.folder."
            return [Need(what, folder, present=False, remedy=remedy)]
        files = [f"{what}, {file}" for file in reversed(FILES)]
        if name in PUBLISHED and hub in PUBLISHED[name].addresses[0]:
            return [
                published_need(name, text, folder / file, addresses, file)
                for text, file in zip(files, reversed(FILES), strict=True)
            ]
        found = []
        for text, file in zip(files, reversed(FILES), strict=True):
            urls = tuple(f"{url}/{file}" for url in on_the_hub(hub))
            remedy = f"Put {urls[0]} at {folder / file}, or set autoencoder.folder."
            found.append(Need(text, folder / file, (folder / file).is_file(), urls, remedy=remedy))
        return found

    @classmethod
    def shape(cls, config: Mapping[str, Any]) -> tuple[int, int] | None:
        """Channels and pixels per latent along a side, without the weights; None = they are not known before."""
        path = Path(config["folder"]) / FILES[0]
        if path.is_file():
            content = read_json(path)
            return content["latent_channels"], 2 ** (len(content["block_out_channels"]) - 1)
        return SD_SHAPE if config["name"] in PUBLISHED else None

    @property
    def name(self) -> str:
        """The given name."""
        return self._name

    @cached_property
    def fingerprint(self) -> str:
        """See `Autoencoder.fingerprint`; hashed once, since there are 84 M weights."""
        return super().fingerprint

    @cached_property
    def latent_fingerprint(self) -> str:
        """sha256 of all but the decoder. The two autoencoders of Stable Diffusion have the same encoder."""
        decoder = ("vae.decoder.", "vae.post_quant_conv.")
        return self._hash({name: t for name, t in self.state_dict().items() if not name.startswith(decoder)})

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance in fp32, see `Autoencoder.encode`."""
        layout = torch.channels_last if x.device.type in CHANNELS_LAST else torch.contiguous_format
        self.vae.encoder.to(memory_format=layout)  # nothing is done where it is so already
        x = x.float().contiguous(memory_format=layout)
        with torch.autocast(x.device.type, enabled=False):
            parts = [self.vae.encode(part).latent_dist for part in x.split(at_once(x, 1, ENCODED))]
        return torch.cat([part.mean for part in parts]), torch.cat([part.logvar for part in parts])

    def decode(self, z: Tensor) -> Tensor:
        """See `Autoencoder.decode`."""
        with torch.autocast(z.device.type, torch.bfloat16, enabled=self.bf16):
            parts = z.split(at_once(z, self.downsample, DECODED))
            return torch.cat([self.vae.decode(part).sample.float() for part in parts])


def at_once(x: Tensor, downsample: int, pixels: int) -> int:
    """How many of the images or latents (N, C, h, w) make up so many pixels; at least one."""
    return max(1, pixels // (x.shape[-2] * x.shape[-1] * downsample**2))


def is_cached(hub: str) -> bool:
    """Whether huggingface_hub has all files of the repository in its cache."""
    from huggingface_hub import try_to_load_from_cache  # where no folder has the files

    return all(isinstance(try_to_load_from_cache(hub, file), str) for file in FILES)


def load(folder: Path, hub: str | None) -> torch.nn.Module:
    """The AutoencoderKL of a folder, or of the hub (its cache without internet).

    Args:
        folder: with the files in the hub's layout, if it exists.
        hub: repository on huggingface.co; None = only the folder.

    Raises:
        UserError: the files are missing and cannot be fetched, or are damaged.
    """
    from diffusers import AutoencoderKL  # takes seconds, and other autoencoders do not need it

    local = (folder / FILES[0]).is_file()
    if not local and hub is None:
        raise UserError(
            f"There is no autoencoder in {folder}: {' and '.join(FILES)} are expected there. "
            "Set autoencoder.folder, or train an autoencoder with studies/kl_autoencoder.py."
        )
    weights = find_weights(folder, STEM) if local else None
    if local and weights is None:
        raise UserError(f"The autoencoder in {folder} has no {FILES[1]}; it holds {listed(folder)}. Fetch that too.")
    which = {"variant": weights.variant, "use_safetensors": weights.is_safetensors} if weights else {}
    try:
        return AutoencoderKL.from_pretrained(folder if local else hub, **which).float()
    except Exception as error:  # the hub's client raises errors of many kinds
        reason = " ".join(str(error).split())[:300]
        if local:
            raise UserError(f"The autoencoder in {folder} cannot be read ({reason}). Fetch it again.") from error
        raise UserError(
            f"The autoencoder {hub} is neither in {folder} nor can it be fetched ({reason}). Put {' and '.join(FILES)} "
            f"from https://huggingface.co/{hub}/tree/main into {folder}, or set autoencoder.folder=<where they are>."
        ) from error
