"""Several finished runs of one base network as experts, each for its part of the process."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ditune.checkpoints import check_file, load_adapters, load_network, locate, read_adapter
from ditune.config.instantiate import instantiate, refuse_strangers
from ditune.errors import UserError
from ditune.run import BUILT, STORED, Trained, build_generator, read_config
from ditune.samplers import Experts


def load_experts(folders: Sequence[Path | str]) -> Trained:
    """Several finished runs of one base network, each for the part of the process that it was trained on.

    Args:
        folders: of the runs. The first one's sampler is used.

    Raises:
        UserError: a run is missing, has no adapter, or another base, process or classes; or two parts overlap.
    """
    if not folders:
        raise UserError("experts is empty. Give run folders, such as experts=[<run>,<run>].")
    paths = {str(folder): Path(folder).expanduser() for folder in folders}
    if len(paths) < len(folders):
        raise UserError("A run stands twice in experts=. Give each one once.")
    configs = {name: _expert_config(name, path) for name, path in paths.items()}
    (name, path), *_ = paths.items()
    cfg, stored = read_config(path), configs[name]
    refuse_strangers(cfg, BUILT, path / "config.yaml")
    base = locate(cfg.pretrained, Path(cfg.paths.cache_dir) / "networks")
    network = load_network(base, stored["network"]).eval()
    for other, config in configs.items():
        check_file(base, config, paths[other] / "adapter")
        for key in ("network", "process", "class_names", "autoencoder"):
            if config[key] != stored[key]:
                raise UserError(f"The runs {name} and {other} differ in {key}. Experts share all but what they train.")
    adapters = load_adapters(network, {other: path / "adapter" for other, path in paths.items()})
    bf16, autoencoder = str(cfg.trainer.precision).startswith("bf16"), instantiate(cfg.autoencoder, "autoencoder")
    generator = build_generator(path, stored, autoencoder, cfg.sampler, bf16, cfg.paths.cache_dir)
    parts = {other: tuple(config.get("part") or (0.0, 1.0)) for other, config in configs.items()}
    return Trained(network, replace(generator, experts=Experts(adapters, parts)), stored["class_names"])


def _expert_config(name: str, path: Path) -> dict[str, Any]:
    if not (path / "adapter").is_dir():
        raise UserError(f"The run {name} has no adapter/, which an expert needs. Train one with pretrained=<base>.")
    config, _ = read_adapter(path / "adapter")
    base = (config.get("base") or {}).get("network")
    if any(key not in config for key in (*STORED, "network")) or base != config["network"]:
        raise UserError(
            f"The run {name} has other classes or another resolution than its base, or does not say them. Experts "
            "leave both as they are: train them without classes= and new_resolution=."
        )
    return config
