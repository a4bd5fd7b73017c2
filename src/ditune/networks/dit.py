"""Diffusion Transformer with adaLN-Zero conditioning (Peebles & Xie, arXiv 2212.09748).

State-dict keys are those of the official files. N batch, T tokens, D hidden size, H heads.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from ditune.networks.embeddings import LabelEmbedder, PatchEmbed, TimestepEmbedder, sincos_2d


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:  # (N, T, D), (N, D), (N, D) -> (N, T, D)
    return x * (1 + scale[:, None]) + shift[:, None]


def scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    """DiffFit's scale (arXiv 2304.06648, Fig. 4), where one has been added."""
    return x if gamma is None else x * gamma


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # 3 x (N, H, T, D/H) -> (N, H, T, D/H)
    """Softmax attention by the back end that is fastest for the device, dtype and length.

    On CPUs in bf16 the product written out beats the fused kernel up to some 256 tokens (docs/results/speed.md).
    """
    reduced = torch.is_autocast_enabled(q.device.type) or q.dtype != torch.float32
    if q.device.type == "cpu" and reduced and q.shape[-2] <= 256 and torch.is_grad_enabled():
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return weights.softmax(dim=-1).to(v.dtype) @ v
    return scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection to queries, keys and values."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.q_norm, self.k_norm = (
            nn.LayerNorm(hidden_size // num_heads, eps=1e-6) if qk_norm else nn.Identity() for _ in range(2)
        )
        self.register_parameter("gamma1", None)  # (3D,), scales qkv: added by DiffFit
        self.register_parameter("gamma2", None)  # (D,), scales the output: added by DiffFit

    def forward(self, x: Tensor) -> Tensor:  # (N, T, D) -> (N, T, D)
        qkv = scaled(self.qkv(x), self.gamma1)
        q, k, v = rearrange(qkv, "n t (three h d) -> three n h t d", three=3, h=self.num_heads)
        x = rearrange(attention(self.q_norm(q), self.k_norm(k), v), "n h t d -> n t (h d)")
        return scaled(self.proj(x), self.gamma2)


class Mlp(nn.Module):
    def __init__(self, hidden_size: int, mlp_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class DiTBlock(nn.Module):
    """Attention and MLP, each behind a LayerNorm whose shift and scale, and a gate, come from the condition c."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, qk_norm: bool = False):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads, qk_norm)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.register_parameter("gamma1", None)  # (D,), scales the attention branch: added by DiffFit
        self.register_parameter("gamma2", None)  # (D,), scales the MLP branch: added by DiffFit

    def forward(self, x: Tensor, c: Tensor) -> Tensor:  # (N, T, D), (N, D) -> (N, T, D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        branch = self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + scaled(gate_msa[:, None] * branch, self.gamma1)
        branch = self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x + scaled(gate_mlp[:, None] * branch, self.gamma2)


class FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:  # (N, T, D), (N, D) -> (N, T, P*P*C_out)
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """Predicts noise (or what else its process says) and, with `learn_sigma`, the variance's interpolation.

    Args:
        input_size: height and width of the input, in latent pixels, divisible by `patch_size`.
        patch_size: side of a patch, in latent pixels.
        in_channels: channels of the input.
        hidden_size: D, divisible by `num_heads` and by 4.
        depth: number of blocks.
        num_heads: heads of each attention.
        mlp_ratio: width of the MLP over D.
        class_dropout_prob: only says whether the label table has a row for the null class (> 0: yes, its last).
        num_classes: K; labels are 0..K-1, the null class is K.
        learn_sigma: twice the channels come out: prediction, then variance.
        pos_embed_scale: factor on the position table's coordinates, see `sincos_2d`.
        step: the network is also told the length of the step that its output is for (arXiv 2410.12557).
    """

    kind = "DiT"  # in the headers of files; the class may be renamed

    fresh: tuple[str, ...] = ()  # what a file did not have, by the beginning of its parameters' names; it must train

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        pos_embed_scale: float = 1.0,
        step: bool = False,
    ):
        self_config = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        super().__init__()
        if input_size % patch_size or hidden_size % num_heads or hidden_size % 4:
            raise ValueError(
                f"input_size {input_size} must be a multiple of patch_size {patch_size}, and hidden_size {hidden_size} "
                f"of num_heads {num_heads} and of 4"
            )
        self.config = self_config
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.patch_size = patch_size
        self.gradient_checkpointing = False

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.step_embedder = TimestepEmbedder(hidden_size) if step else None
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, null_class=class_dropout_prob > 0)
        table = sincos_2d(hidden_size, input_size // patch_size, pos_embed_scale)
        self.register_buffer("pos_embed", table.float()[None])  # (1, T, D)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()
        self.register_load_state_dict_pre_hook(_use_computed_pos_embed)

    def initialize_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # as the linear layer that it is
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for embedder in filter(None, (self.t_embedder, self.step_embedder)):
            nn.init.normal_(embedder.mlp[0].weight, std=0.02)
            nn.init.normal_(embedder.mlp[2].weight, std=0.02)
        # adaLN-Zero: every block starts as the identity, and the network's output as zero
        for layer in (*(block.adaLN_modulation[1] for block in self.blocks), self.final_layer.adaLN_modulation[1]):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def ignore_step_at_first(self) -> None:
        """Let the step's embedding begin as zero, so that the function is that of a network that is not told steps."""
        nn.init.zeros_(self.step_embedder.mlp[2].weight)
        nn.init.zeros_(self.step_embedder.mlp[2].bias)
        self.fresh = ("step_embedder.",)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, step: Tensor | None = None) -> Tensor:
        """Image x (N, C, H, W), timestep t (N,) in 0..999, class y (N,) in 0..K to (N, C_out, H, W).

        A network that is told steps takes a step (N,) too, in the unit that its process says.
        """
        height = x.shape[2] // self.patch_size
        x, c = self.embed(x, t, y, step)
        for block in self.blocks:
            x = self.through(block, x, c)
        return self.unpatchify(self.final_layer(x, c), height)

    def embed(self, x: Tensor, t: Tensor, y: Tensor, step: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens (N, T, D) and condition (N, D)."""
        c = self.t_embedder(t) + self.y_embedder(y)
        if self.step_embedder is not None:
            c = c + self.step_embedder(step)
        return self.x_embedder(x) + self.pos_embed, c

    def through(self, block: nn.Module, x: Tensor, c: Tensor) -> Any:
        """Output of a block, computed a second time in the backward pass where memory is short."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, c, use_reentrant=False)
        return block(x, c)

    def unpatchify(self, x: Tensor, height: int) -> Tensor:  # (N, T, P*P*C_out) -> (N, C_out, H, W)
        p = self.patch_size
        return rearrange(x, "n (h w) (p q c) -> n c (h p) (w q)", h=height, p=p, q=p)

    def compile_blocks(self) -> None:
        """Compile block by block: as fast as the whole network, in half the time, and no key changes its name."""
        for block in self.blocks:
            block.compile(dynamic=False)


def _use_computed_pos_embed(network: DiT, state_dict: dict, prefix: str, *_) -> None:
    """The position table is computed, never loaded: a file of another resolution (or without table) fits too."""
    key = prefix + "pos_embed"
    table = state_dict.get(key)
    if table is not None and table.shape == network.pos_embed.shape and not network.pos_embed.is_meta:
        difference = (table.float() - network.pos_embed.cpu()).abs().max().item()
        if not difference <= rounding(table):
            raise ValueError(
                f"the file's pos_embed differs from the sin-cos table by {difference:.3g}: it is of another network, "
                "or of another pos_embed_scale"
            )
    state_dict[key] = network.pos_embed


def rounding(table: Tensor) -> float:
    """How far a position table may be from the computed one by rounding alone.

    Half a unit in the last place of the narrowest type that holds the table as it is, whatever type it is stored in;
    and no less than what an average of 0.9999 in fp32 drifts by, 1.6e-4 here: DiT's training code averages it too.
    """
    narrow = (torch.bfloat16, torch.float16)
    held = next((dtype for dtype in narrow if torch.equal(table, table.to(dtype).to(table.dtype))), torch.float32)
    return max(5e-4, torch.finfo(held).eps / 2 * table.float().abs().max().item())


# name: (hidden_size, depth, num_heads). S, B, L, XL as Table 1 of arXiv 2212.09748; each with patch size 2, 4, 8.
# fmt: off
SIZES = {
    "dit_s":  ( 384, 12,  6),
    "dit_b":  ( 768, 12, 12),
    "dit_l":  (1024, 24, 16),
    "dit_xl": (1152, 28, 16),
}
# name: (hidden_size, depth, num_heads, patch_size). Ours, for two CPU cores.
TINY_SIZES = {
    "tiny":       ( 32, 2, 2, 2),  # tests
    "emoji_xs":   (128, 6, 4, 4),
    "emoji_s":    (192, 6, 6, 4), # of pixels
    "emoji_s9_2": (192, 9, 6, 2), # of latents: the shipped base
    "emoji_m":    (256, 8, 8, 4),
}
# fmt: on
NETWORKS = {f"{name}_{p}": (*size, p) for name, size in SIZES.items() for p in (2, 4, 8)} | TINY_SIZES
