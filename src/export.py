"""Export: `python src/export.py run=<folder> format=diffusers` merges a run's adapter and writes what others load."""

import hydra
from omegaconf import DictConfig

from ditune.cli import CONFIGS, prepare, reported


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="export")
def main(cfg: DictConfig) -> None:
    from ditune.exporting import export  # after the config is known to be right: it takes seconds

    reported(lambda: export(cfg) and None, cfg.traceback)


if __name__ == "__main__":
    prepare()
    main()
