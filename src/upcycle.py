"""Upcycle: `python src/upcycle.py checkpoint=<file> out=<file>` makes a DiT-MoE of a dense DiT, with its function."""

import hydra
from omegaconf import DictConfig

from ditune.cli import CONFIGS, prepare, reported


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="upcycle")
def main(cfg: DictConfig) -> None:
    from ditune.upcycling import upcycle_file  # after the config is known to be right: it takes seconds

    reported(lambda: upcycle_file(cfg) and None, cfg.traceback)


if __name__ == "__main__":
    prepare()
    main()
