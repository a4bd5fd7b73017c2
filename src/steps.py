"""Quality over the number of steps: `python src/steps.py runs=[<run>,<run>]` writes a table and a curve."""

from omegaconf import DictConfig

from ditune.cli import entry_point


@entry_point("steps")
def main(cfg: DictConfig) -> None:
    from studies.few_steps import study  # after the config is known to be right: it takes seconds

    study(cfg)


if __name__ == "__main__":
    main()
