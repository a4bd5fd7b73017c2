"""Markdown of the gaps: the datasets, every method on every dataset, the methods over all datasets, and their pairs."""

import math
import statistics
from collections.abc import Sequence
from itertools import combinations

from ditune.files.atomic import read_json
from ditune.report.gaps import ERRORS, Gaps, Method, gaps
from ditune.report.intervals import Difference, paired, stratified
from ditune.report.results import Run
from ditune.report.tables import NOT_RUN, count

LEVEL = 0.95  # of all intervals of a table together
MEASURED = "measured.json"  # in a run's folder: losses of single images, drift, forgotten classes (studies/styles.py)


def gaps_markdown(runs: Sequence[Run]) -> str | None:
    """All tables; None if the runs know no gap."""
    found = gaps(runs)
    if found is None:
        return None
    parts = {
        "The datasets": domains_table(found),
        f"{found.metric}, and the share of the gap that closes": methods_table(found),
        "Over the datasets": summary_table(found),
        "Differences between methods": pairs_table(found),
        "Drift and forgetting": drift_table(found),
    }
    return "\n".join(f"## {title}\n\n{part}" for title, part in parts.items() if part)


def domains_table(found: Gaps) -> str:
    """Each dataset before the training, and whether its gap counts."""
    lines = []
    for name, domain in found.domains.items():
        losses = {run.values.get("test_loss before") for m in found.methods for run in m.runs if run.data == name}
        loss = next((f"{value:.4f}" for value in losses if value is not None), NOT_RUN)
        gap = f"{domain.gap:.3f} ± {domain.error:.3f}"
        lines.append([name, f"{domain.before:.3f}", f"{domain.own:.3f}", gap, "yes" if domain.counted else "no", loss])
    head = ["dataset", "KID before", "of its own domain", "gap", "counted", "loss before"]
    note = f"± is the standard error. A gap under {ERRORS} of them is shown and not counted in sums and ranks."
    return f"{_table(head, lines)}\n{note}\n"


def methods_table(found: Gaps) -> str:
    """KID after, share of the gap, share of what full fine-tuning closes, and loss, of every method and dataset."""
    lines = []
    for method in found.methods:
        for name in found.domains:
            if name not in method.closed:
                continue
            own = [run for run in method.runs if run.data == name]
            losses = [run.values["test_loss"] for run in own if "test_loss" in run.values]
            cells = [_mean(method.after[name], "{:.3f}"), _percent(found.share(method, name))]
            cells += [_ratio(found.of_full(method, [name])), _mean(losses, "{:.4f}"), str(len(own))]
            lines.append([method.name, name, *cells])
    head = ["method", "dataset", "KID after", "gap closed", "of what full closes", "loss after", "seeds"]
    return _table(head, lines) + "\n± is the standard deviation over seeds, where there are several.\n"


def summary_table(found: Gaps) -> str:
    """The methods over the datasets that count, and what they cost."""
    lines = []
    for method in found.methods:
        share, names = found.overall(method)
        rank = "-" if method.rank is None else f"{method.rank:.2f}"
        cells = [_percent(share), _ratio(found.of_full(method, names)), f"{len(names)} of {len(found.counted)}", rank]
        sizes = [statistics.fmean(run.values["parameters"] for run in method.runs)]
        seconds = [run.values["seconds"] for run in method.runs if "seconds" in run.values]
        megabytes = [run.values["adapter_bytes"] / 1e6 for run in method.runs if "adapter_bytes" in run.values]
        cells += [count(sizes[0]), _of_all(seconds, "{:.0f}"), _of_all(megabytes, "{:.2f}")]
        lines.append([method.name, *cells])
    head = ["method", "sum closed / sum of gaps", "of what full closes", "datasets", "rank", "trains", "seconds", "MB"]
    note = "Ranks: over the datasets that count and on which every method here has a figure"
    return f"{_table(head, lines)}\n{note}: {', '.join(found.common) or 'none yet'}.\n"


def pairs_table(found: Gaps) -> str:
    """Paired differences of all pairs of methods, with intervals that hold for the table as a whole."""
    pairs = list(combinations(found.methods, 2))
    lines = []
    for one, other in pairs:
        level = 1 - (1 - LEVEL) / len(pairs)  # Bonferroni
        loss, kid = loss_difference(one, other, level), kid_difference(found, one, other, level)
        if loss is not None or kid is not None:
            names = f"{one.name} less {other.name}"
            lines.append([names, *_verdict(loss, one, other, "{:+.4f}"), *_verdict(kid, one, other, "{:+.3f}")])
    if not lines:
        return ""
    head = ["pair", "loss on the same images", "lower loss", "KID on the same datasets", "lower KID"]
    note = (
        f"In brackets: {LEVEL:.0%} intervals for all {len(pairs)} pairs together (Bonferroni), Student's, of paired "
        "differences: over held-out images with the same noise, seeds averaged and datasets of equal weight; and over "
        "the datasets that count. Where zero lies inside of the interval, the pair is not ranked."
    )
    return f"{_table(head, lines)}\n{note}\n"


def loss_difference(one: Method, other: Method, level: float) -> Difference | None:
    """Loss of one method less that of the other, image by image; None if no dataset has both methods' losses."""
    mine, theirs = image_losses(one), image_losses(other)
    groups = [[a - b for a, b in zip(mine[k], theirs[k], strict=True)] for k in mine if k in theirs]
    return stratified(groups, level) if groups else None


def image_losses(method: Method) -> dict[str, list[float]]:
    """By dataset, the loss of each held-out image: the mean over seeds."""
    found: dict[str, list[list[float]]] = {}
    for run in method.runs:
        if (losses := measured(run).get("losses")) is not None:
            found.setdefault(run.data, []).append(losses)
    return {name: [statistics.fmean(values) for values in zip(*own, strict=True)] for name, own in found.items()}


def kid_difference(found: Gaps, one: Method, other: Method, level: float) -> Difference | None:
    """KID of one method less that of the other over the datasets that count; None if they share none."""
    names = [name for name in found.counted if name in one.after and name in other.after]
    differences = [statistics.fmean(one.after[name]) - statistics.fmean(other.after[name]) for name in names]
    return paired(differences, level) if differences else None


def drift_table(found: Gaps) -> str:
    """How far images move from the base's of the same noise and class, and what is lost of classes not trained on."""
    lines = []
    for method in found.methods:
        for run in method.runs:
            values = measured(run)
            if "drift" not in values:
                continue
            forgotten = values.get("forgotten")
            cells = [f"{values['drift']['mean']:.3f} ± {values['drift']['error']:.3f}"]
            cells += [f"{forgotten[key]:.3f}" if forgotten else "" for key in ("before", "after")]
            cells += [f"{forgotten['error']:.3f}" if forgotten else ""]
            lines.append([method.name, run.data, str(run.result["seed"]), *cells])
    if not lines:
        return ""
    head = ["method", "dataset", "seed", "drift", "KID before", "after", "standard error"]
    note = (
        "Drift: mean cosine distance of the features to those of the base's image of the same noise and class, ± "
        "standard error. KID: of classes that the dataset lacks, to the base's domain, before and after the training."
    )
    return f"{_table(head, lines)}\n{note}\n"


def measured(run: Run) -> dict:
    """What was measured of single images of a run; {} if nothing was."""
    path = run.folder / MEASURED
    return read_json(path) if path.is_file() else {}


def _verdict(difference: Difference | None, one: Method, other: Method, form: str) -> list[str]:
    if difference is None:
        return [NOT_RUN, NOT_RUN]
    if math.isinf(difference.low):
        return [f"{form.format(difference.mean)} (one dataset)", "not ranked"]
    ends = ", ".join(form.format(end) for end in (difference.low, difference.high))
    better = (one if difference.mean < 0 else other).name if difference.decides else "not ranked"
    return [f"{form.format(difference.mean)} [{ends}]", better]


def _mean(values: Sequence[float], form: str) -> str:
    if not values:
        return NOT_RUN
    deviation = f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else ""
    return form.format(statistics.fmean(values)) + deviation


def _of_all(values: Sequence[float], form: str) -> str:
    return form.format(statistics.fmean(values)) if values else NOT_RUN


def _percent(share: float | None) -> str:
    return NOT_RUN if share is None else f"{100 * share:.0f} %"


def _ratio(share: float | None) -> str:
    return NOT_RUN if share is None else f"{share:.2f}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
