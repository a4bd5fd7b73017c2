"""Table of trainable parameters: `python src/parameters.py networks=[dit_xl_2] num_classes=101`."""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from ditune.cli import CONFIGS, prepare, reported


def parameters(cfg: DictConfig) -> None:
    from ditune.parameters import parameter_table  # after the config is known to be right: it takes seconds

    sys.stdout.write(parameter_table(cfg.rows, cfg.networks, cfg.num_classes, Path(CONFIGS) / "peft"))


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="parameters")
def main(cfg: DictConfig) -> None:
    reported(lambda: parameters(cfg), cfg.traceback)


if __name__ == "__main__":
    prepare()
    main()
