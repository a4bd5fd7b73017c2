"""Which keys decide what, and that a new key with a neutral value invalidates nothing."""

from functools import cache

import pytest
from omegaconf import OmegaConf

from ditune import data
from ditune.config import roles
from ditune.config.components import build_components
from ditune.config.roles import ROLES, Decides, Role, job_hash, significant
from ditune.config.training import resume_key
from helpers import ROOT, SMALL, compose

# Hashes by which sweeps know finished jobs.
HASHES = {
    "experiment=difffit_cub": "34c1b41a3c76f6e1",
    "experiment=dit_moe_b_imagenet256": "b54c358da337f82d",
    "~experiment peft=full": "91e97588563fe214",
}


def hash_of(tmp_path, overrides, **added):
    cfg = compose(tmp_path, *overrides.split(), "paths.root_dir=/ditune")  # resolved paths are part of the hash
    OmegaConf.set_struct(cfg, False)
    for key, value in added.items():
        cfg[key] = value
    return job_hash(cfg)


def test_every_key_has_one_role():
    keys = set(OmegaConf.load(ROOT / "configs" / "train.yaml")) - {"defaults"}
    for folder in ("experiment", "sweep", "preset", "model", "debug"):
        for path in (ROOT / "configs" / folder).glob("*.yaml"):
            keys |= set(OmegaConf.load(path)) - {"defaults"}
    groups = {"network", "objective", "peft", "optimizer", "scheduler", "ema", "data", "augment", "autoencoder"}
    groups |= {"balance", "trainer", "sampler", "metrics", "callbacks", "logger", "paths", "addresses", "hydra"}
    assert keys | groups == set(ROLES)


@pytest.mark.parametrize("overrides", HASHES)
def test_finished_jobs_are_known_by_these_hashes(tmp_path, overrides):
    assert hash_of(tmp_path, overrides) == HASHES[overrides]


def test_a_new_key_at_its_neutral_value_changes_no_hash(tmp_path, monkeypatch):
    monkeypatch.setitem(ROLES, "critic", Role(Decides.TRAINING, neutral=None))
    known = HASHES["~experiment peft=full"]
    assert hash_of(tmp_path, "~experiment peft=full", critic=None) == known
    assert hash_of(tmp_path, "~experiment peft=full", critic=0.5) != known


def test_what_decides_nothing_changes_no_hash(tmp_path):
    known = HASHES["~experiment peft=full"]
    for override in ("run_dir=elsewhere", "tags=[a]", "logger=wandb", "dry_run=true", "verbose=true", "resume=auto"):
        assert hash_of(tmp_path, f"~experiment peft=full {override}") == known, override
    for override in ("seed=1", "max_steps=7", "metrics.n=3", "sampler.steps=2", "trainer.precision=32-true"):
        assert hash_of(tmp_path, f"~experiment peft=full {override}") != known, override


# Of experiment=dit_moe_b_imagenet256: balance=batch would make the first three count.
KEEPS = (
    *("trainer.devices=4", "trainer.num_nodes=2", "trainer.accumulate_grad_batches=2"),
    *("trainer=ddp", "trainer=cpu", "trainer.log_every_n_steps=7", "compile=true", "gradient_checkpointing=true"),
    *("data.num_workers=9", "data.root=/elsewhere", "data.prepared=/there", "data.pictures.in_memory=true"),
    *("paths.root_dir=/moved", "paths.data_dir=/disk", "paths.cache_dir=/scratch", "logger=wandb", "tags=[a]"),
    *("callbacks.samples.every_n_steps=9", "callbacks.checkpoint.every_n_steps=9", "callbacks.checkpoint.keep=1"),
    *("callbacks.routing.every_n_steps=9", "sampler.batch_size=7", "sweep_name=a", "resume=auto"),
)
CHANGES = (
    *("seed=1", "batch_size=8", "max_steps=7", "trainer.precision=32-true", "trainer.gradient_clip_val=2"),
    *("data.resolution=128", "data.flip=false", "data.pictures.split=null", "data.latents=false", "data=food101"),
    *("metrics.n=3", "sampler.steps=2", "callbacks.samples.n=3", "optimizer.lr=1", "ema.decay=0.5", "peft.lr=1"),
    *("pretrained=/a/network.safetensors", "name=other"),
)


def identity_of(tmp_path, *overrides):
    """Groups are composed; keys are set in what was composed, which is much faster."""
    groups = [text for text in overrides if text[0] == "~" or (ROOT / "configs" / text.partition("=")[0]).is_dir()]
    cfg = composed(tmp_path, *groups).copy()
    OmegaConf.set_struct(cfg, False)
    for text in overrides:
        if text not in groups:
            cfg.merge_with_dotlist([text])
    return roles.job_identity(cfg)


@cache
def composed(tmp_path, *groups):
    return compose(tmp_path, *groups)


def test_what_changes_no_result_starts_no_job_again(tmp_path):
    known = identity_of(tmp_path, "experiment=difffit_cub")
    for override in KEEPS:
        assert identity_of(tmp_path, "experiment=difffit_cub", override) == known, override
    for override in CHANGES:
        assert identity_of(tmp_path, "experiment=difffit_cub", override) != known, override
    patterns = [pattern for pattern in (*roles.SAME_RESULT, *roles.OF_PUBLISHED) if "*" not in pattern]
    assert {pattern.partition(".")[0] for pattern in patterns} <= set(ROLES)


def test_a_loss_of_micro_batches_knows_their_size(tmp_path):
    """balance=batch is of the micro-batch of a rank; balance=global of all ranks, and of the micro-batches so far.

    A folder of one's own is known by its place.
    """
    for scope, kept in (("batch", (False, False, False)), ("global", (True, True, False)), ("none", (True,) * 3)):
        chosen = ("~experiment", "model=dit_moe", "network=tiny_moe", f"balance={scope}")
        known = identity_of(tmp_path, *chosen)
        for override, same in zip(KEEPS[:3], kept, strict=True):
            assert (identity_of(tmp_path, *chosen, override) == known) is same, (scope, override)
    folders = {identity_of(tmp_path, "~experiment", "data=folder", f"data.root=/x/{name}") for name in "ab"}
    assert len(folders) == 2


def test_published_datasets_are_those_of_the_package():
    classes = [value for value in vars(data).values() if isinstance(value, type) and issubclass(value, data.Benchmark)]
    assert sorted(roles.PUBLISHED) == sorted(
        f"ditune.data.{cls.__name__}" for cls in classes if cls is not data.Benchmark
    )


def test_a_run_goes_on_under_the_same_key(tmp_path, pictures, monkeypatch):
    def key(*overrides, **added):
        cfg = compose(tmp_path, *SMALL, f"data.root={pictures}", "peft=full", *overrides)
        OmegaConf.set_struct(cfg, False)
        for name, value in added.items():
            cfg[name] = value
        return resume_key(cfg, build_components(cfg))

    known = key()
    assert set(known) == {
        *("network", "objective", "max_steps", "peft", "autoencoder", "optimizer", "scheduler", "ema", "base_sha256"),
        *("classes", "data", "flip", "augment", "batch_size", "precision", "gradient_clip_val", "seed", "balance"),
    }
    assert key("max_steps=9", "metrics.n=4", "callbacks.samples.n=1", "data.num_workers=1") == known
    for override in ("seed=1", "batch_size=8", "optimizer.lr=1", "ema.decay=0.5", "trainer.gradient_clip_val=2"):
        assert key(override) != known, override
    monkeypatch.setitem(ROLES, "critic", Role(Decides.TRAINING, neutral=None))
    assert key(critic=None) == known
    assert key(critic=0.5) == known | {"critic": 0.5}


def test_protocols_leave_neutral_values_out():
    values = {"n": 8, "guidance_rescale": 0.0}
    assert significant(values, roles.NEUTRAL_IN_PROTOCOLS) == {"n": 8}
    assert significant(values | {"guidance_rescale": 0.5}, roles.NEUTRAL_IN_PROTOCOLS)["guidance_rescale"] == 0.5
