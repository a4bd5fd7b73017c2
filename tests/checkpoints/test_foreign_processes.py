"""Foreign checkpoints: their heads, their classes, and the process that they were trained on."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from ditune.checkpoints import load_network, read_network
from ditune.checkpoints.diffusers_dit import to_theirs
from ditune.checkpoints.networks import PROCESSES
from ditune.commands.train import train
from ditune.config.components import build_components
from ditune.config.options import load_option
from ditune.errors import UserError
from ditune.networks import dit, dit_moe
from ditune.processes import FlowProcess, GaussianProcess, build_process
from ditune.run import load_checkpoint, load_run
from foreign_files import STEM, Settings, arguments, assert_read, network
from helpers import ROOT, SMALL_FLOW, compose

NONE = OmegaConf.create({"_target_": "ditune.autoencoders.Pixels"})


# Widths and heads


@pytest.mark.parametrize(("hidden", "heads"), [(384, 6), (768, 12), (1024, 16), (1152, 16)])
def test_a_new_size_of_ours_changes_no_foreign_file(saved, monkeypatch, hidden, heads):
    monkeypatch.setitem(dit.SIZES, "dit_h", (hidden, 40, heads + 2 if hidden == 1152 else 2 * heads))
    monkeypatch.setitem(dit_moe.SIZES, "dit_moe_h", (hidden, 40, 2, 4, 1, False))
    path = saved(network(hidden_size=hidden, num_heads=heads).state_dict())
    assert load_network(path).config["num_heads"] == heads


def test_widths_of_nobody_take_their_heads_from_the_caller(saved):
    own = network(hidden_size=100, num_heads=5, mlp_ratio=2.67)
    path = saved(own.state_dict())
    with pytest.raises(UserError, match=r"size 100.*network_overrides\.num_heads="):
        load_network(path)
    loaded = load_network(path, num_heads=5)
    assert loaded.config["num_heads"] == 5
    assert loaded.blocks[0].mlp.fc1.out_features == 267
    assert load_network(path, own.config).config["num_heads"] == 5  # what is known of it
    published = saved(network().state_dict(), "published.pt")
    assert load_network(published, {"num_heads": 12}).config["num_heads"] == 6
    assert load_network(published, num_heads=12).config["num_heads"] == 12


def test_label_tables_without_a_null_class(saved):
    path = saved(network(class_dropout_prob=0.0).state_dict())
    assert load_network(path).num_classes == 2  # as in every published file
    assert load_network(path, num_classes=3).config["class_dropout_prob"] == 0
    assert load_network(path, class_dropout_prob=0.0).num_classes == 3


# Processes


def stored_process(path: Path, **options: object) -> dict:
    return read_network(path, **options).process


def test_the_guess_is_said_at_every_use(saved, tensors, caplog):
    caplog.set_level("INFO")
    path = saved({"ema": {key: value.half() for key, value in tensors.items()}})
    assert stored_process(path) == {}
    assert (
        f"read {path}: official DiT, hidden 384, depth 1, 6 heads, 3 classes + null class, epsilon diffusion "
        "(assumed), from 'ema', fp16" in caplog.text
    )
    assert "read as DiT's epsilon diffusion, since the file does not say; for a SiT file set process=sit" in caplog.text
    caplog.clear()
    assert stored_process(path, process="diffusion", key="pretrained_process") == {}
    assert "(by pretrained_process=)" in caplog.text
    assert "since the file does not say" not in caplog.text
    with pytest.raises(UserError, match="Choose one of diffusion, sit, repa"):
        read_network(path, "flow")


@pytest.mark.parametrize(("name", "key"), [("SiT-XL-2-256x256.pt", "sit"), ("last_repa.pt", "repa")])
def test_names_that_speak_against_the_guess(saved, tensors, caplog, name, key):
    read_network(saved(tensors, name))
    assert f"set process={key}" in caplog.text
    assert "WARNING" in caplog.text


@pytest.mark.parametrize(
    ("args", "data_at"),
    [
        (arguments(path_type="Linear", prediction="velocity"), 1),
        (arguments(path_type="linear", prediction="v", enc_type="dinov2-vit-b"), 0),
    ],
)
def test_arguments_in_the_file_say_the_process(saved, tensors, args, data_at):
    process = stored_process(saved({"ema": tensors, "args": args}))
    assert (process["kind"], process["data_at"], process["time_scale"]) == ("flow", data_at, 1.0)
    args.path_type = "GVP"
    path = saved({"ema": tensors, "args": args})
    with pytest.raises(UserError, match="path gvp"):
        read_network(path)
    assert read_network(path, "sit").process["data_at"] == 1


def test_projectors_are_repas_and_not_of_the_network(saved, tensors):
    path = saved({"ema": tensors | {"projectors.0.0.weight": torch.ones(2, 384)}})
    assert stored_process(path)["data_at"] == 0
    assert_read(path, tensors)


def test_sit_and_repa_are_asked_as_their_codes_do(saved):
    """SiT: x_t = t data + (1 - t) noise, v = data - noise. REPA: x_t = (1 - t) data + t noise, v = noise - data."""
    told = []

    def perfect(x, t, y):
        told.append(t.item())
        data, noise = torch.zeros_like(x), x / time
        return torch.cat([data - noise if sit else noise - data, x], dim=1)

    time = 0.25  # here: 0 = data
    for sit in (True, False):
        process = build_process(PROCESSES["sit" if sit else "repa"])
        x = torch.full((1, 4, 2, 2), 3.0)
        velocity = process.velocity(perfect, x, torch.tensor([time]), torch.zeros(1))
        torch.testing.assert_close(velocity, x / time)
    assert told == [0.75, 0.25]


def test_a_checkpoint_is_drawn_from_by_its_process(saved):
    path = saved(network(in_channels=3, learn_sigma=False).state_dict())
    sampler = load_option(ROOT / "configs" / "sampler" / "published.yaml")
    trained = load_checkpoint(path, NONE, sampler, False, "repa", {"num_heads": None})
    assert isinstance(trained.generator.process, FlowProcess)
    assert type(trained.generator.sampler).__name__ == "Euler"
    trained = load_checkpoint(path, NONE, sampler, False)
    assert trained.generator.process.config["variance"] == "fixed_large"
    own = OmegaConf.create({"kind": "flow", "time_scale": 1000.0})
    assert load_checkpoint(path, NONE, sampler, False, own).generator.process.time_scale == 1000
    unknown = OmegaConf.create({"kind": "flow", "speed": 1})
    with pytest.raises(UserError, match="process is no process"):
        load_checkpoint(path, NONE, sampler, False, unknown)


def test_training_on_a_flow_of_others(saved, pictures, tmp_path):
    """Its velocities are taken as they are; without the key it would be read as a diffusion, and converted."""
    path = saved(network(input_size=16, in_channels=3, learn_sigma=False).state_dict())
    general = [*SMALL_FLOW, f"data.root={pictures}", f"pretrained={path}", "network=as_pretrained"]

    def built(*overrides: str):
        cfg = compose(tmp_path / "run", *general, "peft=full", *overrides)
        return build_components(cfg).objective.process

    assert built().diffused is not None
    assert built("pretrained_process=diffusion").diffused is not None
    with pytest.raises(UserError, match=r"objective\.process\.time_scale=1\.0 objective\.process\.data_at=1"):
        built("pretrained_process=sit")
    process = built("pretrained_process=sit", "objective.process.time_scale=1", "objective.process.data_at=1")
    assert process.diffused is None


def test_a_run_on_a_flow_of_an_unpublished_width(saved, pictures, tmp_path):
    own = network(input_size=16, in_channels=3, learn_sigma=False, hidden_size=96, num_heads=3)
    path = saved({"ema": own.state_dict(), "args": arguments(), "config": Settings()})
    overrides = [*SMALL_FLOW, f"data.root={pictures}", f"pretrained={path}", "pretrained_process=repa", "peft=difffit"]
    overrides += ["network=as_pretrained", "+network.num_heads=3", "objective.process.time_scale=1.0", "max_steps=1"]
    cfg = compose(tmp_path / "run", *overrides, f"paths.cache_dir={tmp_path}/cache")
    assert train(cfg) == 0
    run = load_run(tmp_path / "run")
    assert run.network.config["num_heads"] == 3
    assert (run.generator.process.time_scale, run.generator.process.diffused) == (1.0, None)


COSINE = GaussianProcess("cosine").tables["betas"].tolist()


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ({"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}, "v"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}, "epsilon"),
        (
            {"_class_name": "DDIMScheduler", "trained_betas": COSINE},
            "epsilon",
        ),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, None),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"}, None),
    ],
)
def test_a_pipelines_scheduler_says_the_process(diffusers_folder, tensors, scheduler, expected):
    save_file({k: v.contiguous() for k, v in to_theirs(tensors).items()}, diffusers_folder / f"{STEM}.safetensors")
    path = diffusers_folder.parent / "scheduler" / "scheduler_config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(scheduler))
    if expected is None:
        with pytest.raises(UserError, match="of no diffusion that is known"):
            read_network(diffusers_folder.parent)
        assert read_network(diffusers_folder.parent, "sit").process["data_at"] == 1
        return
    process = build_process(read_network(diffusers_folder.parent).process).config
    assert process["prediction"] == expected
    assert process["schedule"] == ("cosine" if "trained_betas" in scheduler else "linear")
