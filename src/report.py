"""Tables, plots and a page of a sweep: `python src/report.py sweep=<folder>` writes them into the folder."""

import sys

from omegaconf import DictConfig

from ditune.cli import REPORT_CONFIGS, entry_point


@entry_point("report", REPORT_CONFIGS)
def main(cfg: DictConfig) -> None:
    from ditune.report.write import write_report  # after the config is known to be right: it takes seconds

    sys.stdout.write(write_report(cfg.sweep, cfg.metric))
    sys.stdout.write(f"\n{cfg.sweep}/report.html shows all of it.\n")


if __name__ == "__main__":
    main()
