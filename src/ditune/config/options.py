"""One option of a config group, read with its base files and without Hydra."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf


def load_option(path: Path) -> DictConfig:
    """The option of a group that a yaml file describes, merged onto the base files of its `defaults`.

    Args:
        path: `configs/<group>/<option>.yaml`. Its `defaults` may name only files of the same group.

    Returns:
        The option's keys, with interpolations unresolved.
    """
    option = OmegaConf.load(path)
    bases = [load_option(path.with_name(f"{name}.yaml")) for name in option.pop("defaults", [])]
    return OmegaConf.merge(*bases, option)
