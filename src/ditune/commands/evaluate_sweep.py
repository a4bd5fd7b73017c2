"""`python src/evaluate.py sweep=<folder>`: metrics of the finished runs that lack them, one run after another.

Every run is evaluated by processes of its own, so one that fails stops none of the others. The same command again
evaluates what is missing.
"""

import hashlib
import json
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from ditune.config.grammar import hydra_value
from ditune.config.guides import KEYS
from ditune.errors import UserError
from ditune.files.atomic import read_json, read_or_set_aside, write_json
from ditune.launch.sweep import POLL, Stopped, terminable, visible_gpus
from ditune.launch.trees import Tree
from ditune.metrics.names import headline
from ditune.progress import console, meter

log = logging.getLogger(__name__)

LOGS = "evaluations"  # folder beside the runs: what their processes wrote, and which metrics were asked for
GENERATED_BY = ("guide", "guidance", "strength")  # keys that change a run's images
OF_THIS = ("runs=", "processes=", "run=")


@dataclass
class Evaluated:
    """A run of the sweep, and how its evaluation ended.

    Args:
        folder: of the run.
        status: due; or not finished, has metrics, damaged; in the end evaluated, failed or stopped.
        error: why it has no metrics.
    """

    folder: Path
    status: str
    error: str = ""


def evaluate_sweep(cfg: DictConfig) -> int:
    """Evaluate the runs of a sweep's folder that lack what is asked for; returns the exit code.

    Args:
        cfg: of evaluate.py; `runs` is the folder, `processes` work on each run.

    Raises:
        UserError: the folder holds no runs, or no number of images is known.
    """
    folder, asked = Path(cfg.runs).expanduser(), asked_for(cfg)
    runs = runs_of(folder, asked)
    due = [run for run in runs if run.status == "due"]
    refuse_without_number(cfg, due)
    code = 0
    try:
        with terminable(), meter("evaluating the runs", len(due), "runs") as progress:
            for run in due:
                evaluate_run(run, cfg, folder / LOGS / run.folder.name)
                note(folder, run, asked)
                progress.advance(note=f"{run.folder.name} {run.status}")
    except Stopped as stopped:
        code = 128 + stopped.args[0]
    console().print(table(runs))
    return code or int(any(run.status in ("failed", "damaged") for run in runs))


def asked_for(cfg: DictConfig) -> str | None:
    """What tells the metrics of this command from others; None = each run's own."""
    changed = any(cfg[key] is not None for key in GENERATED_BY)
    settings = {key: cfg[key] for key in (*GENERATED_BY, *KEYS)} if changed else {}
    if cfg.metrics_of != "run":
        settings |= {key: OmegaConf.to_container(cfg.metrics, resolve=True)[key] for key in ("judge", "n", "seed")}
    if not settings:
        return None
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def runs_of(folder: Path, asked: str | None) -> list[Evaluated]:
    """The runs in a sweep's folder; those without the metrics that are asked for are due.

    Raises:
        UserError: there is none.
    """
    paths = sorted(folder.glob("*/result.json"), key=lambda path: (len(path.parent.name), path.parent.name))
    if not paths:
        raise UserError(f"There are no runs in {folder}. Set sweep= to the folder that holds the runs of a sweep.")
    noted = read_or_set_aside(folder / LOGS / "asked.json")
    return [_seen(path, asked, noted.get(path.parent.name, [])) for path in paths]


def _seen(path: Path, asked: str | None, noted: list[str]) -> Evaluated:
    try:
        result = read_json(path)
    except UserError as error:
        return Evaluated(path.parent, "damaged", str(error))
    if result.get("status") != "finished":
        return Evaluated(path.parent, "not finished", f"its training is {result.get('status')}")
    there = bool(result.get("metrics")) if asked is None else asked in noted and "other_protocols" in result
    return Evaluated(path.parent, "has metrics" if there else "due")


def refuse_without_number(cfg: DictConfig, due: list[Evaluated]) -> None:
    """Refuse runs that were trained with metrics.n=0 unless this command says how many images they get."""
    if not due or cfg.metrics_of != "run" or number_given() or OmegaConf.load(due[0].folder / "config.yaml").metrics.n:
        return
    raise UserError(
        f"{len(due)} runs were trained with metrics.n=0, which says not how many images to evaluate. "
        "Set metrics.n=10000 or another number, or metrics_of=this for metrics= of this command."
    )


def number_given() -> bool:
    """Whether the command line sets metrics.n."""
    given = OmegaConf.to_container(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    return any(override.lstrip("+").startswith("metrics.n=") for override in given)


def evaluate_run(run: Evaluated, cfg: DictConfig, logs: Path) -> None:
    """Evaluate one run by processes of its own; sets its status and error."""
    given = OmegaConf.to_container(HydraConfig.get().overrides.task)  # as they were written, nothing resolved
    overrides = [override for override in given if not override.startswith(OF_THIS)]
    command = [sys.executable, str(Path(sys.argv[0]).resolve()), *overrides, f"run={hydra_value(run.folder)}"]
    tree = Tree(command, cfg.processes, logs, visible_gpus() or None, cfg.threads or 1)
    try:
        while (codes := tree.poll()) is None:
            time.sleep(POLL)
    except Stopped:
        run.status, run.error = "stopped", "the same command evaluates it"
        raise
    finally:
        tree.stop()
    if any(codes):
        run.status, run.error = (
            "failed",
            "; ".join(dict.fromkeys(text.removeprefix("Error: ") for text in tree.causes().values())),
        )
        log.warning("run %s: %s. See %s", run.folder.name, run.error, tree.log(next(iter(tree.causes()), 0)))
    else:
        run.status = "evaluated"


def note(folder: Path, run: Evaluated, asked: str | None) -> None:
    """Write down that a run has the metrics of this command."""
    if run.status == "evaluated" and asked is not None:
        path = folder / LOGS / "asked.json"
        noted: dict[str, Any] = read_or_set_aside(path)
        write_json(path, noted | {run.folder.name: [*noted.get(run.folder.name, []), asked]})


def table(runs: list[Evaluated]) -> Table:
    """The runs with their headline metrics."""
    there = sum(run.status in ("evaluated", "has metrics") for run in runs)
    shown = Table(title=f"{there} of {len(runs)} runs have the metrics")
    for name in ("run", "status", "metrics", "error"):
        shown.add_column(name, overflow="fold")
    for run in runs:
        values = {} if run.status == "damaged" else measured(read_json(run.folder / "result.json"))
        shown.add_row(
            run.folder.name,
            run.status,
            " ".join(f"{key} {value:.4g}" for key, value in values.items()),
            run.error[:500],
        )
    return shown


def measured(result: dict[str, Any]) -> dict[str, float]:
    """The headline metrics of a run after its training, by its own and by other protocols."""
    every = [result.get("metrics", {}), *result.get("other_protocols", {}).values()]
    return {key: value for metrics in every for key, value in metrics.get("after", {}).items() if headline(key)}
