"""W&B workspace and report from code: `python src/dashboard.py entity=<you>`; with spec=<file> nothing is sent."""

import json
import sys
from pathlib import Path

from omegaconf import DictConfig

from ditune.cli import entry_point


@entry_point("dashboard")
def main(cfg: DictConfig) -> None:
    from ditune.files.atomic import atomic  # after the config is known to be right: it takes seconds
    from ditune.report.wandb_workspace import build_report, build_workspace, specification

    parts = (
        build_workspace(cfg.entity, cfg.project, cfg.group, cfg.metric),
        build_report(cfg.entity, cfg.project, cfg.group, cfg.metric),
    )
    if cfg.spec is not None:
        with atomic(Path(cfg.spec)) as temporary:
            temporary.write_text(json.dumps(specification(*parts), indent=2), encoding="utf-8")
        return
    for part in parts:
        part.save()
        sys.stdout.write(f"{part.url}\n")


if __name__ == "__main__":
    main()
