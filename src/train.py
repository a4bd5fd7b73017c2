"""Train: `python src/train.py` is the main job; every config key and group can be set on the command line."""

import hydra
from omegaconf import DictConfig

from ditune.cli import CONFIGS, prepare, reported


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="train")
def main(cfg: DictConfig) -> None:
    from ditune.training import train  # after the config is known to be right: it takes seconds

    reported(lambda: train(cfg), cfg.traceback)


if __name__ == "__main__":
    prepare()
    main()
