"""Get a data set ready: `python src/prepare.py data=cub` fetches, verifies and encodes it, each at most once."""

import hydra
from omegaconf import DictConfig

from ditune.cli import CONFIGS, prepare, reported


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="prepare")
def main(cfg: DictConfig) -> None:
    from ditune.preparing import prepare as run  # after the config is known to be right: it takes seconds

    reported(lambda: run(cfg), cfg.traceback)


if __name__ == "__main__":
    prepare()
    main()
