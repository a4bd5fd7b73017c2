"""A run as a folder for the Hugging Face hub: weights, result.json, images and a model card made from them.

Nothing of the run is executed or built: its config is read as plain values, and its adapter by its hash.
"""

import logging
import re
import shutil
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ditune.checkpoints import read_adapter, read_header, read_json, write_json
from ditune.cli import ROOT
from ditune.data import ImageDataset
from ditune.errors import UserError, require
from ditune.files import hub
from ditune.files.atomic import atomic, sha256
from ditune.report.card import Facts, card
from ditune.run import read_config

log = logging.getLogger(__name__)

REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
NETWORK = "network.safetensors"
NOT_STATED = "not stated by the run; ask those who took or drew the images"
SAID = ("process", "network", "class_names", "resolution")  # of an adapter or network, for its card


def publish(cfg: DictConfig) -> Path:
    """Write what the config of src/publish.py names, and send it where `push` is true; returns the folder.

    Raises:
        UserError: the settings or a file are wrong, the run has not finished, or the hub refuses.
    """
    valid = cfg.repo is not None and REPO.fullmatch(cfg.repo) is not None
    require(valid, "repo", cfg.repo, "Set it to <user>/<name>, as on the hub.")
    require(cfg.run is not None, "run", cfg.run, "Set it to a run folder.")
    folder, out = Path(cfg.run).expanduser(), Path(cfg.out).expanduser()
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty. Give another out=, or delete it.")
    config, result = read_config(folder), read_json(folder / "result.json")
    if result.get("status") != "finished":
        raise UserError(f"The run {folder} is {result.get('status')}, not finished. Let it finish: resume=auto.")
    header, files = weights(folder)
    grid = newest_grid(folder)
    facts = Facts(
        repo=cfg.repo,
        is_adapter=len(files) > 1,
        autoencoder=option_of(str(header.get("autoencoder_name"))),
        classes=len(header["class_names"] or ()),
        resolution=header["resolution"],
        licence=cfg.licence,
        data_licence=cfg.data_licence or licence_of_images(config),
        grid=None if grid is None else "grid.png",
    )
    out.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, out / file.name)
    if grid is not None:
        shutil.copyfile(grid, out / "grid.png")
    write_json(out / "result.json", result)
    with atomic(out / "README.md") as temporary:
        temporary.write_text(card(result, facts), encoding="utf-8")
    log.info("%s is ready for hf://%s: %s", out, cfg.repo, ", ".join(sorted(file.name for file in out.iterdir())))
    if cfg.push:
        push(out, cfg.repo, cfg.private, f"{result.get('name')}, {files[-1].name} {sha256(files[-1])}")
    else:
        log.info("nothing was sent; push=true sends it")
    return out


def weights(folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """What the trained weights say of themselves, and their files.

    Raises:
        UserError: there are none, or they are damaged or say too little.
    """
    if (folder / "adapter").is_dir():
        header, _ = read_adapter(folder / "adapter")
        files = [folder / "adapter" / name for name in ADAPTER]
    elif (folder / NETWORK).is_file():
        found = read_header(folder / NETWORK)
        header = found["provenance"] | {key: found[key] for key in ("process", "network")}
        files = [folder / NETWORK]
    else:
        raise UserError(f"The run {folder} has saved neither adapter/ nor {NETWORK}. Let it finish: resume=auto.")
    missing = [key for key in SAID if key not in header]
    if missing:
        raise UserError(f"{files[-1]} does not say its {', '.join(missing)}. Give a run of src/train.py.")
    return header, files


def option_of(autoencoder: str) -> str:
    """The autoencoder= that brings an autoencoder back, by the name that it has in files."""
    if autoencoder.startswith("pixels"):
        return "none"
    fitted = re.fullmatch(r"patch_?pca_(\d+)", autoencoder)
    return f"patch_pca autoencoder.channels={fitted[1]}" if fitted else autoencoder


def newest_grid(folder: Path) -> Path | None:
    """The evaluation's images, else the last sample grid; None = the run has none."""
    grids = [folder / "samples" / "grid.png", *sorted(folder.glob("samples/step_*.png"), reverse=True)]
    return next((grid for grid in grids if grid.is_file()), None)


def licence_of_images(config: DictConfig) -> str:
    """Licence of the training images of a run: as its dataset states it, or assets/README.md those that are shipped."""
    try:
        pictures = OmegaConf.to_container(config.data.pictures, resolve=True)
    except (OmegaConfBaseException, AttributeError, ValueError):
        return NOT_STATED
    target = str(pictures.get("_target_", "")) if isinstance(pictures, dict) else ""
    if target.startswith("ditune.data."):
        cls = get_object(target)
        if isinstance(cls, type) and issubclass(cls, ImageDataset) and getattr(cls, "licence", None):
            return f"{cls.licence} See {cls.homepage}."
    sources = [str(source) for source in (pictures.get("sources") or [])] if isinstance(pictures, dict) else []
    rows = (ROOT / "assets" / "README.md").read_text(encoding="utf-8").splitlines()
    stated = {cells[1].strip(" `"): cells[3].strip() for row in rows if len(cells := row.split("|")) == 6}
    found = [stated.get(source.partition("assets/")[2]) for source in sources]
    return "; ".join(found) if found and all(found) else NOT_STATED


def push(folder: Path, repo: str, private: bool, message: str) -> str:
    """Send a folder to the hub; returns the address with its commit.

    Raises:
        UserError: there is no token, or the hub refuses.
    """
    from huggingface_hub import HfApi, get_token

    token = get_token()
    if token is None:
        raise UserError("push=true needs a token of the hub. Run `hf auth login`, or set HF_TOKEN in the environment.")
    api = HfApi(endpoint=hub.endpoint(), token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except Exception as error:  # its errors are of many kinds
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"The hub did not take hf://{repo} ({reason}). The folder is {folder}; try again.") from error
    address = f"hf://{repo}@{commit.oid}"
    log.info("sent: %s", address)
    return address
