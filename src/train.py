"""Train: `python src/train.py` is the main job; every config key and group can be set on the command line."""

from omegaconf import DictConfig

from ditune.cli import entry_point
from ditune.stopping import listen


@entry_point("train")
def main(cfg: DictConfig) -> int:
    with listen(last=True):  # from here on, since the import takes seconds, too
        from ditune.commands.train import train  # after the config is known to be right

        return train(cfg)


if __name__ == "__main__":
    main()
