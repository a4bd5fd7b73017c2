"""Weights that others publish: where they are, and what is known of them before they are fetched.

Each fact was read on a public page or in a public repository, which `source` names. What was found nowhere is left out:
a file without a hash is known by the one of its first use.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """Files of one network.

    Args:
        addresses: tried in order, see `ditune.files.download.fetch_any`; of a folder if `files` are named.
        licence: of the weights, as their authors state it.
        files: name -> (size in bytes, SHA-256); None = not published. A single file is named "".
        source: where addresses, sizes and hashes were read.
    """

    addresses: tuple[str, ...]
    licence: str
    files: dict[str, tuple[int | None, str | None]]
    source: str


def on_the_hub(repository: str, revision: str = "main") -> tuple[str, str]:
    """Addresses of the files of a repository on huggingface.co: by https, and by huggingface_hub."""
    return f"https://huggingface.co/{repository}/resolve/{revision}", f"hf://{repository}@{revision}"


HUB_CONFIG, HUB_WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
DIT = "https://dl.fbaipublicfiles.com/DiT/models"
DIT_LICENCE = "CC BY-NC 4.0"

PUBLISHED: dict[str, Published] = {
    "dit_xl_2_256": Published(
        (f"{DIT}/DiT-XL-2-256x256.pt",),
        DIT_LICENCE,
        {"": (2_700_611_775, None)},
        "address and licence: README of facebookresearch/DiT; size: a download script in a public repository",
    ),
    "dit_xl_2_512": Published(
        (f"{DIT}/DiT-XL-2-512x512.pt",),
        DIT_LICENCE,
        {"": (None, None)},
        "README of facebookresearch/DiT",
    ),
    "sd_vae_ema": Published(
        on_the_hub("stabilityai/sd-vae-ft-ema", "f04b2c4b98319346dad8c65879f680b1997b204a"),
        "MIT",
        {HUB_WEIGHTS: (334_643_276, None), HUB_CONFIG: (547, None)},
        "licence and size of config.json: the repository's page on huggingface.co; revision and size of the weights: "
        "paths of the hub's cache and size checks in several public repositories",
    ),
    "sd_vae_mse": Published(
        on_the_hub("stabilityai/sd-vae-ft-mse", "31f26fdeee1355a5c34592e401dd41e45d25a493"),
        "MIT",
        {
            HUB_WEIGHTS: (334_643_276, "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815"),
            HUB_CONFIG: (547, "92d3dfb746fca211a2c9e019e285f8597412211728dce3c5bcf4eda0f2d62e7e"),
        },
        "licence: the repository's page on huggingface.co; revision, sizes and hashes: the same in several public "
        "repositories that pin them",
    ),
    "inception": Published(
        (
            "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
            "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        ),
        "Apache 2.0",
        {"": (95_628_359, "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2")},
        "addresses: torchmetrics' documentation and pytorch-fid's inception.py (both names end in the first digits of "
        "the hash); size: two public repositories; licence: the metadata of the package torch-fidelity",
    ),
    "dinov2": Published(
        ("https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",),
        "Apache 2.0",
        {"": (1_217_586_395, "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428")},
        "address: README of facebookresearch/dinov2; licence: its LICENSE; size and hash: the same in several public "
        "repositories that pin them",
    ),
}
