"""Guides on the emoji pair: KID and network evaluations of every guide and method, over seeds, from finished runs.

python studies/guides.py
"""

import csv
import logging
import math
import statistics
from ast import literal_eval
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ditune.cli import entry_point
from ditune.config.instantiate import instantiate
from ditune.config.keys import APART
from ditune.config.kinds import Key
from ditune.errors import UserError
from ditune.files.atomic import read_json
from ditune.report.intervals import paired

log = logging.getLogger(__name__)

CONFIGS = str(Path(__file__).resolve().parent / "configs")
APART["guides"] = (Key("sweeps", str, many=True), Key("level", float, above=0, below=1))


@dataclass(frozen=True)
class Value:
    """One evaluation of one run.

    Args:
        method: PEFT method.
        objective: plain, or DogFit.
        guide: what guidance pushes away from, with its setting; none = no guidance.
        guidance: scale.
        seed: of the training.
        before, after: KID of the base and of the run.
        error: standard error of `after`.
        evaluations: network evaluations of an image.
        fit: seconds of the training.
        plain: whether it is what the others of the method are compared with: the own protocol of a run without DogFit.
    """

    method: str
    objective: str
    guide: str
    guidance: float
    seed: int
    before: float
    after: float
    error: float
    evaluations: int
    fit: float
    plain: bool

    @property
    def row(self) -> tuple[str, str, str, float]:
        """What the values of several seeds share."""
        return self.method, self.objective, self.guide, self.guidance


def study(cfg: DictConfig) -> Path:
    """Write table.md and values.csv; returns their folder.

    Raises:
        UserError: no sweep has a finished run.
    """
    values = [value for sweep in cfg.sweeps for value in values_of(Path(sweep))]
    if not values:
        raise UserError(f"There is no evaluated run in {', '.join(cfg.sweeps)}. Run sweep=guides first.")
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "values.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Value)])
        writer.writeheader()
        writer.writerows(asdict(value) for value in values)
    (out / "table.md").write_text(table(values, cfg.level), encoding="utf-8")
    log.info("%d evaluations are in %s", len(values), out)
    return out


def values_of(sweep: Path) -> list[Value]:
    """Every evaluation of every finished run of a sweep, in the order of the jobs."""
    found = []
    for path in sorted(sweep.glob("*/result.json"), key=lambda path: (len(path.parent.name), path.parent.name)):
        result = read_json(path)
        if result["status"] != "finished":
            continue
        cfg = OmegaConf.load(path.with_name("config.yaml"))
        for metrics in (result["metrics"], *result.get("other_protocols", {}).values()):
            found.append(value_of(cfg, result, metrics))
    return found


def value_of(cfg: DictConfig, result: dict[str, Any], metrics: dict[str, Any]) -> Value:
    """One evaluation of a run; its config and result.json say what was trained."""
    protocol, transfer = metrics["protocol"], cfg.get("transfer")
    kid = next(name for name in metrics["after"] if name.startswith("kid_") and not name.endswith("_std"))
    return Value(
        method=result["peft"]["name"],
        objective="plain" if transfer is None else transfer._target_.rpartition(".")[2],
        guide=guide_of(protocol),
        guidance=protocol["guidance"],
        seed=result["seed"],
        before=metrics["before"][kid],
        after=metrics["after"][kid],
        error=metrics["after"][f"{kid}_std"],
        evaluations=evaluations(cfg, protocol),
        fit=result["seconds"]["fit"],
        plain=transfer is None and metrics is result["metrics"],
    )


def guide_of(protocol: dict[str, Any]) -> str:
    """What guidance pushes away from, such as 'interpolated 0.5'."""
    if protocol["guidance"] == 1:
        return "none"
    kind, _, settings = protocol.get("guide", "null class {}").rpartition(" {")
    return " ".join([kind, *(str(value)[:8] for value in literal_eval("{" + settings).values())])


def evaluations(cfg: DictConfig, protocol: dict[str, Any]) -> int:
    """Network evaluations of an image: one for each step of DDIM, and one more where the step is guided."""
    process = instantiate(cfg.objective, "objective").process
    times = process.in_steps(protocol["steps"]).timestep_map
    low, high = (end * process.length for end in protocol["guidance_interval"])
    return len(times) + (protocol["guidance"] != 1) * sum(low <= float(t) <= high for t in times)


def table(values: Sequence[Value], level: float) -> str:
    """Means and deviations over seeds, and differences to the null class by the same seeds, as Markdown."""
    rows: dict[tuple, list[Value]] = defaultdict(list)
    for value in values:
        rows[value.row].append(value)
    head = ["method", "objective", "guide", "scale", "seeds", "KID before", "KID", f"less null class, {level:.0%}"]
    lines = [[*head, "network evaluations", "training, s"], ["---"] * 4 + ["---:"] * 6]
    for (method, objective, guide, scale), own in rows.items():
        plain = [value for value in values if value.method == method and value.plain]
        counts = sorted({value.evaluations for value in own})
        cells = [method, objective, guide, f"{scale:g}", str(len(own))]
        cells += [mean(value.before for value in own[:1]), mean(value.after for value in own)]
        cells += ["" if own[0].plain else less(own, plain, level), ", ".join(map(str, counts))]
        lines.append([*cells, f"{statistics.fmean(value.fit for value in own):.0f}"])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def mean(values: Iterable[float]) -> str:
    """Mean ± sample standard deviation."""
    known = list(values)
    deviation = f" ± {statistics.stdev(known):.4f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.4f}{deviation}"


def less(own: Sequence[Value], plain: Sequence[Value], level: float) -> str:
    """Mean difference of the seeds that both have, with Student's interval."""
    theirs = {value.seed: value.after for value in plain}
    differences = [value.after - theirs[value.seed] for value in own if value.seed in theirs]
    if not differences:
        return "not run"
    found = paired(differences, level)
    if math.isinf(found.low):
        return f"{found.mean:+.4f} (one seed)"
    return f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


@entry_point("guides", CONFIGS)
def main(cfg: DictConfig) -> None:
    study(cfg)


if __name__ == "__main__":
    main()
