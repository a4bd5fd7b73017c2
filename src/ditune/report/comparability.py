"""Warnings that methods were not given the same chances, or were not measured by one protocol; read from result.json.

`notes` names what everybody looks at: steps, batch, precision, sampler. Here is what makes a comparison unequal
unnoticed: how many learning rates each method was given, and the rest of the protocol.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence

from ditune.report.results import Run

# keys of an evaluation's protocol that `notes` does not compare, with their names in a sentence
PROTOCOL = {
    "guide": "the guide",
    "guidance_interval": "the interval of guidance",
    "guidance_channels": "the channels with guidance",
    "guidance_rescale": "the rescaling of guidance",
    "cache": "the cache of block outputs",
    "seed": "the seed of the generated images",
    "batch_size": "the images generated at once, which decide rounding",
    "bf16": "the precision of sampling",
    "autoencoder": "the autoencoder",
    "reference": "the reference images",
    "features": "the features, or the resize before them",
}
ABSENT = {"guide": "null_class", "cache": None, "guidance_rescale": 0.0}  # protocols leave neutral values out


def warnings(runs: Sequence[Run], metric: str) -> list[str]:
    """Sentences about runs whose figures stand side by side.

    Args:
        runs: finished ones.
        metric: name of the metric that is compared.
    """
    return [*_searched(runs), *_protocols(runs, metric)]


def _searched(runs: Sequence[Run]) -> Iterator[str]:
    """Methods that were given unequal numbers of learning rates on a dataset: the better searched one gains by it."""
    for data in dict.fromkeys(run.data for run in runs):
        rates: dict[str, set[float]] = defaultdict(set)
        for run in runs:
            if run.data == data and run.result.get("lr") is not None:
                rates[run.method].add(run.result["lr"])
        counts = {method: len(found) for method, found in rates.items()}
        if len(set(counts.values())) > 1:
            shown = ", ".join(f"{method} {count}" for method, count in sorted(counts.items(), key=lambda item: item[1]))
            yield f"Unequal search on {data}: the methods had different numbers of learning rates ({shown})."


def _protocols(runs: Sequence[Run], metric: str) -> Iterator[str]:
    """Keys of the protocol that differ between methods on one dataset."""
    for data in dict.fromkeys(run.data for run in runs):
        measured = [(run, run.protocol(metric)) for run in runs if run.data == data and run.protocol(metric)]
        for key, title in PROTOCOL.items():
            groups: dict[str, list[str]] = defaultdict(list)
            for run, protocol in measured:
                value = protocol.get(key, ABSENT.get(key))
                groups[json.dumps(value, sort_keys=True)].append(run.method)
            if len(groups) > 1:
                methods = "; ".join(", ".join(dict.fromkeys(names)) for names in groups.values())
                yield f"Unequal protocol on {data}: the runs differ in {title} ({methods})."
