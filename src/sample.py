"""Draw: `python src/sample.py run=<folder> n=64 seed=0` writes pictures of a run; `checkpoint=<file>` of a network."""

import hydra
from omegaconf import DictConfig

from ditune.cli import CONFIGS, prepare, reported


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="sample")
def main(cfg: DictConfig) -> None:
    from ditune.sampling import sample  # after the config is known to be right: it takes seconds

    reported(lambda: sample(cfg) and None, cfg.traceback)


if __name__ == "__main__":
    prepare()
    main()
