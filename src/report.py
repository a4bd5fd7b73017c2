"""Tables, plots and a page of a sweep: `python src/report.py sweep=<folder>` writes them into the folder."""

import sys

import hydra
from omegaconf import DictConfig

from ditune.cli import REPORT_CONFIGS, prepare, reported


def report(cfg: DictConfig) -> None:
    from ditune.report.write import write_report  # after the config is known to be right: it takes seconds

    sys.stdout.write(write_report(cfg.sweep, cfg.metric))
    sys.stdout.write(f"\n{cfg.sweep}/report.html shows all of it.\n")


@hydra.main(version_base="1.3", config_path=REPORT_CONFIGS, config_name="report")
def main(cfg: DictConfig) -> None:
    reported(lambda: report(cfg), cfg.traceback)


if __name__ == "__main__":
    prepare()
    main()
