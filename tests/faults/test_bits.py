"""Files that claim absurd sizes, images that were exchanged, and flipped bits in every file that is ours."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ditune.checkpoints import load_adapter, load_network, read_adapter, save_adapter, save_network
from ditune.commands.prepare import prepare
from ditune.data import ImageDataset
from ditune.data import sources as sources_module
from ditune.data.archives import unpack
from ditune.data.latents import MEANS, Latents, Means, Writer
from ditune.data.manifest import read_manifest
from ditune.errors import UserError
from ditune.evaluation.image_arrays import ArrayImages
from ditune.files.atomic import sha256
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


# Networks and adapters


def flip(path: Path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


def header_size(path: Path) -> int:
    """Of a safetensors file, with the eight bytes before it."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def every_kind(path: Path) -> list[int]:
    """Bytes of a safetensors file: in facts, names, shapes, hash, and at both ends of every tensor."""
    head = path.read_bytes()[: header_size(path)]
    content = json.loads(head[8:])
    ends = [header_size(path) + end for k, v in content.items() if "data_offsets" in v for end in v["data_offsets"]]
    words = [b"depth", b"content_sha256", b"ditune-network-1", b"x_embedder.proj.bias", b"shape", b"provenance"]
    return [*(head.index(word) + 3 for word in words if word in head), *(end - 1 for end in ends if end), ends[0]]


@pytest.mark.parametrize("parts", [False, True])
def test_a_flipped_bit_of_a_network_is_noticed(tmp_path, monkeypatch, parts):
    """Also where a large file is read in parts."""
    if parts:
        monkeypatch.setattr("ditune.checkpoints.loading.LARGE", 1000)
    network, path = build_base("dit"), tmp_path / "network.safetensors"
    save_network(path, network, {"kind": "diffusion"}, class_names=("cat", "dog"), by_step={1: 2.5})
    content = path.read_bytes()
    for byte in every_kind(path):
        flip(path, byte)
        with pytest.raises(UserError, match=r"network\.safetensors .*\. (Copy|Check|Give|Use|Correct)"):
            load_network(path)
        path.write_bytes(content)
    found = load_network(path).state_dict()
    assert all(value.equal(found[name]) for name, value in network.state_dict().items())


def test_a_network_file_of_before_has_no_hash(tmp_path):
    network, path = build_base("dit"), tmp_path / "network.safetensors"
    save_network(path, network, {})
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["ditune"])
    del header["content_sha256"]
    save_file(load_file(path), path, metadata={"ditune": json.dumps(header)})
    flip(path, -1)
    load_network(path)  # as it always did


@pytest.mark.parametrize("method", ["difffit", "lora"])
def test_a_flipped_bit_of_an_adapter_is_noticed(tmp_path, method):
    network, path = build_base("dit"), tmp_path / "adapter_model.safetensors"
    build_peft(method, lr=1e-3).apply(network)
    save_adapter(network, tmp_path)
    content = path.read_bytes()
    for byte in (header_size(path), len(content) // 2, -1):
        flip(path, byte)
        with pytest.raises(UserError, match=r"adapter_model\.safetensors is damaged: .* Copy the adapter again"):
            load_adapter(build_base("dit"), tmp_path)
        path.write_bytes(content)
    assert "content_sha256" not in read_adapter(tmp_path)[0]
    load_adapter(build_base("dit"), tmp_path)


# Latents


@pytest.fixture
def encoded(tmp_path) -> Path:
    """Images with their manifest and latents."""
    path = make(tmp_path / "data", tree(prefix="train/") | tree(prefix="test/"))
    prepare(prepare_config(path, "data=folder"))
    return path.with_name("data.prepared")


def caches(prepared: Path) -> list[tuple[Path, type]]:
    folder = prepared / "latents"
    return [(folder / "train_16_patchpca_16", Latents), (folder / "test_16_patchpca_16_means", Means)]


def test_a_flipped_bit_of_the_latents_is_noticed_where_it_is_used(encoded):
    for folder, kind in caches(encoded):
        header, path = json.loads((folder / "header.json").read_text()), folder / "latents.npy"
        rows = int(np.load(path).shape[0])
        content = path.read_bytes()
        flip(path, -1)
        cache = kind(folder, header)
        assert len(cache.take([0, 1])[0]) == 2
        with pytest.raises(UserError, match=rf"row {rows - 1} of latents\.npy is not what was written.*again=true"):
            cache.take(list(range(rows)), *([torch.ones(rows, dtype=torch.bool)] if kind is Latents else []))
        path.write_bytes(content)
        kind(folder, header).take(list(range(rows)))


@pytest.mark.parametrize("name", ["labels.npy", "checksums.npy"])
def test_a_flipped_bit_of_the_small_files_is_noticed_and_mended(encoded, name):
    for folder, kind in caches(encoded):
        header, content = json.loads((folder / "header.json").read_text()), (folder / name).read_bytes()
        for byte in (-1, -8, 9, 40):
            flip(folder / name, byte)
            with pytest.raises(UserError, match=r"latent cache .* is damaged.*src/prepare\.py"):
                kind(folder, header)
            (folder / name).write_bytes(content)
        flip(folder / name, -1)
    prepare(prepare_config(encoded.with_name("data"), "data=folder"))
    for folder, kind in caches(encoded):
        kind(folder, json.loads((folder / "header.json").read_text())).take([0])


def test_a_cache_of_before_has_no_checksums_and_needs_the_right_labels_and_types(encoded):
    folder, _ = caches(encoded)[0]
    header = json.loads((folder / "header.json").read_text())
    del header["sha256"]
    (folder / "header.json").write_text(json.dumps(header))
    (folder / "checksums.npy").unlink()
    labels, latents = np.load(folder / "labels.npy"), np.load(folder / "latents.npy")
    cache = Latents(folder, header, torch.from_numpy(labels))
    assert cache.take([3])[0].equal(torch.from_numpy(latents[[3], 0]))
    np.save(folder / "labels.npy", np.where(labels == 2, 99, labels))
    with pytest.raises(UserError, match="its labels are not those of the images"):
        Latents(folder, header, torch.from_numpy(labels))
    np.save(folder / "labels.npy", labels)
    np.save(folder / "latents.npy", latents.astype(np.float64))
    with pytest.raises(UserError, match="other shapes or types"):
        Latents(folder, header)


def test_a_cache_that_an_earlier_version_began_is_finished_without_checksums(tmp_path):
    header = {"format": MEANS, "shape": [2, 1, 2, 2]}
    (tmp_path / "latents.npy").write_bytes(b"")
    writer = Writer(tmp_path, header)
    writer.write(0, torch.ones(2, 1, 2, 2))
    writer.close()
    writer.finish(torch.zeros(2, dtype=torch.int64), header)
    assert Means(tmp_path, header).take([1])[0].equal(torch.ones(1, 1, 2, 2))
    assert not (tmp_path / "checksums.npy").exists()


# Manifests


@pytest.mark.parametrize("name", ["manifest.csv", "checked.csv"])
def test_a_flipped_bit_of_a_manifest_is_noticed(encoded, name):
    path, content = encoded / name, (encoded / name).read_bytes()
    places = [content.index(b"train", 90), content.index(b"\n"), content.rindex(b"#sha256"), content.rindex(b"\n#"), -9]
    for byte in (*places, *range(60, len(content), 97)):
        flip(path, byte)
        with pytest.raises(UserError, match=rf"{name} is damaged.*src/prepare\.py"):
            read_manifest(path)
        path.write_bytes(content)
    flip(path, content.index(b"train", 90))
    prepare(prepare_config(encoded.with_name("data"), "data=folder", "stages=[verify]"))
    assert path.read_bytes() == content


def test_a_manifest_of_before_has_no_checksum_and_its_latents_are_still_valid(encoded):
    rows, header = read_manifest(encoded / "manifest.csv"), caches(encoded)[0][0] / "header.json"
    for name in ("manifest.csv", "checked.csv"):
        content = (encoded / name).read_bytes()
        (encoded / name).write_bytes(content[: content.rindex(b"#sha256")])
    assert read_manifest(encoded / "manifest.csv") == rows
    assert json.loads(header.read_text())["manifest"] == sha256(encoded / "manifest.csv")
    written = header.stat().st_mtime_ns
    prepare(prepare_config(encoded.with_name("data"), "data=folder"))
    assert header.stat().st_mtime_ns == written


def test_the_manifest_of_the_same_images_is_the_same_file(tmp_path):
    path = make(tmp_path / "data", tree() | {"cat/9.png": b"no image"})
    files = []
    for _ in range(2):
        prepare(prepare_config(path, "data=folder", "stages=[verify]", "policy=skip", "again=true"))
        files.append((tmp_path / "data.prepared" / "manifest.csv").read_bytes())
    assert files[0] == files[1]
    assert b"cannot identify image file" in files[0]


def test_an_adapter_without_a_base_is_loaded_with_a_warning(tmp_path, caplog):
    network = build_base("dit")
    build_peft("difffit", lr=1e-3).apply(network)
    save_adapter(network, tmp_path)
    load_adapter(build_base("dit"), tmp_path)
    assert f"the adapter in {tmp_path} does not say which base file it was trained on" in caplog.text
