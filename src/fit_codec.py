"""Fit the linear codecs on the base domain and measure what they lose: `python src/fit_codec.py`."""

import sys

import hydra
from omegaconf import DictConfig

from ditune.cli import CONFIGS, prepare, reported


def fit_codec(cfg: DictConfig) -> None:
    from ditune.codec_study import study  # after the config is known to be right: it takes seconds

    sys.stdout.write(study(cfg))


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="fit_codec")
def main(cfg: DictConfig) -> None:
    reported(lambda: fit_codec(cfg), cfg.traceback)


if __name__ == "__main__":
    prepare()
    main()
