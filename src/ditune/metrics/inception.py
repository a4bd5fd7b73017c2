"""Inception of 2015, on which the literature's FID rests, and the distances that carry its names."""

import io
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ditune.errors import UserError, require
from ditune.files.arrays import refuse_absurd
from ditune.files.atomic import sha256 as hash_of
from ditune.files.needs import Addresses, Need
from ditune.metrics.clean import CLEAN, clean_resize
from ditune.metrics.distances import frechet_distance, frechet_from_statistics, statistics
from ditune.metrics.features import FrozenExtractor, check_file, read_tensors, remedy_of, weights_need
from ditune.metrics.suite import MetricSuite

# what numpy, zipfile and the file system raise for files that are damaged or something else
UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, MemoryError)
UNREADABLE += (zipfile.BadZipFile, zlib.error)
SIDE = 299  # pixels of the network's input
LAYERS = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2")
LAYERS += tuple(f"Mixed_{name}" for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"))
LAYERS += ("AvgPool",)
SPATIAL_CHANNELS = 7  # of sFID: 7 x 17 x 17 = 2023 numbers, about as many as pool3 has


class Inception2015(FrozenExtractor):
    """TensorFlow's Inception v3 of 2015 in torch-fidelity's port: uint8 (N, 3, H, W) -> float32 (N, 5079).

    The columns are pool3 (2048), the first 7 channels of mixed_6/conv for sFID (2023) and logits without bias for IS
    (1008). Images are resized to 299 as TensorFlow 1 did it inside the graph (bilinear, no antialiasing).

    Args:
        weights: torch-fidelity's file; its tensors are read, no pickle is executed.
        sha256: of that file.
        resize: "tensorflow" as above; "clean" by `clean_resize`, and pixels to 2 x / 255 - 1, as pytorch-fid's port and
            dgm-eval have them. The name is inception_clean then.

    Raises:
        UserError: the file is missing or another one, or there is no such resize.

    Source: Szegedy et al. 2015, arXiv 1512.00567; sFID: Nash et al. 2021, arXiv 2103.03841, as in ADM's evaluator.
    """

    name = "inception"
    width = 5079
    columns = {"features": slice(0, 2048), "spatial": slice(2048, 4071), "logits": slice(4071, 5079)}  # noqa: RUF012

    def __init__(self, weights: str | Path, sha256: str, resize: str = "tensorflow") -> None:
        super().__init__()
        remedy = "Choose tensorflow or clean."
        require(resize in ("tensorflow", "clean"), "metrics.judge.extractor.resize", resize, remedy)
        check_file(Path(weights), sha256, remedy_of("inception"))
        self.sha256, self.resize = sha256, resize
        if resize == "clean":
            self.name = "inception_clean"
        # torch-fidelity unpickles what it is given, so it is given a copy of the tensors that are here already
        copy = io.BytesIO()
        torch.save(read_tensors(Path(weights)), copy)
        copy.seek(0)
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        self.network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], copy)
        self.network.to(memory_format=torch.channels_last)
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)
        self._spatial = torch.empty(0)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].flatten(1).clone()  # (N, 7 x 17 x 17)

    @classmethod
    def needs(cls, config: Mapping[str, Any], addresses: Addresses) -> list[Need]:
        """The weights; see `ditune.files.needs`."""
        return [weights_need("inception", "the feature extractor Inception of 2015", config, addresses)]

    @property
    def identity(self) -> dict[str, str | int]:
        """Everything that changes the features; kept in the header of cached features."""
        resize = "bilinear of TensorFlow 1" if self.resize == "tensorflow" else CLEAN
        return {"extractor": self.name, "sha256": self.sha256, "resolution": SIDE, "resize": resize}

    def features(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) -> float32 (N, 5079)."""
        if self.resize == "clean":
            pool, logits = self.of_pixels(clean_resize(images, SIDE) / 255 * 2 - 1)
        else:
            pool, logits = self.network(images)
        # the hook has kept the spatial features
        return torch.cat([pool, self._spatial, logits], dim=1)  # (N, 2048 + 2023 + 1008)

    def of_pixels(self, x: Tensor) -> tuple[Tensor, Tensor]:  # (N, 3, 299, 299) -> (N, 2048), (N, 1008)
        """pool3 and logits without bias of pixels in -1..1; the network itself takes bytes and resizes them."""
        for name in LAYERS:
            x = getattr(self.network, name)(x)
        pool = x.flatten(1)
        return pool, pool @ self.network.fc.weight.T


class InceptionMetrics(MetricSuite):
    """FID, sFID and IS besides the metrics of every suite; N stands in their names.

    Args:
        extractor: the Inception network.
        cache: folder for features of references; see `MetricSuite`.
        batch_size: images per batch.
        statistics: a reference file of ADM's (.npz with mu, sigma and mu_s, sigma_s), such as the literature's
            VIRTUAL_imagenet256_labeled.npz; FID and sFID are then to it. None = to the reference's images.
        reference_split: see `MetricSuite`.

    Raises:
        UserError: the file is missing or holds something else.
    """

    def __init__(
        self,
        extractor: Inception2015,
        cache: str | Path | None = None,
        batch_size: int = 64,
        statistics: str | Path | None = None,
        reference_split: str | None = None,
    ) -> None:
        super().__init__(extractor, cache, batch_size, reference_split)
        self.statistics = None if statistics is None else read_statistics(Path(statistics))
        self._sha256 = None if statistics is None else hash_of(Path(statistics))

    @classmethod
    def needs(cls, config: Mapping[str, Any], addresses: Addresses) -> list[Need]:
        """The reference statistics, if a file is named; see `ditune.files.needs`."""
        if config.get("statistics") is None:
            return []
        path = Path(config["statistics"])
        remedy = (
            f"There is no {path}. Give a reference file of ADM's evaluator, or set metrics.judge.statistics=null "
            "to compare with the reference's images."
        )
        return [Need("reference statistics", path, path.is_file(), remedy=remedy)]

    @property
    def identity(self) -> dict[str, str | int]:
        """As of every suite, with the hash of the reference statistics."""
        return super().identity | ({} if self._sha256 is None else {"statistics": self._sha256})

    def compare(self, x: Tensor, y: Tensor) -> dict[str, float | int]:
        """Metrics of outputs x (N, 5079) of generated images and y (M, 5079) of the reference.

        Returns:
            For N = 10,000: {fid_10k, sfid_10k, is_10k, kid_inception, precision_inception, ...}; with the clean resize
            {fid_clean_10k, ..., kid_inception_clean, ...}.

        Raises:
            UserError: there are too few images; see `MetricSuite.compare`.
        """
        values, columns = super().compare(x, y), self.extractor.columns
        fid = values.pop(f"fd_{self.name}")
        count = f"{self.name}_{format_count(len(x))}".removeprefix("inception_")  # 10k, clean_10k, clean_train_10k
        if self.statistics is None:
            sfid = frechet_distance(x[:, columns["spatial"]], y[:, columns["spatial"]])
        else:
            fid, sfid = (
                frechet_from_statistics(*statistics(x[:, columns[name]]), *self.statistics[name])
                for name in ("features", "spatial")
            )
        own = {
            f"fid_{count}": fid,
            f"sfid_{count}": sfid,
            f"is_{count}": inception_score(x[:, columns["logits"]]),
        }
        return own | values


def read_statistics(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Read a reference file of ADM's evaluator.

    TensorFlow flattens the spatial features as (17, 17, 7); they are reordered to (7, 17, 17) here.

    Args:
        path: .npz with mu, sigma, mu_s and sigma_s.

    Returns:
        (mean (D,), covariance (D, D)), float64, of "features" (pool3, D = 2048) and of "spatial" (D = 2023).

    Raises:
        UserError: the file is missing or holds something else.
    """
    remedy = "Give a reference file of ADM's evaluator, a .npz with mu, sigma, mu_s and sigma_s."
    try:
        refuse_absurd(Path(path))
        with np.load(path, allow_pickle=False) as file:
            found = {name: torch.from_numpy(file[name]).double() for name in ("mu", "sigma", "mu_s", "sigma_s")}
    except UNREADABLE as error:
        raise UserError(f"The statistics {path} cannot be read ({error}). {remedy}") from error
    side = 17 * 17
    if found["sigma"].shape != (2048, 2048) or found["sigma_s"].shape != (SPATIAL_CHANNELS * side,) * 2:
        raise UserError(f"The statistics {path} are not of the 2015 Inception. {remedy}")
    order = torch.arange(side * SPATIAL_CHANNELS).view(side, SPATIAL_CHANNELS).T.flatten()
    spatial = found["mu_s"][order], found["sigma_s"][order][:, order]
    return {"features": (found["mu"], found["sigma"]), "spatial": spatial}


def inception_score(logits: Tensor, split: int = 5000) -> float:
    """Inception score exp E KL(p(y|x) || p(y)); it says nothing about nearness to a reference.

    Args:
        logits: (N, K), without bias.
        split: images of a split; the score is the mean over splits, as in ADM's evaluator.

    Returns:
        The score, at least 1.

    Source: Salimans et al. 2016, arXiv 1606.03498.
    """
    log_p = logits.double().log_softmax(1)
    scores = []
    for rows in log_p.split(split):
        marginal = rows.logsumexp(0) - torch.tensor(float(len(rows)), dtype=torch.float64).log()  # log p(y), (K,)
        scores.append((rows.exp() * (rows - marginal)).sum(1).mean().exp())
    return torch.stack(scores).mean().item()


def format_count(count: int) -> str:
    """Short form of a count for names: 10000 -> 10k, 512 -> 512."""
    return f"{count // 1000}k" if count and count % 1000 == 0 else str(count)


InceptionJudge = InceptionMetrics  # its name in the configs of earlier runs
