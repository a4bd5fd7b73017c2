"""Fit the linear codecs on the base domain and measure what they lose: `python src/fit_codec.py`."""

import sys

from omegaconf import DictConfig

from ditune.cli import entry_point


@entry_point("fit_codec")
def main(cfg: DictConfig) -> None:
    from studies.linear_codecs import study  # after the config is known to be right: it takes seconds

    sys.stdout.write(study(cfg))


if __name__ == "__main__":
    main()
