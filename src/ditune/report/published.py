"""Published figures to lay beside ours, each with its source. A figure that was not read somewhere is not in here.

None of them was read in its paper, but for those whose source says so. A new figure is one row of `PUBLISHED`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ditune.metrics.names import family

UNKNOWN = "protocol unknown"


@dataclass(frozen=True)
class Published:
    """A figure that somebody has published.

    Args:
        method: name of the PEFT method, `peft.name`.
        data: name of the dataset, `data.name`.
        value: of the metric.
        source: whose it is and where it was read.
        protocol: how it was measured, as far as the source says.
        where: keys of a run's config, and the values that they must have.
        metric: family of the metric.
    """

    method: str
    data: str
    value: float
    source: str
    protocol: str = UNKNOWN
    where: Mapping[str, Any] = field(default_factory=dict)
    metric: str = "fid"


def _row(values: Mapping[str, float], method: str, **common: Any) -> tuple[Published, ...]:
    return tuple(Published(method, data, value, **common) for data, value in values.items())


def _steps(values: Mapping[int, float], data: str, network: str, source: str) -> tuple[Published, ...]:
    """Shortcut models by their number of steps: FID of 50,000 images."""
    return tuple(
        Published("full", data, value, source, f"50,000 images, {steps} steps", {**SHORTCUT, **_where(network, steps)})
        for steps, value in values.items()
    )


def _where(network: str, steps: int) -> dict[str, Any]:
    return {"network.name": network, "sampler.steps": steps, "data.resolution": 256}


SHORTCUT = {"objective._target_": "ditune.objectives.Shortcut"}
PIXELS_256 = {"data.resolution": 256}
# Flowers-102 and Cars: the index has no figure of DiffFit's that is surely its own.
DIFFFIT = {
    "food101": 6.96,
    "sun397": 8.55,
    "df20m_mini": 17.35,
    "caltech101": 33.84,
    "cub": 5.48,
    "artbench10": 20.87,
}
# DF-20M is left out: that group's scripts train on all 1,577 classes, ours on the 182 of the mini set.
FULL_GUIDED = {
    "food101": 10.93,
    "sun397": 14.13,
    "caltech101": 23.84,
    "cub": 5.37,
    "artbench10": 19.94,
    "stanford_cars": 6.32,
}
README = "the README of kvfrans/shortcut-models"

PUBLISHED: tuple[Published, ...] = (
    *_row(
        DIFFFIT,
        "difffit",
        source="DiffFit (arXiv 2304.06648), as quoted by wizwand.com/paper/68fa70291e209131cea497f0",
        where=PIXELS_256,
    ),
    *_row(
        FULL_GUIDED,
        "full",
        source="full fine-tuning with guidance, as quoted by notes on NAG (ICLR 2026, openreview UMBc0Ky20K)",
        protocol="10,000 images against all images of the dataset, 50 steps, images resized by PIL; "
        "weight of the guidance unknown",
        where=PIXELS_256,
    ),
    Published(
        "difffit",
        "imagenet",
        3.02,
        "abstract of DiffFit (arXiv 2304.06648)",
        "25 epochs at 512 px from a network of 256 px; number of images, steps and guidance unknown",
        {"data.resolution": 512},
    ),
    Published(
        "full",
        "imagenet",
        1.72,
        "DiT-MoE (arXiv 2407.11633, Table 2)",
        "50,000 images; guidance unknown; others got 9.64 from the published weights (feizc/DiT-MoE issue 7)",
        {"network.name": "dit_moe_xl_2_8e2a", **PIXELS_256},
    ),
    *_steps({128: 15.5, 4: 28.3, 1: 40.3}, "imagenet", "dit_b_2", README),
    *_steps({128: 3.8, 4: 7.8, 1: 10.6}, "imagenet", "dit_xl_2", README),
    *_steps({128: 6.9, 4: 13.8, 1: 20.5}, "celebahq", "dit_b_2", README),
)


def published(method: str, data: str, metric: str, config: Mapping[str, Any]) -> list[Published]:
    """Figures that stand for a run.

    Args:
        method: name of its PEFT method.
        data: name of its dataset.
        metric: name of the metric that the report compares.
        config: dotted keys of the run's config; {} = the run has not begun, and only figures without conditions fit.
    """
    kind = family(metric)
    return [
        figure
        for figure in PUBLISHED
        if (figure.method, figure.data) == (method, data)
        and kind is not None
        and kind.name == figure.metric
        and all(config.get(key) == value for key, value in figure.where.items())
    ]
