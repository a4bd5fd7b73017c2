"""Evaluation on disk: shared by processes, stopped and gone on with, written for ADM's evaluator."""

import hashlib
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import forked
from ditune.commands.evaluate import evaluate
from ditune.commands.train import train
from ditune.data import Pictures
from ditune.errors import UserError
from ditune.evaluation.image_files import ImageFiles
from ditune.evaluation.image_shards import ArrayImages, ImageShards, weights_hash
from ditune.files.atomic import read_json, write_json
from ditune.metrics import Judge
from helpers import SMALL, compose, task


def picture(i: int) -> torch.Tensor:
    return torch.full((3, 4, 4), i, dtype=torch.uint8)


def drawing(calls: list[int]):
    def draw(numbers: list[int]) -> torch.Tensor:
        calls.extend(numbers)
        return torch.stack([picture(i) for i in numbers])

    return draw


def blocks(folder: Path, n: int = 7, **header: object) -> ImageShards:
    return ImageShards(folder, header, torch.arange(n) % 3, size=3)


def test_blocks_are_drawn_once_and_read_in_any_order(tmp_path):
    calls: list[int] = []
    blocks(tmp_path, a=1).fill(drawing(calls))
    assert calls == list(range(7))
    (tmp_path / "000001.npy").unlink()  # a process was stopped in it
    (tmp_path / ".000001.npy.tmp-1").write_bytes(b"half")
    calls.clear()
    again = blocks(tmp_path, a=1)
    again.fill(drawing(calls))
    assert calls == [3, 4, 5]
    pictures, labels = again.__getitems__([6, 0, 4])
    assert torch.equal(pictures, torch.stack([picture(i) for i in (6, 0, 4)]))
    assert labels.tolist() == [0, 0, 1]
    with pytest.raises(UserError, match="generated with other settings"):
        blocks(tmp_path, a=2)


def test_ranks_share_the_blocks(tmp_path, monkeypatch):
    calls: list[int] = []
    monkeypatch.setattr("ditune.evaluation.shared_files.time.sleep", lambda _: pytest.fail("it waits"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    blocks(tmp_path).fill(drawing(calls))
    assert calls == [3, 4, 5]
    blocks(tmp_path).wait([5, 3])  # its own
    with pytest.raises(pytest.fail.Exception):
        blocks(tmp_path).wait()  # for the other one
    monkeypatch.setenv("RANK", "0")
    blocks(tmp_path).fill(drawing(calls))
    assert sorted(calls) == list(range(7))
    blocks(tmp_path).wait()


def test_npz_is_what_adm_reads(tmp_path):
    drawn = blocks(tmp_path / "blocks")
    drawn.fill(drawing([]))
    drawn.save_npz(tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as file:
        assert file["arr_0"].shape == (7, 4, 4, 3)
        assert file["arr_0"].dtype == np.uint8
        assert (file["arr_0"][:, 0, 0, 0] == np.arange(7)).all()
        assert file["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    read = ArrayImages(tmp_path / "samples.npz")
    assert torch.equal(read.__getitems__([5, 2])[0], torch.stack([picture(5), picture(2)]))
    drawn.delete()
    assert not (tmp_path / "blocks").exists()


IMAGES = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "content",
    [
        {"arr_0": IMAGES},
        {"arr_0": IMAGES, "arr_1": np.arange(8)},
        {"arr_0": IMAGES.transpose(0, 3, 1, 2)},
        {"labels": np.arange(8), "samples": IMAGES, "mean": np.zeros((1, 2, 3, 4))},
        IMAGES,
        IMAGES.transpose(0, 3, 1, 2),
    ],
)
def test_arrays_of_the_usual_shapes_are_the_same_images(tmp_path, content):
    path = tmp_path / ("x.npz" if isinstance(content, dict) else "x.npy")
    np.savez(path, **content) if isinstance(content, dict) else np.save(path, content)
    read = ArrayImages(path)
    assert (len(read), read.resolution) == (8, 16)
    assert torch.equal(read.__getitems__([5, 2])[0], torch.from_numpy(IMAGES[[5, 2]]).permute(0, 3, 1, 2))
    assert read.fingerprint == hashlib.sha256(IMAGES).hexdigest()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"arr_0": np.zeros((2, 4, 4, 3))}, "arr_0 in .* is float64"),
        (np.zeros((2, 3, 4, 4), np.float32), "is float32"),
        ({"arr_0": np.zeros((8, 16, 24, 3), np.uint8)}, "24 x 16, and not square"),
        (np.zeros((8, 3, 24, 16), np.uint8), "16 x 24, and not square"),
        ({"arr_0": np.zeros((2, 4, 4, 1), np.uint8)}, "no RGB images"),
        ({"arr_0": np.zeros((2, 4, 4), np.uint8)}, "no RGB images"),
        ({"arr_0": np.zeros((4, 4, 3), np.uint8)}, "no RGB images"),
        ({"arr_0": np.zeros((2, 3, 3, 3), np.uint8)}, "second axis or the last"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, "holds no images"),
        ({"a": IMAGES, "b": IMAGES}, "2 arrays that can hold images .*a uint8"),
        ({"mu": np.zeros(3)}, "0 arrays that can hold images"),
        ({}, "in it: nothing"),
        ({"arr_0": np.array([print], dtype=object)}, "cannot be read"),  # a pickle, which is not executed
        (np.array([print], dtype=object), "cannot be read"),
    ],
)
def test_other_arrays_are_refused(tmp_path, content, message):
    path = tmp_path / ("x.npz" if isinstance(content, dict) else "x.npy")
    np.savez(path, **content) if isinstance(content, dict) else np.save(path, content)
    with pytest.raises(UserError, match=message):
        ArrayImages(path)


def test_files_that_are_no_arrays_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    with pytest.raises(UserError, match="no file"):
        ArrayImages(path)
    path.write_bytes(b"no zip")
    with pytest.raises(UserError, match="cannot be read"):
        ArrayImages(path)
    with pytest.raises(UserError, match="cannot be read"):
        ArrayImages(tmp_path)
    np.savez_compressed(path, arr_0=IMAGES)
    content = bytearray(path.read_bytes())
    content[2000:2100] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        ArrayImages(path)


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


@pytest.fixture
def sampled(tmp_path) -> Path:
    """What src/sample.py writes, by two machines into one folder."""
    folder = tmp_path / "sampled"
    for i, image in enumerate(IMAGES):
        save(folder / "pictures" / f"{i:05d}.png", image)
    for suffix in ("", "_00004"):
        save(folder / f"grid{suffix}.png", IMAGES[0])
        (folder / f"samples{suffix}.json").write_text("{}")
    return folder


def test_a_folder_of_samples_is_its_images_without_the_sheets(sampled, tmp_path, caplog):
    caplog.set_level("INFO")
    images = ImageFiles(sampled, 16)
    assert [name.split("/")[-1] for name in images.names] == [f"{i:05d}.png" for i in range(8)]
    assert torch.equal(images.__getitems__([3])[0][0], torch.from_numpy(IMAGES[3]).permute(2, 0, 1))
    assert images.facts == {"passed_over": {".json": 2}, "sheets_passed_over": 2, "resized": {}}
    assert "no images are passed over: .json (2)" in caplog.text
    assert "(grid*.png, nearest.png) are passed over: 2" in caplog.text
    alone = ImageFiles(sampled / "pictures", 16)
    assert alone.fingerprint == Pictures(sampled / "pictures", 16).fingerprint  # as before there was this class
    with zipfile.ZipFile(tmp_path / "sampled.zip", "w") as archive:
        for path in sorted(sampled.rglob("*.*")):
            archive.write(path, path.relative_to(tmp_path))
    zipped = ImageFiles(tmp_path / "sampled.zip", 16)
    assert torch.equal(zipped.__getitems__([0, 7])[0], images.__getitems__([0, 7])[0])
    assert len(zipped) == 8


def test_any_layout_of_images_will_do(tmp_path, caplog):
    """Deep, loose and hidden files, other kinds and other sizes; nothing is a class."""
    folder = tmp_path / "images"
    for name in ("0.png", "a/1.png", "a/b/2.PNG", "train/3.jpg", "grid.png"):  # no JSON says that this is a sheet
        save(folder / name, IMAGES[0])
    for name in ("4.png", "c/5.png"):
        save(folder / name, IMAGES[0][:12, :8])
    for name in (".6.png", ".cache/7.png", "__MACOSX/8.png"):
        save(folder / name, IMAGES[0])
    (folder / "notes.txt").write_text("x")
    (folder / "LICENSE").write_text("x")
    images = ImageFiles(folder, 16)
    assert len(images) == 7
    assert images.__getitems__(list(range(7)))[0].shape == (7, 3, 16, 16)
    assert images.facts["resized"] == {"8 x 12": 2}
    assert images.facts["passed_over"] == {".txt": 1, "no extension": 1}
    assert "2 of 7 images are not 16 x 16" in caplog.text
    assert "8 x 12 (2)" in caplog.text


def test_folders_without_whole_images_are_refused(tmp_path):
    with pytest.raises(UserError, match="There is nothing at"):
        ImageFiles(tmp_path / "nowhere", 16)
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match="There are no images in"):
        ImageFiles(tmp_path / "x", 16)
    np.save(tmp_path / "x" / "samples.npy", IMAGES)
    with pytest.raises(UserError, match=r"other kinds: \.npy \(1\)"):
        ImageFiles(tmp_path / "x", 16)
    with pytest.raises(UserError, match="Give it as npz="):
        ImageFiles(tmp_path / "x" / "samples.npy", 16)
    save(tmp_path / "x" / "0.png", IMAGES[0])
    (tmp_path / "x" / "1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot be read: 1\.png"):
        ImageFiles(tmp_path / "x", 16)
    whole = (tmp_path / "x" / "0.png").read_bytes()
    (tmp_path / "x" / "1.png").write_bytes(whole[: len(whole) // 2])  # its header is there
    with pytest.raises(UserError, match=r"cannot be read: 1\.png"):
        ImageFiles(tmp_path / "x", 16).__getitems__([0, 1])


def evaluated(pictures: Path, out: Path, *overrides: str) -> dict:
    common = ["data=folder", f"data.root={pictures}", "data.resolution=16", f"paths.cache_dir={out}/cache"]
    return read_json(evaluate(task("evaluate", *common, f"out={out}", *overrides)))


def test_samples_are_evaluated_as_the_array_of_them(sampled, pictures, tmp_path):
    np.save(tmp_path / "x.npy", IMAGES)
    files = evaluated(pictures, tmp_path / "files", f"images={sampled}")
    array = evaluated(pictures, tmp_path / "array", f"npz={tmp_path / 'x.npy'}")
    assert files["metrics"] == array["metrics"]
    assert files["metrics"]["values"]["n"] == 8
    assert files["passed_over"] == {".json": 2}
    with pytest.raises(UserError, match=r"16 pixels, the reference 32\. Set data\.resolution=16"):
        evaluated(pictures, tmp_path / "other", f"npz={tmp_path / 'x.npy'}", "data.resolution=32")


def test_too_few_images_are_refused_before_any_work(pictures, tmp_path):
    np.save(tmp_path / "x.npy", IMAGES[:3])
    with pytest.raises(UserError, match="at least 4 images, and here are 3"):
        evaluated(pictures, tmp_path / "out", f"npz={tmp_path / 'x.npy'}")
    assert not (tmp_path / "out").exists()
    np.save(tmp_path / "x.npy", IMAGES)
    with pytest.raises(UserError, match="at least 6 images of the reference, and it has 5"):
        evaluated(pictures, tmp_path / "out", f"npz={tmp_path / 'x.npy'}", "+data.pictures.limit=5")


def test_hash_sees_every_weight():
    network = nn.Linear(2, 2)
    before = weights_hash(network)
    assert weights_hash(network) == before
    with torch.no_grad():
        network.bias[1] += 1
    assert weights_hash(network) != before


def test_too_few_pictures_and_small_sets(caplog):
    class Tiny(nn.Module):
        name, identity, columns = "tiny", {}, {"features": slice(None)}

    x, y = torch.randn(3, 8), torch.randn(20, 8)
    with pytest.raises(UserError, match="Generate more"):
        Judge(Tiny()).compare(x, y)
    Judge(Tiny()).compare(torch.randn(8, 8), y)
    assert "biased" in caplog.text


@pytest.mark.ddp
@pytest.mark.slow
def test_one_and_three_processes_give_the_same(tmp_path, pictures):
    run = tmp_path / "run"
    settings = [*SMALL, f"data.root={pictures}", "peft=full", "max_steps=1", "metrics.n=9", "sampler.batch_size=2"]
    assert train(compose(run, *settings, f"paths.cache_dir={tmp_path}/cache")) == 0
    found = []
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    for processes in (1, 3):
        write_json(run / "result.json", {"status": "finished"})
        command = ["src/evaluate.py", f"run={run}", f"processes={processes}", "threads=1", f"out={tmp_path}/out"]
        done = forked.run(tmp_path, *command, env=env)  # of three it starts each
        assert done.returncode == 0, done.stdout + done.stderr
        assert "images/s" in done.stdout
        assert "kid_efflite0" in done.stdout
        with np.load(run / "samples.npz", allow_pickle=False) as file:
            found.append((file["arr_0"], json.loads((run / "result.json").read_text())["metrics"]["after"]))
        assert not (run / "evaluation").exists()
    (one, metrics), (three, others) = found
    assert len(one) == 9
    np.testing.assert_array_equal(one, three)
    assert metrics == pytest.approx(others, abs=1e-9)
