"""Files that claim absurd sizes, images that were exchanged, and flipped bits in every file that is ours."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ditune.checkpoints import load_adapter, save_adapter
from ditune.commands.prepare import prepare
from ditune.data import ImageDataset
from ditune.data import sources as sources_module
from ditune.data.archives import unpack
from ditune.errors import UserError
from ditune.evaluation.image_arrays import ArrayImages
from ditune.metrics.inception import read_statistics
from ditune.peft import build_peft
from peft_helpers import build_base
from small_datasets import make, png, prepare_config, tree

# Bounds before memory is taken


def zip_with(path: Path, name: str, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for other, data in tree().items():
            archive.writestr(other, data)
        archive.writestr(name, content)
    return path


def test_an_image_that_unpacks_to_nonsense_is_not_unpacked(tmp_path):
    dataset = ImageDataset(zip_with(tmp_path / "a.zip", "cat/bomb.png", bytes(20 * 2**20)), 8)
    with pytest.raises(UserError, match=r"cat/bomb\.png .*claims 20,971,520 bytes in \d\d,\d{3} packed ones"):
        dataset.load()


def test_an_image_larger_than_any_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sources_module, "LARGEST", 1000)
    monkeypatch.setattr(sources_module, "LARGEST_TABLE", 2000)
    dataset = ImageDataset(zip_with(tmp_path / "a.zip", "cat/large.png", bytes(1500)), 8)
    with pytest.raises(UserError, match=r"cat/large\.png .*claims 1,500 bytes, and up to 1,000 are read"):
        dataset.load()
    with pytest.raises(UserError, match=r"metadata\.csv .*claims 2,001 bytes, and up to 2,000"):
        ImageDataset(zip_with(tmp_path / "b.zip", "metadata.csv", b"x" * 2001), 8)


def test_an_entry_gives_no_more_than_it_says(tmp_path):
    """Its directory says 10 bytes; unpacked, it would be a megabyte."""
    path = zip_with(tmp_path / "a.zip", "cat/liar.png", bytes(2**20))
    content = path.read_bytes()
    path.write_bytes(content.replace((2**20).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    with pytest.raises(UserError, match=r"cat/liar\.png .*Bad CRC"):
        ImageDataset(path, 8).load()


def npy(shape: tuple[int, ...], content: bytes = b"") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue() + content


@pytest.mark.parametrize("ending", ["npy", "npz"])
def test_an_array_that_claims_terabytes_is_refused(tmp_path, ending):
    path, content = tmp_path / f"samples.{ending}", npy((2**31, 16, 16, 3), bytes(100))
    if ending == "npy":
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", content)
    for read in (ArrayImages, read_statistics):
        with pytest.raises(UserError, match=r"claims 1,536\.0 GiB of numbers, and 100 bytes are there"):
            read(path)


def test_an_array_larger_than_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ditune.files.arrays.host_memory", lambda: (500, 1000))
    (tmp_path / "samples.npy").write_bytes(npy((1, 16, 16, 3), bytes(768)))
    with pytest.raises(UserError, match="needs 768 bytes of memory, and 500 bytes are free"):
        ArrayImages(tmp_path / "samples.npy")


def test_a_member_larger_than_the_disk_is_not_unpacked(tmp_path):
    member = tarfile.TarInfo("cat/0.png")
    member.size = 2**60
    (tmp_path / "a.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    (tmp_path / "into").mkdir()
    with pytest.raises(UserError, match=r"free bytes, and 1,152,921,504,606,846,976 are needed"):
        unpack(tmp_path / "a.tar", tmp_path / "into")
    assert not any((tmp_path / "into").iterdir())


def test_row_groups_larger_than_memory_are_refused(tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": [png()] * 3, "label": ["cat", "dog", "eel"]}), tmp_path / "a.parquet")
    dataset = ImageDataset(tmp_path / "a.parquet", 8)
    monkeypatch.setattr("ditune.data.parquet_reader.host_memory", lambda: (10, 1000))
    with pytest.raises(UserError, match=r"Row group 0 of .*a\.parquet claims \d+ bytes, and 10 bytes of memory"):
        dataset.load()


@pytest.mark.parametrize(("method", "key"), [("lora", "r"), ("adaptformer", "bottleneck")])
def test_an_adapter_that_asks_for_an_absurd_rank_is_refused(tmp_path, method, key):
    network = build_base("dit")
    build_peft(method, lr=1e-3).apply(network)
    save_adapter(network, tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    (config if "peft_type" in config else config["peft"])[key] = 10**9
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"asks for {key}=1,000,000,000, and the widest layer here has \d+ values"):
        load_adapter(build_base("dit"), tmp_path)


# Images that were exchanged


@pytest.fixture(params=["data", "data.zip"])
def verified(request, tmp_path) -> tuple[Path, Path]:
    """Images, and the manifest of them."""
    path = make(tmp_path / request.param, tree())
    prepare(prepare_config(path, "data=folder", "data.resolution=8", "stages=[verify]"))
    return path, next(tmp_path.rglob("manifest.csv"))


def exchange(path: Path, content: bytes) -> None:
    """Another image under the name cat/1.png."""
    if path.suffix == ".zip":
        make(path, tree() | {"cat/1.png": content})
    else:
        (path / "cat" / "1.png").write_bytes(content)


def test_an_image_of_another_size_is_noticed_at_the_start(verified):
    path, manifest = verified
    before = ImageDataset(path, 8, manifest=manifest).fingerprint
    exchange(path, png((1, 2, 3), (64, 64)))
    with pytest.raises(UserError, match=r"cat/1\.png in .* is another file .*`python src/prepare\.py`.*again=true"):
        ImageDataset(path, 8, manifest=manifest)
    prepare(prepare_config(path, "data=folder", "data.resolution=8", "stages=[verify]", "again=true"))
    assert ImageDataset(path, 8, manifest=manifest).fingerprint != before


def test_an_image_of_the_same_size_is_noticed_when_it_is_decoded(verified):
    path, manifest = verified
    exchange(path, png((201, 31, 31)))
    assert len(png((201, 31, 31))) == len(tree()["cat/1.png"])
    dataset = ImageDataset(path, 8, manifest=manifest)
    with pytest.raises(UserError, match=r"cat/1\.png in .* is another file"):
        dataset.load()
    assert ImageDataset(path, 8).load().shape[0] == 9  # nothing is known of it
