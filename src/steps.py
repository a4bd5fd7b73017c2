"""Quality over the number of steps: `python src/steps.py runs=[<run>,<run>]` writes a table and a curve."""

import hydra
from omegaconf import DictConfig

from ditune.cli import CONFIGS, prepare, reported


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="steps")
def main(cfg: DictConfig) -> None:
    from ditune.step_study import study  # after the config is known to be right: it takes seconds

    reported(lambda: study(cfg) and None, cfg.traceback)


if __name__ == "__main__":
    prepare()
    main()
