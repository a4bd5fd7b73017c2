"""Our distances against torch-fidelity's and torchmetrics', on shared features and through a shared Inception."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.init import kaiming_normal_, normal_, trunc_normal_
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance

from ditune.errors import UserError
from ditune.metrics import (
    DINOv2,
    Inception2015,
    InceptionMetrics,
    density_coverage,
    extract,
    frechet_distance,
    frechet_from_statistics,
    inception_score,
    kid,
    precision_recall,
    statistics,
)
from ditune.metrics.clean import clean_resize
from ditune.metrics.dinov2 import resize_positions
from ditune.metrics.inception import read_statistics


def samples_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sets() -> tuple[Tensor, Tensor]:
    """Features of 300 generated and 200 real images, 32 dimensions, correlated and shifted."""
    mixing = samples_of(32, 32, seed=2)
    return samples_of(300, 32) @ mixing + 0.2, samples_of(200, 32, seed=1) @ mixing


# Formulas on shared features


def test_frechet_distance_equals_torch_fidelity():
    x, y = sets()
    theirs = fid_statistics_to_metric(fid_features_to_statistics(x), fid_features_to_statistics(y), verbose=False)
    expected = theirs["frechet_inception_distance"]
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert frechet_from_statistics(*statistics(x), *statistics(y)) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_equals_torchmetrics():
    class Flat(nn.Module):
        num_features = 32

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)

    x, y = sets()
    metric = FrechetInceptionDistance(Flat(), normalize=True, antialias=False, input_img_size=(2, 4, 4))
    metric.update(x.view(300, 2, 4, 4), real=False)
    metric.update(y.view(200, 2, 4, 4), real=True)
    assert frechet_distance(x, y) == pytest.approx(metric.compute().item(), rel=1e-7)


def test_frechet_distance_of_known_gaussians_and_singular_covariances():
    mean, cov = torch.zeros(3), torch.diag(torch.tensor([4.0, 9.0, 0.0]))
    other = torch.diag(torch.tensor([1.0, 1.0, 0.0]))
    # |(1, 0, 2)|^2 + (2 - 1)^2 + (3 - 1)^2 + 0
    assert frechet_from_statistics(mean, cov, torch.tensor([1.0, 0.0, 2.0]), other) == pytest.approx(10)


def test_kid_over_all_samples_equals_torch_fidelity():
    x, y = (features[:200] for features in sets())
    theirs = kid_features_to_metric(
        x, y, kid_subsets=1, kid_subset_size=200, kid_kernel="poly", kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1, kid_kernel_rbf_sigma=10, rng_seed=0, verbose=False,
    )  # fmt: skip
    assert kid(x, y) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)


PRC = {"prc_neighborhood": 3, "prc_batch_size": 64, "save_cpu_ram": True, "verbose": False}


def test_precision_and_recall_equal_torch_fidelity():
    x, y = 2 * samples_of(300, 3) + 1, samples_of(200, 3, seed=1)
    theirs = prc_features_to_metric(x, y, **PRC)
    expected = theirs["precision"], theirs["recall"]
    assert precision_recall(x, y) == pytest.approx(expected, abs=1e-6)
    assert min(expected) < 0.9


def test_density_and_coverage_by_definition():
    x, y = (features[:60].numpy() for features in sets())
    between = np.linalg.norm(x[:, None] - y[None], axis=-1)
    reach = np.sort(np.linalg.norm(y[:, None] - y[None], axis=-1), axis=1)[:, 5]
    density = sum(between[i, j] < reach[j] for i in range(60) for j in range(60)) / (5 * 60)
    coverage = np.mean([min(between[:, j]) < reach[j] for j in range(60)])
    found = density_coverage(torch.from_numpy(x), torch.from_numpy(y))
    assert found == pytest.approx((density, coverage), abs=1e-12)
    with pytest.raises(UserError, match="Give more than 5"):
        density_coverage(torch.from_numpy(x), torch.from_numpy(y[:5]))


def test_inception_score_equals_torch_fidelity():
    logits = 3 * samples_of(120, 10)
    theirs = isc_features_to_metric(logits, splits=3, shuffle=False, rng_seed=0)
    assert inception_score(logits, split=40) == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert inception_score(torch.zeros(8, 10)) == pytest.approx(1)


# Through a shared Inception: the real architecture with random weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as torch-fidelity's: all tensors of its Inception, seeded."""
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: None)
        network = FeatureExtractorInceptionV3("random", ["2048"], verbose=False)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                kaiming_normal_(module.weight, nonlinearity="relu")  # features of order 1
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def images(count: int, seed: int) -> Tensor:
    """Smooth random images: of noise alone, all features would be the same."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (nn.functional.interpolate(coarse, 32, mode="bilinear") * 255).to(torch.uint8)


def test_one_inception_gives_both_the_same_metrics(weights: Path):
    generated, real = images(7, 0), images(8, 1)
    suite = InceptionMetrics(Inception2015(weights, sha256(weights)), batch_size=8)
    x, y = (extract(suite.extractor, batch, 8) for batch in (generated, real))
    ours, features = suite.compare(x, y), suite.extractor.columns["features"]
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(weights))
    (their_x, logits), (their_y, _) = network(generated), network(real)
    assert their_x.std(0).mean() > 0.01
    torch.testing.assert_close(x[:, features], their_x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y[:, features], their_y, rtol=1e-4, atol=1e-5)

    expected = isc_features_to_metric(logits, splits=1, shuffle=False, rng_seed=0)["inception_score_mean"]
    assert ours["is_7"] == pytest.approx(expected, rel=1e-5)
    prc = prc_features_to_metric(their_x, their_y, **PRC)
    assert ours["precision_inception"] == pytest.approx(prc["precision"], abs=1e-6)
    assert ours["recall_inception"] == pytest.approx(prc["recall"], abs=1e-6)
    assert ours["kid_inception"] == pytest.approx(kid(their_x, their_y), rel=1e-3)
    # their FID takes a minute at 2048 dimensions, and its root of a singular matrix is inexact; hence 4 of them
    few = [batch[:, features][:, :: 2048 // 4] for batch in (x, y)]
    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, few), verbose=False)
    # a small difference of larger traces, whose roots are rounded in another way on every machine: hence `abs`
    assert frechet_distance(*few) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6, abs=1e-7)
    assert ours["fid_7"] == frechet_distance(x[:, features], y[:, features])
    assert ours["sfid_7"] > 0
    assert not any(name.startswith("fd_") for name in ours)  # FID has one name only


def test_spatial_features_are_those_of_adms_evaluator(weights: Path):
    """The first 7 channels of mixed_6's 1x1 branch, as the network itself has them between its layers."""
    extractor, seen = Inception2015(weights, sha256(weights)), {}
    extractor.network.Mixed_6c.register_forward_hook(lambda module, inputs, output: seen.update(before=output.clone()))
    features = extractor(images(2, 0))
    expected = extractor.network.Mixed_6d.branch1x1(seen["before"])[:, :7]
    assert expected.shape == (2, 7, 17, 17)
    torch.testing.assert_close(features[:, extractor.columns["spatial"]], expected.flatten(1))


def test_fid_to_a_reference_file_of_adms(weights: Path, tmp_path: Path):
    """Its spatial statistics are of (17, 17, 7), ours of (7, 17, 17)."""
    generator = np.random.default_rng(0)
    y = generator.normal(size=(12, 2048)), generator.normal(size=(12, 7, 17, 17))
    flattened = y[1].transpose(0, 2, 3, 1).reshape(12, -1)  # as TensorFlow does it
    content = {"mu": y[0].mean(0), "sigma": np.cov(y[0], rowvar=False)}
    content |= {"mu_s": flattened.mean(0), "sigma_s": np.cov(flattened, rowvar=False)}
    np.savez(tmp_path / "reference.npz", **content)
    read = read_statistics(tmp_path / "reference.npz")
    assert torch.allclose(read["features"][0], torch.from_numpy(y[0]).mean(0))
    mean, cov = statistics(torch.from_numpy(y[1]).flatten(1))
    assert torch.allclose(read["spatial"][0], mean)
    assert torch.allclose(read["spatial"][1], cov)
    np.savez(tmp_path / "other.npz", mu=np.zeros(4))
    for name in ("other.npz", "missing.npz"):
        with pytest.raises(UserError, match="Give a reference file"):
            read_statistics(tmp_path / name)


@pytest.mark.parametrize("extractor", [Inception2015, DINOv2])
def test_missing_weights_say_where_to_get_them(extractor: type, tmp_path: Path):
    with pytest.raises(UserError) as caught:
        extractor(tmp_path / "weights.pth", "abc123")
    for part in (str(tmp_path / "weights.pth"), "abc123", "Download https://"):
        assert part in str(caught.value)
    (tmp_path / "weights.pth").write_bytes(b"another file")
    with pytest.raises(UserError, match="expected abc123"):
        extractor(tmp_path / "weights.pth", "abc123")


def test_weights_that_would_execute_something_are_refused(tmp_path: Path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    path = tmp_path / "weights.pth"
    torch.save({"trap": Trap()}, path)
    for extractor in (Inception2015, DINOv2):
        with pytest.raises(UserError, match="tensors"):
            extractor(path, sha256(path))
    assert not (tmp_path / "executed").exists()


# The clean resize


def keys_cubic(size: int, side: int) -> np.ndarray:  # (side, size)
    """Weights of Keys' cubic kernel with a = -1/2, widened where it shrinks; by its definition, in float64."""
    scale = max(size / side, 1.0)
    centre = (np.arange(side) + 0.5) * size / side
    x = np.abs((np.arange(size) + 0.5 - centre[:, None]) / scale)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(("size", "side"), [(256, 299), (256, 224), (64, 299), (299, 299)])
def test_the_clean_resize_is_the_antialiased_cubic_kernel_on_floats(size: int, side: int):
    picture = torch.randint(
        0, 256, (2, 3, size, size + 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    found = clean_resize(picture, side)
    rows, columns = keys_cubic(size, side), keys_cubic(size + 8, side)
    expected = (rows @ picture.double().numpy() @ columns.T).clip(0, 255)
    assert np.abs(found.numpy() - expected).max() < 1e-2  # Pillow sums in float32 between its two passes
    torchs = nn.functional.interpolate(picture.float(), (side, side), mode="bicubic", antialias=True).clamp(0, 255)
    assert (found - torchs).abs().max() < 1e-2
    assert size == side or not torch.equal(found, found.round()), "floats, not bytes"


def test_the_layers_by_name_are_torch_fidelitys_network(weights: Path):
    """On images of 299 pixels its own resize does nothing, and bytes become (x - 128) / 128."""
    batch = nn.functional.interpolate(images(2, 0).float(), 299).to(torch.uint8)
    extractor = Inception2015(weights, sha256(weights), resize="clean")
    with torch.inference_mode():
        ours, theirs = extractor.of_pixels((batch.float() - 128) / 128), extractor.network(batch)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_clean_metrics_have_names_of_their_own(weights: Path, tmp_path: Path):
    generated, real = images(7, 0), images(8, 1)
    extractor = Inception2015(weights, sha256(weights), resize="clean")
    x, y = (extract(extractor, batch, 8) for batch in (generated, real))
    usual = extract(Inception2015(weights, sha256(weights)), generated, 8)
    assert not torch.equal(x, usual)
    with torch.inference_mode():
        pool, _ = extractor.of_pixels(clean_resize(generated, 299) / 127.5 - 1)
    torch.testing.assert_close(x[:, extractor.columns["features"]], pool, rtol=1e-4, atol=1e-5)
    suites = {split: InceptionMetrics(extractor, reference_split=split) for split in ("all", "train")}
    values = {split: suite.compare(x, y) for split, suite in suites.items()}
    assert {"fid_clean_7", "sfid_clean_7", "is_clean_7", "kid_inception_clean"} <= values["all"].keys()
    assert {"fid_clean_train_7", "kid_inception_clean_train"} <= values["train"].keys()
    assert values["all"]["fid_clean_7"] == values["train"]["fid_clean_train_7"]
    assert not any(name.startswith(("fd_", "fid_7")) for name in values["all"])
    assert suites["all"].identity["reference_split"] == "all"
    assert suites["all"].identity != suites["train"].identity
    # statistics as dgm-eval has them: numpy's mean and covariance, and the roots of the eigenvalues of S_x S_y
    few = [batch[:, ::512][:, :4].double().numpy() for batch in (x, y)]
    covariances = [np.cov(batch, rowvar=False) for batch in few]
    roots = np.real(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex) ** 0.5).sum()
    expected = np.square(few[0].mean(0) - few[1].mean(0)).sum() + sum(map(np.trace, covariances)) - 2 * roots
    assert frechet_distance(*map(torch.from_numpy, few)) == pytest.approx(expected, rel=1e-6, abs=1e-7)


# DINOv2: the authors' file layout with random weights of a small network


def test_dinov2_reads_the_authors_layout(tmp_path: Path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model("vit_small_patch14_dinov2", pretrained=False)  # 518 pixels, as theirs
        for parameter in network.parameters():
            normal_(parameter, std=0.05)
    state = network.state_dict() | {"mask_token": torch.zeros(1, 384)}
    assert state["pos_embed"].shape == (1, 1 + 37 * 37, 384)
    path = tmp_path / "dinov2.pth"
    torch.save(state, path)
    extractor = DINOv2(path, sha256(path), "vit_small_patch14_dinov2")
    features = extractor(images(3, 0))
    assert features.shape == (3, 384)
    assert features.isfinite().all()
    assert features.std(0).mean() > 1e-4  # images are told apart
    clean = DINOv2(path, sha256(path), "vit_small_patch14_dinov2", resize="clean")
    assert clean.name == "dinov2_clean"
    assert clean.identity["resize"] != extractor.identity["resize"]
    torch.testing.assert_close(clean(images(3, 0)), features, rtol=1e-3, atol=1e-3)  # both are of one kernel


def test_positions_are_resized_as_dinov2_does():
    table = trunc_normal_(torch.empty(1, 1 + 37 * 37, 8), std=0.5, generator=torch.Generator().manual_seed(0))
    resized = resize_positions(table, 16)
    assert resized.shape == (1, 1 + 16 * 16, 8)
    assert torch.equal(resized[:, 0], table[:, 0])
    assert resize_positions(table, 37) is table
    smooth = torch.cat([table[:, :1], torch.linspace(0, 1, 37 * 37).view(1, -1, 1).expand(-1, -1, 8)], dim=1)
    rows = resize_positions(smooth, 16)[0, 1:, 0].view(16, 16)
    assert (rows.diff(dim=0) > 0).all()  # rows stay rows
