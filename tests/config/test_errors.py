"""Mistakes of a user end in one clear sentence with the remedy, and never in a traceback."""

import subprocess
import sys

import pytest
import torch

import forked
from ditune.cli import reported
from ditune.commands.train import train
from ditune.errors import UserError
from helpers import ROOT, SMALL

# overrides of a small training, and a part of the message
NOBODY = "'http://127.0.0.1:9'"  # an address that does not answer
MISTAKES = {
    "no pictures": (["data.root=/nowhere"], "There is nothing at /nowhere"),
    "no such split": (["data.pictures.split=val"], "no image in the split 'val'"),
    "no class file": (["data.classes=/nowhere/classes.txt"], "no file /nowhere/classes.txt"),
    "class not in the list": (["data.classes=@one_class"], "which is not one of the 1 in `classes`"),
    "no base network": (["pretrained=/nowhere/base.safetensors"], "There is no network file"),
    "damaged base network": (["pretrained=@damaged"], "is damaged"),
    "base of other classes": (["pretrained=@base", "data.classes=@four_classes"], "knows 3 classes, the data has 4"),
    "base of other class names": (["pretrained=@base", "data.classes=@renamed"], "in the same order"),
    "base of another size": (["pretrained=@base", "network.name=emoji_xs"], "hidden_size 32 there, 128 here"),
    "base of another resolution": (["pretrained=@base", "data.resolution=32"], "input_size 16 there, 32 here"),
    "base of another process": (["pretrained=@base", "objective.process.prediction=v"], "prediction x0 there, v here"),
    "base of other latents": (["pretrained=@base", "autoencoder.scale=3.0"], "other latents"),
    "batch and micro-steps": (["trainer.accumulate_grad_batches=3"], "multiple of 3"),
    "empty batch": (["batch_size=0"], "batch_size is 0, but must be a whole number"),
    "resume by a path": (["resume=last.ckpt"], "Set one of auto, never."),
    "sizes of no file": (["network=as_pretrained"], "Set pretrained=<file>"),
    "no such network": (["network.name=dit_xxl_2"], "there is no network 'dit_xxl_2'"),
    "no such method": (["peft.name=diffit"], "There is no method 'diffit'"),
    "key of another method": (["peft=bitfit", "+peft.gamma_depth=1"], "gamma_depth"),
    "key that AdamW does not have": (["+optimizer.momentum=0.9"], "momentum"),
    "too many gammas": (["peft=difffit", "peft.gamma_depth=3"], "Set 0 to 2"),
    "picture and patch": (["data.resolution=15"], "multiple of patch_size"),
    "learned variance of a network without": (["objective.process.variance=learned_range"], "learn_sigma"),
    "no such loss": (["objective.loss=l1"], "Choose one of mse"),
    "fraction of a seed": (["seed=1000.5"], "seed is 1000.5, but must be a whole number of at least 0"),
    "decay above one": (["ema.decay=1.5"], "ema.decay is 1.5, but must be a number between 0 and 1"),
    "label drop above one": (["objective.label_drop=2"], "between 0 and 1"),
    "one step of a diffusion": (["sampler.steps=1"], "Set steps to 2 or more"),
    "more steps than timesteps": (["sampler.steps=2000"], "steps"),
    "no GPU": (["trainer=gpu"], "Set trainer=cpu"),
    "nothing to adapt": (["peft=bitfit"], "Set pretrained="),
    "trainables in bf16": (["trainer.precision=bf16-true"], "Set one of bf16-mixed, 32-true, auto"),
    "changed latents": (["augment=drawings", "data.latents=true"], "data.latents=false"),
    "no null class": (["network.class_dropout_prob=0"], "label_drop=0"),
    "guidance without a null class": (
        ["network.class_dropout_prob=0", "objective.label_drop=0", "sampler.guidance=2"],
        "Set sampler.guidance=1",
    ),
    "Inception without its weights": (
        ["metrics=fid", "metrics.n=2", f"addresses.inception=[{NOBODY}]"],
        "inception=[<other address>]",
    ),
    "DINOv2 without its weights": (
        ["metrics=dinov2", "metrics.n=2", f"addresses.dinov2=[{NOBODY}]"],
        "dinov2=[<other address>]",
    ),
    "dropout in an adapter": (["peft=lora", "+peft.lora_dropout=0.1", "pretrained=@base"], "lora_dropout"),
    "missing value": (["data.root=???"], "no value for data.root"),
}


@pytest.fixture
def filled(tmp_path, pictures, base):
    """Replaces @names in overrides by the paths of files that are made for it."""
    texts = {"one_class": "cat", "four_classes": "cat\ndog\neel\nfox", "renamed": "eel\ndog\ncat"}
    files = {"base": base}
    for name, text in texts.items():
        files[name] = tmp_path / f"{name}.txt"
        files[name].write_text(text)
    files["damaged"] = tmp_path / "damaged.safetensors"
    files["damaged"].write_bytes(base.read_bytes()[: base.stat().st_size // 2])

    def fill(overrides):
        for name, path in files.items():
            overrides = [override.replace(f"=@{name}", f"={path}") for override in overrides]
        return overrides

    return fill


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_with_their_remedy(small, filled, mistake):
    if mistake == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    overrides, message = MISTAKES[mistake]
    if not any(override.startswith(("peft=", "pretrained=")) for override in overrides):
        overrides = ["peft=full", *overrides]
    with pytest.raises(UserError) as caught:
        train(small("max_steps=1", *filled(overrides)))
    assert message in str(caught.value)
    assert str(caught.value).endswith(".")


def test_loss_that_is_not_finite_stops_the_training(small):
    cfg = small("max_steps=5", "peft=full", "optimizer.lr=1e38", "trainer.gradient_clip_val=null")
    with pytest.raises(UserError, match="not finite at step 1"):
        train(cfg)


# The same through the entry point: exit code, message, no traceback

PROCESSES = {
    "unknown key": (["batchsize=8"], "There is no key 'batchsize'. Did you mean batch_size?", 2),
    "unknown option": (["peft=difft"], "There is no peft=difft. Did you mean difffit?", 2),
    "wrong type": (["optimizer.lr=high"], "optimizer.lr is high, but must be a number above 0.", 2),
    "missing asset": (["data.root=/nowhere"], "There is nothing at /nowhere", 2),
    "wrong class count": (["pretrained=@base", "data.classes=@four_classes"], "knows 3 classes", 2),
    "batch that does not divide": (["peft=full", "trainer.accumulate_grad_batches=3"], "Set it to a multiple of 3", 2),
}


@pytest.mark.slow
def test_exit_codes_and_messages(tmp_path, pictures, filled):
    for name, (overrides, message, code) in PROCESSES.items():
        run_dir = tmp_path / name.replace(" ", "_")
        command = ["src/train.py", *SMALL, f"data.root={pictures}", f"run_dir={run_dir}", *filled(overrides)]
        if name == "missing asset":  # one by a start of its own
            done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120)
        else:
            done = forked.run(tmp_path, *command)
        assert done.returncode == code, f"{name}: {done.stderr}"
        assert message in done.stderr, name
        assert "Traceback" not in done.stdout + done.stderr, name


def test_debug_shows_the_traceback(small, capsys):
    def mistake():
        raise UserError("It is wrong. Mend it.")

    with pytest.raises(UserError):
        reported(mistake, traceback=True)
    with pytest.raises(SystemExit) as caught:
        reported(mistake, traceback=False)
    assert caught.value.code == 2
    assert "Error: It is wrong. Mend it." in capsys.readouterr().err
    assert small("debug=default").traceback
