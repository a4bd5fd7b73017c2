"""Fetching, verifying and encoding: stages that repeat, share, survive, and refuse what is wrong."""

import hashlib
import http.server
import io
import json
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from PIL import Image

from ditune import cli
from ditune.autoencoders import PatchPCA
from ditune.commands import prepare as preparing
from ditune.commands.prepare import prepare
from ditune.commands.train import train
from ditune.config.instantiate import instantiate
from ditune.data import CUB, Caltech101, Flowers102, ImageNet
from ditune.data import archives as archives_module
from ditune.data.archives import Archive, install, unpack
from ditune.data.latents import Latents, Writer
from ditune.data.stream import PictureStream
from ditune.errors import UserError
from ditune.files.download import fetch, record_first_use
from ditune.files.locks import attempt, share
from helpers import ROOT, SMALL, compose
from miniatures import MINIATURES, SYNSETS, cub, picture, put


def config(root: Path, *overrides: str) -> DictConfig:
    """Of `prepare.py`, with codes of 4 x 4 pixels, without statistics."""
    cli.prepare()
    with hydra.initialize_config_dir(cli.CONFIGS, version_base="1.3"):
        return hydra.compose(
            "prepare",
            [
                *(f"data.root={root}", f"paths.cache_dir={root}/cache", "data.resolution=16", "autoencoder=patch_pca"),
                *("stages=[fetch,verify,encode]", "download=false", *overrides),
            ],
        )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    cub(tmp_path / "cub")
    return tmp_path / "cub"


BIRD = "CUB_200_2011/images/002.Laysan_Albatross/Laysan_Albatross_0002_796002.jpg"
LATENTS = "prepared/latents/train_16_patchpca_16"


def stamp(folder: Path) -> dict[str, int]:
    """When each file was written."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


# The stages


def test_everything_is_made_once_and_stages_repeat_alone(root):
    cfg = config(root)
    prepare(cfg)
    made = stamp(root / "prepared")
    assert {"manifest.csv", "report.json", "latents/train_16_patchpca_16/header.json"} <= made.keys()
    assert not [name for name in made if "pieces" in name or ".checking" in name]
    prepare(cfg)
    again = stamp(root / "prepared")
    assert {k: v for k, v in again.items() if k != "report.json"} == {
        k: v for k, v in made.items() if k != "report.json"
    }
    prepare(config(root, "stages=[encode]", "again=true"))
    assert stamp(root / "prepared")["latents/train_16_patchpca_16/latents.npy"] > made[f"{LATENTS[9:]}/latents.npy"]
    report = json.loads((root / "prepared" / "report.json").read_text())
    assert report["pictures"] == {"train": 12, "test": 3}
    assert report["differs_from_published"]


def test_latents_are_those_of_the_autoencoder(root):
    cfg = config(root)
    prepare(cfg)
    pictures, autoencoder = instantiate(cfg.data.pictures, "data"), instantiate(cfg.autoencoder, "autoencoder")
    latents = preparing.training_source(with_latents(cfg), pictures, autoencoder)
    assert isinstance(latents, Latents)
    mirrored = torch.tensor([False, True, True, False])
    moments, labels = latents.take([3, 0, 11, 3], mirrored)
    pixels, expected_labels = pictures.take([3, 0, 11, 3], mirrored)
    expected, _ = autoencoder.encode(preparing.from_uint8(pixels))
    assert moments.shape == (4, 1, 16, 4, 4)
    assert torch.equal(moments[:, 0], expected.half())
    assert torch.equal(labels, expected_labels)


def with_latents(cfg: DictConfig) -> DictConfig:
    cfg.data.latents = True
    return cfg


def test_the_stream_gives_the_same_pictures_and_flips_from_the_cache(root):
    cfg = config(root)
    prepare(cfg)
    pictures, autoencoder = instantiate(cfg.data.pictures, "data"), instantiate(cfg.autoencoder, "autoencoder")
    latents = preparing.training_source(cfg, pictures, autoencoder)
    positions = list(range(30))
    pixels, labels, _ = PictureStream(pictures, seed=3, flip=True).__getitems__(positions)
    moments, again, _ = PictureStream(latents, seed=3, flip=True).__getitems__(positions)
    assert torch.equal(moments[:, 0], autoencoder.encode(preparing.from_uint8(pixels))[0].half())
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
    prepare(config(root))
    cached = root / LATENTS
    with pytest.raises(UserError, match="no latent cache"):
        Latents(cached.with_name("train_32_patchpca_16"), {})
    header = json.loads((cached / "header.json").read_text())
    for key in ("manifest", "autoencoder", "transform", "split"):
        with pytest.raises(UserError, match=f"something else: {key} differ"):
            Latents(cached, header | {key: "another"})
    put(root / BIRD, picture(99))  # another picture of a training: the manifest is made anew
    prepare(config(root, "stages=[verify]"))
    with pytest.raises(UserError, match=r"manifest, pictures differ.*src/prepare\.py"):
        train(training(tmp_path / "run", root))
    prepare(config(root))
    assert train(training(tmp_path / "run", root)) == 0


def test_a_damaged_cache_is_refused(root):
    prepare(config(root))
    header = json.loads((root / LATENTS / "header.json").read_text())
    content = (root / LATENTS / "latents.npy").read_bytes()
    for bad in (content[: len(content) // 2], b"", b"\x80\x04pickle"):
        put(root / LATENTS / "latents.npy", bad)
        with pytest.raises(UserError, match="damaged"):
            Latents(root / LATENTS, header)
    prepare(config(root))
    assert (root / LATENTS / "latents.npy").read_bytes() == content


def test_labels_or_splits_that_changed_make_the_manifest_stale(root):
    prepare(config(root))
    path = root / "CUB_200_2011" / "train_test_split.txt"
    path.write_text(path.read_text().replace("1 1\n", "1 0\n", 1))
    with pytest.raises(UserError, match="of other pictures, labels or splits"):
        CUB(root, 16, manifest=root / "prepared" / "manifest.csv")


# Broken pictures


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
def test_a_broken_picture_stops_or_is_left_out(root, problem):
    put(root / BIRD, BROKEN[problem]((root / BIRD).read_bytes()))
    with pytest.raises(UserError, match=rf"1 of 15 pictures are broken: .*{problem}.*policy=skip"):
        prepare(config(root))
    assert not (root / "prepared" / "manifest.csv").exists()
    prepare(config(root, "policy=skip"))
    report = json.loads((root / "prepared" / "report.json").read_text())
    assert problem in report["left_out"]["0:" + BIRD.removeprefix("CUB_200_2011/")]
    assert len(CUB(root, 16, manifest=root / "prepared" / "manifest.csv")) == 11
    assert np.load(root / LATENTS / "labels.npy").shape == (11,)
    with pytest.raises(UserError, match="broken"):
        prepare(config(root))


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_fingerprint_is_the_same_with_a_manifest(root, split):
    before = CUB(root, 16, split=split).fingerprint
    prepare(config(root))
    after = CUB(root, 16, split=split, manifest=root / "prepared" / "manifest.csv")
    assert after.checksums
    assert after.fingerprint == before  # else a run that began before there was a manifest could not be resumed


def test_a_missing_picture_is_reported_and_its_return_noticed(root):
    content = (root / BIRD).read_bytes()
    (root / BIRD).unlink()
    with pytest.raises(UserError, match="no such file"):
        prepare(config(root))
    put(root / BIRD, content)
    prepare(config(root))
    assert len(CUB(root, 16, manifest=root / "prepared" / "manifest.csv")) == 12


# Stopped, shared, without room


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
        prepare(config(root))
    assert not (root / LATENTS).exists()
    prepare(config(root))
    assert calls == [0, 4, 4, 8]  # the first piece was not done again
    monkeypatch.setattr(preparing, "_encoded", encoded)
    whole = (root / LATENTS / "latents.npy").read_bytes()
    prepare(config(root, "stages=[encode]", "again=true"))
    assert (root / LATENTS / "latents.npy").read_bytes() == whole


def test_a_full_disk_leaves_nothing_that_passes_for_whole(root, monkeypatch):
    prepare(config(root, "stages=[verify]"))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ditune.data.latents.os.pwrite", full)
        with pytest.raises(UserError, match=r"No space left.*data\.prepared"):
            prepare(config(root))
    assert not (root / LATENTS).exists()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 10))
        with pytest.raises(UserError, match=r"need 12,\d+ bytes|need \d"):
            prepare(config(root))
    prepare(config(root))
    assert (root / LATENTS / "header.json").exists()


def test_a_cache_folder_that_cannot_be_written(root, tmp_path):
    put(tmp_path / "file", "not a folder")
    with pytest.raises(UserError, match=r"Cannot write to .*data\.prepared=<another folder>"):
        prepare(config(root, f"data.prepared={tmp_path}/file/prepared"))


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
    command = [sys.executable, ROOT / "src" / "prepare.py", f"data.root={root}", f"paths.cache_dir={root}/cache"]
    command += ["data.resolution=16", "autoencoder=patch_pca"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        text = process.communicate(timeout=120)[0]
        assert process.returncode == 0, text
        assert "published are 5,994" in text
    first = (root / LATENTS / "latents.npy").read_bytes()
    prepare(config(root, "stages=[encode]", "again=true"))
    assert (root / LATENTS / "latents.npy").read_bytes() == first
    left = [p.name for p in (root / "prepared" / "latents").iterdir() if not p.name.endswith(".lock")]
    assert left == ["train_16_patchpca_16"]
    assert list((root / "cache" / "features").glob("efflite0-*"))  # the statistics


def test_rows_of_other_shapes_are_not_written(tmp_path):
    writer = Writer(tmp_path, {"shape": [4, 2, 1, 3, 2, 2]})
    with pytest.raises(ValueError, match="do not fit"):
        writer.write(0, torch.zeros(1, 2, 1, 3, 2, 3, dtype=torch.float16))
    writer.close()


# Archives


def pack(folder: Path, path: Path) -> Path:
    """A tar or zip file of what is in `folder`."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(folder.rglob("*")):
                archive.write(file, file.relative_to(folder))
    else:
        with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as archive:
            for entry in sorted(folder.iterdir()):
                archive.add(entry, entry.name)
    return path


def known(archives: tuple[Archive, ...], root: Path) -> tuple[Archive, ...]:
    """The archives with the hashes of the files in `root`."""
    return tuple(Archive(**{**vars(a), "md5": hashlib.md5((root / a.file).read_bytes()).hexdigest()}) for a in archives)


def test_cub_is_unpacked_from_its_archive(tmp_path, monkeypatch):
    cub(tmp_path / "whole")
    root = tmp_path / "root"
    root.mkdir()
    pack(tmp_path / "whole", root / "CUB_200_2011.tgz")
    with pytest.raises(UserError, match="has the MD5"):
        CUB.fetch(root, download=False)
    monkeypatch.setattr(CUB, "archives", known(CUB.archives, root))
    CUB.fetch(root, download=False)
    assert len(CUB(root, 16)) == 12
    assert not list(root.glob(".unpacking*"))
    before = stamp(root)
    CUB.fetch(root, download=False)
    assert stamp(root) == before


def test_flowers_take_single_files(tmp_path, monkeypatch):
    MINIATURES["flowers102"](tmp_path / "whole")
    root, whole = tmp_path / "root", tmp_path / "whole" / "flowers-102"
    root.mkdir()
    for name in ("imagelabels.mat", "setid.mat"):
        shutil.move(whole / name, root / name)
    pack(whole, root / "102flowers.tgz")
    monkeypatch.setattr(Flowers102, "archives", known(Flowers102.archives, root))
    Flowers102.fetch(root, download=False)
    assert len(Flowers102(root, 16, split=None)) == 10


def test_caltech_and_imagenet_have_archives_inside(tmp_path, monkeypatch):
    MINIATURES["caltech101"](tmp_path / "whole")
    root, outer = tmp_path / "root", tmp_path / "outer"
    root.mkdir()
    shutil.rmtree(tmp_path / "whole" / "caltech101" / "Annotations")
    (outer / "caltech-101").mkdir(parents=True)
    pack(tmp_path / "whole" / "caltech101", outer / "caltech-101" / "101_ObjectCategories.tar.gz")
    put(outer / "__MACOSX" / "caltech-101" / "._101_ObjectCategories.tar.gz", b"a fork")
    pack(outer, root / "caltech-101.zip")
    monkeypatch.setattr(Caltech101, "archives", known(Caltech101.archives, root))
    Caltech101.fetch(root, download=False)
    assert Caltech101(root, 16).class_names == ["Faces", "accordion", "yin_yang"]

    MINIATURES["imagenet"](tmp_path / "imagenet")
    root, outer = tmp_path / "root2", tmp_path / "outer2"
    root.mkdir()
    outer.mkdir()
    for synset in SYNSETS:
        pack(tmp_path / "imagenet" / "train" / synset, outer / f"{synset}.tar")
    pack(outer, root / "ILSVRC2012_img_train.tar")
    pack(tmp_path / "imagenet" / "val", root / "ILSVRC2012_img_val.tar")
    shutil.rmtree(tmp_path / "imagenet" / "val")
    shutil.rmtree(tmp_path / "imagenet" / "train")
    pack(tmp_path / "imagenet", root / "ILSVRC2012_devkit_t12.tar.gz")
    monkeypatch.setattr(ImageNet, "archives", known(ImageNet.archives, root))
    ImageNet.fetch(root, download=False)
    assert len(ImageNet(root, 16, split=None)) == 16


def evil_tar(path: Path, change: Callable[[tarfile.TarInfo], None]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo("CUB_200_2011/x")
        info.size = 3
        change(info)
        archive.addfile(info, io.BytesIO(b"abc") if info.isreg() else None)
    return path


def linked(info: tarfile.TarInfo, kind: bytes) -> None:
    info.type, info.linkname, info.size = kind, "/etc/passwd", 0


EVIL: dict[str, Callable[[tarfile.TarInfo], None]] = {
    "above": lambda info: setattr(info, "name", "../../evil"),
    "absolute": lambda info: setattr(info, "name", "/tmp/evil"),
    "symlink": lambda info: linked(info, tarfile.SYMTYPE),
    "hard link": lambda info: linked(info, tarfile.LNKTYPE),
    "device": lambda info: linked(info, tarfile.CHRTYPE),
}


@pytest.mark.parametrize("kind", EVIL)
def test_entries_that_leave_the_folder_are_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(archives_module, "check_md5", lambda *_: None)
    evil_tar(tmp_path / "CUB_200_2011.tgz", EVIL[kind])
    with pytest.raises(UserError, match="Do not trust this file"):
        CUB.fetch(tmp_path, download=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["CUB_200_2011.tgz"]


def test_zip_entries_that_leave_the_folder_are_refused(tmp_path):
    for name, mode in (("../evil", 0o100644), ("C:/evil", 0o100644), ("link", 0o120777)):
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, "/etc/passwd")
        (tmp_path / "out").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="Do not trust"):
            unpack(tmp_path / "x.zip", tmp_path / "out")
        assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("name", ["x.tgz", "x.zip", "x.tar"])
@pytest.mark.parametrize("share_kept", [0, 0.5, 0.7])
def test_a_truncated_archive_leaves_nothing(tmp_path, name, share_kept):
    cub(tmp_path / "whole")
    root = tmp_path / "root"
    root.mkdir()
    content = pack(tmp_path / "whole", tmp_path / name).read_bytes()
    put(root / name, content[: int(len(content) * share_kept)])
    with pytest.raises(UserError, match="cannot be unpacked"):
        install(Archive(name, makes="CUB_200_2011"), root, download=False)
    assert {p.name for p in root.iterdir()} <= {name, f"{name}.json"}


# The network


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `content`, with ranges; breaks off after `limit` bytes as long as `breaks` is not used up."""

    content, breaks, limit, ranges, requests = b"", 0, 0, True, []

    def do_GET(self) -> None:
        cls = type(self)
        wanted = self.headers.get("Range") if cls.ranges else None
        cls.requests.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if self.path == "/missing":
            return self.send_error(404)
        if start >= len(cls.content) and wanted:
            return self.send_error(416)
        body = cls.content[start:]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if cls.breaks:
            cls.breaks -= 1
            body = body[: cls.limit]
        return self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server(monkeypatch) -> Iterator[str]:
    monkeypatch.setattr("ditune.files.download.PAUSE", 0)
    Handler.content, Handler.breaks, Handler.limit, Handler.ranges, Handler.requests = (
        bytes(range(250)) * 40,
        0,
        0,
        True,
        [],
    )
    service = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{service.server_port}"
    service.shutdown()


def md5() -> str:
    return hashlib.md5(Handler.content).hexdigest()


def test_a_download_that_breaks_off_goes_on(server, tmp_path):
    Handler.breaks, Handler.limit = 2, 3000
    fetch(f"{server}/x", tmp_path / "x", md5())
    assert (tmp_path / "x").read_bytes() == Handler.content
    assert Handler.requests == [None, "bytes=3000-", "bytes=6000-"]
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_part_of_an_earlier_process_is_gone_on_from(server, tmp_path):
    put(tmp_path / "x.part", Handler.content[:4321])
    fetch(f"{server}/x", tmp_path / "x", md5())
    assert Handler.requests == ["bytes=4321-"]
    put(tmp_path / "y.part", Handler.content)  # only the renaming was missing
    fetch(f"{server}/y", tmp_path / "y", md5())
    assert (tmp_path / "y").read_bytes() == Handler.content


def test_a_server_without_ranges_starts_again(server, tmp_path):
    Handler.ranges = False
    put(tmp_path / "x.part", b"old")
    fetch(f"{server}/x", tmp_path / "x", md5())
    assert (tmp_path / "x").read_bytes() == Handler.content


def test_a_wrong_checksum_is_refused_and_the_next_try_starts_afresh(server, tmp_path):
    put(tmp_path / "x.part", b"wrong")
    with pytest.raises(UserError, match="has the MD5"):
        fetch(f"{server}/x", tmp_path / "x", md5())
    assert not list(tmp_path.iterdir())
    fetch(f"{server}/x", tmp_path / "x", md5())


def test_what_cannot_be_fetched_is_said(server, tmp_path):
    with pytest.raises(UserError, match=r"/missing cannot be fetched .*404.* put it at .*/x"):
        fetch(f"{server}/missing", tmp_path / "x")
    Handler.breaks, Handler.limit = 99, 100
    with pytest.raises(UserError, match="it goes on where it stopped"):
        fetch(f"{server}/x", tmp_path / "x")
    assert (tmp_path / "x.part").stat().st_size == 500


def test_a_data_set_is_fetched_with_its_licence_shown(server, tmp_path, monkeypatch, caplog):
    cub(tmp_path / "whole")
    Handler.content = pack(tmp_path / "whole", tmp_path / "CUB_200_2011.tgz").read_bytes()
    archive = Archive("CUB_200_2011.tgz", "CUB_200_2011", (f"{server}/missing", f"{server}/x"), md5())
    monkeypatch.setattr(CUB, "archives", (archive,))
    with pytest.raises(UserError, match="is not in"):
        prepare(config(tmp_path / "root", "stages=[fetch]"))
    prepare(config(tmp_path / "root", "stages=[fetch]", "download=true"))
    assert CUB.licence in caplog.text
    assert len(CUB(tmp_path / "root", 16)) == 12


def test_a_file_without_a_published_hash_is_remembered(tmp_path):
    put(tmp_path / "x.tar", "first")
    found = record_first_use(tmp_path / "x.tar", "http://somewhere/x.tar")
    assert found == {"bytes": 5, "sha256": hashlib.sha256(b"first").hexdigest()}
    assert json.loads((tmp_path / "x.tar.json").read_text()) == found | {"url": "http://somewhere/x.tar"}
    assert record_first_use(tmp_path / "x.tar") == found
    put(tmp_path / "x.tar", "other")
    with pytest.raises(UserError, match="not the file that was first used"):
        record_first_use(tmp_path / "x.tar")


def test_what_is_no_image_and_what_nothing_trains_is_said(tmp_path, caplog):
    for name in ("train/cat/0.png", "train/dog/0.png", "test/owl/0.png", "train/cat/notes.txt", "train/a.svg"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(path) if name.endswith(".png") else path.touch()
    prepare(config(tmp_path / "data", "data=folder", "stages=[verify]"))
    report = json.loads((tmp_path / "data.prepared" / "report.json").read_text())
    assert report["not_images"] == {".svg": 1, ".txt": 1}
    assert report["classes_without_training_images"] == ["owl"]
    assert any("2 files are no images: .svg 1, .txt 1" in note for note in report["notes"])
    assert all(note in caplog.text for note in report["notes"])
