"""Table of a sweep: `python src/report.py sweep=<folder>` writes table.md into the folder and shows it."""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from ditune.checkpoints.files import atomic
from ditune.cli import CONFIGS, prepare, reported
from ditune.report import markdown_table, read_results


def report(cfg: DictConfig) -> None:
    table = markdown_table(read_results(cfg.sweep))
    with atomic(Path(cfg.sweep) / "table.md") as temporary:
        temporary.write_text(table, encoding="utf-8")
    sys.stdout.write(table)


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="report")
def main(cfg: DictConfig) -> None:
    reported(lambda: report(cfg), cfg.traceback)


if __name__ == "__main__":
    prepare()
    main()
