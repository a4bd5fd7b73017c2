"""Publish: `python src/publish.py run=<folder> repo=<user/name>` writes a run for the hub; push=true sends it."""

from omegaconf import DictConfig

from ditune.cli import entry_point


@entry_point("publish")
def main(cfg: DictConfig) -> None:
    from ditune.commands.publish import publish  # after the config is known to be right: it takes seconds

    publish(cfg)


if __name__ == "__main__":
    main()
