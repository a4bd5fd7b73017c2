"""Export: `python src/export.py run=<folder> format=diffusers` merges a run's adapter and writes what others load."""

from omegaconf import DictConfig

from ditune.cli import entry_point


@entry_point("export")
def main(cfg: DictConfig) -> None:
    from ditune.commands.export import export  # after the config is known to be right: it takes seconds

    export(cfg)


if __name__ == "__main__":
    main()
