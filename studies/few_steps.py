"""Quality of finished runs over the number of sampling steps: `python studies/few_steps.py runs=[<folder>]`.

The result is a table, a curve and step grids.
"""

import logging
import statistics
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig

from ditune.cli import entry_point
from ditune.commands.evaluate import check_reference
from ditune.config.instantiate import instantiate
from ditune.config.keys import APART
from ditune.config.kinds import Key
from ditune.distributed import best_device
from ditune.errors import UserError
from ditune.evaluation.protocol import Evaluation
from ditune.files.atomic import read_json, write_json
from ditune.generation.grids import before_after_sheet
from ditune.run import Run, load_run
from ditune.samplers import check

log = logging.getLogger(__name__)

CONFIGS = str(Path(__file__).resolve().parent / "configs")
APART["few_steps"] = (
    Key("runs", str, many=True),
    Key("steps", int, at_least=1, many=True),
    Key("shown", int, at_least=1),
)


def study(cfg: DictConfig) -> Path:
    """Evaluate every run at every number of steps; values that are in `out` already are not measured again.

    Raises:
        UserError: a run is missing or has not finished, or does not fit the reference.
    """
    out, path = Path(cfg.out), Path(cfg.out) / "result.json"
    content = read_json(path) if path.is_file() else {"runs": {}}
    reference = instantiate(cfg.metrics.reference, "metrics")
    judge = instantiate(cfg.metrics.judge, "metrics")
    for folder in cfg.runs:
        run = load_run(folder)
        check_reference(run, reference)
        name = f"{facts(run)['objective']}_{run.cfg.seed}"
        entry = content["runs"].setdefault(name, {"facts": facts(run), "values": {}})
        if entry["facts"] != facts(run):
            raise UserError(f"{path} has another run called {name}. Give another out=, or delete that entry.")
        for steps in cfg.steps:
            if str(steps) not in entry["values"] and fits(run, steps):
                generator = replace(run.generator, steps=steps)
                if cfg.guidance is not None:
                    generator = replace(generator, guidance=cfg.guidance)
                evaluation = Evaluation(judge, reference, generator, n=cfg.metrics.n, seed=cfg.metrics.seed)
                values = evaluation(run.network.to(best_device()))
                log.info("%s in %d steps: %s", name, steps, values)
                entry["values"][str(steps)] = {"protocol": evaluation.key, **values}
                write_json(path, content)
        step_grid(run, [s for s in cfg.steps if fits(run, s)], cfg, out / f"{name}.png")
    key = f"kid_{judge.extractor.name}"
    (out / "table.md").write_text(table(content["runs"], list(cfg.steps), key), encoding="utf-8")
    curve(content["runs"], key, out / "curve.png")
    return out


def facts(run: Run) -> dict:
    result = read_json(run.folder / "result.json")
    if result["status"] != "finished":
        raise UserError(f"The run {run.folder} is {result['status']}. Let it finish: resume=auto goes on with it.")
    objective = run.cfg.objective._target_.rpartition(".")[2]
    return {
        "objective": objective if result["method"] == "full" else f"{objective}_{result['method']}",
        "seed": run.cfg.seed,
        "max_steps": run.cfg.max_steps,
        "batch_size": run.cfg.batch_size,
        "network": run.cfg.network.name,
        "parameters": result["parameters"],
        "fit_seconds": result["seconds"]["fit"],
        "denoising": result.get("denoising", {}),
    }


def fits(run: Run, steps: int) -> bool:
    """Whether the run's network was trained for this number of steps."""
    try:
        check(run.generator.sampler, run.generator.process, steps)
    except UserError as error:
        log.info("%s is left out at %d steps: %s", run.folder, steps, error)
        return False
    return True


def step_grid(run: Run, steps: list[int], cfg: DictConfig, path: Path) -> None:
    """One row of images for each number of steps, all from the same noise and classes."""
    labels = [i * run.network.num_classes // cfg.shown for i in range(cfg.shown)]
    rows = {}
    for count in steps:
        generator = replace(run.generator, steps=count, batch_size=cfg.shown)
        generator = generator if cfg.guidance is None else replace(generator, guidance=cfg.guidance)
        rows[f"steps: {count}"] = generator.generate(run.network, torch.tensor(labels), cfg.metrics.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    before_after_sheet(rows).save(path)


def grouped(runs: dict) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = defaultdict(list)
    for entry in runs.values():
        groups[entry["facts"]["objective"]].append(entry)
    return groups


def table(runs: dict, steps: list[int], key: str) -> str:
    """One row for each objective: mean and, over seeds, deviation."""
    lines = [f"| objective | seeds | training steps | fit seconds | {' | '.join(f'{s} steps' for s in steps)} |"]
    lines.append("|---" * (4 + len(steps)) + "|")
    for objective, entries in grouped(runs).items():
        seconds = statistics.fmean(entry["facts"]["fit_seconds"] for entry in entries)
        cells = [cell([e["values"][str(s)][key] for e in entries if str(s) in e["values"]]) for s in steps]
        counts = sorted({entry["facts"]["max_steps"] for entry in entries})
        lines.append(
            f"| {objective} | {len(entries)} | {', '.join(map(str, counts))} | {seconds:.0f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


def cell(values: list[float]) -> str:
    if not values:
        return "not run"
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def curve(runs: dict, key: str, path: Path) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for objective, entries in grouped(runs).items():
        steps = sorted({int(s) for entry in entries for s in entry["values"]})
        means = [statistics.fmean(e["values"][str(s)][key] for e in entries if str(s) in e["values"]) for s in steps]
        axes.plot(steps, means, marker="o", label=objective)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("steps")
    axes.set_ylabel(key)
    axes.legend()
    figure.savefig(path, dpi=120)


@entry_point("few_steps", CONFIGS)
def main(cfg: DictConfig) -> None:
    study(cfg)


if __name__ == "__main__":
    main()
