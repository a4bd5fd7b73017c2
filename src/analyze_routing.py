"""What experts do: `python src/analyze_routing.py run=<folder>` plots their choice over class, position and time."""

from omegaconf import DictConfig

from ditune.cli import entry_point


@entry_point("analyze_routing")
def main(cfg: DictConfig) -> None:
    from ditune.commands.analyze_routing import analyse  # after the config is known to be right: it takes seconds

    analyse(cfg)


if __name__ == "__main__":
    main()
