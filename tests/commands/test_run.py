"""What runs leave behind: loaded, drawn from and judged again."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import forked
from ditune import errors
from ditune.checkpoints import load_network, read_adapter
from ditune.commands.analyze_routing import analyse
from ditune.commands.evaluate import evaluate
from ditune.commands.export import export
from ditune.commands.prepare import prepare
from ditune.commands.sample import balanced_labels, sample
from ditune.commands.train import train
from ditune.commands.upcycle import upcycle_file
from ditune.config import hardware
from ditune.config.components import build_comparison, build_components, build_evaluation, build_generator
from ditune.config.instantiate import instantiate, refuse_strangers
from ditune.errors import UserError
from ditune.evaluation.protocol import Record
from ditune.files.atomic import sha256, write_json
from ditune.networks import DiT
from ditune.report.write import write_report
from ditune.run import BUILT, load_checkpoint, load_run
from helpers import ROOT, SMALL, compose, task
from run_results import write_run

JUDGED = ["metrics.n=5", "+metrics.judge.batch_size=4", "sampler.batch_size=4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Callable[..., Path]:
    """`trained(name, *overrides)`: folder of a run of two steps in bf16, judged by five pictures."""

    def run(name: str, *overrides: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        general = [*SMALL, *JUDGED, f"data.root={pictures}", "trainer.precision=bf16-mixed", "max_steps=2"]
        cfg = compose(folder, *general, f"paths.cache_dir={folder.parent}/cache", *overrides)
        assert train(cfg) == 0
        return folder

    return run


@pytest.fixture(scope="module")
def scratch(trained: Callable[..., Path]) -> Path:
    return trained("scratch", "peft=full", "optimizer.lr=0.01")


@pytest.fixture(scope="module")
def adapted(trained: Callable[..., Path], scratch: Path) -> Path:
    return trained("adapted", f"pretrained={scratch}/network.safetensors", "optimizer.lr=0.01")


@pytest.fixture
def judging(pictures: Path, tmp_path: Path) -> list[str]:
    """Overrides of evaluate.py that repeat the protocol of `trained`."""
    data = ["data=folder", f"data.root={pictures}", "data.resolution=16", "sampler.steps=2"]
    return [*data, *JUDGED, f"paths.cache_dir={tmp_path}/cache", f"out={tmp_path}/out"]


def drawn(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.array(Image.open(path)) for path in sorted((folder / "pictures").iterdir())}


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def test_run_from_scratch_is_loaded_as_it_was_judged(scratch: Path, tmp_path: Path) -> None:
    run = load_run(scratch)
    assert run.base is None
    assert run.class_names == ["cat", "dog", "eel"]
    assert not run.network.training
    assert {p.dtype for p in run.network.parameters()} == {torch.float32}
    before = result(scratch)
    copy = copytree(scratch, tmp_path / "copy")
    write_json(copy / "result.json", before | {"metrics": {"kept": 1}})
    for name in ("grid", "nearest"):
        (copy / "samples" / f"{name}.png").unlink()
    assert evaluate(task("evaluate", f"run={copy}")) == copy / "result.json"
    after = result(copy)
    assert after.pop("evaluation")["images_per_second"] > 0
    assert after == before | {"metrics": {"kept": 1} | before["metrics"]}
    for name in ("grid", "nearest"):
        assert (copy / "samples" / f"{name}.png").read_bytes() == (scratch / "samples" / f"{name}.png").read_bytes()


def test_adapter_is_loaded_onto_its_base_as_it_was_judged(adapted: Path, scratch: Path, tmp_path: Path) -> None:
    run = load_run(adapted)
    assert run.base == scratch / "network.safetensors"
    _, tensors = read_adapter(adapted / "adapter")
    state, base = run.network.state_dict(), load_network(run.base).state_dict()
    assert any("gamma" in name for name in tensors)
    assert all(torch.equal(state[name], tensors.get(name, base.get(name))) for name in state)
    copy = copytree(adapted, tmp_path / "copy")
    (copy / "result.json").write_text('{"status": "finished"}')
    evaluate(task("evaluate", f"run={copy}"))
    # the training kept frozen weights in bf16, here they are fp32: under autocast that is the same
    assert result(copy)["metrics"] == result(adapted)["metrics"]
    assert result(copy)["metrics"]["after"] != result(copy)["metrics"]["before"]


def test_another_protocol_is_kept_beside_the_runs_own(adapted: Path, tmp_path: Path) -> None:
    copy = copytree(adapted, tmp_path / "copy")
    settings = ["metrics_of=this", "metrics.n=6", "+metrics.judge.batch_size=4", f"paths.cache_dir={tmp_path}/cache"]
    evaluate(task("evaluate", f"run={copy}", *settings))
    found = result(copy)
    assert found["metrics"] == result(adapted)["metrics"]
    ((key, other),) = found["other_protocols"].items()
    assert other["protocol"]["n"] == other["after"]["n"] == 6
    assert other["protocol"]["reference"] == found["metrics"]["protocol"]["reference"]  # the run's data
    assert len(key) == 16
    with np.load(copy / "samples.npz", allow_pickle=False) as file:
        assert len(file["arr_0"]) == 6
    with pytest.raises(UserError, match="metrics_of=run"):
        evaluate(task("evaluate", f"run={copy}", "metrics_of=other"))


@pytest.mark.parametrize("settings", [[], ["sampler=ddpm", "sampler.batch_size=4", "steps=3", "guidance=2"]])
def test_picture_i_is_the_same_whatever_is_drawn_with_it(adapted: Path, tmp_path: Path, settings: list[str]) -> None:
    def draw(name: str, *overrides: str) -> dict[str, np.ndarray]:
        return drawn(sample(task("sample", f"run={adapted}", f"out={tmp_path / name}", *settings, *overrides)))

    all_six, last_three, one = draw("six", "n=6"), draw("three", "n=3", "first=3"), draw("one", "n=1")
    other = draw("other", "n=1", "seed=1")
    assert list(all_six) == [f"0000{i}.png" for i in range(6)]
    assert list(last_three) == list(all_six)[3:]
    for name, picture in (last_three | one).items():
        np.testing.assert_allclose(picture.astype(int), all_six[name], atol=1, rtol=0)
    assert (other["00000.png"] != one["00000.png"]).any()
    assert (all_six["00001.png"] != all_six["00000.png"]).any()


def test_what_is_written_about_pictures(adapted: Path, tmp_path: Path) -> None:
    sample(task("sample", f"run={adapted}", f"out={tmp_path}", "n=3", "seed=4", "guidance=3"))
    sample(task("sample", f"run={adapted}", f"out={tmp_path}", "n=2", "seed=4", "guidance=3", "first=3"))
    assert {p.name for p in tmp_path.glob("*.*")} == {
        "grid.png",
        "grid_00003.png",
        "samples.json",
        "samples_00003.json",
    }
    about = json.loads((tmp_path / "samples.json").read_text())
    entries, precision = about.pop("pictures"), about.pop("precision")
    assert precision == ("bf16-mixed" if hardware.multiplies_bf16("cpu") else "32-true")
    assert about == {"source": str(adapted), "seed": 4, "sampler": "DDIM", "steps": 2, "guidance": 3}
    assert [entry["file"] for entry in entries] == ["00000.png", "00001.png", "00002.png"]
    assert sorted((entry["label"], entry["class_name"]) for entry in entries) == [(0, "cat"), (1, "dog"), (2, "eel")]


def test_labels_are_balanced_and_functions_of_seed_and_number() -> None:
    labels = balanced_labels(range(98), 0, range(980))
    assert torch.equal(labels.bincount(), torch.full((98,), 10))
    assert torch.equal(balanced_labels(range(98), 0, range(90, 110)), labels[90:110])
    assert not torch.equal(balanced_labels(range(98), 1, range(980)), labels)
    assert sorted(balanced_labels([7, 3], 0, [4, 5]).tolist()) == [3, 7]


def test_chosen_classes(adapted: Path, tmp_path: Path) -> None:
    def names(*overrides: str) -> set[str]:
        sample(task("sample", f"run={adapted}", f"out={tmp_path}", "n=4", *overrides))
        return {entry["class_name"] for entry in json.loads((tmp_path / "samples.json").read_text())["pictures"]}

    assert names("class_name=dog") == {"dog"}
    assert names("classes=[eel,cat]") == {"eel", "cat"}
    with pytest.raises(UserError, match=r"no class cta\. Did you mean cat\?"):
        names("classes=[dog,cta]")
    with pytest.raises(UserError, match="both given"):
        names("class_name=dog", "classes=[dog]")


def test_bare_network_draws_as_its_run(scratch: Path, tmp_path: Path) -> None:
    network = f"checkpoint={scratch}/network.safetensors"
    own = drawn(sample(task("sample", f"run={scratch}", "n=2", f"out={tmp_path}/a")))
    bare = task("sample", network, "n=2", f"out={tmp_path}/b", "sampler=ddim", "steps=2", "sampler.batch_size=4")
    for name, picture in drawn(sample(bare)).items():
        np.testing.assert_array_equal(picture, own[name])


@pytest.mark.slow
def test_compiled_blocks_change_images_by_rounding_only(scratch: Path, tmp_path: Path) -> None:
    network = task("sample", f"checkpoint={scratch}/network.safetensors", "n=2", "steps=3", "precision=32-true")
    counters, found = torch._dynamo.utils.counters, {}
    for compiled in (False, True):
        counters.clear()
        network.compile, network.out = compiled, str(tmp_path / str(compiled))
        found[compiled] = drawn(sample(network))
        assert bool(counters["frames"]["ok"]) == compiled
    for name, plain in found[False].items():
        assert np.abs(plain.astype(int) - found[True][name].astype(int)).max() <= 1


def test_default_sampler_of_a_bare_network(scratch: Path, tmp_path: Path) -> None:
    sample(task("sample", f"checkpoint={scratch}/network.safetensors", "n=1", f"out={tmp_path}"))
    about = json.loads((tmp_path / "samples.json").read_text())
    assert (about["sampler"], about["steps"], about["guidance"]) == ("DDIM", 25, 1.5)


def test_record_of_a_base_is_found_by_the_trainings_judge(
    adapted: Path, scratch: Path, judging: list[str], pictures: Path, tmp_path: Path
) -> None:
    base, record = scratch / "network.safetensors", tmp_path / "record.json"
    record.write_text('{"how": "by a test"}')
    own = [*judging, "+data.pictures.limit=9"]  # another reference, as another domain is
    for overrides in (judging, own):
        evaluate(task("evaluate", f"checkpoint={base}", f"record={record}", "precision=bf16-mixed", *overrides))
    content = json.loads(record.read_text())
    assert content["how"] == "by a test"
    assert list(content["metrics"]) == [sha256(base)]
    assert len(content["metrics"][sha256(base)]) == 2

    cfg = OmegaConf.load(adapted / "config.yaml")
    cfg.metrics.record = str(record)
    cfg.metrics.base_reference = {**cfg.metrics.reference, "limit": 9}
    parts = build_components(cfg)
    generator = build_generator(cfg, parts)
    keys = [
        build_evaluation(cfg, generator, instantiate(reference, "metrics")).key
        for reference in (cfg.metrics.reference, cfg.metrics.base_reference)
    ]
    assert set(keys) == set(content["metrics"][sha256(base)])
    # told apart from measured values, and with a gap: the tiny network has none
    for key, value in zip(keys, (0.8, 0.2), strict=True):
        content["metrics"][sha256(base)][key]["values"]["kid_efflite0"] = value
    write_json(record, content)
    metrics = build_comparison(cfg, generator)(parts.network, parts.base.path, tmp_path / "sheets")
    assert (metrics["before_is"], metrics["base_domain_is"]) == ("record", "record")
    assert metrics["gap_before"] == pytest.approx(0.6)
    assert metrics["gap_closed"] == pytest.approx((0.8 - metrics["after"]["kid_efflite0"]) / 0.6)


def test_every_setting_of_the_protocol_changes_its_key(scratch: Path, judging: list[str]) -> None:
    cfg = task("evaluate", *judging)
    trained = load_checkpoint(scratch / "network.safetensors", cfg.autoencoder, cfg.sampler, bf16=True)
    reference = instantiate(cfg.metrics.reference, "metrics")
    evaluation = build_evaluation(cfg, trained.generator, reference)
    others = [
        replace(evaluation, generator=replace(trained.generator, **change))
        for change in ({"bf16": False}, {"steps": 3}, {"guidance": 2.0}, {"batch_size": 8}, {"resolution": 32})
    ]
    others += [replace(evaluation, n=6), replace(evaluation, seed=0)]
    assert evaluation.key not in {other.key for other in others}
    assert len({other.key for other in others}) == len(others)


def test_images_are_judged_as_the_network_that_drew_them(scratch: Path, judging: list[str], tmp_path: Path) -> None:
    run = load_run(scratch)
    evaluation = build_evaluation(run.cfg, run.generator, instantiate(run.cfg.metrics.reference, "metrics"))
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, picture in enumerate(evaluation.generate(run.network)):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{i:05d}.png")
    path = evaluate(task("evaluate", f"images={folder}", *judging))
    assert json.loads(path.read_text())["metrics"]["values"] == result(scratch)["metrics"]["after"]
    assert (tmp_path / "out" / "nearest.png").is_file()


@pytest.mark.parametrize("given", [[], ["run=a", "checkpoint=b"]])
def test_one_source_is_needed(given: list[str]) -> None:
    for name, work in (("sample", sample), ("evaluate", evaluate)):
        with pytest.raises(UserError, match=r"Give exactly one of run= or .*checkpoint="):
            work(task(name, *given))


def test_record_is_for_networks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Give checkpoint= or run="):
        evaluate(task("evaluate", f"npz={tmp_path}/images.npz", f"record={tmp_path}/record.json"))
    (tmp_path / "record.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        Record(tmp_path / "record.json")


def test_runs_that_cannot_be_loaded(adapted: Path, scratch: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        load_run(tmp_path / "nowhere")
    copy = copytree(adapted, tmp_path / "copy")
    adapter, config = copy / "adapter" / "adapter_model.safetensors", OmegaConf.load(copy / "config.yaml")
    content = adapter.read_bytes()
    adapter.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="damaged"):
        load_run(copy)
    adapter.write_bytes(content)
    other = tmp_path / "other.safetensors"
    other.write_bytes((scratch / "network.safetensors").read_bytes() + b" ")
    for base, message in ((other, "another file than the base"), (tmp_path / "gone", r"base network .* is missing")):
        config.pretrained = str(base)
        OmegaConf.save(config, copy / "config.yaml")
        with pytest.raises(UserError, match=message):
            load_run(copy)
    (copy / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"config .* is damaged"):
        load_run(copy)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_bytes((scratch / "config.yaml").read_bytes())
    with pytest.raises(UserError, match="resume=auto"):
        load_run(unfinished)


def test_networks_that_do_not_fit(scratch: Path, judging: list[str]) -> None:
    network = f"checkpoint={scratch}/network.safetensors"
    for overrides, message in (
        (["autoencoder.scale=7"], "other latents"),
        (["data.resolution=32"], "Set data.resolution=16"),
        (["data.pictures.classes=[eel,dog,cat]"], "other names"),
        (["data.pictures.classes=[cat,dog,eel,fox]"], "knows 3 classes, the reference has 4"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(task("evaluate", network, *judging, *overrides))


@pytest.mark.parametrize("channels", [3, 4])
def test_official_files_need_the_decoder_of_their_latents(tmp_path: Path, channels: int) -> None:
    sizes = {"hidden_size": 384, "num_heads": 6, "depth": 1, "input_size": 8, "num_classes": 3}
    torch.save(DiT(in_channels=channels, **sizes).state_dict(), tmp_path / "dit.pt")
    cfg = task("sample", f"checkpoint={tmp_path}/dit.pt", "n=2", f"out={tmp_path}", "steps=2", "class_name=1")
    if channels == 4:
        with pytest.raises(UserError, match="Stable Diffusion"):
            sample(cfg)
    else:
        assert drawn(sample(cfg))["00001.png"].shape == (8, 8, 3)


def start(name: str, where: Path, *overrides: str) -> subprocess.CompletedProcess:
    """`python src/<name>.py <overrides>` in a new folder `where`."""
    where.mkdir()
    command = [sys.executable, str(ROOT / "src" / f"{name}.py"), *overrides]
    return subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)


def test_sample_leaves_no_stray_files(scratch: Path, tmp_path: Path) -> None:
    done = start("sample", tmp_path / "where", f"run={scratch}", "n=2", f"out={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    assert "2 images are in" in done.stdout
    assert len(drawn(tmp_path / "out")) == 2
    assert list((tmp_path / "where").iterdir()) == []


def test_evaluate_reports_a_mistake_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "where").mkdir()
    failed = forked.run(tmp_path, "src/evaluate.py", f"run={tmp_path}/nowhere", cwd=tmp_path / "where")
    assert failed.returncode == errors.USER_ERROR
    assert failed.stderr.strip().startswith("Error:")
    assert "no run folder" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert list((tmp_path / "where").iterdir()) == []


# Run folders of strangers


def bomb(folder: Path) -> tuple[Path, Path]:
    """A pickle, and the file that it makes when it is executed."""
    mark = folder / "executed"
    (folder / "evil.pt").write_bytes(b"cos\nmkdir\n(V" + str(mark).encode() + b"\ntR.")
    return folder / "evil.pt", mark


HOSTILE = {
    "torch.load": lambda evil, mark: {"_target_": "torch.load", "f": evil, "weights_only": False},
    "numpy.load": lambda evil, mark: {"_target_": "numpy.load", "file": evil, "allow_pickle": True},
    "a method": lambda evil, mark: {"_target_": "pathlib.Path.touch", "self": mark},
    "by way of us": lambda evil, mark: {"_target_": "ditune.cli.os.mknod", "path": mark},
    "a class of others by way of us": lambda evil, mark: {
        "_target_": "ditune.launch.trees.subprocess.Popen",
        "args": ["touch", mark],
    },
    "below ours": lambda evil, mark: {
        "_target_": "ditune.autoencoders.Pixels",
        "deep": [{"x": {"_target_": "shutil.copy", "src": evil, "dst": mark}}],
    },
    "no text": lambda evil, mark: {"_target_": 3},
}
ENTRIES = {
    "sample": lambda run, out: sample(task("sample", f"run={run}", f"out={out}", "n=1")),
    "evaluate": lambda run, out: evaluate(task("evaluate", f"run={run}")),
    "export": lambda run, out: export(task("export", f"run={run}", f"out={out}/network.safetensors")),
    "analyze_routing": lambda run, out: analyse(task("analyze_routing", f"run={run}", f"out={out}")),
}


def test_the_bomb_is_one(tmp_path: Path) -> None:
    evil, mark = bomb(tmp_path)
    with pytest.raises(RuntimeError, match="magic number"):
        torch.load(evil, weights_only=False)
    assert mark.exists()


def stranger(adapted: Path, folder: Path, group: str, kind: str) -> tuple[Path, Path]:
    """A run folder whose config calls what it should not, and the file that tells of it."""
    run = copytree(adapted, folder / "run")
    evil, mark = bomb(folder)
    cfg = OmegaConf.load(run / "config.yaml")
    OmegaConf.update(cfg, group, HOSTILE[kind](str(evil), str(mark)), merge=False, force_add=True)
    OmegaConf.save(cfg, run / "config.yaml")
    return run, mark


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("group", ["autoencoder", "sampler.sampler", "metrics.judge"])
def test_a_run_folder_of_a_stranger_runs_nothing(adapted: Path, tmp_path: Path, group: str, kind: str) -> None:
    run, mark = stranger(adapted, tmp_path, group, kind)
    with pytest.raises(UserError, match="which is no class of this package"):
        load_run(run)
    assert not mark.exists()


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_point_refuses_it(adapted: Path, tmp_path: Path, entry: str) -> None:
    run, mark = stranger(adapted, tmp_path, "metrics.judge", "torch.load")
    with pytest.raises(UserError, match="which is no class of this package"):
        ENTRIES[entry](run, tmp_path / "out")
    assert not mark.exists()


def test_a_report_reads_configs_as_text(tmp_path: Path) -> None:
    """Of a `_target_` it makes a column, and a tag of Python is a sentence."""
    evil, mark = bomb(tmp_path)
    for seed, kind in enumerate(HOSTILE):
        config = {"autoencoder": HOSTILE[kind](str(evil), str(mark))}
        write_run(tmp_path / "sweep" / str(seed), "DiffFit", seed, config=config, changed={"error": "<script>alert"})
    write_report(tmp_path / "sweep")
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert "torch.load" in page
    assert "<script>alert" not in page
    for text in (f"seed: !!python/object/apply:os.mkdir ['{mark}']", "- a list", "a: [", "\0"):
        (tmp_path / "sweep" / "0" / "config.yaml").write_text(text)
        with pytest.raises(UserError, match=r"config\.yaml is damaged"):
            write_report(tmp_path / "sweep")
    assert not mark.exists()


def test_upcycling_runs_nothing(adapted: Path, tmp_path: Path) -> None:
    run, mark = stranger(adapted, tmp_path, "autoencoder", "torch.load")
    out = f"out={tmp_path}/network.safetensors"
    for checkpoint in (tmp_path / "evil.pt", run, run / "config.yaml"):
        with pytest.raises(UserError):
            upcycle_file(task("upcycle", f"checkpoint={checkpoint}", out))
    assert not mark.exists()


def test_a_prepared_folder_runs_nothing(pictures: Path, tmp_path: Path) -> None:
    """Its arrays are pickles: they are refused with a sentence, or encoded anew."""
    prepared = f"data.prepared={tmp_path}/prepared"
    data = ["data=folder", f"data.root={pictures}", "data.resolution=16", prepared, "autoencoder=none"]
    prepare(task("prepare", *data, "stages=[verify,encode]"))
    latents = [f"data.root={pictures}", "data.latents=true", prepared]
    evil, mark = bomb(tmp_path)
    for name in ("latents.npy", "labels.npy", "checksums.npy"):
        (path,) = (p for p in (tmp_path / "prepared").rglob(name) if "train" in str(p))
        before = path.read_bytes()
        path.write_bytes(evil.read_bytes())
        with suppress(UserError):
            train(compose(tmp_path / "run", *SMALL, *latents, "peft=full", "max_steps=1", "resume=auto"))
        with suppress(UserError):
            prepare(task("prepare", *data, "stages=[encode]"))
        path.write_bytes(before)
    assert not mark.exists()


def test_a_resumed_run_runs_nothing(scratch: Path, pictures: Path, tmp_path: Path) -> None:
    """Neither its config, which is composed anew, nor its checkpoints."""
    run, mark = stranger(scratch, tmp_path, "autoencoder", "torch.load")
    for path in (run / "checkpoints").glob("*.ckpt"):
        path.write_bytes((tmp_path / "evil.pt").read_bytes())
    again = [*SMALL, f"data.root={pictures}", "peft=full", "optimizer.lr=0.01", "max_steps=3", "resume=auto"]
    with pytest.raises(UserError, match="checkpoint"):
        train(compose(run, *again))
    assert not mark.exists()


def test_what_our_configs_name_is_ours() -> None:
    """All that is built from a run folder, of every option of its groups."""
    for group in BUILT:
        for path in (ROOT / "configs" / group).glob("*.yaml"):
            targets = re.findall(r"_target_: *(\S+)", path.read_text())
            refuse_strangers(OmegaConf.create({group: {"all": [{"_target_": t} for t in targets]}}), [group], path)
