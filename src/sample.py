"""Sample: `python src/sample.py run=<folder> n=64 seed=0` writes images of a run; `checkpoint=<file>` of a network."""

from omegaconf import DictConfig

from ditune.cli import entry_point


@entry_point("sample")
def main(cfg: DictConfig) -> None:
    from ditune.commands.sample import sample  # after the config is known to be right: it takes seconds

    sample(cfg)


if __name__ == "__main__":
    main()
