"""Every rule refuses what it is for: a rule without an example here fails."""

import traceback

import pytest

from ditune.commands.train import train
from ditune.config import rules
from ditune.config.components import build_components
from ditune.errors import UserError
from ditune.training.components import Processes
from helpers import SMALL, SMALL_FLOW, compose

BY_TIME = ["+network.choice=time", "+network.time_range=7"]
# Overrides of a small training that break a rule; @base is a tiny diffusion network, @flow a flow.
BROKEN = {
    "classes_are_as_many": ["pretrained=@base", "data.classes=@four_classes"],
    "flows_need_an_objective_of_flows": ["pretrained=@flow"],
    "processes_are_equal": ["pretrained=@base", "objective.process.prediction=v"],
    "latents_are_the_bases": ["pretrained=@base", "autoencoder.scale=3.0"],
    "class_names_are_the_bases": ["pretrained=@base", "data.classes=@renamed"],
    "shapes_are_the_bases": ["pretrained=@base", "network.name=emoji_xs"],
    "new_classes_are_trained": ["pretrained=@base", "classes=reinit", "peft.train_labels=false"],
    "adapters_need_a_base": ["peft=bitfit"],
    "labels_from_scratch_are_trained": ["peft.train_labels=false"],
    "objective_takes_the_batch": ["objective=shortcut_code"],
    "balance_needs_experts": ["balance=batch"],
    "routing_by_time_is_not_balanced": ["network=tiny_moe", *BY_TIME, "balance=batch"],
    "routing_by_time_knows_its_end": ["network=tiny_moe", *BY_TIME],
    "teacher_is_dense": ["sparsity=n_m", "sparsity.teacher=0.1"],
    "masks_suit_the_weights": ["pretrained=@base", "peft=bitfit", "sparsity=n_m"],
    "adapters_have_no_router_biases": ["pretrained=@experts", "network=tiny_moe", "balance=loss_free"],
    "forward_mode_suits_the_method": ["pretrained=@flow", "objective=mean_flow", "peft=loha", "peft.r=2"],
    "int8_suits_the_method": ["pretrained=@base", "peft=shira", "frozen_weights=int8"],
    "differences_are_not_rounded": [
        "objective=mean_flow",
        "objective.derivative=difference",
        "trainer.precision=bf16-mixed",
    ],
    "null_class_is_there": ["network.class_dropout_prob=0"],
    "latents_are_not_augmented": ["augment=drawings", "data.latents=true"],
    "batch_is_shared_evenly": ["trainer.accumulate_grad_batches=3"],
    "late_blocks_are_there": ["objective=mean_flow", "objective.process.step_blocks=9"],
    "own_paths_suit_the_objective": ["pretrained=@base", "objective=live_reflow", "objective.process.bridge=path"],
    "transfer_needs_a_base": ["transfer=diff_tuning"],
    "windows_need_a_grid": ["patches=windows", "+network.patch_size=8"],
    "micro_batches_may_be_chosen": ["network=tiny_moe", "balance=global", "trainer.accumulate_grad_batches=auto"],
}


def network_file(folder, pictures, name, *overrides):
    """A network from scratch, as a training writes it."""
    assert train(compose(folder / name, *overrides, f"data.root={pictures}", "peft=full", "max_steps=1")) == 0
    return folder / name / "network.safetensors"


@pytest.fixture(scope="module")
def files(tmp_path_factory, pictures, base):
    folder = tmp_path_factory.mktemp("rules")
    made = {"base": base, "flow": network_file(folder, pictures, "flow", *SMALL_FLOW)}
    made["experts"] = network_file(folder, pictures, "experts", *SMALL, "network=tiny_moe")
    for name, text in {"four_classes": "cat\ndog\neel\nfox", "renamed": "eel\ndog\ncat"}.items():
        made[name] = folder / f"{name}.txt"
        made[name].write_text(text)
    return made


def broken_rule(error):
    """Name of the rule that raised it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code is rules.check.__code__]
    return frames[-1].f_locals["rule"].__name__ if frames else None


def test_every_rule_has_an_example():
    assert {rule.__name__ for rule in rules.RULES} == {*BROKEN, "sweep_starts_every_process"}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_refused(tmp_path, pictures, files, name):
    overrides = BROKEN[name]
    flow = any(override.startswith("objective=") for override in overrides)
    if not any(override.startswith("peft=") for override in overrides):
        overrides = ["peft=full", *overrides]
    for key, path in files.items():
        overrides = [override.replace(f"=@{key}", f"={path}") for override in overrides]
    common = SMALL_FLOW[:-1] if flow else SMALL
    cfg = compose(tmp_path, *common, f"data.root={pictures}", "max_steps=1", *overrides)
    with pytest.raises(UserError) as caught:
        train(cfg)
    assert broken_rule(caught.value) == name, caught.value
    assert str(caught.value).endswith(".")


def test_jobs_that_cannot_start_their_processes_are_refused(small):
    components = build_components(small("peft=full"))
    rules.check(components, rules.RULES)
    components.processes = Processes(world_size=2, accumulate=1, starts_others=True)
    with pytest.raises(UserError, match="cannot start others"):
        rules.check(components, rules.OF_THE_PROCESSES)


def test_rules_change_nothing(small):
    components = build_components(small("peft=full"))
    before = dict(vars(components))
    rules.check(components, rules.RULES)
    assert vars(components) == before
