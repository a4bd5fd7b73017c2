"""Judge: `python src/evaluate.py run=<folder>` judges a run again, sweep=<folder> those of a sweep; see its config."""

from omegaconf import DictConfig

from ditune.cli import entry_point


@entry_point("evaluate")
def main(cfg: DictConfig) -> int:
    from ditune.launch.ranks import is_rank, run_ranks  # after the config is known to be right: it takes seconds

    if cfg.runs is not None:
        from ditune.commands.evaluate_sweep import evaluate_sweep

        return evaluate_sweep(cfg)
    if cfg.processes > 1 and not is_rank():
        return run_ranks(cfg.processes, cfg.out, cfg.threads)
    from ditune.commands.evaluate import evaluate

    evaluate(cfg)
    return 0


if __name__ == "__main__":
    main()
