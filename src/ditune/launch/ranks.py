"""Running this command again in several processes that share its work."""

import os
import sys
import time
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from ditune.config.grammar import hydra_value
from ditune.launch.sweep import POLL, visible_gpus
from ditune.launch.trees import Tree


def is_rank() -> bool:
    """Whether torchrun or the like has started this process."""
    return "RANK" in os.environ


def run_ranks(processes: int, out: str | Path, threads: int | None) -> int:
    """Run this script with its overrides in several ranks.

    Args:
        processes: number of ranks.
        out: folder that all of them write to; gets their logs.
        threads: of each process; None = one.

    Returns:
        Exit code of the rank that failed first; 0 if none failed.
    """
    out = Path(out).expanduser()
    given = OmegaConf.to_container(HydraConfig.get().overrides.task)  # as they were written, nothing resolved
    overrides = [*given, f"out={hydra_value(out)}"]
    command = [sys.executable, str(Path(sys.argv[0]).resolve()), *overrides]
    tree = Tree(command, processes, out, visible_gpus() or None, threads or 1)
    try:
        while (codes := tree.poll()) is None:
            time.sleep(POLL)
    finally:
        tree.stop()
    failed = next(iter(tree.causes()), None)
    sys.stdout.write(tree.log(failed or 0).read_text(encoding="utf-8"))
    return 0 if failed is None else abs(codes[failed])
