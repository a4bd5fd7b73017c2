"""Get files ready: `python src/prepare.py experiment=difffit_cub`, or data=cub; each is fetched and encoded once."""

import sys

from omegaconf import DictConfig

from ditune.cli import entry_point
from ditune.config.trainings import as_one_run, is_of_trainings

OF_TRAININGS = is_of_trainings(sys.argv[1:])


@entry_point("prepare_training" if OF_TRAININGS else "prepare")
def main(cfg: DictConfig) -> None:
    from ditune.commands.prepare import prepare  # after the config is known to be right: it takes seconds
    from ditune.commands.prepare_trainings import prepare_trainings

    prepare_trainings(cfg) if OF_TRAININGS else prepare(cfg)


if __name__ == "__main__":
    if OF_TRAININGS:
        sys.argv[1:] = as_one_run(sys.argv[1:])
    main()
