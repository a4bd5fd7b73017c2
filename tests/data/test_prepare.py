"""Fetching, verifying and encoding: stages that repeat, share, survive, and refuse what is wrong."""

import io
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from PIL import Image

from ditune.autoencoders import PatchPCA
from ditune.commands.prepare import held_out_images, held_out_source, prepare, training_source
from ditune.commands.train import train
from ditune.config.instantiate import instantiate
from ditune.data import CUB, from_uint8, images
from ditune.data import prepare as preparing
from ditune.data.latents import FORMAT, Latents, Writer
from ditune.data.stream import ImageStream
from ditune.errors import UserError
from ditune.evaluation.held_out import CachedHeldOut, EncodedHeldOut
from ditune.files.locks import attempt, share
from forked import Forked, script
from helpers import SMALL, compose
from miniatures import cub, picture, put
from small_datasets import prepare_config, stamp


@pytest.fixture
def root(tmp_path: Path) -> Path:
    cub(tmp_path / "cub")
    return tmp_path / "cub"


BIRD = "CUB_200_2011/images/002.Laysan_Albatross/Laysan_Albatross_0002_796002.jpg"
LATENTS = "prepared/latents/train_16_patchpca_16"


# The stages


def test_everything_is_made_once_and_stages_repeat_alone(root):
    cfg = prepare_config(root)
    prepare(cfg)
    made = stamp(root / "prepared")
    assert {"manifest.csv", "report.json", "latents/train_16_patchpca_16/header.json"} <= made.keys()
    assert not [name for name in made if "pieces" in name or ".checking" in name]
    prepare(cfg)
    again = stamp(root / "prepared")
    assert {k: v for k, v in again.items() if k != "report.json"} == {
        k: v for k, v in made.items() if k != "report.json"
    }
    prepare(prepare_config(root, "stages=[encode]", "again=true"))
    assert stamp(root / "prepared")["latents/train_16_patchpca_16/latents.npy"] > made[f"{LATENTS[9:]}/latents.npy"]
    report = json.loads((root / "prepared" / "report.json").read_text())
    assert report["pictures"] == {"train": 12, "test": 3}
    assert report["differs_from_published"]


def test_latents_are_those_of_the_autoencoder(root):
    cfg = prepare_config(root)
    prepare(cfg)
    pictures, autoencoder = instantiate(cfg.data.pictures, "data"), instantiate(cfg.autoencoder, "autoencoder")
    latents = training_source(with_latents(cfg), pictures, autoencoder)
    assert isinstance(latents, Latents)
    mirrored = torch.tensor([False, True, True, False])
    moments, labels = latents.take([3, 0, 11, 3], mirrored)
    pixels, expected_labels = pictures.take([3, 0, 11, 3], mirrored)
    expected, _ = autoencoder.encode(from_uint8(pixels))
    assert moments.shape == (4, 1, 16, 4, 4)
    assert torch.equal(moments[:, 0], expected.half())
    assert torch.equal(labels, expected_labels)


def with_latents(cfg: DictConfig) -> DictConfig:
    cfg.data.latents = True
    return cfg


def test_the_stream_gives_the_same_images_and_flips_from_the_cache(root):
    cfg = prepare_config(root)
    prepare(cfg)
    pictures, autoencoder = instantiate(cfg.data.pictures, "data"), instantiate(cfg.autoencoder, "autoencoder")
    latents = training_source(cfg, pictures, autoencoder)
    positions = list(range(30))
    pixels, labels, _ = ImageStream(pictures, seed=3, flip=True).__getitems__(positions)
    moments, again, _ = ImageStream(latents, seed=3, flip=True).__getitems__(positions)
    assert torch.equal(moments[:, 0], autoencoder.encode(from_uint8(pixels))[0].half())
    assert torch.equal(labels, again)


# Training


def training(folder: Path, root: Path, *overrides: str) -> DictConfig:
    options = [option for option in SMALL if not option.startswith("data")]
    return compose(
        folder,
        *(*options, "data=cub", f"data.root={root}", "data.resolution=16", "data.num_workers=0", "peft=full"),
        *("autoencoder=patch_pca", "max_steps=2", *overrides),
    )


def losses(folder: Path) -> list[float]:
    lines = (folder / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("train/loss")
    return [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]]


def test_training_prepares_and_reads_only_the_cache(root, tmp_path, monkeypatch):
    assert train(training(tmp_path / "pixels", root, "data.latents=false")) == 0
    assert not (root / "prepared").exists()
    assert train(training(tmp_path / "cached", root)) == 0  # checks and encodes first
    assert (root / LATENTS / "header.json").is_file()
    torch.testing.assert_close(losses(tmp_path / "cached"), losses(tmp_path / "pixels"), rtol=1e-3, atol=0)

    encode = PatchPCA.encode

    def no_batch(self, x):
        assert len(x) == 3, "a training batch was encoded"  # the three test pictures are, for the loss on them
        return encode(self, x)

    monkeypatch.setattr(PatchPCA, "encode", no_batch)
    assert train(training(tmp_path / "again", root)) == 0
    assert losses(tmp_path / "again") == losses(tmp_path / "cached")


def test_a_stale_or_foreign_cache_is_refused(root, tmp_path):
    prepare(prepare_config(root))
    cached = root / LATENTS
    with pytest.raises(UserError, match="no latent cache"):
        Latents(cached.with_name("train_32_patchpca_16"), {})
    header = json.loads((cached / "header.json").read_text())
    for key in ("manifest", "autoencoder", "transform", "split"):
        with pytest.raises(UserError, match=f"something else: {key} differ"):
            Latents(cached, header | {key: "another"})
    put(root / BIRD, picture(99))  # another picture of a training: the manifest is made anew
    prepare(prepare_config(root, "stages=[verify]"))
    with pytest.raises(UserError, match=r"manifest, pictures differ.*src/prepare\.py"):
        train(training(tmp_path / "run", root))
    prepare(prepare_config(root))
    assert train(training(tmp_path / "run", root)) == 0


def test_a_damaged_cache_is_refused(root):
    prepare(prepare_config(root))
    header = json.loads((root / LATENTS / "header.json").read_text())
    content = (root / LATENTS / "latents.npy").read_bytes()
    for bad in (content[: len(content) // 2], b"", b"\x80\x04pickle"):
        put(root / LATENTS / "latents.npy", bad)
        with pytest.raises(UserError, match="damaged"):
            Latents(root / LATENTS, header)
    prepare(prepare_config(root))
    assert (root / LATENTS / "latents.npy").read_bytes() == content


def test_labels_or_splits_that_changed_make_the_manifest_stale(root):
    prepare(prepare_config(root))
    path = root / "CUB_200_2011" / "train_test_split.txt"
    path.write_text(path.read_text().replace("1 1\n", "1 0\n", 1))
    with pytest.raises(UserError, match="of other images, labels or splits"):
        CUB(root, 16, manifest=root / "prepared" / "manifest.csv")


# Broken images


def bomb() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (20000, 20000)).save(buffer, "PNG")
    return buffer.getvalue()


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "the file is empty": lambda _: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "cannot identify": lambda _: b"<html>404</html>",
    "decompression bomb": lambda _: bomb(),
}


@pytest.mark.parametrize("problem", BROKEN)
def test_a_broken_image_stops_or_is_left_out(root, problem):
    put(root / BIRD, BROKEN[problem]((root / BIRD).read_bytes()))
    with pytest.raises(UserError, match=rf"1 of 15 images are broken: .*{problem}.*policy=skip"):
        prepare(prepare_config(root))
    assert not (root / "prepared" / "manifest.csv").exists()
    prepare(prepare_config(root, "policy=skip"))
    report = json.loads((root / "prepared" / "report.json").read_text())
    assert problem in report["left_out"]["0:" + BIRD.removeprefix("CUB_200_2011/")]
    assert len(CUB(root, 16, manifest=root / "prepared" / "manifest.csv")) == 11
    assert np.load(root / LATENTS / "labels.npy").shape == (11,)
    with pytest.raises(UserError, match="broken"):
        prepare(prepare_config(root))


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_fingerprint_is_the_same_with_a_manifest(root, split):
    before = CUB(root, 16, split=split).fingerprint
    prepare(prepare_config(root))
    after = CUB(root, 16, split=split, manifest=root / "prepared" / "manifest.csv")
    assert after.checksums
    assert after.fingerprint == before  # else a run that began before there was a manifest could not be resumed


def test_a_missing_image_is_reported_and_its_return_noticed(root):
    content = (root / BIRD).read_bytes()
    (root / BIRD).unlink()
    with pytest.raises(UserError, match="no such file"):
        prepare(prepare_config(root))
    put(root / BIRD, content)
    prepare(prepare_config(root))
    assert len(CUB(root, 16, manifest=root / "prepared" / "manifest.csv")) == 12


# Stopped, shared, without room


def test_latents_have_the_same_bits_whatever_decodes(root, monkeypatch):
    """By the encoding thread itself, and by two threads that run ahead of it."""
    found = []
    for threads in (0, 2):
        with monkeypatch.context() as patch:
            patch.setattr(os, "cpu_count", lambda: 2)
            if not threads:
                for module in (preparing, images):
                    patch.setattr(module, "ahead", lambda work, items, waiting: map(work, items))
            prepare(prepare_config(root, "again=true"))
        found.append((root / LATENTS / "latents.npy").read_bytes())
    assert found[0] == found[1]


def test_an_encoding_that_was_stopped_goes_on(root, monkeypatch):
    monkeypatch.setattr(preparing, "PIECE", 4)
    encoded = preparing._encoded
    calls = []

    def stops(pictures, rows, *rest):
        calls.append(rows[0])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encoded(pictures, rows, *rest)

    monkeypatch.setattr(preparing, "_encoded", stops)
    with pytest.raises(KeyboardInterrupt):
        prepare(prepare_config(root))
    assert not (root / LATENTS).exists()
    prepare(prepare_config(root))
    assert calls == [0, 4, 4, 8, 0]  # the first piece was not done again; the last is of the held-out images
    monkeypatch.setattr(preparing, "_encoded", encoded)
    whole = (root / LATENTS / "latents.npy").read_bytes()
    prepare(prepare_config(root, "stages=[encode]", "again=true"))
    assert (root / LATENTS / "latents.npy").read_bytes() == whole


def test_a_full_disk_leaves_nothing_that_passes_for_whole(root, monkeypatch):
    prepare(prepare_config(root, "stages=[verify]"))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ditune.data.latents.os.pwrite", full)
        with pytest.raises(UserError, match=r"No space left.*data\.prepared"):
            prepare(prepare_config(root))
    assert not (root / LATENTS).exists()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 10))
        with pytest.raises(UserError, match=r"need 12,\d+ bytes|need \d"):
            prepare(prepare_config(root))
    prepare(prepare_config(root))
    assert (root / LATENTS / "header.json").exists()


def test_a_cache_folder_that_cannot_be_written(root, tmp_path):
    put(tmp_path / "file", "not a folder")
    with pytest.raises(UserError, match=r"Cannot write to .*data\.prepared=<another folder>"):
        prepare(prepare_config(root, f"data.prepared={tmp_path}/file/prepared"))


def test_pieces_are_shared_and_those_of_the_dead_are_taken_up(tmp_path):
    done: list[list[int]] = [[], []]
    start = threading.Barrier(2)

    def process(k: int) -> None:
        def work(i: int) -> None:
            if not done[k]:
                start.wait(10)  # both are at a piece at the same time
            done[k].append(i)

        share(tmp_path, 12, work, lambda: False)

    threads = [threading.Thread(target=process, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(done[0] + done[1]) == list(range(12))
    assert all(done)
    with attempt(tmp_path / "x.lock") as mine, attempt(tmp_path / "x.lock") as second:
        assert mine
        assert not second
    with attempt(tmp_path / "x.lock") as mine:
        assert mine
    with attempt(tmp_path / "gone" / "x.lock") as mine:
        assert not mine


def test_two_that_start_at_once_make_one_cache(root):
    command = ["src/prepare.py", f"data.root={root}", f"paths.cache_dir={root}/cache"]
    command += ["data.resolution=16", "autoencoder=patch_pca"]
    processes = [Forked(script(*command), root.parent / f"{k}.log") for k in range(2)]
    for process in processes:
        assert process.wait(120) == 0, process.out.read_text()
        assert "published are 5,994" in process.out.read_text()
    first = (root / LATENTS / "latents.npy").read_bytes()
    prepare(prepare_config(root, "stages=[encode]", "again=true"))
    assert (root / LATENTS / "latents.npy").read_bytes() == first
    left = [p.name for p in (root / "prepared" / "latents").iterdir() if not p.name.endswith(".lock")]
    assert sorted(left) == ["test_16_patchpca_16_means", "train_16_patchpca_16"]
    assert list((root / "cache" / "features").glob("efflite0-*"))  # the statistics


def test_rows_of_other_shapes_are_not_written(tmp_path):
    writer = Writer(tmp_path, {"format": FORMAT, "shape": [4, 2, 1, 3, 2, 2]})
    for rows in (torch.zeros(1, 2, 1, 3, 2, 3, dtype=torch.float16), torch.zeros(1, 2, 1, 3, 2, 2)):
        with pytest.raises(ValueError, match="do not fit"):
            writer.write(0, rows)
    writer.close()


def test_what_is_no_image_and_what_nothing_trains_is_said(tmp_path, caplog):
    for name in ("train/cat/0.png", "train/dog/0.png", "test/owl/0.png", "train/cat/notes.txt", "train/a.svg"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(path) if name.endswith(".png") else path.touch()
    prepare(prepare_config(tmp_path / "data", "data=folder", "stages=[verify]"))
    report = json.loads((tmp_path / "data.prepared" / "report.json").read_text())
    assert report["not_images"] == {".svg": 1, ".txt": 1}
    assert report["classes_without_training_images"] == ["owl"]
    assert any("2 files are no images: .svg 1, .txt 1" in note for note in report["notes"])
    assert all(note in caplog.text for note in report["notes"])


def test_held_out_images_are_encoded_once_for_all_runs(root, monkeypatch):
    """The cache holds what encoding gives, to the bit, and the next run does not encode."""
    cfg = with_latents(prepare_config(root))
    prepare(cfg)
    images, autoencoder = held_out_images(cfg), instantiate(cfg.autoencoder, "autoencoder")
    direct = EncodedHeldOut(images, autoencoder).batch(range(len(images)), torch.device("cpu"))
    monkeypatch.setattr(preparing, "_encoded", lambda *_: pytest.fail("it encodes again"))
    source = held_out_source(cfg, images, autoencoder)
    assert isinstance(source, CachedHeldOut)
    cached = source.batch(range(len(images)), torch.device("cpu"))
    for one, two in zip(direct, cached, strict=True):
        assert torch.equal(one, two)
