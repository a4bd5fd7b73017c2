"""Parquet files of image bytes, as `datasets` exports them, stand where folders of images stand."""

import copy
import json
import sys
import zlib
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from ditune.commands.prepare import prepare
from ditune.config.instantiate import instantiate
from ditune.data import ImageDataset
from ditune.data import parquet_reader as reader_module
from ditune.data.sources import open_source
from ditune.errors import UserError
from ditune.evaluation.image_files import ImageFiles
from small_datasets import identity, make, png, prepare_config

pa = pytest.importorskip("pyarrow", reason="pyarrow, which only Parquet files need, is not installed")
pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow, which only Parquet files need, is not installed")


def write(path: Path, labels: list, names: list[str] | None = None, groups: int = 4, first: int = 0, **columns) -> Path:
    """A file of gray images, each darker than the next, in row groups of a few."""
    images = [{"bytes": png((first + i,) * 3), "path": f"{i}.png"} for i in range(len(labels))]
    table = pa.table({"image": pa.array(images), "label": pa.array(labels), **columns})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=groups)
    return path


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """Two files of ten training images and one of five others, as in a repository of the hub."""
    names = ["cat", "dog"]
    for i in range(2):
        write(tmp_path / f"export/data/train-{i:05d}-of-00002.parquet", [0, 1, 0, 1, 1], names, first=5 * i)
    write(tmp_path / "export/data/validation-00000-of-00001.parquet", [0, 1, 0, -1, None], names, first=10)
    make(tmp_path / "export", {"README.md": b"", "data/.cache": b""})
    return tmp_path / "export"


def test_class_names_and_splits_are_those_of_the_export(export):
    train, val = ImageDataset(export, 8, "train"), ImageDataset(export, 8, "validation")
    assert train.class_names == ["cat", "dog"]
    assert train.labels.tolist() == [0, 1, 0, 1, 1] * 2
    assert train.names[5] == "data/train-00001-of-00002.parquet/00000000"
    assert train.rows[1] == {"file_name": train.names[1], "label": "dog"}
    assert train.load()[:, 0, 0, 0].tolist() == list(range(10))
    assert val.load()[:, 0, 0, 0].tolist() == [10, 11, 12]  # the others have no label
    assert any("because they have no label in 'label': 2" in note for note in val.notes)


def test_it_reads_like_any_source(export):
    source = open_source(export)
    name = source.names[7]
    content = source.read(name)
    assert content == png((7, 7, 7))
    assert source.size(name) == len(content)
    assert source.crc(name) == zlib.crc32(content)
    whole = ImageDataset(export, 8, "train").load()
    pictures = ImageDataset(export, 8, "train", in_memory=False)
    assert torch.equal(copy.deepcopy(pictures)[3][0], whole[3])
    loader = DataLoader(pictures, 4, collate_fn=identity, num_workers=2)  # the parent has read before they fork
    assert torch.equal(torch.cat([batch for batch, _ in loader]), whole)


def test_one_row_group_is_read_for_an_image(export, monkeypatch):
    monkeypatch.setattr(reader_module, "KEPT", 1)  # byte
    read, groups = pq.ParquetFile.read_row_group, []
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *a, **k: groups.append(a[1]) or read(*a, **k))
    pictures = ImageDataset(export, 8, "train", in_memory=False)
    assert groups == []
    pictures.__getitems__([4, 4, 0, 3])
    assert groups == [1, 0]


def test_text_labels_and_a_hashed_split_without_names_of_splits(tmp_path):
    path = write(tmp_path / "birds.parquet", ["owl", "jay"] * 50, style=pa.array(["a"] * 100))
    train, test = ImageDataset(path, 8, "train"), ImageDataset(path, 8, "test")
    assert train.class_names == ["jay", "owl"]
    assert len(train) + len(test) == 100
    assert 3 < len(test) < 20
    assert ImageDataset(path, 8, class_column="style").class_names == ["a"]
    alone = ImageDataset(write(tmp_path / "b" / "train.parquet", ["owl"] * 100).parent, 8, "test")
    assert 3 < len(alone) < 20
    assert "There is only the split 'train'" in alone.notes[0]


def test_numbers_are_classes_and_no_label_is_one_class(tmp_path):
    path = write(tmp_path / "a.parquet", [3, 10, 3], split=pa.array(["Train", "valid", "train"]))
    assert ImageDataset(path, 8).class_names == ["10", "3"]
    assert len(ImageDataset(path, 8, "val")) == 1
    table = pq.read_table(path).drop_columns(["label"])
    pq.write_table(table, tmp_path / "b.parquet")
    pictures = ImageDataset(tmp_path / "b.parquet", 8)
    assert pictures.class_names == ["all"]
    assert "has no column 'label', so all images are one class; other columns: split." in pictures.notes[0]


def test_bytes_without_a_path_and_missing_files(tmp_path):
    table = pa.table({"img": pa.array([png(), None]), "labels": pa.array(["x", "y"])})
    pq.write_table(table, tmp_path / "train-00001-of-00003.parquet")
    pictures = ImageDataset(tmp_path, 8)
    assert pictures.class_names == ["x", "y"]
    assert "Only 1 of the 3 files train-*-of-00003" in pictures.notes[0]
    with pytest.raises(UserError, match=r"cannot be read .*holds no bytes"):
        pictures.load()
    assert [open_source(tmp_path).size(name) > 0 for name in pictures.names] == [True, False]


@pytest.mark.parametrize(
    ("files", "kwargs", "message"),
    [
        ({"train.parquet": [0]}, {"class_column": "kind"}, "has no column 'kind', which class_column .* these: label"),
        ({"train.parquet": [0]}, {"class_column": "image"}, "The column 'image' of .* names no class"),
        ({"train.parquet": [[0, 1]]}, {}, "The column 'label' of .* names no class"),
        ({"train.parquet": [0], "training.parquet": [0]}, {}, "'train' and 'training' in .* both name the split"),
        ({"train.parquet": [0], "more.parquet": [0]}, {}, "more.parquet beside it names none"),
        ({"train.parquet": [0, 2]}, {"names": ["cat", "dog"]}, "has the label 2 .* its schema names 2 classes"),
        ({"train.parquet": [-1]}, {"names": ["cat", "dog"]}, "There are no images in .* with a label in 'label'"),
        ({"train.parquet": b"PAR1"}, {}, "train.parquet is no whole Parquet file"),
    ],
)
def test_mistakes_are_named(tmp_path, files, kwargs, message):
    for name, labels in files.items():
        if isinstance(labels, bytes):
            make(tmp_path / "a", {name: labels})
        else:
            write(tmp_path / "a" / name, labels, kwargs.get("names"))
    with pytest.raises(UserError, match=message):
        ImageDataset(tmp_path / "a", 8, class_column=kwargs.get("class_column"))


def test_columns_of_images_must_be_clear(tmp_path):
    table = pa.table({"left": pa.array([png()]), "right": pa.array([png()])})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"it has several \(left, right\)"):
        ImageDataset(tmp_path, 8)
    pq.write_table(table.append_column("image", pa.array([png()])), tmp_path / "a.parquet")
    assert len(ImageDataset(tmp_path, 8)) == 1
    pq.write_table(pa.table({"text": pa.array(["x"])}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"it has none\. Its columns are: text"):
        ImageDataset(tmp_path, 8)


def test_without_pyarrow_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", [0])
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        ImageDataset(path, 8)
    with pytest.raises(UserError, match="Unpack it: Parquet files are read"):
        ImageDataset(make(tmp_path / "a.zip", {"data/train.parquet": path.read_bytes()}), 8)


def test_images_beside_parquet_files_come_first(tmp_path):
    write(tmp_path / "cat" / "a.parquet", [0])
    pictures = ImageDataset(make(tmp_path, {"cat/0.png": png()}), 8)
    assert pictures.class_names == ["cat"]
    assert pictures.not_images == {".parquet": 1}


def test_images_to_evaluate_are_no_parquet(export):
    with pytest.raises(UserError, match=r"is Parquet, which data\.root= reads"):
        ImageFiles(export, 16)


def test_it_is_verified_and_encoded_as_folders_are(export):
    cfg = prepare_config(export, "data=folder", "data.resolution=16")
    prepare(cfg)
    prepared = export.with_name("export.prepared")
    assert json.loads((prepared / "report.json").read_text())["pictures"] == {"train": 10, "val": 3}
    assert instantiate(cfg.data.pictures, "data").fingerprint == ImageDataset(export, 16, "train").fingerprint
    assert (prepared / "latents" / "train_16_patchpca_16" / "header.json").is_file()
