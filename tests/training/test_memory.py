"""The micro-batch that fits changes nothing but rounding, and too little memory is one sentence with its figures."""

import csv
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch.testing import assert_close

from ditune.cli import reported
from ditune.commands.train import train
from ditune.config.components import build_components
from ditune.errors import UserError
from ditune.files.atomic import read_json
from ditune.memory import figures, host_memory, is_out_of_memory, memory_for
from ditune.networks import block
from ditune.objectives import FlowMatching, GaussianDiffusion
from ditune.training import micro_batch, plan
from ditune.training.micro_batch import candidates, largest_micro_batch
from ditune.training.plan import expected_memory
from helpers import ROOT, SMALL_FLOW, assert_same_bits, checkpoint
from trials import finished, pair

OF_CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 39.39 GiB of which 1.20 GiB is free."
)
OF_TORCH = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 67108864"
OF_TORCH += " bytes. Error code 12 (Cannot allocate memory)"


def fits_up_to(most: int, monkeypatch) -> list[int]:
    """Let the objective run out of memory above `most` images, and the CPU be tried as a GPU is; sizes that it saw."""
    original, seen = GaussianDiffusion.loss, []

    def loss(self, network, batch, random, *state):
        seen.append(len(batch[1]))
        if len(batch[1]) > most:
            raise torch.OutOfMemoryError(OF_CUDA)
        return original(self, network, batch, random, *state)

    monkeypatch.setattr(GaussianDiffusion, "loss", loss)
    monkeypatch.setattr("ditune.training.plan.expected_memory", lambda *_: {})  # which calls it too
    monkeypatch.setattr(micro_batch, "can_be_tried", lambda device: True)
    return seen


# The search


def test_sizes_share_the_batch_evenly():
    assert candidates(12, 1) == [12, 6, 4, 3, 2, 1]
    assert candidates(12, 4) == [3, 1]


def test_the_largest_that_fits_is_taken_and_other_errors_are_not_hidden():
    tried = []

    def at_most(most, error):
        def try_batch(count):
            tried.append(count)
            if count > most:
                raise error

        return try_batch

    for error in (torch.OutOfMemoryError(OF_CUDA), RuntimeError(OF_TORCH), MemoryError()):
        tried.clear()
        assert largest_micro_batch(at_most(4, error), [12, 6, 4, 3]) == 4
        assert tried == [12, 6, 4]
    with pytest.raises(MemoryError):
        largest_micro_batch(at_most(0, MemoryError()), [2, 1])
    with pytest.raises(RuntimeError, match="shapes"):
        largest_micro_batch(at_most(1, RuntimeError("shapes differ")), [2, 1])


# Trainings

TRAINING = ["peft=difffit", "pretrained=@base", "optimizer.lr=1e-3", "max_steps=4"]
TRAINING += ["callbacks.checkpoint.every_n_steps=2"]


@pytest.fixture
def trained(small, base, tmp_path):
    """`trained(name, *overrides)`: folder of a training of four steps of four images."""

    def run(name, *overrides):
        filled = [override.replace("@base", str(base)) for override in (*TRAINING, *overrides)]
        assert train(small(*filled, folder=tmp_path / name)) == 0
        return tmp_path / name

    return run


def logged(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def by_steps(count):
    return f"trainer.accumulate_grad_batches={count}"


def test_micro_batches_change_nothing_but_rounding(trained, monkeypatch):
    whole = trained("whole")
    others = {"two": [by_steps(2)], "four": [by_steps(4)], "checkpointed": [by_steps(2), "gradient_checkpointing=true"]}
    folders = [trained(name, *overrides) for name, overrides in others.items()]
    with monkeypatch.context() as patch:
        seen = fits_up_to(2, patch)
        folders.append(trained("auto", by_steps("auto")))
    # one step each at the beginning, in the middle and at the end; then two micro-steps in every step
    assert seen[:13] == [4, 2, 2, 2] + [2] * 8 + seen[12:13]
    assert read_json(folders[-1] / "result.json")["micro_batch"] == checkpoint(folders[-1])["micro_batch"] == 2
    a, b = checkpoint(folders[-1]), checkpoint(folders[0])
    for part in ("state_dict", "ema", "optimizer_states", "lr_schedulers", "identity"):
        assert_same_bits(a[part], b[part], part)  # nothing of the tries is left
    assert (folders[-1] / "metrics.csv").read_bytes() == (folders[0] / "metrics.csv").read_bytes()
    for folder in folders:
        for name, value in checkpoint(whole)["state_dict"].items():
            if not name.endswith("qkv.bias"):  # softmax cancels a third of it: its gradient is rounding
                assert_close(checkpoint(folder)["state_dict"][name], value, atol=1e-5, rtol=0, msg=name)
        for ours, theirs in zip(logged(folder), logged(whole), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, nan_ok=True)


def test_a_resumed_run_keeps_its_micro_batch_where_it_fits(trained, monkeypatch):
    whole = trained("whole", by_steps(4))
    trained("halved", by_steps(4), "max_steps=2")
    with monkeypatch.context() as patch:
        seen = fits_up_to(4, patch)
        halved = trained("halved", by_steps("auto"), "resume=auto")
    assert set(seen[:3]) == {1}
    for part in ("state_dict", "ema", "optimizer_states"):
        assert_same_bits(checkpoint(halved)[part], checkpoint(whole)[part], part)
    trained("larger", "max_steps=2")
    with monkeypatch.context() as patch:
        fits_up_to(2, patch)
        larger = trained("larger", by_steps("auto"), "resume=auto")  # on a smaller device
    assert checkpoint(larger)["micro_batch"] == 2
    for name, value in checkpoint(whole)["state_dict"].items():
        if not name.endswith("qkv.bias"):
            assert_close(checkpoint(larger)["state_dict"][name], value, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("method", ["peft=full", "peft=lora"])
def test_tries_leave_experts_teachers_and_buffers_alone(small, base, tmp_path, monkeypatch, method):
    experts = ["network=tiny_moe", "balance=loss_free", "objective.process.variance=fixed_small", "peft=full"]
    case = experts if method == "peft=full" else [method, f"pretrained={base}"]
    for name, way in (("two", by_steps(2)), ("auto", by_steps("auto"))):
        with monkeypatch.context() as patch:
            fits_up_to(2, patch)
            cfg = small("max_steps=2", "callbacks.checkpoint.every_n_steps=2", *case, way, folder=tmp_path / name)
            assert train(cfg) == 0
    a, b = (checkpoint(tmp_path / name) for name in ("two", "auto"))
    for part in ("state_dict", "ema", "balance", "method", "teacher"):
        assert_same_bits(a[part], b[part], part)


def test_a_cpu_is_asked_by_an_estimate(trained, monkeypatch):
    asked = []
    monkeypatch.setattr(micro_batch, "expected_memory", lambda *_: {"p": 1.0, "t": 20.0, "a": 10.0})  # MiB
    monkeypatch.setattr(micro_batch, "host_memory", lambda: asked.append(1) or (100 * 2**20, 200 * 2**20))
    # 80 MiB may be taken: 20 and 2.5 x 10 for each image
    assert read_json(trained("auto", by_steps("auto")) / "result.json")["micro_batch"] == 2
    assert asked
    monkeypatch.setattr(micro_batch, "host_memory", lambda: (0, 200 * 2**20))
    assert read_json(trained("least", by_steps("auto")) / "result.json")["micro_batch"] == 1  # it is only an estimate


def test_not_one_image_fits(small, monkeypatch, tmp_path):
    fits_up_to(0, monkeypatch)
    with pytest.raises(UserError) as caught:
        train(small("peft=full", "max_steps=1", by_steps("auto")))
    assert str(caught.value) == (
        "There is not enough memory for the training: 2.0 GiB more were asked for, 1.2 GiB of 39.4 GiB are free on "
        "GPU 1. Set trainer.accumulate_grad_batches=2 (or more; auto finds the number) or gradient_checkpointing=true."
    )
    result = read_json(tmp_path / "run" / "result.json")
    assert (result["status"], result["error"]) == ("failed", str(caught.value))


def ranks_fit(*most: int) -> Callable[[], None]:
    """Let each rank run out of memory above so many images."""

    def inject() -> None:
        original = FlowMatching.loss

        def loss(self, network, batch, *others):
            if len(batch[1]) > most[int(os.environ["RANK"])]:
                raise torch.OutOfMemoryError("out of memory")
            return original(self, network, batch, *others)

        FlowMatching.loss, micro_batch.can_be_tried = loss, lambda device: True
        plan.expected_memory = lambda *_: {}  # which calls it too

    return inject


@pytest.mark.ddp
@pytest.mark.slow
def test_all_ranks_take_what_fits_the_smallest(tmp_path, pictures):
    common = [*SMALL_FLOW, f"data.root={pictures}", "peft=full", "max_steps=2", "callbacks.checkpoint.every_n_steps=2"]
    ways = {"auto": by_steps("auto"), "two": by_steps(2)}
    for name, way in ways.items():
        trials = pair(tmp_path / name, [*common, way], ranks_fit(2, 1))
        assert finished(trials) == [0, 0], trials[0].output[-3000:]
    auto, two = (checkpoint(tmp_path / name) for name in ways)
    assert auto["micro_batch"] == two["micro_batch"] == 1
    assert_same_bits(auto["state_dict"], two["state_dict"])


# Real limits, in a process of its own


def test_a_process_that_may_not_have_more(tmp_path, pictures):
    command = [sys.executable, str(ROOT / "tests" / "support" / "limited.py"), str(tmp_path), str(pictures)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["micro_batch"] == 4  # of 64 MiB an image, in 400 MiB
    whole, auto = found["whole"], found["auto"]
    assert (whole["code"], whole["status"]) == (2, "failed")
    assert whole["error"].startswith("There is not enough memory for the training: ")
    assert " MiB more were asked for, " in whole["error"]
    assert "that this process may use are free. Set trainer.accumulate_grad_batches=2" in whole["error"]
    assert f"Error: {whole['error']}" in done.stderr
    assert "Traceback" not in done.stderr
    assert (auto["code"], auto["status"]) == (0, "finished")
    assert 1 < auto["micro_batch"] < 2048
    assert found["sampled"].startswith("There is not enough memory for generating 8192 images at once: ")
    assert "Set sampler.batch_size lower" in found["sampled"]
    assert found["python"].startswith("There is not enough memory for a tensor: ")


# Sentences and figures


def test_what_is_out_of_memory():
    for error in (torch.OutOfMemoryError(OF_CUDA), RuntimeError(OF_TORCH), MemoryError(), OSError(errno.ENOMEM, "no")):
        assert is_out_of_memory(error)
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    for error in (RuntimeError("shapes differ"), OSError(errno.ENOSPC, "no"), ValueError("out of memory")):
        assert not is_out_of_memory(error)


def test_figures():
    assert figures(OF_CUDA) == "2.0 GiB more were asked for, 1.2 GiB of 39.4 GiB are free on GPU 1"
    assert figures("CUDA error: out of memory") == "the GPU is full"
    assert figures(OF_TORCH).startswith("64 MiB more were asked for, ")


def test_the_innermost_block_speaks_and_other_errors_pass():
    outer, inner = memory_for("the training", "Set more."), memory_for("decoding", lambda: "Set less.")
    sentence = r"^There is not enough memory for decoding: .* Set less\.$"
    with pytest.raises(UserError, match=sentence), outer, inner:
        raise MemoryError
    with pytest.raises(RuntimeError, match="shapes differ"), memory_for("the training", "Set more."):
        raise RuntimeError("shapes differ")


@pytest.mark.parametrize(
    ("line", "folder", "limit", "used", "cache"),
    [
        ("0::/job/step", "sys/fs/cgroup/job", "memory.max", "memory.current", "inactive_file"),
        (
            *("4:cpu,memory:/job/step", "sys/fs/cgroup/memory/job"),
            *("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
)
def test_the_limit_of_a_job_counts(tmp_path, line, folder, limit, used, cache):
    """Of Slurm or a container, in a group above that of the process."""
    group = tmp_path / folder
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"9:pids:/\n{line}\n")
    (group / limit).write_text("3000000\n")
    (group / used).write_text("2500000\n")
    (group / "memory.stat").write_text(f"anon 1\n{cache} 500000\n")
    assert host_memory(tmp_path) == (1_000_000, 3_000_000)
    (group / limit).write_text("max\n" if limit == "memory.max" else "9223372036854771712\n")
    assert host_memory(tmp_path)[1] > 3_000_000


def test_expected_memory_of_a_fused_kernel_and_of_blocks_that_are_computed_twice(small, monkeypatch):
    c = build_components(small("peft=full"))
    arguments = (c.network, c.objective, c.autoencoder.latent_shape(16), 4, True)

    def activations(fused):
        return expected_memory(*arguments, fused)["saved activations"]

    explicit, fused = activations(False), activations(True)
    with monkeypatch.context() as patch:
        patch.setattr(block, "attention", torch.nn.functional.scaled_dot_product_attention)
        really = activations(False)
    assert fused == pytest.approx(really, rel=0.01)
    assert explicit > 1.1 * really
    c.network.gradient_checkpointing = True
    assert activations(True) < 0.75 * fused  # of two blocks one is there at a time
    assert c.network.gradient_checkpointing


def test_a_command_that_runs_out_of_memory_anywhere(capsys):
    def fails(error):
        def work():
            raise error

        return work

    with pytest.raises(SystemExit) as caught:
        reported(fails(MemoryError()), traceback=False)
    assert caught.value.code == 2
    assert "Error: There is not enough memory for this command: " in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="shapes differ"):
        reported(fails(RuntimeError("shapes differ")), traceback=False)
