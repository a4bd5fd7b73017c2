"""Prune: `python src/prune.py checkpoint=<file> out=<file>` writes a network whose smallest weights are zero."""

from omegaconf import DictConfig

from ditune.cli import entry_point


@entry_point("prune")
def main(cfg: DictConfig) -> None:
    from ditune.commands.prune import prune_file  # after the config is known to be right: it takes seconds

    prune_file(cfg)


if __name__ == "__main__":
    main()
