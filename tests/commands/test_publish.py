"""Runs on the hub: the folder with its card, what is sent and what is not, and what is read from there."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from ditune.checkpoints import load_network, locate, locate_adapter
from ditune.commands.export import export
from ditune.commands.publish import licence_of_images, publish
from ditune.commands.sample import sample
from ditune.commands.train import train
from ditune.data import StanfordCars
from ditune.errors import UserError
from ditune.files import hub
from ditune.files.atomic import read_json, sha256, write_json
from ditune.files.download import fetch, reachable
from ditune.report.card import plain
from helpers import ROOT, SMALL, compose, task
from hub_server import COMMIT, Hub


@pytest.fixture(scope="module")
def run(tmp_path_factory, pictures, base) -> Path:
    """A finished run with an adapter."""
    folder = tmp_path_factory.mktemp("run")
    adapted = [f"data.root={pictures}", "peft=difffit", f"pretrained={base}", "max_steps=2"]
    assert train(compose(folder, *SMALL, *adapted, "metrics.loss_split=test")) == 0
    return folder


@pytest.fixture
def server(monkeypatch, tmp_path) -> Iterator[Hub]:
    service = Hub()
    monkeypatch.setenv("HF_ENDPOINT", service.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no_token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield service
    service.shutdown()


def published(run: Path, out: Path, *overrides: str) -> Path:
    return publish(task("publish", f"run={run}", "repo=user/name", f"out={out}", *overrides))


def test_the_folder_holds_weights_result_images_and_a_card(run, tmp_path, server, caplog):
    caplog.set_level(logging.INFO)
    out = published(run, tmp_path / "out", "licence=apache-2.0", "data_licence='CC0, ours'")
    files = {"README.md", "result.json", "grid.png", "adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in out.iterdir()} == files
    assert sha256(out / "adapter_model.safetensors") == sha256(run / "adapter" / "adapter_model.safetensors")
    result = read_json(run / "result.json")
    assert read_json(out / "result.json") == result
    text = (out / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---")[1])
    assert (front["license"], front["library_name"]) == ("apache-2.0", "ditune")
    for part in (
        "An adapter by difffit for class-conditional images of 16 x 16 pixels, 3 classes",
        f"base.safetensors, SHA-256 {result['base']['sha256']}",
        "| licence of the training images | CC0, ours |",
        f"| {result['denoising']['before']:.4g} | {result['denoising']['after']:.4g} |",
        "checkpoint=<base.safetensors> adapter=hf://user/name autoencoder=none",
        "one run with one seed",
    ):
        assert part in text
    assert str(run) not in text
    assert str(ROOT) not in text
    assert server.requests == []
    assert "nothing was sent" in caplog.text


def test_nothing_is_sent_without_a_token(run, tmp_path, server):
    with pytest.raises(UserError, match=r"push=true needs a token"):
        published(run, tmp_path / "out", "push=true")
    assert server.requests == []


def test_what_is_sent_can_be_read_from_there(run, base, tmp_path, server, monkeypatch):
    """The circle: publish, then sample and export with the adapter from the hub, which is fetched once."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    out = published(run, tmp_path / "out", "push=true")
    monkeypatch.delenv("HF_TOKEN")
    assert "Bearer hf_secret" in server.tokens
    assert server.files["user/name"].keys() == {path.name for path in out.iterdir()}
    assert all(server.files["user/name"][path.name] == path.read_bytes() for path in out.iterdir())

    cache = f"paths.cache_dir={tmp_path}/cache"
    common = [f"checkpoint={base}", "autoencoder=none", "n=2", "steps=2", "precision=32-true", cache]
    pinned = f"hf://user/name@{COMMIT}"
    images = [
        sample(task("sample", *common, f"adapter={address}", f"out={tmp_path}/{k}"))
        for k, address in enumerate((run / "adapter", pinned))
    ]
    for name in ("00000.png", "00001.png"):
        assert (images[0] / "pictures" / name).read_bytes() == (images[1] / "pictures" / name).read_bytes()
    assert read_json(images[1] / "samples.json")["adapter"] == pinned

    before = len(server.requests)
    arguments = [f"checkpoint={base}", "autoencoder=none", "format=dit", cache]
    merged = export(task("export", *arguments, f"adapter={pinned}", f"out={tmp_path}/merged"))
    assert len(server.requests) == before  # it is there, whatever the hub has now
    own = export(task("export", f"run={run}", "format=dit", f"out={tmp_path}/own"))
    a, b = (load_network(path).state_dict() for path in (merged, own))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_branch_is_pinned_to_its_commit_at_the_first_use(base, tmp_path, server):
    server.files["user/net"] = {"network.safetensors": base.read_bytes(), "weights.pkl": b"evil", "README.md": b"x"}
    path = locate("hf://user/net", tmp_path)
    assert path.name == "network.safetensors"
    assert {file.name for file in path.parent.iterdir()} == {"network.safetensors"}  # no pickle is fetched
    note = read_json(tmp_path / "hub" / "user--net.json")
    assert note["url"] == f"hf://user/net@{COMMIT}"
    assert note["bytes"] == base.stat().st_size
    server.commit, server.files["user/net"] = "f" * 40, {"network.safetensors": b"another"}
    assert sha256(locate("hf://user/net", tmp_path)) == sha256(base)
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="not the file that was first used"):
        locate("hf://user/net", tmp_path)


def test_one_file_of_a_repository(base, tmp_path, server):
    server.files["user/net"] = {"sub/a.safetensors": base.read_bytes()}
    assert sha256(locate(f"hf://user/net@{COMMIT}/sub/a.safetensors", tmp_path)) == sha256(base)
    assert reachable("hf://user/net/sub/a.safetensors") is None
    assert reachable("hf://user/net") is None
    assert reachable("hf://user/net/none") is not None
    assert reachable("hf://user/other") is not None
    with pytest.raises(UserError, match="cannot be fetched"):
        fetch("hf://user/other", tmp_path / "other")
    server.files["user/only"] = {"a.pkl": b""}
    with pytest.raises(UserError, match=r"has none of \*\.safetensors"):
        fetch("hf://user/only", tmp_path / "only")
    assert not (tmp_path / "only").exists()


@pytest.mark.parametrize("address", ["hf://a", "hf://a/", "hf:///b", "hf://a/b/../c", "hf://../b", "hf://a/b//c"])
def test_addresses_that_lead_elsewhere_are_refused(address):
    with pytest.raises(UserError, match="is no address of the hub"):
        hub.parse(address)


def test_addresses_are_read_and_written_alike():
    for text in ("hf://a/b", "hf://a/b@main", "hf://datasets/a/b@x/c/d.parquet"):
        assert str(hub.parse(text)) == text
    assert hub.parse("hf://datasets/a/b").kind == "dataset"


def test_a_dataset_whose_address_is_dead_comes_from_the_hub(tmp_path, server, monkeypatch):
    """Stanford Cars as Parquet, of which the fetched files are those of its splits."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    from small_datasets import png  # needs the tests' support alone

    monkeypatch.setattr(StanfordCars, "published", {"train": 2, "test": 2, "classes": 2})
    monkeypatch.setattr(StanfordCars, "ends", ("a car", "b car"))
    names = {"features": {"label": {"names": ["a car", "b car"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}}
    metadata = {"huggingface": json.dumps({"info": names})}
    rows = pa.table({"image": [{"bytes": png(0), "path": "0"}, {"bytes": png(1), "path": "1"}], "label": [0, 1]})
    pq.write_table(rows.replace_schema_metadata(metadata), tmp_path / "x.parquet")
    address = hub.parse(StanfordCars.on_hub)
    content = (tmp_path / "x.parquet").read_bytes()
    files = ("train-00000-of-00001", "test-00000-of-00001", "contrast-00000-of-00001")
    server.files[address.repository] = {f"data/{name}.parquet": content for name in files}
    server.commit = address.revision

    (need,) = StanfordCars.needs({"root": str(tmp_path / "cars")}, {})
    assert need.addresses == (StanfordCars.on_hub,)
    with pytest.raises(UserError, match=r"download=true it fetches the copy hf://datasets/tanganke"):
        StanfordCars.fetch(tmp_path / "cars", download=False)
    StanfordCars.fetch(tmp_path / "cars", download=True)
    data = StanfordCars(tmp_path / "cars", 16)
    assert (len(data), data.class_names) == (2, ["a car", "b car"])
    assert read_json(tmp_path / "cars" / "copy.json")["url"] == StanfordCars.on_hub
    assert not list((tmp_path / "cars").rglob("contrast*"))


def test_a_run_that_has_not_finished_is_not_published(run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text((run / "config.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    write_json(folder / "result.json", {"status": "stopped"})
    with pytest.raises(UserError, match="is stopped, not finished"):
        published(folder, tmp_path / "out")
    with pytest.raises(UserError, match="Set it to <user>/<name>"):
        publish(task("publish", f"run={run}", "repo=../../x", f"out={tmp_path}/out"))
    assert not (tmp_path / "out").exists()


def test_a_hostile_run_calls_nothing_and_writes_no_markup(run, tmp_path):
    config = OmegaConf.create({"data": {"pictures": {"_target_": "os.system", "sources": ["touch /x"]}}})
    assert licence_of_images(config).startswith("not stated")
    shipped = {"_target_": "ditune.data.Pictures", "sources": ["/any/assets/emoji/fluent3d.zip"]}
    assert licence_of_images(OmegaConf.create({"data": {"pictures": shipped}})).startswith("MIT, Copyright Microsoft")
    cars = OmegaConf.create({"data": {"pictures": {"_target_": "ditune.data.StanfordCars"}}})
    assert StanfordCars.licence in licence_of_images(cars)
    assert plain("a | b\n# c <script> [x](y) `z`") == r"a \| b \# c &lt;script> \[x\](y) \`z\`"


def test_adapter_and_run_together_are_refused(run, tmp_path):
    for name, work in (("sample", sample), ("export", export)):
        with pytest.raises(UserError, match=r"run= has its own adapter"):
            work(task(name, f"run={run}", "adapter=x", f"out={tmp_path}/out"))
    assert locate_adapter(str(run), tmp_path) == run / "adapter"
