"""Judge: `python src/evaluate.py run=<folder>` judges a run again; checkpoint=, images= and npz= judge others."""

import hydra
from omegaconf import DictConfig

from ditune.cli import CONFIGS, prepare, reported


def evaluate(cfg: DictConfig) -> int:
    from ditune.launch.ranks import is_rank, run_ranks  # after the config is known to be right: it takes seconds

    if cfg.processes > 1 and not is_rank():
        return run_ranks(cfg.processes, cfg.out, cfg.threads)
    from ditune.judging import evaluate

    evaluate(cfg)
    return 0


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="evaluate")
def main(cfg: DictConfig) -> None:
    reported(lambda: evaluate(cfg), cfg.traceback)


if __name__ == "__main__":
    prepare()
    main()
