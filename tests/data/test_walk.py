"""Files below a folder: each once, whatever links there are."""

import os
from pathlib import Path

import pytest

from ditune.data import ImageDataset
from ditune.data.walk import files_below
from ditune.errors import UserError
from small_datasets import make, png, tree


def test_a_loop_ends_and_changes_nothing(tmp_path):
    plain = ImageDataset(make(tmp_path / "plain", tree()), 8)
    path = make(tmp_path / "looped", tree())
    (path / "cat" / "loop").symlink_to(".")
    (path / "dog" / "up").symlink_to(tmp_path)
    (path / "itself").symlink_to("itself")
    looped = ImageDataset(path, 8)
    assert looped.fingerprint == plain.fingerprint
    assert "because they lead to what is there under another name: 2 (cat/loop, dog/up)" in looped.notes[0]


def test_link_farms_are_read_once(tmp_path):
    store = make(tmp_path / "store", tree())
    farm = tmp_path / "farm"
    (farm / "files").mkdir(parents=True)
    for name in ("cat", "dog"):
        (farm / name).symlink_to(store / name)
    for i in range(3):
        (farm / "files" / f"{i}.png").symlink_to(store / "eel" / f"{i}.png")
    pictures = ImageDataset(farm, 8)
    assert pictures.class_names == ["cat", "dog", "files"]
    assert len(pictures) == 9
    assert pictures.notes == []
    (farm / "again").symlink_to(store / "cat")  # the first of the sorted names is kept
    (farm / "files" / "copy.png").symlink_to(store / "eel" / "0.png")
    (farm / "files" / "gone.png").symlink_to(store / "gone.png")
    names, passed = files_below(farm)
    assert passed == ["cat", "files/copy.png"]
    assert "files/gone.png" in names  # verify says that there is no such file


def test_a_real_file_comes_before_links_to_it(tmp_path):
    path = make(tmp_path, tree())
    (path / "all").mkdir()
    (path / "all" / "0.png").symlink_to("../cat/0.png")
    (path / "aa").symlink_to("cat")
    assert files_below(path) == (sorted(tree()), ["aa", "all/0.png"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    path = make(tmp_path, tree())
    (path / "cat").chmod(0)
    with pytest.raises(UserError, match=r"cat cannot be read"):
        ImageDataset(path, 8)


def test_a_name_that_is_no_text_is_named(tmp_path):
    try:
        Path(os.fsdecode(os.fsencode(make(tmp_path, tree())) + b"/cat/\xff.png")).write_bytes(png())
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(UserError, match="is no UTF-8"):
        ImageDataset(tmp_path, 8)
