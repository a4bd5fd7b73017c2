"""What a run needs: known before anything is built, planned without it, fetched from anywhere, refused all at once."""

import functools
import hashlib
import http.server
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ditune.commands.prepare_trainings import prepare_trainings
from ditune.commands.train import train
from ditune.config import disk, trainings
from ditune.config.components import build_components
from ditune.config.needs import needs_of
from ditune.config.outline import outline
from ditune.data import CUB
from ditune.errors import UserError
from ditune.files import download, hub
from ditune.files.atomic import sha256
from ditune.files.needs import Need, bring, with_reasons
from ditune.networks import build_network
from ditune.training.components import Processes
from ditune.training.plan import saved_activations
from helpers import ROOT, compose, task
from miniatures import MINIATURES
from small_datasets import pack
from small_vae import small_vae

EIGHT = ("food101", "sun397", "df20m_mini", "caltech101", "cub", "artbench10", "flowers102", "stanford_cars")
SMALL = [
    *("network=dit_s_8", "trainer=cpu", "trainer.precision=32-true", "trainer.log_every_n_steps=1", "batch_size=4"),
    *("max_steps=1", "data.resolution=64", "data.num_workers=0", "sampler.steps=2", "sampler.batch_size=2"),
    *("callbacks.samples.n=2", "metrics=efflite0", "metrics.n=4"),
]
EXTRACTOR = ROOT / "assets" / "extractors" / "efficientnet_lite0.fp16.safetensors"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """Address and folder of a server of files."""
    monkeypatch.setattr(download, "PAUSE", 0)
    folder = tmp_path / "served"
    folder.mkdir()
    service = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=service.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{service.server_port}", folder
    service.shutdown()
    service.server_close()


@pytest.fixture
def published(server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Small files in place of all that experiment=difffit_cub needs; overrides that name them and their places."""
    url, folder = server
    MINIATURES["cub"](tmp_path / "whole")
    archive = pack(tmp_path / "whole", folder / "CUB_200_2011.tgz")
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(CUB, "archives", (replace(CUB.archives[0], md5=md5),))
    small_vae(folder / "vae")
    network = build_network("dit_s_8", input_size=8, in_channels=4, num_classes=10)
    torch.save(network.state_dict(), folder / "dit.pt")
    shutil.copy(EXTRACTOR, folder / "extractor")
    return [
        *SMALL,
        *("experiment=difffit_cub", f"paths.data_dir={tmp_path}/data", f"paths.cache_dir={tmp_path}/data/cache"),
        *(f"addresses.archives=[{url}/nowhere,{url}]", f"addresses.sd_vae_ema=[{url}/vae]"),
        *(f"addresses.dit_xl_2_256=['file://{folder}/dit.pt']", f"addresses.inception=[{url}/gone,{url}/extractor]"),
        "metrics.judge.extractor._target_=fetched_extractor.Fetched",
        f"metrics.judge.extractor.weights={tmp_path}/data/cache/extractor.safetensors",
    ]


def test_one_command_fetches_all_that_a_training_needs(published, server, tmp_path, caplog, capsys):
    caplog.set_level("INFO")
    prepare_trainings(task("prepare_training", *published))
    data = tmp_path / "data"
    assert sha256(data / "cache" / "extractor.safetensors") == sha256(EXTRACTOR)
    vae = data / "autoencoders" / "sd_vae_ema"
    for file in (
        vae / "config.json",
        vae / "diffusion_pytorch_model.safetensors",
        data / "cache" / "networks" / "DiT-XL-2-256x256.pt",
    ):
        assert json.loads(file.with_name(f"{file.name}.json").read_text())["sha256"] == sha256(file)
    assert "the SHA-256 of this first use is kept" in caplog.text
    assert (data / "cub" / "prepared" / "latents" / "train_64_sd_vae_ema" / "header.json").is_file()
    assert list((data / "cache" / "features").glob("efflite0-*.safetensors"))
    assert f"all images can be read: 3 in test, 12 in train; 3 classes; more in {data}/cub/prepared" in caplog.text
    shown = capsys.readouterr().out
    for part in ("CUB_200_2011.tgz: to be fetched, 1.2 GB", "MD5 is compared", "licence: CC BY-NC 4.0", "licence: MIT"):
        assert part in shown
    shutil.rmtree(server[1])  # from here on nothing is fetched
    assert train(compose(tmp_path / "run", *published)) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]["after"]["n"] == 4


def test_a_training_fetches_for_itself_and_says_what_first(published, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    assert train(compose(tmp_path / "run", *published, "metrics.n=0")) == 0
    shown = capsys.readouterr().out
    assert shown.index("this needs:") < shown.index("difffit trains")
    assert "feature extractor" not in shown  # nothing is evaluated
    assert "disk: dataset CUB-200-2011, CUB_200_2011.tgz 2.3 GB" in caplog.text


def test_everything_that_cannot_be_had_is_said_at_once(published, server, tmp_path):
    url, folder = server
    (folder / "CUB_200_2011.tgz").rename(folder / "elsewhere")
    overrides = [*published, "trainer=gpu", f"addresses.inception=[{url}/gone]", "sampler.steps=1"]
    if torch.cuda.is_available():
        pytest.skip("the machine has a GPU")
    with pytest.raises(UserError) as caught:
        train(compose(tmp_path / "run", *overrides))
    text = str(caught.value)
    for part in ("for 4 reasons", "trainer=cpu", "CUB-200-2011", "HTTP 404", "feature extractor", "steps is 1"):
        assert part in text
    assert "sd_vae_ema" not in text  # it could be fetched, and was not
    assert not (tmp_path / "data").exists()
    with pytest.raises(UserError, match="Not everything can be had, for 2 reasons"):
        prepare_trainings(task("prepare_training", *overrides))
    with pytest.raises(UserError, match="5 of the files above are missing, and download=false"):
        prepare_trainings(task("prepare_training", *published, "download=false"))
    assert not (tmp_path / "data").exists()


def test_dry_runs_of_all_experiments_with_nothing_there(tmp_path, capsys):
    """Shapes and counts are those of the published tables; of CUB with the experiment's own network."""
    for name in EIGHT:
        size = [] if name == "cub" else ["network=dit_s_8"]
        cfg = compose(
            tmp_path / "run", f"experiment=difffit_{name}", *size, "trainer.precision=32-true", "dry_run=true"
        )
        cfg.paths.data_dir, cfg.paths.cache_dir = f"{tmp_path}/data", f"{tmp_path}/cache"
        assert train(cfg) == 0
        shown = capsys.readouterr().out
        for part in (
            "network dit_xl_2_256: to be fetched, 2.7 GB",
            "4 x 32 x 32",
            "MiB (expected)",
            "latents",
            "free:",
        ):
            assert part in shown, (name, part)
        if name == "cub":
            assert "difffit trains 817,952 of 674,009,888 parameters" in shown
            assert "5,994 images, 200 classes, as published" in shown
        if name in ("sun397", "stanford_cars"):
            assert "a copy on the hub: to be fetched" in shown
    assert not (tmp_path / "data").exists()
    with pytest.raises(UserError, match=r"network .*/nothing.pt: missing"):
        train(compose(tmp_path / "run", "experiment=difffit_cub", f"pretrained={tmp_path}/nothing.pt", "dry_run=true"))


@pytest.mark.parametrize("method", ["difffit", "lora"])
def test_memory_is_planned_without_the_network(tmp_path, method):
    overrides = ["experiment=difffit_cub", f"peft={method}", "network=dit_s_8", "trainer.precision=bf16-mixed"]
    found = outline(compose(tmp_path, *overrides, f"paths.data_dir={tmp_path}"), Processes(1, 1, False))
    whole = saved_activations(found.build(12), found.components.objective, (4, 32, 32), bf16=True, fused=found.fused)
    assert found.per_sample == pytest.approx(whole, rel=1e-3)


def test_disk_is_planned_as_it_is_used(small):
    """Checkpoints and network, within 5 % and 60 kB a file for what is not weights."""
    cfg = small("peft=full", "+network.hidden_size=128", "max_steps=3", "callbacks.checkpoint.every_n_steps=1")
    assert train(cfg) == 0
    folder = Path(cfg.paths.output_dir)
    planned = {
        space.what.partition(" of ")[0]: space.size for space in disk.spaces(cfg, build_components(cfg), folder, [])
    }
    checkpoints = [path.stat().st_size for path in (folder / "checkpoints").glob("*.ckpt")]
    assert len(checkpoints) == 2
    assert sum(checkpoints) == pytest.approx(planned["2 checkpoints"] * 2 / 3, rel=0.05, abs=120_000)
    assert (folder / "network.safetensors").stat().st_size == pytest.approx(planned["network"], rel=0.05, abs=60_000)


def test_a_disk_that_is_too_small_is_said(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    (text,) = disk.shortage([disk.Space("checkpoints", tmp_path / "run", free), disk.Space("latents", tmp_path, free)])
    assert "callbacks.checkpoint.keep" in text
    assert "checkpoints" in text
    assert not disk.shortage([disk.Space("checkpoints", tmp_path, 1000)])


def test_trainings_of_a_command_line():
    assert not trainings.is_of_trainings(["data=cub", "metrics=fid"])
    line = ["-m", "experiment=difffit_cub,difffit_food101", "metrics=dinov2"]
    assert trainings.is_of_trainings(line)
    first, metrics, mode, params = trainings.as_one_run(line)
    assert (first, metrics, mode) == ("experiment=difffit_cub", "metrics=dinov2", "hydra.mode=RUN")
    assert params == "++hydra.sweeper.params={experiment: 'difffit_cub,difffit_food101'}"
    found = trainings.jobs({"experiment": "a,b", "peft": "full,lora", "seed": "0,1"}, ["experiment=a", "metrics=fid"])
    assert found == [["metrics=fid", f"experiment={name}", "peft=full", "seed=0"] for name in ("a", "b")]
    assert trainings.jobs(None, ["experiment=a"]) == [["experiment=a"]]
    assert trainings.jobs({"optimizer.lr": "tag(log, interval(1e-4, 1e-2))"}, []) == [[]]


def test_the_command_takes_several_experiments(tmp_path):
    command = ["experiment=difffit_cub,difffit_sun397", "peft=lora", "download=false", f"paths.data_dir={tmp_path}"]
    ended = subprocess.run([sys.executable, ROOT / "src" / "prepare.py", *command], capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert "CUB_200_2011.tgz: to be fetched" in ended.stdout
    assert "dataset SUN397, a copy on the hub: to be fetched" in ended.stdout
    assert ended.stdout.count("network dit_xl_2_256") == 1
    assert "of the files above are missing" in ended.stderr


def test_addresses_are_tried_in_order_and_hashes_compared(server, tmp_path):
    url, folder = server
    (folder / "x").write_bytes(b"weights")
    right = hashlib.sha256(b"weights").hexdigest()
    need = Need("x", tmp_path / "x", False, (f"{url}/gone", f"file://{folder}/gone", f"{url}/x"), sha256=right)
    assert with_reasons([need]) == [need]
    bring(need)
    assert need.path.read_bytes() == b"weights"
    assert not need.path.with_name("x.json").exists()  # its hash is published
    wrong = replace(need, path=tmp_path / "y", sha256="0" * 64, addresses=(f"{url}/x",))
    with pytest.raises(UserError, match=r"has the SHA-256 .*, published is 000"):
        bring(wrong)
    assert not [path for path in tmp_path.glob("y*") if path.suffix != ".lock"]
    (gone,) = with_reasons([replace(need, path=tmp_path / "z", addresses=(f"{url}/gone", f"file://{folder}/gone"))])
    assert gone.lost
    assert "HTTP 404" in str(gone)
    with pytest.raises(UserError, match="is no address of the hub"):
        bring(replace(need, path=tmp_path / "h", addresses=("hf://owner",)))


def test_a_hub_without_network_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    address = "hf://owner/name@main/folder/file.bin"
    with pytest.raises(UserError, match="cannot be fetched"):
        download.fetch(address, tmp_path / "file.bin")
    assert hub.parse(address) == hub.Address("model", "owner/name", "main", "folder/file.bin")


def test_needs_are_asked_without_building(tmp_path):
    cfg = compose(tmp_path, "experiment=difffit_imagenet512", "pretrained=dit_xl_2_512", "metrics=dinov2")
    names = [need.what for need in needs_of(cfg)]
    assert names[-1] == "the feature extractor DINOv2"
    assert "network dit_xl_2_512" in names
    assert all(need.present for need in needs_of(compose(tmp_path, "experiment=difffit_emoji")))  # all is shipped
