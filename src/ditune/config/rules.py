"""Combinations that can be composed and cannot work: one function each, which says why and how to mend it.

A rule takes the built components and returns its sentences, or None. No rule changes anything.
"""

from collections.abc import Callable, Sequence

import torch

from ditune.config.base_rules import OF_THE_BASE, OF_THE_LABELS, Rule
from ditune.data.stream import micro_batch_size
from ditune.errors import UserError
from ditune.networks import DiTMoE
from ditune.networks.int8 import is_quantised
from ditune.objectives import MeanFlow, Patches
from ditune.objectives.transfer import Transfer
from ditune.peft import Full
from ditune.processes import DiffusionPath
from ditune.training.components import Components


def check(components: Components, rules: Sequence[Rule]) -> None:
    """Raises UserError with the sentences of the first rule that is broken."""
    for rule in rules:
        text = rule(components)
        if text is not None:
            raise UserError(text)


def refusal(attempt: Callable[[], object]) -> str | None:
    """The sentences with which an object itself refuses, or None."""
    try:
        attempt()
    except UserError as error:
        return str(error)
    return None


def adapters_need_a_base(c: Components) -> str | None:
    """Only full training starts from scratch."""
    if c.base is not None or isinstance(c.method, Full):
        return None
    return (
        f"peft={c.method.title} adapts a pretrained network, and there is none. "
        "Set pretrained=<file>, or peft=full to train from scratch."
    )


def labels_from_scratch_are_trained(c: Components) -> str | None:
    """Random label embeddings must learn."""
    if c.base is not None or c.method.train_labels:
        return None
    return "The label table of a network from scratch must train. Set peft.train_labels=true."


def objective_takes_the_batch(c: Components) -> str | None:
    """Some objectives divide the batch."""
    return refusal(lambda: c.objective.check(c.settings.batch_size))


def balance_needs_experts(c: Components) -> str | None:
    """Only a mixture of experts has a load to balance."""
    if c.balance is None or isinstance(c.network, DiTMoE):
        return None
    return "The network has no experts whose load could be balanced. Leave balance= out, or set network=."


def routing_by_time_is_not_balanced(c: Components) -> str | None:
    """Where the time chooses, the load is that of the times, and no loss changes it."""
    b = c.balance
    if b is None or c.network.config.get("choice") != "time" or not (b.alpha or b.z or b.bias_rate):
        return None
    return (
        "network.choice=time has no learned router, so nothing can balance its load. "
        "Set balance.alpha=0 balance.z=0 balance.bias_rate=0, which still records the routing, or balance=none."
    )


def routing_by_time_knows_its_end(c: Components) -> str | None:
    """The slices of the time are those of the process."""
    config = c.network.config
    if config.get("choice") != "time":
        return None
    end = c.objective.process.part(torch.tensor([config["time_range"]], dtype=torch.float64)).item()
    if min(abs(end), abs(end - 1)) < 1e-6:
        return None
    return (
        f"network.time_range is {config['time_range']:g}, and the process ends at another time. Set it to "
        "objective.process.time_scale of a flow, or objective.process.timesteps of a diffusion."
    )


def adapters_have_no_router_biases(c: Components) -> str | None:
    """Loss-free balance moves biases that an adapter's file does not hold."""
    if c.base is None or c.balance is None or not c.balance.bias_rate:
        return None
    return (
        "Biases of the routers move with balance.bias_rate, and an adapter has no place for them. "
        "Set balance.bias_rate=0."
    )


def forward_mode_suits_the_method(c: Components) -> str | None:
    """Some adapters have no derivative by torch.func.jvp."""
    if not c.objective.forward_mode or c.method.forward_mode:
        return None
    return (
        f"{type(c.objective).__name__} differentiates the network by its input, which peft={c.method.title} cannot. "
        "Set objective.derivative=difference, or choose another method."
    )


def int8_suits_the_method(c: Components) -> str | None:
    """Weights in int8 are those of layers that do not train, and are multiplied by and nothing else."""
    if c.settings.frozen_weights != "int8":
        return None
    if c.method.whole_weights:
        return (
            f"frozen_weights=int8 keeps no weights in floating point, and peft={c.method.title} computes with those of "
            "its layers, or changes them. Set frozen_weights=null, or another method, such as peft=lora or difffit."
        )
    if c.settings.compiled:
        return (
            "compile=true keeps the matrices of frozen_weights=int8 in floating point until the backward pass. Set "
            "compile=false, or frozen_weights=null."
        )
    if is_quantised(c.network):
        return None
    return (
        f"frozen_weights=int8 is for matrices that do not train, and peft={c.method.title} trains all of them. Set "
        "frozen_weights=null, or another method, such as peft=lora or difffit."
    )


def differences_are_not_rounded(c: Components) -> str | None:
    """Two outputs that are almost equal are subtracted."""
    if not isinstance(c.objective, MeanFlow) or c.objective.forward_mode or not c.settings.bf16:
        return None
    return (
        "objective.derivative is difference, and bf16 rounds more than what is left of it (docs/guide/few_steps.md). "
        "Set trainer.precision=32-true, or objective.derivative=jvp."
    )


def late_blocks_are_there(c: Components) -> str | None:
    """Of decoupled time."""
    late, depth = getattr(c.objective.process, "step_blocks", None), len(c.network.blocks)
    if late is None or late <= depth:
        return None
    return f"objective.process.step_blocks is {late}, and the network has {depth} blocks. Set it to {depth} or less."


def own_paths_suit_the_objective(c: Components) -> str | None:
    """Some objectives know that the path is straight."""
    if not isinstance(c.objective.process, DiffusionPath) or c.objective.any_path:
        return None
    return (
        f"{type(c.objective).__name__} needs a straight path, and objective.process.bridge=path is none. "
        "Set objective.process.bridge=aligned, or objective=flow_matching, shortcut or mean_flow."
    )


def teacher_is_dense(c: Components) -> str | None:
    """The dense network that a sparse one learns from is the base, with the run's classes and resolution."""
    if c.sparsity is None or not c.sparsity.teacher:
        return None
    if c.base is None:
        return (
            "sparsity.teacher compares with the dense pretrained network, and there is none. Set pretrained=<file>, or "
            "sparsity.teacher=0."
        )
    if (c.base.sha256 and c.base.reshaped) or c.settings.classes is not None:  # a base that is not here yet has no hash
        return (
            f"sparsity.teacher compares with {c.base.path.name}, which has other classes or another resolution than "
            "the run. Leave classes= and new_resolution= out, or set sparsity.teacher=0."
        )
    if c.base.header is not None and c.base.header["provenance"].get("sparsity"):
        return (
            f"sparsity.teacher compares with {c.base.path.name}, which is pruned itself. Set pretrained= to the dense "
            "file and let sparsity= mask it, or set sparsity.teacher=0."
        )
    return None


def transfer_needs_a_base(c: Components) -> str | None:
    """Objectives for transfer, and those that distil, call the pretrained network."""
    if c.base is not None or not c.objective.needs_base:
        return None
    if not isinstance(c.objective, Transfer):
        return (
            f"The teacher of {type(c.objective).__name__} is the pretrained network, and there is none. "
            "Set pretrained=<file>, or objective.teacher=<run or file>."
        )
    return (
        "transfer= needs a pretrained network in its loss, and there is none. Set pretrained=<file>, or transfer=none."
    )


def windows_need_a_grid(c: Components) -> str | None:
    """A quarter of the grid's side is at least one token."""
    config = c.network.config
    side = config["input_size"] // config["patch_size"]
    if not isinstance(c.objective, Patches) or side >= 4:
        return None
    return f"patches= cuts windows of a grid of {side} x {side} tokens, and 4 x 4 is the smallest. Set patches=none."


def masks_suit_the_weights(c: Components) -> str | None:
    """Masks are of weights that train."""
    if c.sparsity is None:
        return None
    return refusal(lambda: c.sparsity.targets(c.method.trainable(c.network)))


def null_class_is_there(c: Components) -> str | None:
    """Dropped labels, guidance in the objective and augmented images need the null class."""
    needed = c.objective.needs_null_class or c.settings.augmented
    if c.network.config["class_dropout_prob"] > 0 or not needed:
        return None
    return (
        "The network has no null class for dropped labels, guidance or augmented images. "
        "Set objective.label_drop=0, guidance=1 and no augment=, or network.class_dropout_prob above 0."
    )


def latents_are_not_augmented(c: Components) -> str | None:
    """Augmentation changes pixels."""
    if not c.settings.augmented or not c.settings.latents:
        return None
    return "Latents that are encoded once cannot be augmented. Set data.latents=false, or no augment=."


def batch_is_shared_evenly(c: Components) -> str | None:
    """Every process and micro-step sees equally many images."""
    if c.processes is None:
        return None
    return refusal(lambda: micro_batch_size(c.settings.batch_size, c.processes.accumulate, c.processes.world_size))


def micro_batches_may_be_chosen(c: Components) -> str | None:
    """The device may choose the micro-batch where it changes nothing but rounding."""
    if c.processes is None or not c.processes.searched or c.balance is None:
        return None
    if not c.balance.of_micro_batches:
        return None
    return (
        f"balance.scope={c.balance.scope} takes the experts' load from micro-batches, so their size decides what is "
        "learned, and trainer.accumulate_grad_batches=auto must not. Set a number, or balance=sequence or loss_free."
    )


def sweep_starts_every_process(c: Components) -> str | None:
    """A job that runs inside of the launcher's process would start the whole sweep again."""
    if c.processes is None or not c.processes.starts_others:
        return None
    return (
        "This hydra/launcher runs jobs in its own process, which cannot start others for them. "
        "Leave hydra/launcher out, or give every process a task (docs/guide/sweeps.md)."
    )


OF_A_TRAINING: tuple[Rule, ...] = (
    adapters_need_a_base,
    labels_from_scratch_are_trained,
    objective_takes_the_batch,
    balance_needs_experts,
    routing_by_time_is_not_balanced,
    routing_by_time_knows_its_end,
    adapters_have_no_router_biases,
    forward_mode_suits_the_method,
    int8_suits_the_method,
    differences_are_not_rounded,
    late_blocks_are_there,
    own_paths_suit_the_objective,
    teacher_is_dense,
    transfer_needs_a_base,
    windows_need_a_grid,
    masks_suit_the_weights,
    null_class_is_there,
    latents_are_not_augmented,
)
OF_THE_PROCESSES: tuple[Rule, ...] = (
    batch_is_shared_evenly,
    micro_batches_may_be_chosen,
    sweep_starts_every_process,
)
RULES = (*OF_THE_BASE, *OF_THE_LABELS, *OF_A_TRAINING, *OF_THE_PROCESSES)
