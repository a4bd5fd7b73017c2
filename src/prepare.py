"""Get a data set ready: `python src/prepare.py data=cub` fetches, verifies and encodes it, each at most once."""

from omegaconf import DictConfig

from ditune.cli import entry_point


@entry_point("prepare")
def main(cfg: DictConfig) -> None:
    from ditune.commands.prepare import prepare  # after the config is known to be right: it takes seconds

    prepare(cfg)


if __name__ == "__main__":
    main()
