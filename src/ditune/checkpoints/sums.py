"""Sums and differences of adapters of one base: theta_0 + sum_i w_i (theta_i - theta_0).

What is added are changes of weights. LoRA's factors are not weights: their ranks are concatenated, so that the changes
sum_i w_i s_i B_i A_i are added exactly. Methods whose weights are no linear function of what they train are refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditune.checkpoints.adapters import (
    apply_adapter,
    build_method,
    check_network,
    check_rank,
    masked_by,
    read_adapter,
)
from ditune.errors import UserError
from ditune.peft import PeftMethod
from ditune.peft.huggingface import PREFIX
from ditune.peft.slots import slots

# keys of a method that may differ between adapters that are added
FREE = ("lr", "weight_decay", "base_model_name_or_path", "peft_version", "inference_mode", "auto_mapping", "revision")
OF_RANKS = ("r", "lora_alpha", "use_rslora", "init_lora_weights")


@dataclass(frozen=True)
class Term:
    """One adapter of a sum.

    Args:
        folder: of the adapter.
        weight: w_i; negative = subtracted.
        config, tensors: see `read_adapter`.
    """

    folder: Path
    weight: float
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def read_terms(weights: dict[Path, float]) -> list[Term]:
    """Read the adapters of a sum.

    Args:
        weights: w_i by folder of the adapter.

    Raises:
        UserError: there is none, one is damaged, or they are not of one base.
    """
    if not weights:
        raise UserError("adapters= names no adapter. Give it as adapters=[<run>:0.7,<run>:0.3].")
    terms = [Term(folder, weight, *read_adapter(folder)) for folder, weight in weights.items()]
    first = terms[0]
    for term in terms:
        base = term.config.get("base") or {}
        if "sha256" not in base or base["sha256"] != (first.config.get("base") or {}).get("sha256"):
            raise UserError(
                f"The adapters in {first.folder} and {term.folder} do not say that they are of one base network. "
                "Add up adapters that were trained from the same file."
            )
        if base.get("classes") is not None:
            raise UserError(
                f"The adapter in {term.folder} has a label table of its own classes, which the base does not know. "
                "Add up adapters that keep the base's classes (classes=null)."
            )
        for key in ("process", "autoencoder", "network"):
            if term.config.get(key) != first.config.get(key):
                raise UserError(
                    f"The adapters in {first.folder} and {term.folder} have another {key}. Add up equal ones."
                )
    return terms


def apply_sum(network: nn.Module, terms: Sequence[Term]) -> PeftMethod:
    """Adapt a base by a sum of adapters; the base is kept, so that the sum has a dial too.

    Args:
        network: the base; changed in place.
        terms: see `read_terms`.

    Raises:
        UserError: the methods cannot be added up.
    """
    methods = [build_method(term.config, term.folder) for term in terms]
    for term, method in zip(terms, methods, strict=True):
        check_network(network, term.config, term.folder)
        check_rank(network, term.config, term.tensors, term.folder)
        if method.sums is None:
            raise UserError(
                f"The adapter in {term.folder} is of {title(term.config)}, whose change of the weights is no linear "
                "function of what it trains. Add up adapters of LoRA, DiffFit, BitFit, norms or full fine-tuning."
            )
        free = (*FREE, *OF_RANKS) if method.sums == "ranks" else FREE
        ours, theirs = (_settings(one.config, free) for one in (terms[0], term))
        if ours != theirs:
            different = sorted(key for key in ours | theirs if ours.get(key) != theirs.get(key))
            raise UserError(
                f"The adapters in {terms[0].folder} and {term.folder} have other settings: {', '.join(different)}. "
                "Add up adapters of one method with equal settings."
            )
    if methods[0].sums == "ranks":
        config, tensors = _concatenated(network, terms)
        return apply_adapter(network, config, tensors, terms[0].folder, keep_base=True)
    return _added(network, methods[0], terms)


def title(config: dict[str, Any]) -> str:
    """Name of an adapter's method for messages."""
    return config["peft"]["name"] if "peft" in config else f"peft's {config['peft_config']['peft_type']}"


def _settings(config: dict[str, Any], free: Sequence[str]) -> dict[str, Any]:
    settings = config.get("peft") or config.get("peft_config") or {}
    return {key: value for key, value in settings.items() if key not in free}


def _added(network: nn.Module, method: PeftMethod, terms: Sequence[Term]) -> PeftMethod:
    """Parameters that are weights, or that weights are linear in."""
    method.apply(network, base=slots(network))
    values = []
    for term in terms:
        method.from_file(network, term.tensors)
        values.append({name: value.detach().clone() for name, value in method.trainable(network).items()})
    # not trained, such as the places of SHiRA's entries; or trained from random values, such as new step embeddings
    fixed = {key: [term.tensors[key] for term in terms] for key in getattr(method, "constants", ())}
    for name, value in method.trainable(network).items():
        start = method.dial.start_of(name, value)
        each = [found[name] for found in values]
        if start is None:
            fixed[name] = each
        else:
            value.data.copy_(_sum(start.to(value), each, [term.weight for term in terms]))
            _refuse_filled(name, value, each, terms)
    method.dial.masked = tuple(dict.fromkeys(name for term in terms for name in masked_by(term.config)))
    for name, each in fixed.items():
        if not all(torch.equal(one, each[0]) for one in each):
            raise UserError(f"The adapters differ in {name}, which is no change of a weight. Add up others.")
    return method


def _refuse_filled(name: str, value: Tensor, each: Sequence[Tensor], terms: Sequence[Term]) -> None:
    """Raises UserError if a sum of adapters, some of which were trained with zeros, does not have these zeros."""
    masked = [found for found, term in zip(each, terms, strict=True) if name in masked_by(term.config)]
    if not masked or not any(term.weight for term in terms):  # weights of 0 alone: the base is none of the adapters
        return
    if (value == 0).sum() < max(int((found == 0).sum()) for found in masked):
        raise UserError(
            f"The sum would fill zeros of {name} with which an adapter was trained (sparsity=). Give that run alone, "
            "as run=, or add up dense runs."
        )


def _sum(start: Tensor, values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """theta_0 + sum_i w_i (theta_i - theta_0); one adapter alone to the bit, as the dial has it."""
    if len(values) == 1:
        return torch.lerp(start, values[0], weights[0])
    return start + sum(weight * (value - start) for value, weight in zip(values, weights, strict=True))


def _concatenated(network: nn.Module, terms: Sequence[Term]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """LoRA of the sum of the ranks, with scale 1: B = [w_i s_i B_i], A = [A_i]."""
    configs = [term.config["peft_config"] for term in terms]
    if any(config.get("rank_pattern") or config.get("alpha_pattern") for config in configs):
        raise UserError("An adapter has ranks of its own for some layers (rank_pattern). Add up others.")
    factors = [
        term.weight * config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
        for term, config in zip(terms, configs, strict=True)
    ]
    tensors = {}
    for key in terms[0].tensors:
        each = [term.tensors[key] for term in terms]
        if ".lora_A." in key:
            tensors[key] = torch.cat(each)  # (sum r_i, D_in)
        elif ".lora_B." in key:
            tensors[key] = torch.cat([f * one for f, one in zip(factors, each, strict=True)], dim=1)  # (D_out, sum r_i)
        else:  # labels and biases, which are weights of the base
            start = network.get_parameter(key.removeprefix(PREFIX)).detach().cpu()
            tensors[key] = _sum(start, each, [term.weight for term in terms])
    rank = sum(config["r"] for config in configs)
    config = configs[0] | {"r": rank, "lora_alpha": rank, "use_rslora": False, "init_lora_weights": True}
    return terms[0].config | {"peft_config": config}, tensors
