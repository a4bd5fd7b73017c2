"""Whether the content of a checkpoint fits a training: what trains, its average, the optimizer's state."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ditune.moe.balance import Balance
from ditune.training.checkpoint_io import Unusable
from ditune.training.module import GenerativeModule
from ditune.training.muon import MuonAdamW

WITH_STATE = (AdamW, MuonAdamW)  # optimizers that have a state of the parameters' own shapes after one step
PREFIX = "network."


def require_fit(content: dict[str, Any], module: GenerativeModule) -> None:
    """Compare names, shapes and values of a checkpoint with the training that is to go on from it; nothing is changed.

    Args:
        content: of the checkpoint, as `read_checkpoint` gives it.
        module: of the training.

    Raises:
        Unusable: the training cannot go on from it.
    """
    trained = {name.removeprefix(PREFIX): value for name, value in content["state_dict"].items()}
    _require_same("trained parameters", trained, module.method.trainable(module.network))
    _require_same("their average (EMA)", content["ema"], module.ema.average)
    _require_same("biases of the routers", content["balance"], Balance.state_dict(module.network))
    if content["teacher"]:
        _require_same("teacher", content["teacher"], module.ema.average)
    for table in (content["state_dict"], content["ema"], content["teacher"]):
        name = next((name for name, value in table.items() if not _is_finite(value)), None)
        if name is not None:
            raise Unusable(f"holds numbers that are not finite, in {name}")
    if content["method"].keys() != module.method.training_state().keys():
        raise Unusable(f"lacks the state of {module.method.title}")
    _require_optimizer(content, module.configure_optimizers()["optimizer"])


def _is_finite(value: Tensor) -> bool:
    """Of a checkpoint in shares, whose values are not here, it is seen when each process has read its own."""
    return value.is_meta or bool(torch.isfinite(value).all())


def _require_same(what: str, theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor | nn.Parameter]) -> None:
    for text, names in (("lacks", ours.keys() - theirs.keys()), ("has unknown", theirs.keys() - ours.keys())):
        if names:
            raise Unusable(f"{text} {what}: {_some(names)}")
    shapes = {name for name, value in ours.items() if theirs[name].shape != value.shape}
    if shapes:
        raise Unusable(f"has {what} of another shape: {_some(shapes)}")


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _require_optimizer(content: dict[str, Any], optimizer: Optimizer) -> None:
    """Optimizer states that load without an error and are of another training would change the result in silence."""
    if len(content["optimizer_states"]) != 1 or len(content["lr_schedulers"]) != 1:
        raise Unusable("lacks the state of the optimizer or of its schedule")
    saved, ours = content["optimizer_states"][0], optimizer.state_dict()
    try:
        sizes = [len(group["params"]) for group in saved["param_groups"]]
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        states = [saved["state"].get(number, {}) for number in numbers]
    except (KeyError, TypeError, AttributeError):
        raise Unusable("has an optimizer state of another kind") from None
    if sizes != [len(group["params"]) for group in ours["param_groups"]]:
        raise Unusable("has an optimizer state of other parameters")
    if not isinstance(optimizer, WITH_STATE):
        return
    if content["global_step"] and not any(states):
        raise Unusable("has an empty optimizer state")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for state, parameter in zip(states, parameters, strict=True):
        if any(isinstance(v, Tensor) and v.ndim and v.shape != parameter.shape for v in state.values()):
            raise Unusable("has an optimizer state of other shapes")
