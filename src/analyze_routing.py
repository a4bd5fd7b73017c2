"""What experts do: `python src/analyze_routing.py run=<folder>` draws their choice over class, position and time."""

import hydra
from omegaconf import DictConfig

from ditune.cli import CONFIGS, prepare, reported


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="analyze_routing")
def main(cfg: DictConfig) -> None:
    from ditune.routing_analysis import analyse  # after the config is known to be right: it takes seconds

    reported(lambda: analyse(cfg) and None, cfg.traceback)


if __name__ == "__main__":
    prepare()
    main()
