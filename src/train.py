"""Train: `python src/train.py` is the main job; every config key and group can be set on the command line."""

from omegaconf import DictConfig

from ditune.cli import entry_point


@entry_point("train")
def main(cfg: DictConfig) -> int:
    from ditune.commands.train import train  # after the config is known to be right: it takes seconds

    return train(cfg)


if __name__ == "__main__":
    main()
