"""Table of trainable parameters: `python src/parameters.py networks=[dit_xl_2] num_classes=101`."""

import sys
from pathlib import Path

from omegaconf import DictConfig

from ditune.cli import CONFIGS, entry_point


@entry_point("parameters")
def main(cfg: DictConfig) -> None:
    from ditune.commands.parameters import parameter_table  # after the config is known to be right: it takes seconds

    sys.stdout.write(parameter_table(cfg.rows, cfg.networks, cfg.num_classes, Path(CONFIGS) / "peft"))


if __name__ == "__main__":
    main()
