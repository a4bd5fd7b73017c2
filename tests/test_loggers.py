"""Loggers write what they should, offline; and the trainer's switches change nothing but speed and memory."""

import io
import json
import struct
from pathlib import Path

import pytest
import torch
from helpers import SMALL, compose
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.testing import assert_close
from wandb.proto.wandb_internal_pb2 import Record

from ditune.build import build_parts, plain
from ditune.draws import Draws
from ditune.networks import build_network
from ditune.training import train

STEPS = 3


def records(path: Path) -> list[Record]:
    """Records of an offline W&B file: LevelDB's log format behind a header of seven bytes.

    32-KiB blocks of frames [crc32c u32, length u16, type u8]; types: 1 whole, 2 first, 3 middle, 4 last part.
    """
    content, at, found, payload = path.read_bytes(), 7, [], b""
    assert content[:4] == b":W&B"
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:  # too little for a frame: the block is padded
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        payload += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            found.append(Record.FromString(payload))
            payload = b""
    return found


def test_wandb_offline(small, tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # a developer's account sees nothing of the tests
    cfg = small("peft=full", "logger=wandb", f"max_steps={STEPS}", "tags=[tests]", "name=small")
    assert train(cfg) == 0
    folders = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(folders) == 1
    written = records(next(folders[0].glob("*.wandb")))

    def key(item):
        return item.key or "/".join(item.nested_key)

    kinds = {kind: [r for r in written if r.WhichOneof("record_type") == kind] for kind in ("run", "history", "exit")}
    run = kinds["run"][0].run
    assert (run.project, run.run_group, list(run.tags)) == ("ditune", "small", ["tests"])
    assert run.display_name == "small-full-0"
    history = [{key(item): json.loads(item.value_json) for item in r.history.item} for r in kinds["history"]]
    losses = [row["train/loss"] for row in history if "train/loss" in row]
    assert len(losses) == STEPS
    assert all(0 < loss < 10 for loss in losses)
    steps = [row["trainer/global_step"] for row in history if "train/loss" in row]
    assert steps == list(range(STEPS))
    config = {}
    for record in written:
        updates = {"run": record.run.config.update, "config": record.config.update}
        for item in updates.get(record.WhichOneof("record_type"), ()):
            config[key(item)] = json.loads(item.value_json)
    for name in ("peft", "batch_size", "objective"):
        assert config[name] == plain(cfg)[name]
    sheets = list(folders[0].rglob("samples*.png"))
    assert len(sheets) == 2  # before and after
    with Image.open(io.BytesIO(sheets[0].read_bytes())) as image:
        assert image.width > 32


def test_tensorboard(small, tmp_path):
    assert train(small("peft=full", "logger=tensorboard", f"max_steps={STEPS}")) == 0
    files = list((tmp_path / "run").rglob("events.out.tfevents.*"))
    assert len(files) == 1
    events = EventAccumulator(str(files[0]))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(STEPS))
    assert [event.step for event in events.Images("samples")] == [0, STEPS]
    assert (tmp_path / "run" / "metrics.csv").exists()  # besides


def test_dry_run_shows_the_plan_and_stops(small, base, tmp_path, capsys):
    assert train(small("peft=bitfit", f"pretrained={base}", "dry_run=true")) == 0
    shown = capsys.readouterr().out
    for text in ("BitFit", "parameters train", "global batch", "expected memory"):
        assert text in shown
    assert (tmp_path / "run" / "config.yaml").exists()
    assert not list((tmp_path / "run").rglob("*.ckpt"))
    assert not (tmp_path / "run" / "result.json").exists()


def test_bf16_freezes_in_bf16_and_trains_in_fp32(tmp_path, pictures, base):
    for precision, frozen in (("bf16-mixed", torch.bfloat16), ("32-true", torch.float32)):
        method = ["peft=difffit", f"pretrained={base}", f"trainer.precision={precision}"]
        parts = build_parts(compose(tmp_path, *SMALL, f"data.root={pictures}", *method))
        for parameter in parts.network.parameters():
            assert parameter.dtype == (torch.float32 if parameter.requires_grad else frozen)


def test_bf16_learns_what_fp32_learns(small, tmp_path, base):
    for name, precision in (("fp32", "32-true"), ("bf16", "bf16-mixed")):
        overrides = ["peft=difffit", f"pretrained={base}", f"trainer.precision={precision}", f"max_steps={STEPS}"]
        assert train(small(*overrides, folder=tmp_path / name)) == 0
    losses = []
    for name in ("fp32", "bf16"):
        header, *rows = (tmp_path / name / "metrics.csv").read_text().splitlines()
        column = header.split(",").index("train/loss")
        losses.append(torch.tensor([float(row.split(",")[column]) for row in rows if row.split(",")[column]]))
    assert len(losses[0]) == STEPS
    assert_close(losses[0], losses[1], rtol=0.02, atol=0)


def gradients(parts, prepare) -> dict[str, torch.Tensor]:
    """Of one loss of a network whose zero initial layers have been filled."""
    torch.manual_seed(0)
    network = build_network(
        "tiny", **{k: parts.network.config[k] for k in ("in_channels", "input_size", "num_classes", "learn_sigma")}
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    prepare(network)
    x0 = torch.randn(4, parts.network.in_channels, 16, 16)
    loss = parts.objective.loss(network, (x0, torch.tensor([0, 1, 2, 0])), Draws(0, 0, range(4)))
    loss.total.backward()
    return {name: p.grad for name, p in network.named_parameters()}


@pytest.fixture
def parts(tmp_path, pictures):
    return build_parts(compose(tmp_path, *SMALL, f"data.root={pictures}", "peft=full"))


def test_gradient_checkpointing_changes_no_gradient(parts):
    plainly = gradients(parts, lambda network: None)
    again = gradients(parts, lambda network: setattr(network, "gradient_checkpointing", True))
    assert all(torch.equal(again[name], gradient) for name, gradient in plainly.items())


@pytest.mark.slow
def test_compiling_changes_gradients_by_rounding_only(parts):
    plainly = gradients(parts, lambda network: None)
    compiled = gradients(parts, lambda network: network.compile_blocks())
    assert compiled.keys() == plainly.keys()  # no key changes its name
    for name, gradient in plainly.items():
        assert_close(compiled[name], gradient, atol=1e-5, rtol=1e-3)
