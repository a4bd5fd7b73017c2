"""Upcycle: `python src/upcycle.py checkpoint=<file> out=<file>` makes a DiT-MoE of a dense DiT, with its function."""

from omegaconf import DictConfig

from ditune.cli import entry_point


@entry_point("upcycle")
def main(cfg: DictConfig) -> None:
    from ditune.commands.upcycle import upcycle_file  # after the config is known to be right: it takes seconds

    upcycle_file(cfg)


if __name__ == "__main__":
    main()
