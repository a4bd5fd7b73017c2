"""Evaluation by a fixed protocol; a value is comparable to another of the same protocol only."""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditune.config.roles import NEUTRAL_IN_PROTOCOLS, significant
from ditune.data import ImageDataset
from ditune.distributed import rank
from ditune.evaluation.image_shards import ImageShards, weights_hash
from ditune.evaluation.shared_files import ranks_of
from ditune.files.atomic import read_json, sha256, write_json
from ditune.generation.generator import ImageGenerator, label_plan
from ditune.generation.grids import grid, neighbours_sheet
from ditune.metrics import ImageSet, MetricSuite, check_counts
from ditune.progress import meter

log = logging.getLogger(__name__)

SHOWN = 64  # images of the grid
NEIGHBOURS = 8  # samples of the grid of nearest training images


@dataclass(frozen=True)
class Evaluation:
    """Generates `n` images with the reference's class frequencies and compares them with the reference.

    Args:
        suite: of metrics, with its feature extractor.
        reference: the images to come near to.
        generator: sampler, steps and guidance, the same before and after a training.
        n: number of images.
        seed: of noise and classes.
        store: folder that keeps generated images and their features until they are evaluated, so that a stopped
            evaluation goes on and several processes share the work; None = memory.

    Raises:
        UserError: there are too few images, or too few of the reference, for the metrics.
    """

    suite: MetricSuite
    reference: ImageDataset
    generator: ImageGenerator
    n: int
    seed: int
    store: Path | None = None

    def __post_init__(self) -> None:
        check_counts(self.n, len(self.reference))

    @property
    def protocol(self) -> dict[str, Any]:
        """All that decides the value, but the weights."""
        generator = self.generator
        values = {
            "n": self.n,
            "seed": self.seed,
            "sampler": f"{generator.sampler.kind} {generator.sampler.settings()}",
            "steps": generator.steps,
            "guidance": float(generator.guidance),  # guidance=3 on the command line is no other protocol than 3.0
            "guidance_interval": [float(end) for end in generator.guidance_interval],
            "guidance_channels": generator.guidance_channels,
            "guidance_rescale": generator.guidance_rescale,
            "batch_size": generator.batch_size,
            "bf16": generator.bf16,
            "resolution": generator.resolution,
            "autoencoder": generator.autoencoder.fingerprint,
            "reference": self.reference.fingerprint,
            "features": self.suite.identity,  # has a resolution of its own
        }
        for name in ("noise_awareness", "guidance_input"):
            value = getattr(generator, name)
            values[name] = None if value is None else float(value)
        # the parts alone: which run knows each is a matter of the weights
        values["experts"] = None if generator.experts is None else list(generator.experts.settings.values())
        cache = generator.cache
        values["cache"] = None if cache is None else f"{cache.kind} {cache.settings}"
        guide = generator.guide
        values["guide"] = None if guide is None else f"{guide.kind} {guide.settings}"
        return significant(values, NEUTRAL_IN_PROTOCOLS)

    @property
    def key(self) -> str:
        """Hash of the protocol."""
        return hashlib.sha256(json.dumps(self.protocol, sort_keys=True).encode()).hexdigest()[:16]

    def labels(self) -> Tensor:  # (n,)
        """Classes of the images, with the frequencies of the reference."""
        return label_plan(self.reference.labels, self.seed, self.n)

    def generate(self, network: nn.Module) -> Tensor | ImageShards:
        """The protocol's images, (n, 3, R, R) uint8, in memory or as shards in the store."""
        if self.store is not None:
            shards = self._share(network)
            shards.wait()
            return shards
        network.eval()
        with meter("generating images", self.n) as progress:
            done, labels = progress.update, self.labels()
            return self.generator.generate(network, labels, self.seed, on_batch=done, fixed_batch=True)

    def _share(self, network: nn.Module) -> ImageShards:
        """This process's share of the images goes into the store."""
        network.eval()
        shards, labels = self.shards(network), self.labels()
        shards.fill(lambda rows: self.generator.generate(network, labels[rows], self.seed, rows, fixed_batch=True))
        return shards

    def shards(self, network: nn.Module) -> ImageShards:
        """Where the store keeps this network's images."""
        header = {"protocol": self.protocol, "network": weights_of(network, self.generator)}
        folder = self.store / f"{self.key}_{header['network'][:16]}"
        return ImageShards(folder, header, self.labels(), self.generator.batch_size, ranks_of(self.store.parent))

    def __call__(
        self, network: nn.Module, folder: Path | None = None, keep_images: bool = True
    ) -> dict[str, float | int]:
        """Metrics of the network; with `folder`, a grid and the nearest training images go there as PNG.

        With a store, all processes generate images and extract features, theirs and the reference's. Only the first
        one computes metrics; the others get nothing, and leave when their share is done.

        Args:
            network: the same on all processes, to the bit.
            folder: see above.
            keep_images: whether the store still has the images afterwards.

        Raises:
            UserError: another process has ended before its share was done.
        """
        self.suite.extractor.to(next(network.parameters()).device)
        if self.store is None:
            images = self.generate(network)
            return evaluate_images(self.suite, self.reference, images, folder) if rank() == 0 else {}
        shards = self._share(network)
        shared, reference = shards.features(self.suite), self.suite.reference(self.reference)
        if rank() != 0:
            return {}
        shared.wait()
        features = torch.cat([torch.from_numpy(shared.read(i)) for i in range(shared.count)])
        values = compare(self.suite, self.reference, shards, features, reference, folder)
        if not keep_images:
            shards.delete()
        return values


def evaluate_images(
    suite: MetricSuite, reference: ImageDataset, images: Tensor | ImageSet, folder: Path | None
) -> dict[str, float | int]:
    """Metrics of images (N, 3, R, R) uint8; with `folder`, grid.png and nearest.png go there."""
    return compare(suite, reference, images, suite.features(images), suite.reference(reference), folder)


def compare(
    suite: MetricSuite,
    reference: ImageDataset,
    images: Tensor | ImageSet,
    features: Tensor,
    reference_features: Tensor,
    folder: Path | None,
) -> dict[str, float | int]:
    """Metrics by the extractor's outputs (N, D) and (M, D); with `folder`, grid.png and nearest.png go there."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        first = list(range(min(SHOWN, len(images))))
        shown = images[first] if isinstance(images, Tensor) else images.__getitems__(first)[0]
        grid(shown, columns=8).save(folder / "grid.png")
        count = min(NEIGHBOURS, len(images))
        distance, index = suite.nearest(features[:count], reference_features, k=4)
        neighbours_sheet(shown[:count], reference, index, distance).save(folder / "nearest.png")
    return suite.compare(features, reference_features)


def weights_of(network: nn.Module, generator: ImageGenerator) -> str:
    """Hash of all weights that images come from: of the network and, where there are experts, with each of them."""
    experts = generator.experts
    if experts is None:
        return weights_hash(network)
    hashes = [weights_hash(network)]
    for name in experts.parts:
        with experts.adapters.used(name):
            hashes.append(weights_hash(network))
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


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
        """Values of the network in the file `network` by the evaluation's protocol; None = not measured yet."""
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
