"""data.subset: a few training images that stand for all."""

import pytest
import torch
from omegaconf import OmegaConf

from ditune.config.instantiate import instantiate, training_images
from ditune.config.outline import expected_images
from ditune.config.roles import job_identity
from ditune.data.prepare import cache_of, verify_images
from ditune.data.subsets import WAYS, choose, herding, k_means, quotas
from ditune.errors import UserError
from helpers import SMALL, compose

BLOBS = 6


def blobs(each=20, width=0.01):
    """Well separated groups of points; row i is of group i % BLOBS."""
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(BLOBS, 8, generator=generator, dtype=torch.float64)
    noise = width * torch.randn(each * BLOBS, 8, generator=generator, dtype=torch.float64)
    return centres.repeat(each, 1) + noise


def chosen(features, **settings):
    count = len(features)
    return choose([f"{i}.png" for i in range(count)], torch.arange(count) % 3, lambda: features, **settings)


@pytest.mark.parametrize("seed", range(5))
def test_k_means_takes_one_of_each_blob(seed):
    x = blobs()
    rows = k_means(x, BLOBS, seed)
    assert sorted(i % BLOBS for i in rows) == list(range(BLOBS))
    for i in rows:  # the nearest to the mean of its blob
        members = x[i % BLOBS :: BLOBS]
        assert int((members - members.mean(dim=0)).norm(dim=1).argmin()) == i // BLOBS


def test_k_means_on_a_line_by_hand():
    x = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [12.5]], dtype=torch.float64)
    assert sorted(k_means(x, 2, 0)) == [1, 4]  # centres 1 and 11.17


def test_centres_without_images_move_to_the_farthest_ones():
    """Many copies: k-means++ runs out of distances, and n different rows come out all the same."""
    x = torch.zeros(10, 2, dtype=torch.float64)
    x[9] = 1.0
    for n in (2, 5, 10):
        rows = k_means(x, n, 0)
        assert len(set(rows)) == n
        assert 9 in rows


def test_herding_is_greedy_by_hand():
    x = torch.tensor([[0.0], [1.0], [5.0], [6.0]], dtype=torch.float64)  # mean 3
    # |3 - x|: 1 and 5 tie, the first one counts; then (1 + 5) / 2 = 3; then 3 * 3 - 6 = 3: 0 and 6 tie
    assert herding(x, 4, 0) == [1, 2, 0, 3]


def test_the_mean_of_herding_is_nearer_than_that_of_chance():
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    distance = {
        by: (x[chosen(x, n=20, by=by)].mean(dim=0) - x.mean(dim=0)).norm().item() for by in ("herding", "random")
    }
    assert distance["herding"] < distance["random"] / 5


@pytest.mark.parametrize("by", [*WAYS, "random"])
def test_rows_are_distinct_ascending_and_repeatable(by):
    x = blobs()
    for n in (1, 7, 50, len(x)):
        rows = chosen(x, n=n, by=by, seed=3)
        assert rows == sorted(set(rows)) == chosen(x, n=n, by=by, seed=3)
        assert len(rows) == n
    assert chosen(x, n=len(x), by=by) == list(range(len(x)))
    if by != "herding":
        assert len({tuple(chosen(x, n=9, by=by, seed=seed)) for seed in range(4)}) > 1
    if by != "k_means":  # smaller ones lie in larger ones
        assert set(chosen(x, n=7, by=by)) < set(chosen(x, n=50, by=by))


def test_random_depends_on_names_alone():
    def refuse():
        raise AssertionError

    names = [f"{i}.png" for i in range(20)]
    found = choose(names, torch.zeros(20), refuse, n=5, by="random")
    assert {names[i] for i in found} == {
        names[::-1][i] for i in choose(names[::-1], torch.zeros(20), refuse, n=5, by="random")
    }


@pytest.mark.parametrize("by", [*WAYS, "random"])
def test_balanced_subsets_have_as_many_images_of_each_class(by):
    rows = chosen(blobs(), n=10, by=by, balanced=True)
    assert torch.tensor([i % 3 for i in rows]).bincount().tolist() == [4, 3, 3]
    assert quotas([1, 5, 2], 6) == [1, 3, 2]


def test_mistakes_are_refused(tmp_path):
    for wrong, message in (({"n": 0}, r"subset\.n"), ({"n": 121}, r"subset\.n is 121"), ({"n": 2, "by": "x"}, r"\.by")):
        with pytest.raises(UserError, match=message):
            chosen(blobs(), **wrong)
    for value in ("{n: 0}", "{n: 3, by: first}"):
        with pytest.raises(UserError, match=r"data\.subset"):
            training_images(composed(tmp_path, f"data.subset={value}"))
    for value in ("{by: random}", "{n: 3, of: clip}"):
        with pytest.raises(UserError, match="Give n"):
            training_images(composed(tmp_path, f"data.subset={value}"))


# In a training


def composed(tmp_path, *overrides):
    return compose(tmp_path, "data=emoji_streamline", *overrides)


def test_images_of_a_config(tmp_path):
    whole = training_images(composed(tmp_path))
    cfg = composed(tmp_path, "data.subset={n: 12, by: k_means}", f"paths.cache_dir={tmp_path}/cache")
    some = training_images(cfg)
    assert len(some) == 12 == len(expected_images(cfg))
    assert some.names == sorted(some.names, key=whole.names.index)
    places = [whole.names.index(name) for name in some.names]
    assert some.labels.tolist() == whole.labels[places].tolist()
    assert (some.load() == whole.load()[places]).all()
    assert some.fingerprint != whole.fingerprint
    assert training_images(cfg).fingerprint == some.fingerprint  # by features that were kept
    assert instantiate(cfg.metrics.reference, "metrics").names == whole.names


def test_all_images_are_the_plain_dataset(tmp_path):
    whole = training_images(composed(tmp_path))
    same = training_images(composed(tmp_path, f"data.subset={{n: {len(whole)}, by: random}}"))
    assert (same.names, same.fingerprint, same.suffix) == (whole.names, whole.fingerprint, "")


def test_it_goes_together_with_a_fraction_and_has_latents_of_its_own(tmp_path):
    settings = ["data.fraction=0.5", "data.subset={n: 5, by: random}"]
    cfg = composed(tmp_path, *settings)
    images = training_images(cfg)
    assert set(images.names) < set(training_images(composed(tmp_path, settings[0])).names)
    verify_images(instantiate(cfg.data.pictures, "data", split=None), tmp_path, "raise")
    autoencoder = instantiate(cfg.autoencoder, "autoencoder")
    other = training_images(composed(tmp_path, settings[0], "data.subset={n: 5, by: random, seed: 1}"))
    folders = {cache_of(each, autoencoder, tmp_path)[0].name for each in (images, other)}
    assert len(folders) == 2
    assert all("_0.5_" in name for name in folders)


def test_it_is_part_of_a_job_only_if_it_is_set(tmp_path, pictures):
    cfg, some = (
        compose(tmp_path, *SMALL, f"data.root={pictures}", *more) for more in ([], ["data.subset={n: 4, by: random}"])
    )
    known = job_identity(cfg)
    assert job_identity(some) != known
    OmegaConf.set_struct(cfg, False)
    del cfg.data["subset"]  # as in a run of before
    assert job_identity(cfg) == known
    assert len(training_images(cfg)) == 10
    assert len(training_images(some)) == 4
