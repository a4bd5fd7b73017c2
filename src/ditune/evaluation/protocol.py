"""Judging pictures by a fixed protocol; a value is comparable to another of the same protocol only."""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ditune.config.roles import NEUTRAL_IN_PROTOCOLS, significant
from ditune.data import Pictures
from ditune.distributed import rank
from ditune.evaluation.image_shards import Blocks, weights_hash
from ditune.files.atomic import read_json, sha256, write_json
from ditune.generation.generator import Drawer, label_plan
from ditune.generation.grids import grid, neighbours_sheet
from ditune.metrics import Judge, PictureSet, check_counts
from ditune.progress import meter

log = logging.getLogger(__name__)

SHOWN = 64  # pictures of the grid
NEIGHBOURS = 8  # samples of the sheet of nearest training pictures


@dataclass(frozen=True)
class Evaluation:
    """Draws `n` pictures with the reference's class frequencies and compares them with the reference.

    Args:
        judge: extractor and distances.
        reference: the pictures to come near to.
        drawer: sampler, steps and guidance, the same before and after a training.
        n: number of pictures.
        seed: of noise and classes.
        store: folder that keeps drawn pictures until they are judged, so that a stopped evaluation goes on and
            several processes share the drawing; None = memory.

    Raises:
        UserError: there are too few pictures, or too few of the reference, for the metrics.
    """

    judge: Judge
    reference: Pictures
    drawer: Drawer
    n: int
    seed: int
    store: Path | None = None

    def __post_init__(self) -> None:
        check_counts(self.n, len(self.reference))

    @property
    def protocol(self) -> dict[str, Any]:
        """All that decides the value, but the weights."""
        drawer = self.drawer
        values = {
            "n": self.n,
            "seed": self.seed,
            "sampler": f"{drawer.sampler.kind} {drawer.sampler.settings()}",
            "steps": drawer.steps,
            "guidance": float(drawer.guidance),  # guidance=3 on the command line is no other protocol than 3.0
            "guidance_interval": [float(end) for end in drawer.guidance_interval],
            "guidance_channels": drawer.guidance_channels,
            "guidance_rescale": drawer.guidance_rescale,
            "batch_size": drawer.batch_size,
            "bf16": drawer.bf16,
            "resolution": drawer.resolution,
            "autoencoder": drawer.autoencoder.fingerprint,
            "reference": self.reference.fingerprint,
            "features": self.judge.identity,  # has a resolution of its own
        }
        return significant(values, NEUTRAL_IN_PROTOCOLS)

    @property
    def key(self) -> str:
        """Hash of the protocol."""
        return hashlib.sha256(json.dumps(self.protocol, sort_keys=True).encode()).hexdigest()[:16]

    def labels(self) -> Tensor:  # (n,)
        return label_plan(self.reference.labels, self.seed, self.n)

    def draw(self, network: nn.Module) -> Tensor | Blocks:
        """The protocol's pictures, (n, 3, R, R) uint8, in memory or as blocks in the store."""
        network.eval()
        self.judge.extractor.to(next(network.parameters()).device)
        labels = self.labels()
        if self.store is not None:
            blocks = self.blocks(network)
            blocks.draw(lambda rows: self.drawer.draw(network, labels[rows], self.seed, rows, fixed_batch=True))
            return blocks
        with meter("generating images", self.n) as progress:
            return self.drawer.draw(network, labels, self.seed, on_batch=progress.update, fixed_batch=True)

    def blocks(self, network: nn.Module) -> Blocks:
        """Where the store keeps this network's pictures."""
        header = {"protocol": self.protocol, "network": weights_hash(network)}
        folder = self.store / f"{self.key}_{header['network'][:16]}"
        return Blocks(folder, header, self.labels(), self.drawer.batch_size)

    def __call__(self, network: nn.Module, folder: Path | None = None) -> dict[str, float | int]:
        """Metrics of the network; with `folder`, a grid and the nearest training pictures go there as PNG.

        Of several processes, only the first one judges; the others get nothing.
        """
        pictures = self.draw(network)
        return judge_pictures(self.judge, self.reference, pictures, folder) if rank() == 0 else {}


def judge_pictures(
    judge: Judge, reference: Pictures, pictures: Tensor | PictureSet, folder: Path | None
) -> dict[str, float | int]:
    """Metrics of pictures (N, 3, R, R) uint8; with `folder`, grid.png and nearest.png go there."""
    features, reference_features = judge.features(pictures), judge.reference(reference)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        first = list(range(min(SHOWN, len(pictures))))
        shown = pictures[first] if isinstance(pictures, Tensor) else pictures.__getitems__(first)[0]
        grid(shown, columns=8).save(folder / "grid.png")
        count = min(NEIGHBOURS, len(pictures))
        distance, index = judge.nearest(features[:count], reference_features, k=4)
        neighbours_sheet(shown[:count], reference, index, distance).save(folder / "nearest.png")
    return judge.compare(features, reference_features)


class Record:
    """Values of shipped networks, so that they need not be measured again.

    The file is {"metrics": {sha256 of network: {protocol key: {"values": ..., "protocol": ...}}}}; what else stands
    in it is kept.

    Args:
        path: JSON file; a missing one is an empty record.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, path: str | Path | None):
        self.path = None if path is None else Path(path)
        self.content: dict[str, Any] = {"metrics": {}}
        if self.path is not None and self.path.is_file():
            self.content |= read_json(self.path)

    def get(self, network: str | Path, evaluation: Evaluation) -> dict[str, float] | None:
        found = self.content["metrics"].get(sha256(network), {}).get(evaluation.key)
        return None if found is None else found["values"]

    def add(self, network: str | Path, evaluation: Evaluation, values: dict[str, float]) -> None:
        """Write the values of the network in the file `network` into the record's file."""
        entry = {"values": values, "protocol": evaluation.protocol}
        self.content["metrics"].setdefault(sha256(network), {})[evaluation.key] = entry
        write_json(self.path, self.content)

    def or_measure(
        self, path: str | Path, evaluation: Evaluation, load: Callable[[], nn.Module]
    ) -> tuple[dict[str, float], str]:
        """Metrics of the network in `path`, and where they come from."""
        found = self.get(path, evaluation)
        if found is not None:
            return found, "record"
        return evaluation(load()), "measured"


def gap(before: float, after: float, own: float) -> dict[str, float]:
    """How much of the domain gap closes.

    Args:
        before, after: distance to the target domain before and after the training.
        own: the base network's distance to its own domain, which a perfect adaptation of it may reach.

    Returns:
        gap_before, gap_after and their relative difference gap_closed, which is left out where there was no gap.
    """
    values = {"gap_before": before - own, "gap_after": after - own}
    if before <= own:
        log.warning(
            "the base is as near to the target (%.4f) as to its own domain (%.4f): there is no gap", before, own
        )
        return values
    return values | {"gap_closed": (before - after) / (before - own)}
