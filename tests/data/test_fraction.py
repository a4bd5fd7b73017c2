"""data.fraction: a share of the training images, the same for every method and seed; the references stay whole."""

import pytest
from omegaconf import OmegaConf

from ditune.commands.prepare import held_out_images
from ditune.config.instantiate import instantiate, training_images
from ditune.config.keys import check
from ditune.config.outline import expected_images
from ditune.config.roles import job_identity
from ditune.data.prepare import cache_of, verify_images
from ditune.errors import UserError
from helpers import compose


def composed(tmp_path, *overrides):
    return compose(tmp_path, "experiment=styles", "data=emoji_streamline", *overrides)


def names(tmp_path, *overrides):
    return set(training_images(composed(tmp_path, *overrides)).names)


def test_smaller_shares_lie_in_larger_ones(tmp_path):
    whole = names(tmp_path)
    shares = [names(tmp_path, f"data.fraction={share}") for share in (0.03, 0.1, 0.3, 1)]
    assert shares[0] < shares[1] < shares[2] < shares[3] == whole
    for share, found in zip((0.03, 0.1, 0.3), shares, strict=False):
        assert abs(len(found) / len(whole) - share) < 0.05
    assert names(tmp_path, "data.fraction=0.1", "peft=full", "seed=7") == shares[1]
    assert len(expected_images(composed(tmp_path, "data.fraction=0.1"))) == len(shares[1])


def test_what_is_compared_with_stays_whole(tmp_path):
    cfg, all_of_it = composed(tmp_path, "data.fraction=0.03"), composed(tmp_path)
    for build in (held_out_images, lambda cfg: instantiate(cfg.metrics.reference, "metrics")):
        assert build(cfg).names == build(all_of_it).names


def test_the_labels_names_and_notes_are_those_of_the_share(tmp_path):
    whole, share = (training_images(composed(tmp_path, f"data.fraction={f}")) for f in ("null", 0.1))
    places = [whole.names.index(name) for name in share.names]
    assert share.labels.tolist() == whole.labels[places].tolist()
    assert share.rows == [whole.rows[i] for i in places]
    assert (share.load() == whole.load()[places]).all()
    assert share.fingerprint != whole.fingerprint
    assert not set(share.untrained) & {share.class_names[i] for i in share.labels.tolist()}
    missing = {whole.class_names[i] for i in whole.labels.tolist()} - {
        share.class_names[i] for i in share.labels.tolist()
    }
    assert missing <= set(share.untrained)
    assert any("no training image" in note and f"{len(share.untrained)} of 98 classes" in note for note in share.notes)


def test_latents_of_a_share_lie_in_a_cache_of_their_own(tmp_path):
    cfg = composed(tmp_path)
    whole, share = (training_images(composed(tmp_path, f"data.fraction={f}")) for f in ("null", 0.1))
    autoencoder = instantiate(cfg.autoencoder, "autoencoder")
    verify_images(instantiate(cfg.data.pictures, "data", split=None), tmp_path, "raise")
    folders = [cache_of(images, autoencoder, tmp_path)[0].name for images in (whole, share)]
    assert folders == ["train_64_kl_emoji", "train_64_kl_emoji_0.1"]


def test_wrong_shares_and_empty_ones_are_refused(tmp_path):
    for value in ("0", "1.5"):
        with pytest.raises(UserError, match=r"data\.fraction"):
            check(composed(tmp_path, f"data.fraction={value}"))
    with pytest.raises(UserError, match=r"data\.fraction is 1e-09, which leaves none of 336 images\. Raise it"):
        training_images(composed(tmp_path, "data.fraction=1e-9"))


def test_it_is_part_of_a_job_only_if_it_is_set(tmp_path):
    cfg, share = composed(tmp_path), composed(tmp_path, "data.fraction=0.1")
    known = job_identity(cfg)
    assert job_identity(share) != known
    OmegaConf.set_struct(cfg, False)
    del cfg.data["fraction"]  # as in a run of before
    assert job_identity(cfg) == known
    assert len(training_images(cfg)) == 336
