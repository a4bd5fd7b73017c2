"""Metrics of images: right, independent of batches, and refused where they would mislead."""

import io
import json
import logging
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from torchmetrics.image.kid import poly_mmd

from ditune.errors import UserError
from ditune.metrics import (
    EfficientNetLite0,
    MetricSuite,
    density_coverage,
    distances,
    extract,
    frechet_distance,
    kid,
    kid_with_deviation,
    manifold,
    nearest,
    nearest_pixels,
    precision_recall,
    self_test,
)

ASSETS = Path(__file__).parents[2] / "assets"
WEIGHTS = ASSETS / "extractors" / "efficientnet_lite0.fp16.safetensors"
SHA256 = "29e2dfe2b2de0f2f56c85b5f0345bb937bf3367e1549e690fa892144dd9980a3"


def samples_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def load_emoji(name: str, count: int) -> Tensor:
    """`count` images spread evenly over the whole zip, uint8 (count, 3, 64, 64)."""
    with zipfile.ZipFile(ASSETS / "emoji" / f"{name}.zip") as file:
        names = sorted(entry for entry in file.namelist() if entry.endswith(".webp"))
        chosen = [names[i * len(names) // count] for i in range(count)]
        images = [np.array(Image.open(io.BytesIO(file.read(entry))).convert("RGB")) for entry in chosen]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


class Fake:
    """An image set of random images."""

    def __init__(self, count: int, fingerprint: str = "one") -> None:
        self.fingerprint = fingerprint
        generator = torch.Generator().manual_seed(count)
        self.images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.images[indices], torch.zeros(len(indices), dtype=torch.int64)


class Tiny(nn.Module):
    """A seeded stand-in for the extractor: 6 features; counts its calls and the rows of each."""

    name = "tiny"
    columns = {"features": slice(None)}  # noqa: RUF012

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.identity = {"extractor": self.name, "sha256": str(seed), "resolution": 8}
        self.rows: list[int] = []
        self.matrix = nn.Parameter(samples_of(3 * 8 * 8, 6, seed=seed).float(), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        self.rows.append(len(images))
        return images.flatten(1).float() / 255 @ self.matrix


@pytest.fixture(scope="module")
def extractor() -> EfficientNetLite0:
    return EfficientNetLite0(WEIGHTS, SHA256)


# KID


def test_kid_equals_double_loop_and_torchmetrics():
    x, y = samples_of(23, 5), samples_of(23, 5, seed=1) + 0.3

    def kernel(a: Tensor, b: Tensor) -> float:
        return (sum(p * q for p, q in zip(a.tolist(), b.tolist(), strict=True)) / 5 + 1) ** 3

    within = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(23) for j in range(23) if i != j) / (23 * 22)
    across = sum(kernel(a, b) for a in x for b in y) / 23**2
    assert kid(x, y) == pytest.approx(within - 2 * across, rel=1e-12)
    assert kid(x, y) == pytest.approx(poly_mmd(x, y).item(), rel=1e-12)


def test_kid_is_the_same_in_chunks():
    x, y = samples_of(50, 7), samples_of(31, 7, seed=1)
    u, v = torch.ones(50, 1, dtype=torch.float64), torch.ones(31, 1, dtype=torch.float64)
    whole, chunked = (distances.kernel_sums(x, y, u, v, chunk) for chunk in (512, 8))
    assert whole.item() == pytest.approx(chunked.item(), rel=1e-12)


def test_kid_is_unbiased_and_its_deviation_is_honest():
    """Zero on average for equal distributions whatever the sizes; the standard error as repeated draws have it."""
    same = torch.tensor([kid(samples_of(20, 4, seed=s), samples_of(60, 4, seed=s + 10_000)) for s in range(400)])
    assert abs(same.mean()) < 4 * same.std() / 400**0.5
    assert (same < 0).any()

    found = [kid_with_deviation(samples_of(64, 4, seed=s), samples_of(96, 4, seed=s + 10_000) + 0.7) for s in range(60)]
    values, deviations = torch.tensor(found).T
    assert deviations.mean().item() == pytest.approx(values.std().item(), rel=0.4)
    assert found[0] == kid_with_deviation(samples_of(64, 4), samples_of(96, 4, seed=10_000) + 0.7)
    assert found[0][0] == pytest.approx(kid(samples_of(64, 4), samples_of(96, 4, seed=10_000) + 0.7), rel=1e-12)


# Frechet distance


def test_frechet_distance_in_one_dimension():
    """(m1 - m2)^2 + (s1 - s2)^2."""
    x, y = samples_of(100, 1) * 3 + 1, samples_of(80, 1, seed=1)
    expected = (x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2
    assert frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize(("n", "m"), [(90, 60), (20, 60), (15, 12)])
def test_frechet_distance_equals_the_eigenvalue_form(n: int, m: int, caplog: pytest.LogCaptureFixture):
    """Tr (S1^1/2 S2 S1^1/2)^1/2 by eigh; also with fewer samples than dimensions, which is warned of."""
    x, y = samples_of(n, 30) @ samples_of(30, 30, seed=2), samples_of(m, 30, seed=1) + 0.5
    values, vectors = torch.linalg.eigh(torch.cov(x.T))
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    trace_root = torch.linalg.eigvalsh(root @ torch.cov(y.T) @ root).clamp(min=0).sqrt().sum()
    traces = torch.cov(x.T).trace() + torch.cov(y.T).trace()
    expected = (x.mean(0) - y.mean(0)).square().sum() + traces - 2 * trace_root
    with caplog.at_level(logging.WARNING):
        assert frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-6)
    assert ("biased" in caplog.text) == (min(n, m) <= 30)


def test_too_few_samples_are_refused():
    for distance in (kid, frechet_distance):
        with pytest.raises(UserError, match="at least 2 images, here are 1"):
            distance(samples_of(1, 3), samples_of(5, 3))
    with pytest.raises(UserError, match="at least 4"):
        kid_with_deviation(samples_of(5, 3), samples_of(3, 3))
    with pytest.raises(UserError, match="NaN"):
        kid(samples_of(5, 3), samples_of(5, 3) * float("nan"))


def test_self_test_finds_broken_linear_algebra(monkeypatch: pytest.MonkeyPatch):
    self_test()
    right = torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda matrix: right(matrix) * 1.001)
    with pytest.raises(RuntimeError, match="linear algebra library"):
        self_test()


# nearest neighbours


def test_nearest_neighbours():
    references = samples_of(40, 6)
    distance, index = nearest(references[[7, 3]] * 5, references, k=3, chunk=1)
    assert index[:, 0].tolist() == [7, 3]
    assert distance[:, 0].abs().max() < 1e-6
    assert (distance.diff(dim=1) >= 0).all()
    with pytest.raises(UserError, match="among 40"):
        nearest(references, references, k=41)


def test_neighbours_are_found_far_from_the_origin():
    """Cosines differ from 1 by some 1e-8 there, which float32 cannot hold: it found the right one 3 times of 50."""
    x, y = (samples_of(50, 64) + 1e4).float(), (samples_of(60, 64, seed=1) + 1e4).float()
    directions = [torch.nn.functional.normalize(features.double(), dim=1) for features in (x, y)]
    exact = torch.cdist(*directions, compute_mode="donot_use_mm_for_euclid_dist").square() / 2
    distance, index = nearest(x, y)
    assert torch.equal(index[:, 0], exact.argmin(1))
    assert_close(distance[:, 0].double(), exact.amin(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("offset", "spread"), [(0.0, 1.0), (1e3, 1e-3), (1e4, 1e-4)])
def test_shares_do_not_depend_on_where_the_features_lie(offset, spread):
    """About the origin, |a|^2 + |b|^2 - 2 a.b of the last ones is wrong by a factor of 3: precision 1, coverage 0."""
    x, y = samples_of(2, 300, 64)
    moved = x * spread + offset, y * 1.05 * spread + offset
    assert precision_recall(*moved) == precision_recall(x, y * 1.05)
    assert density_coverage(*moved) == density_coverage(x, y * 1.05)
    exact = torch.cdist(*moved, compute_mode="donot_use_mm_for_euclid_dist")
    assert_close(manifold.distances(*manifold.centred(*moved)), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("offset", [1e3, 1e4])
def test_kid_keeps_its_digits_far_from_the_origin(offset):
    """The kernel depends on the origin, so nothing is moved; exact fractions say what is right."""
    x, y = samples_of(2, 12, 4) + offset
    rows = [[[Fraction(value) for value in row] for row in features.tolist()] for features in (x, y)]

    def mean(a: list, b: list, pairs: int) -> Fraction:
        values = ((sum(p * q for p, q in zip(r, s, strict=True)) / 4 + 1) ** 3 for r in a for s in b if r is not s)
        return sum(values) / pairs

    exact = mean(rows[0], rows[0], 132) + mean(rows[1], rows[1], 132) - 2 * mean(rows[0], rows[1], 144)
    assert kid(x, y) == pytest.approx(float(exact), rel=1e-6)


def test_nearest_pixels_is_exact():
    images = Fake(30).images
    query = images[[4]].clone()
    query[0, 0, 0, 0] ^= 1
    distance, index = nearest_pixels(query, images, k=2, chunk=7)
    assert index[0, 0] == 4
    assert distance[0, 0].item() == pytest.approx(1 / 255, rel=1e-12)
    assert nearest_pixels(images[[4]], images)[0].item() == 0
    exact = torch.cdist(query.flatten(1).double() / 255, images.flatten(1).double() / 255).sort().values
    torch.testing.assert_close(distance, exact[:, :2])


# features


def test_weights_are_checked(tmp_path: Path):
    with pytest.raises(UserError, match="missing"):
        EfficientNetLite0(tmp_path / "none.safetensors", SHA256)
    damaged = bytearray(WEIGHTS.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(damaged)
    with pytest.raises(UserError, match="SHA-256"):
        EfficientNetLite0(tmp_path / "damaged.safetensors", SHA256)


def test_features_do_not_depend_on_the_batch(extractor: EfficientNetLite0):
    images = load_emoji("noto", 11)
    features = extract(extractor, images, batch_size=4)
    assert features.shape == (11, 1280)
    assert features.dtype == torch.float32
    for count in (1, 5, 8):
        assert torch.equal(features[:count], extract(extractor, images[:count], batch_size=4))
    torch.testing.assert_close(features, extract(extractor, images, batch_size=11), rtol=1e-3, atol=1e-4)


def test_extractor_ignores_train_mode_autocast_and_gradients(extractor: EfficientNetLite0):
    images = load_emoji("twemoji", 2)
    expected = extractor(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(extractor.train()(images), expected)
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    with pytest.raises(TypeError, match="uint8"):
        extractor(images.float())


def test_batches_are_padded_and_data_sets_are_read():
    tiny, images = Tiny(), Fake(10)
    features = extract(tiny, images, batch_size=4)
    assert tiny.rows == [4, 4, 4]
    assert torch.equal(features, extract(tiny, images.images, batch_size=4))
    with pytest.raises(UserError, match="no images"):
        extract(tiny, images.images[:0])


def test_distances_between_the_domains(extractor: EfficientNetLite0):
    """Measured on all images: Noto to Twemoji 0.053, Noto to Fluent 3D 0.108, Twemoji to Fluent 3D 0.169."""
    noto, twemoji, fluent = (extract(extractor, load_emoji(name, 150)) for name in ("noto", "twemoji", "fluent3d"))
    assert abs(kid(noto[::2], noto[1::2])) < 0.02
    assert kid(noto, twemoji) == pytest.approx(0.053, abs=0.025)
    assert kid(noto, fluent) == pytest.approx(0.108, abs=0.03)
    assert kid(twemoji, fluent) == pytest.approx(0.169, abs=0.04)


# The metric suite


def test_judge_names_the_extractor_and_caches_the_reference(tmp_path: Path):
    suite, reference, samples = MetricSuite(Tiny(), tmp_path / "cache"), Fake(40), Fake(12)
    numbers = suite(samples.images, reference)
    manifold = {f"{name}_tiny" for name in ("precision", "recall", "density", "coverage")}
    keys = {"kid_tiny", "kid_tiny_std", "fd_tiny", "n", "n_reference", "nearest_mean", "nearest_min"}
    assert set(numbers) == keys | manifold
    assert (numbers["n"], numbers["n_reference"]) == (12, 40)
    json.dumps(numbers)
    calls = len(suite.extractor.rows)
    assert suite(samples, reference) == numbers
    assert len(suite.extractor.rows) == calls + 1, "the reference came from the cache"
    assert MetricSuite(Tiny())(samples, reference) == numbers
    distance, index = suite.neighbours(reference.images[[5]], reference, k=2)
    assert index[0, 0] == 5
    assert distance.shape == (1, 2)

    suite.reference(Fake(40, "other"))
    MetricSuite(Tiny(seed=1), tmp_path / "cache").reference(reference)
    names = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert len(names) == 3, "other images and another extractor have their own files, no temporary ones are left"
    assert all(name.startswith("tiny-") for name in names)


def test_foreign_and_damaged_caches_are_refused(tmp_path: Path):
    suite, reference = MetricSuite(Tiny(), tmp_path), Fake(40)
    features = suite.reference(reference)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()

    suite.reference(Fake(40, "other"))
    (other,) = (p for p in tmp_path.iterdir() if p != path)
    path.write_bytes(other.read_bytes())
    with pytest.raises(UserError, match=r"not the expected ones \(data\).*Delete"):
        suite.reference(reference)

    save_file({"features": load_file(path)["features"]}, path)
    with pytest.raises(UserError, match="not the expected ones"):
        suite.reference(reference)

    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(UserError, match="damaged"):
        suite.reference(reference)

    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        suite.reference(reference)

    path.unlink()
    assert torch.equal(suite.reference(reference), features)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ditune.files.atomic.os.fsync", full)
    with pytest.raises(OSError, match="space"):
        MetricSuite(Tiny(), tmp_path).reference(Fake(8))
    assert list(tmp_path.iterdir()) == []
