"""DiT-MoE as its authors publish it (feizc/DiT-MoE): a `.pt` file, bare or with "ema" or "model" inside.

There, each expert is a module of its own; ours are stacked and transposed. The published XL and G have fused attention
with norms on queries and keys. They were trained as rectified flows on unscaled times, S and B as DiT. No file says so:
the authors' README does.
"""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ditune.checkpoints import official_dit
from ditune.checkpoints.official_dit import infer_common, infer_heads, ratio
from ditune.checkpoints.source import Composed, Content, Source
from ditune.errors import UserError
from ditune.networks import DiTMoE

TITLE = "official DiT-MoE"
# Hidden size: heads, of published files (arXiv 2407.11633, Table 1). No network of ours is ever added here.
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1408: 16}
TOP_K = 2  # of all published files
# the fused attention's names: ours
ATTENTION = {"attn.Wqkv.": "attn.qkv.", "attn.out_proj.": "attn.proj."}
# an expert's layers: our stacked ones
STACKED = {"gate_proj": "w_gate_EDF", "up_proj": "w_up_EDF", "down_proj": "w_down_EFD"}
EXPERT = re.compile(r"(.*moe\.)experts\.(\d+)\.(\w+)\.weight")
FLOW = {"kind": "flow", "time_scale": 1.0, "data_at": 0, "sigma_min": 0.0}


def recognises(source: Source) -> bool:
    """Whether the tensors have the names of DiT-MoE's experts."""
    return {"x_embedder.proj.weight", "blocks.0.moe.experts.0.gate_proj.weight"} <= set(source.tensors)


def read(source: Source, known: Mapping[str, Any], **overrides: Any) -> Content:
    """The network in a file; arguments as in `ditune.checkpoints.load_network`."""
    tensors = to_ours(source.tensors)
    return Content(DiTMoE, infer_config(tensors, source, known, **overrides), tensors)


def process(source: Source) -> dict[str, Any] | None:
    """Config of the process that the file's network was trained for; None if it is not known."""
    return FLOW if "blocks.0.attn.Wqkv.weight" in source.tensors else None


def sampling(process: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Sampler settings of the authors, keys as in configs/sampler/; arguments as in `official_dit.sampling`.

    Flows: 50 Euler steps, as in the authors' code. The paper gives no guidance; 1.5 is what others report with.
    """
    if process.get("kind") == "flow":
        return {"sampler": "Euler", "steps": 50, "guidance": 1.5}
    return official_dit.sampling(process, config)


def to_ours(theirs: dict[str, Tensor]) -> dict[str, Tensor | Composed]:
    """Our state dict from theirs; experts are stacked where their numbers are read.

    Raises:
        UserError: an expert is missing.
    """
    ours: dict[str, Tensor | Composed] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for key, tensor in theirs.items():
        match = EXPERT.fullmatch(key)
        if match:
            experts.setdefault(f"{match[1]}experts.{STACKED[match[3]]}", {})[int(match[2])] = tensor.T
            continue
        for name, our in ATTENTION.items():
            key = key.replace(name, our)
        if key.endswith("moe.gate.weight"):
            key = key.replace("gate", "router")
            ours[key.replace("weight", "bias_E")] = torch.zeros(len(tensor), device=tensor.device)
        ours[key] = tensor
    return ours | {key: _stacked(key, own) for key, own in experts.items()}


def _stacked(key: str, experts: dict[int, Tensor]) -> Composed:
    missing = sorted(set(range(max(experts) + 1)) - experts.keys())
    if missing:
        layer = next(layer for layer, stacked in STACKED.items() if key.endswith(stacked))
        name = f"{key.rpartition('.')[0]}.{missing[0]}.{layer}.weight"
        raise UserError(f"The DiT-MoE file has no {name}. Fetch it again.")
    in_order = [experts[e] for e in range(len(experts))]
    shape = len(in_order), *in_order[0].shape
    return Composed(shape, partial(torch.stack, in_order), rows=lambda rows: _stack(in_order[rows], shape))


def _stack(experts: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    return torch.stack(experts) if experts else torch.empty(0, *shape[1:])


def to_theirs(ours: dict[str, Tensor], fused_attention: bool) -> dict[str, Tensor]:
    """Their state dict from ours, for networks of their form; inverts `to_ours`."""
    theirs: dict[str, Tensor] = {}
    layers = {stacked: layer for layer, stacked in STACKED.items()}
    for key, tensor in ours.items():
        *path, name = key.split(".")
        if name in layers:
            for e, weight in enumerate(tensor):
                theirs[f"{'.'.join(path)}.{e}.{layers[name]}.weight"] = weight.T.contiguous()
        elif name != "bias_E":
            key = key.replace("moe.router", "moe.gate")
            for fused, our in ATTENTION.items() if fused_attention else ():
                key = key.replace(our, fused)
            theirs[key] = tensor
    return theirs


def infer_config(
    ours: Mapping[str, Tensor | Composed],
    source: Source,
    known: Mapping[str, Any],
    input_size: int | None = None,
    num_heads: int | None = None,
    top_k: int | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Constructor arguments of DiT-MoE from shapes; heads from the norms of queries, or from the published sizes.

    Args:
        ours: the state dict, by `to_ours`.
        source: the file, for messages.
        known: config of a network that is known to be of this kind, for what the file cannot tell.
        input_size: side of the latents; None = from the position table.
        num_heads: None = from the file or the published sizes.
        top_k: experts per token; None = as published.
        overrides: see `official_dit.infer_classes`.

    Raises:
        UserError: the file does not tell an argument.
    """
    common = infer_common(ours, source, known, input_size, **overrides)
    hidden_size = common["hidden_size"]
    norm = ours.get("blocks.0.attn.q_norm.weight")
    if num_heads is None:
        published = HEADS if norm is None else {hidden_size: hidden_size // len(norm)}
        num_heads = infer_heads(published, hidden_size, source, known)
    num_experts, _, width = ours["blocks.0.moe.experts.w_gate_EDF"].shape
    return common | {
        "num_heads": num_heads,
        "num_experts": num_experts,
        "top_k": min(top_k or TOP_K, num_experts),
        "expert_ratio": ratio(width, hidden_size),
        "shared_ratio": ratio(len(ours["blocks.0.moe.shared_experts.gate_proj.weight"]), hidden_size),
        "qk_norm": norm is not None,
    }
