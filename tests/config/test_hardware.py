"""What a config leaves to the machine is settled once, before anything is built, and said."""

import logging

import pytest
import torch

from ditune.commands.train import train
from ditune.config import hardware
from ditune.config.hardware import bare_precision, device_of, emulation_factor, multiplies_bf16, resolve_precision
from ditune.config.roles import job_hash
from ditune.errors import UserError
from ditune.files.atomic import read_json
from ditune.run import load_run
from helpers import checkpoint, compose


@pytest.fixture
def emulating(monkeypatch):
    """A machine without bf16 units."""
    monkeypatch.setattr(hardware, "multiplies_bf16", lambda device: False)


@pytest.fixture
def multiplying(monkeypatch):
    monkeypatch.setattr(hardware, "multiplies_bf16", lambda device: True)


@pytest.mark.parametrize(
    ("capabilities", "limit", "expected"),
    [
        ({"avx2": True, "avx512_f": True}, "", False),
        ({"avx512_bf16": True}, "", True),
        ({"amx_bf16": True}, "", True),
        ({"bf16": True, "architecture": "aarch64"}, "", True),
        ({"avx512_bf16": False, "amx_bf16": False, "cpu_name": "bf16"}, "", False),
        ({"avx512_bf16": True}, "AVX2", False),  # a machine that is held to what an older one can
        ({"avx512_bf16": True}, "avx512_core_bf16", True),
    ],
)
def test_cpus_with_and_without_bf16_units(monkeypatch, capabilities, limit, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert multiplies_bf16("cpu") == expected


@pytest.mark.parametrize(
    ("capability", "hip", "expected"), [((8, 0), None, True), ((7, 5), None, False), ((9, 0), "6.2", False)]
)
def test_gpus_from_ampere_on(monkeypatch, capability, hip, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert multiplies_bf16("cuda") == expected
    assert not multiplies_bf16("mps")
    assert not multiplies_bf16("xpu")


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-true", "16-true", "64-true", "bf16"])
def test_other_precisions_are_refused(precision):
    with pytest.raises(UserError, match="must stay in fp32"):
        resolve_precision(precision, "cpu")


def test_auto_takes_the_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for there, kind in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert device_of("auto") == kind
    with pytest.raises(UserError, match="trainer=cpu"):
        device_of("gpu")


def test_auto_is_resolved_in_the_records_and_requested_in_the_identity(small, multiplying, tmp_path):
    overrides = (
        "peft=full",
        "max_steps=1",
        "trainer.precision=auto",
        "trainer=cpu",
        "callbacks.checkpoint.every_n_steps=1",
    )
    asked = job_hash(small(*overrides))
    assert train(small(*overrides)) == 0
    result = read_json(tmp_path / "run" / "result.json")
    assert (result["precision"], result["config_hash"]) == ("bf16-mixed", asked)
    assert load_run(tmp_path / "run").cfg.trainer.precision == "bf16-mixed"
    assert checkpoint(tmp_path / "run")["identity"]["precision"] == "bf16-mixed"


def test_a_resumed_run_keeps_its_precision_and_the_cost_is_said(small, monkeypatch, caplog, tmp_path):
    overrides = ("peft=full", "trainer.precision=auto", "trainer=cpu", "callbacks.checkpoint.every_n_steps=1")
    monkeypatch.setattr(hardware, "multiplies_bf16", lambda device: True)
    assert train(small(*overrides, "max_steps=1")) == 0
    monkeypatch.setattr(hardware, "multiplies_bf16", lambda device: False)
    monkeypatch.setattr(hardware, "emulation_factor", lambda: 9.7)
    caplog.set_level(logging.WARNING)
    assert train(small(*overrides, "max_steps=2", "resume=auto")) == 0
    assert read_json(tmp_path / "run" / "result.json")["precision"] == "bf16-mixed"
    assert "a product takes 10 times as long as in fp32" in caplog.text


def test_fp32_where_bf16_is_emulated(small, emulating, tmp_path):
    assert train(small("peft=full", "max_steps=1", "trainer.precision=auto", "trainer=cpu")) == 0
    assert read_json(tmp_path / "run" / "result.json")["precision"] == "32-true"


def test_bare_networks(emulating, monkeypatch, caplog):
    monkeypatch.setattr(hardware, "emulation_factor", lambda: 9.7)
    assert not bare_precision("auto", None)
    assert not bare_precision("auto", False)
    assert not caplog.text
    assert bare_precision("bf16-mixed", None)
    assert bare_precision("auto", True)  # the key of before
    assert "emulated" in caplog.text


def test_the_factor_is_measured():
    assert emulation_factor() > 0


def test_every_default_is_auto(tmp_path):
    cfg = compose(tmp_path)
    assert (cfg.trainer.precision, cfg.trainer.accelerator, cfg.trainer.devices) == ("auto", "auto", 1)
    for option in ("gpu", "ddp", "cpu"):
        assert compose(tmp_path, f"trainer={option}").trainer.precision == "auto"
