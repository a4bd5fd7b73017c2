"""Every preset of a network by name, one row each. A new size is a new row; nothing else reads these tables."""

from typing import Any

# fmt: off
# name: (hidden_size, depth, num_heads). S, B, L, XL of DiT (arXiv 2212.09748, Table 1), each with patch size 2, 4, 8.
DIT = {
    "dit_s":  ( 384, 12,  6),
    "dit_b":  ( 768, 12, 12),
    "dit_l":  (1024, 24, 16),
    "dit_xl": (1152, 28, 16),
}
# name: (hidden_size, depth, num_heads, patch_size). Ours, for two CPU cores.
DIT_SMALL = {
    "tiny":       ( 32, 2, 2, 2),  # tests
    "emoji_xs":   (128, 6, 4, 4),
    "emoji_s":    (192, 6, 6, 4),  # of pixels
    "emoji_s9_2": (192, 9, 6, 2),  # of latents: the shipped base
    "emoji_m":    (256, 8, 8, 4),
}
# name: (hidden_size, depth, num_heads, num_experts, top_k, qk_norm), patch size 2. DiT-MoE (arXiv 2407.11633, Table 1);
# qk_norm is from the original's scripts. Parameters and activated parameters: S 199.3 M, 71.9 M (16 experts 369.2 M,
# 71.9 M), B 795.9 M, 286.3 M, L 2.82 B, 1.01 B, XL 4.17 B, 1.49 B, G 16.50 B, 3.18 B.
DIT_MOE = {
    "dit_moe_s_2_8e2a":  ( 384, 12,  6,  8, 2, False),
    "dit_moe_s_2_16e2a": ( 384, 12,  6, 16, 2, False),
    "dit_moe_b_2_8e2a":  ( 768, 12, 12,  8, 2, False),
    "dit_moe_l_2_8e2a":  (1024, 24, 16,  8, 2, False),
    "dit_moe_xl_2_8e2a": (1152, 28, 16,  8, 2, True),
    "dit_moe_g_2_16e2a": (1408, 40, 16, 16, 2, True),
}
# name: (hidden_size, depth, num_heads), patch size 2. DSMoE (arXiv 2512.01252 and its configs), with DiT's position
# table instead of RoPE.
DSMOE = {
    "dsmoe_s_2_16e2a":   ( 384, 10,  6),
    "dsmoe_b_2_16e2a":   ( 768, 10, 12),
    "dsmoe_l_2_16e2a":   (1024, 20, 16),
}
DSMOE_OPTIONS = {"num_experts": 16, "expert_ratio": 2.0, "shared_ratio": 2.0, "moe_every": 2,
                 "score": "sigmoid", "renormalize": True, "route_scale": 2.0}
# name: (hidden_size, depth, num_heads, patch_size, num_experts, top_k, expert_ratio, shared_ratio). Ours, for two CPU
# cores. A dense network is one expert that computes every token.
MOE_SMALL = {
    "tiny_moe":       ( 32, 2, 2, 2, 4, 2, 1.0, 1.0),  # tests
    "emoji_moe_xs":   (128, 6, 4, 4, 8, 2, 1.0, 1.0),
    "emoji_dense_xs": (128, 6, 4, 4, 1, 1, 3.0, 0.0),
}
# fmt: on

DENSE_KEYS = ("hidden_size", "depth", "num_heads", "patch_size")
MOE_KEYS = ("hidden_size", "depth", "num_heads", "num_experts", "top_k", "qk_norm")
MOE_SMALL_KEYS = (*DENSE_KEYS, "num_experts", "top_k", "expert_ratio", "shared_ratio")


def _rows(keys: tuple[str, ...], table: dict[str, tuple], **same: Any) -> dict[str, dict[str, Any]]:
    """Each row of a table as arguments of the network's constructor, with those that are the same in every row."""
    return {name: dict(zip(keys, row, strict=True)) | same for name, row in table.items()}


# name: arguments of the network's constructor
DENSE_NETWORKS = _rows(
    DENSE_KEYS, {f"{name}_{patch_size}": (*row, patch_size) for name, row in DIT.items() for patch_size in (2, 4, 8)}
) | _rows(DENSE_KEYS, DIT_SMALL)
MOE_NETWORKS = (
    _rows(MOE_KEYS, DIT_MOE, patch_size=2)
    | _rows(MOE_KEYS[:3], DSMOE, patch_size=2, **DSMOE_OPTIONS)
    | _rows(MOE_SMALL_KEYS, MOE_SMALL)
)
