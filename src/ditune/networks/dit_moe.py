"""DiT whose feed-forward layers are mixtures of experts (DiT-MoE, Fei et al. 2024, arXiv 2407.11633)."""

from typing import Any, Literal

from torch import Tensor, nn

from ditune.networks.dit import Attention, DiT, DiTBlock, modulate, scaled
from ditune.networks.moe import MoE
from ditune.networks.routing import Routing


class MoEBlock(nn.Module):
    """`DiTBlock` with `moe` in the place of `mlp`; it returns its routing too, so that recomputing counts nothing."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool, moe: MoE):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads, qk_norm)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.moe = moe
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.register_parameter("gamma1", None)  # (D,), scales the attention branch: added by DiffFit
        self.register_parameter("gamma2", None)  # (D,), scales the MoE branch: added by DiffFit

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Routing]:  # (N, T, D), (N, D) -> (N, T, D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        branch = self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + scaled(gate_msa[:, None] * branch, self.gamma1)
        branch, routing = self.moe(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x + scaled(gate_mlp[:, None] * branch, self.gamma2), routing


class DiTMoE(DiT):
    """DiT-MoE. The defaults are the original's: SwiGLU experts of width 4D and shared ones of 2D in every block.

    Args:
        depth, hidden_size, num_heads, dit: see `DiT`; its `mlp_ratio` is that of blocks without experts.
        num_experts: E, routed experts of a layer.
        top_k: k, experts of a token.
        expert_ratio: width of a routed expert over D.
        shared_ratio: width of all shared experts together over D; 0 = none. The paper has two of width D.
        expert: 'swiglu', or 'gelu' as DiT's own MLP (for networks that are made of a dense one).
        score, renormalize, route_scale, choice: see `Router`.
        moe_every: every k-th block has experts, the last of each k blocks; 2 = interleaved (arXiv 2512.01252).
        moe_from: part of the depth without experts; 0.5 = only the deeper half has them (2407.11633, Fig. 4c).
        qk_norm: LayerNorm on queries and keys, as in the published XL and G.
    """

    kind = "DiTMoE"  # in the headers of files; the class may be renamed

    def __init__(
        self,
        *,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_experts: int = 8,
        top_k: int = 2,
        expert_ratio: float = 4.0,
        shared_ratio: float = 2.0,
        expert: str = "swiglu",
        score: str = "softmax",
        renormalize: bool | Literal["always"] = False,
        route_scale: float = 1.0,
        choice: str = "token",
        moe_every: int = 1,
        moe_from: float = 0.0,
        qk_norm: bool = False,
        **dit: Any,
    ):
        if top_k == 1 < num_experts and renormalize is True:
            renormalize = False  # the same, and files that say true are told apart: see `of_earlier_release`
        own = {key: value for key, value in locals().items() if key not in ("self", "dit", "__class__")}
        super().__init__(hidden_size=hidden_size, depth=0, num_heads=num_heads, mlp_ratio=mlp_ratio, **dit)
        self.config = self.config | own
        for i in range(depth):
            if i < moe_from * depth or (i + 1) % moe_every:
                self.blocks.append(DiTBlock(hidden_size, num_heads, mlp_ratio, qk_norm))
                continue
            sizes = {"expert_size": int(hidden_size * expert_ratio), "shared_size": int(hidden_size * shared_ratio)}
            routing = {"top_k": top_k, "score": score, "renormalize": renormalize, "scale": route_scale}
            moe = MoE(hidden_size, num_experts, **sizes, expert=expert, **routing, choice=choice)
            self.blocks.append(MoEBlock(hidden_size, num_heads, qk_norm, moe))
        if not self.moe_layers:
            raise ValueError(f"no block of {depth} has experts: lower moe_every {moe_every} or moe_from {moe_from}")
        self.initialize_weights()

    @property
    def moe_layers(self) -> dict[int, MoE]:
        """The layers with experts, by the number of their block."""
        found = ((i, module) for i, block in enumerate(self.blocks) for module in block.modules())
        return {i: module for i, module in found if isinstance(module, MoE)}

    def initialize_weights(self) -> None:
        super().initialize_weights()
        for layer in self.moe_layers.values():
            layer.initialize_weights()

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, step: Tensor | None = None, routing: list[Routing] | None = None
    ) -> Tensor:
        """As `DiT.forward`; `routing`, where given, gets what each layer's router decided, in order."""
        height = x.shape[2] // self.patch_size
        x, c = self.embed(x, t, y, step)
        for block in self.blocks:
            output = self.through(block, x, c)
            x, *decided = output if isinstance(output, tuple) else (output,)  # an adapted block is of another class
            if routing is not None:
                routing += decided
        return self.unpatchify(self.final_layer(x, c), height)


def of_earlier_release(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments for what a stored config meant: once `renormalize` divided the weight of a single expert, too."""
    divided = config.get("renormalize") is True and config.get("top_k") == 1 < config.get("num_experts", 1)
    return config | {"renormalize": "always"} if divided else config


def activated(network: nn.Module) -> int:
    """Parameters that compute one token: all but the routed experts that it does not take (2407.11633, Table 1)."""
    total = sum(p.numel() for p in network.parameters())
    for layer in network.moe_layers.values() if isinstance(network, DiTMoE) else ():
        one = sum(p[0].numel() for p in layer.experts.parameters())
        total -= (len(layer.router.weight) - layer.router.top_k) * one
    return total


# name: (hidden_size, depth, num_heads, num_experts, top_k, qk_norm), arXiv 2407.11633, Table 1, and the original's
# scripts for qk_norm. Parameters, activated: S 199.3 M, 71.9 M (16 experts 369.2 M, 71.9 M), B 795.9 M, 286.3 M,
# L 2.82 B, 1.01 B, XL 4.17 B, 1.49 B, G 16.50 B, 3.18 B.
# fmt: off
SIZES = {
    "dit_moe_s_2_8e2a":  ( 384, 12,  6,  8, 2, False),
    "dit_moe_s_2_16e2a": ( 384, 12,  6, 16, 2, False),
    "dit_moe_b_2_8e2a":  ( 768, 12, 12,  8, 2, False),
    "dit_moe_l_2_8e2a":  (1024, 24, 16,  8, 2, False),
    "dit_moe_xl_2_8e2a": (1152, 28, 16,  8, 2, True),
    "dit_moe_g_2_16e2a": (1408, 40, 16, 16, 2, True),
}
# name: (hidden_size, depth, num_heads), arXiv 2512.01252 and its configs; with DiT's position table instead of RoPE.
DSMOE_SIZES = {
    "dsmoe_s_2_16e2a":   ( 384, 10,  6),
    "dsmoe_b_2_16e2a":   ( 768, 10, 12),
    "dsmoe_l_2_16e2a":   (1024, 20, 16),
}
DSMOE = {"num_experts": 16, "expert_ratio": 2.0, "shared_ratio": 2.0, "moe_every": 2,
         "score": "sigmoid", "renormalize": True, "route_scale": 2.0}
# Ours, for two CPU cores. A dense network is one expert that every token takes.
TINY = {
    "tiny_moe":       {"hidden_size":  32, "depth": 2, "num_heads": 2, "patch_size": 2,
                       "num_experts": 4, "expert_ratio": 1.0, "shared_ratio": 1.0},
    "emoji_moe_xs":   {"hidden_size": 128, "depth": 6, "num_heads": 4, "patch_size": 4,
                       "num_experts": 8, "expert_ratio": 1.0, "shared_ratio": 1.0},
    "emoji_dense_xs": {"hidden_size": 128, "depth": 6, "num_heads": 4, "patch_size": 4,
                       "num_experts": 1, "top_k": 1, "expert_ratio": 3.0, "shared_ratio": 0.0},
}
# fmt: on
KEYS = ("hidden_size", "depth", "num_heads", "num_experts", "top_k", "qk_norm")
MOE_NETWORKS: dict[str, dict[str, Any]] = (
    {name: dict(zip(KEYS, sizes, strict=True)) | {"patch_size": 2} for name, sizes in SIZES.items()}
    | {name: dict(zip(KEYS, sizes, strict=False)) | {"patch_size": 2} | DSMOE for name, sizes in DSMOE_SIZES.items()}
    | TINY
)
