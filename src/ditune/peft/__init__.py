"""Parameter-efficient fine-tuning: one file per method, behind the interface `PeftMethod`."""

from collections.abc import Callable
from functools import partial

from torch import nn

from ditune.errors import UserError
from ditune.peft.adalora import AdaLora
from ditune.peft.adapter_set import Adapters, merge_adapters
from ditune.peft.base import PeftMethod
from ditune.peft.bitfit import BitFit
from ditune.peft.bottleneck import Adapter, AdaptFormer
from ditune.peft.difffit import DiffFit
from ditune.peft.experts import Router, build_on_experts
from ditune.peft.full import Full
from ditune.peft.huggingface import HuggingFace, from_peft_config
from ditune.peft.huggingface_rows import HUGGINGFACE
from ditune.peft.label_table import adapt_labels
from ditune.peft.norm import NormTuning
from ditune.peft.off import Off
from ditune.peft.tlora import TLora
from ditune.peft.vpt import VPT
from ditune.peft.weight_noise import Float

METHODS: dict[str, Callable[..., PeftMethod]] = {
    "full": Full,
    "bitfit": BitFit,
    "difffit": DiffFit,
    "adaptformer": AdaptFormer,
    "adapter": Adapter,
    "vpt_deep": partial(VPT, deep=True),
    "vpt_shallow": partial(VPT, deep=False),
    "norm": NormTuning,
    "adalora": AdaLora,
    "tlora": TLora,
    "float": Float,
    **{name: partial(HuggingFace, peft_type, **fixed) for name, (peft_type, fixed) in HUGGINGFACE.items()},
}
MOE_METHODS: dict[str, Callable[..., PeftMethod]] = {"router": Router}  # for networks with experts only


def build_peft(name: str, target: str | None = None, **kwargs) -> PeftMethod:
    """A method by name.

    Args:
        name: one of `METHODS` or `MOE_METHODS`.
        target: "experts" adapts the weights of a DiT-MoE's experts; None = the method's usual parameters.
        **kwargs: arguments of its constructor.

    Raises:
        UserError: there is no method or target of that name, or an argument has a value that the method refuses.
        TypeError: the method does not have an argument.
    """
    known = METHODS | MOE_METHODS
    if name not in known:
        raise UserError(f"There is no method {name!r}. Choose one of {', '.join(known)}.")
    if target not in (None, "experts"):
        raise UserError(f"There is no target {target!r}. Set peft.target=experts, or leave it out.")
    method = known[name](**kwargs) if target is None else build_on_experts(name, **kwargs)
    method.arguments = {"name": name, **kwargs} | ({"target": target} if target else {})
    return method


def merge(network: nn.Module) -> None:
    """Turn an adapted network into a plain one with the same output; a plain network stays as it is.

    Args:
        network: changed in place.

    Raises:
        UserError: its method cannot be merged; the network is as it was.
    """
    method = getattr(network, "adaptation", None)
    if method is not None:
        method.merge(network)


__all__ = [
    "HUGGINGFACE",
    "METHODS",
    "MOE_METHODS",
    "VPT",
    "AdaptFormer",
    "Adapter",
    "Adapters",
    "BitFit",
    "DiffFit",
    "Float",
    "Full",
    "HuggingFace",
    "NormTuning",
    "Off",
    "PeftMethod",
    "adapt_labels",
    "build_peft",
    "from_peft_config",
    "merge",
    "merge_adapters",
]
