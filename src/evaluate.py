"""Judge: `python src/evaluate.py run=<folder>` computes a run's metrics again; checkpoint= and images= judge others."""

import hydra
from omegaconf import DictConfig

from ditune.cli import CONFIGS, prepare, reported


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="evaluate")
def main(cfg: DictConfig) -> None:
    from ditune.judging import evaluate  # after the config is known to be right: it takes seconds

    reported(lambda: evaluate(cfg) and None, cfg.traceback)


if __name__ == "__main__":
    prepare()
    main()
