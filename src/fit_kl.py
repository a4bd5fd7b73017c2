"""Train the small autoencoder of the emoji: `python src/fit_kl.py`; then `autoencoder=kl_emoji` uses it."""

import hydra
from omegaconf import DictConfig

from ditune.cli import CONFIGS, prepare, reported


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="fit_kl")
def main(cfg: DictConfig) -> None:
    from ditune.kl_training import fit  # after the config is known to be right: it takes seconds

    reported(lambda: fit(cfg) and None, cfg.traceback)


if __name__ == "__main__":
    prepare()
    main()
