"""Every dataset has the same keys, so that a sweep over datasets can set each of them; the new ones change no hash."""

import pytest
from omegaconf import OmegaConf
from test_keys import leaves

from ditune.config.data_keys import check_data, unused
from ditune.config.keys import check
from ditune.config.roles import NEUTRAL_BELOW, job_hash
from ditune.errors import UserError
from helpers import ROOT, compose

DATA = sorted(path.stem for path in (ROOT / "configs" / "data").glob("[!_]*.yaml"))
# how each reader finds its images and their classes
OF_READERS = {"_target_", "root", "sources", "class_column", "classes", "partition"}


def data_of(tmp_path, name):
    return compose(tmp_path, "~experiment", f"data={name}").data


def test_all_data_configs_have_the_same_keys(tmp_path):
    keys = {}
    for name in DATA:
        found = set(leaves(OmegaConf.to_container(data_of(tmp_path, name))))
        keys[name] = found - {f"pictures.{key}" for key in OF_READERS}
    assert {"root", "resolution", "pictures.limit", "pictures.split", "num_workers"} <= keys["cub"]
    assert all(found == keys["cub"] for found in keys.values()), keys


def test_what_a_dataset_does_not_use_is_refused(tmp_path):
    assert {name: unused(data_of(tmp_path, name)) for name in ("cub", "emoji_base", "folder")} == {
        "cub": ["class_column", "classes"],
        "emoji_base": ["root", "class_column", "classes"],
        "folder": [],
    }
    for override, message in {
        "data=emoji_base data.root=/pictures": "data.root is set, but data=emoji_base does not use it.*data=folder",
        "data=cub data.class_column=label": "data.class_column is set, but data=cub does not use it",
        "data=cub data.root=null": "data.root is null",
        "data=folder data.root=null": "data.root is null",
        "data=cub data.pictures.limit=0": "limit",
        "data=sun397 data.pictures.partition=11": "partition",
    }.items():
        with pytest.raises(UserError, match=message):
            check(compose(tmp_path, "~experiment", *override.split()))
    check_data(OmegaConf.create({"data": None}))
    check(compose(tmp_path, "~experiment", "data=folder", "data.root=/pictures", "data.class_column=label"))


def test_keys_that_decide_nothing_change_no_hash(tmp_path):
    """The hashes of before are in test_roles.py; here is what makes them stay."""
    for name in ("emoji_base", "sun397"):
        cfg = compose(tmp_path, "~experiment", f"data={name}")
        known = job_hash(cfg)
        OmegaConf.set_struct(cfg, False)
        for key in unused(cfg.data):
            del cfg.data[key]
        for key in ("limit", "partition"):
            cfg.data.pictures.pop(key, None)
        assert job_hash(cfg) == known
    folder = compose(tmp_path, "~experiment", "data=folder", "data.root=/pictures")
    known = job_hash(folder)
    OmegaConf.set_struct(folder, False)
    del folder.data.pictures["class_column"]
    del folder.data["class_column"]  # it is as old as the dataset, so it stays in the hash
    assert job_hash(folder) != known
    assert job_hash(compose(tmp_path, "~experiment", "data=sun397", "data.pictures.partition=1")) != job_hash(
        compose(tmp_path, "~experiment", "data=sun397")
    )
    assert {neutral for name, neutral in NEUTRAL_BELOW.items() if ".pictures." in name} == {None}
