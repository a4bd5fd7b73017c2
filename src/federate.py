"""Federate: `python src/federate.py clients=4 rounds=5` trains clients in turn and merges their weights every round."""

from omegaconf import DictConfig

from ditune.cli import entry_point
from ditune.stopping import listen


@entry_point("federate")
def main(cfg: DictConfig) -> int:
    with listen(last=True):  # from here on, since the import takes seconds, too
        from ditune.commands.federate import federate  # after the config is known to be right

        return federate(cfg)


if __name__ == "__main__":
    main()
