"""App: `python src/app.py` shows base and adapters side by side, with the same noise, and the table of a sweep."""

from omegaconf import DictConfig

from ditune.cli import entry_point


@entry_point("app")
def main(cfg: DictConfig) -> None:
    from ditune.commands.app import serve  # after the config is known to be right: it takes seconds

    serve(cfg)


if __name__ == "__main__":
    main()
