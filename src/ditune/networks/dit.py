"""Diffusion Transformer with adaLN-Zero conditioning (Peebles & Xie, arXiv 2212.09748).

State-dict keys are those of the official files. N batch, C channels, T tokens, D hidden size, H heads, P patch size.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from ditune.networks.block import Attention, Mlp, TransformerBlock, apply_gamma, modulate, norm_modulate
from ditune.networks.embeddings import LabelEmbedder, NoTime, PatchEmbed, TimestepEmbedder, sincos_2d
from ditune.networks.sizes import DIT as SIZES
from ditune.networks.unread import Unread

__all__ = ["SIZES", "Attention", "DiT", "DiTBlock", "FinalLayer", "Mlp", "TransformerBlock", "apply_gamma", "modulate"]

DiTBlock = TransformerBlock  # its earlier name
INPUTS = {"step": "step_embedder", "untimed": "no_time", "guided": "guidance_embedder"}  # argument: its module
OPTIONAL = ("untimed", "guided", "step_blocks")  # arguments that stand in a config only where they are set


class FinalLayer(nn.Module):
    """Tokens to patches: LayerNorm and linear layer, with shift and scale from the condition c.

    Args:
        hidden_size: D.
        patch_size: P.
        out_channels: C_out.
    """

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:  # (N, T, D), (N, D) -> (N, T, P*P*C_out)
        """Values of every patch."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(norm_modulate(self.norm_final, x, shift, scale))


class DiT(nn.Module):
    """Predicts the process's target (e.g. noise) and, with `learn_sigma`, the variance interpolation.

    Args:
        input_size: height and width of the input, in latent pixels, divisible by `patch_size`.
        patch_size: P, side of a patch, in latent pixels.
        in_channels: C, channels of the input.
        hidden_size: D, divisible by `num_heads` and by 4.
        depth: number of blocks.
        num_heads: H, heads of each attention.
        mlp_ratio: width of the MLP over D.
        class_dropout_prob: if > 0, the label table has an extra last row for the null class.
        num_classes: K; labels are 0..K-1, the null class is K.
        learn_sigma: the output has 2C channels: prediction, then variance.
        pos_embed_scale: factor on the position table's coordinates, see `sincos_2d`.
        step: the network is also conditioned on the step size of its output (arXiv 2410.12557).
        untimed: one vector stands for the embedding of a missing time, t = NaN (noise-awareness guidance, 2510.12497).
        guided: the network is also conditioned on the guidance scale w of its output (DogFit, arXiv 2508.05685).
        step_blocks: only so many last blocks and the final layer are conditioned on the step size, the others on t
            alone (decoupled time, after Decoupled MeanFlow, arXiv 2510.24474, whose last blocks get r = t - d in place
            of t); None = all blocks.

    Raises:
        ValueError: `input_size` or `hidden_size` is not divisible as above.
    """

    kind = "DiT"  # in the headers of files; the class may be renamed

    # name prefixes of parameters missing from the checkpoint; they are always trainable
    new_parameter_prefixes: tuple[str, ...] = ()
    unread: Unread | None = None  # what of the parameters has no values yet

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
        untimed: bool = False,
        guided: bool = False,
        step_blocks: int | None = None,
    ):
        # stored in files, from which the network is built again
        self_config = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        for key in OPTIONAL:  # younger than files that do without them
            if not self_config[key]:
                del self_config[key]
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
        self.recompute_context = noop_context_fn  # contexts of a block and of its second computation

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.step_embedder = TimestepEmbedder(hidden_size) if step else None
        self.no_time = NoTime(hidden_size) if untimed else None
        self.guidance_embedder = TimestepEmbedder(hidden_size) if guided else None
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, null_class=class_dropout_prob > 0)
        table = sincos_2d(hidden_size, input_size // patch_size, pos_embed_scale)
        self.register_buffer("pos_embed", table.float()[None])  # (1, T, D)
        mlp_size = int(hidden_size * mlp_ratio)
        self.blocks = nn.ModuleList(
            TransformerBlock(hidden_size, num_heads, Mlp(hidden_size, mlp_size)) for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()
        self.register_load_state_dict_pre_hook(_use_computed_pos_embed)

    @property
    def fresh(self) -> tuple[str, ...]:
        """Earlier name of `new_parameter_prefixes`."""
        return self.new_parameter_prefixes

    @fresh.setter
    def fresh(self, prefixes: tuple[str, ...]) -> None:
        self.new_parameter_prefixes = prefixes

    def initialize_weights(self) -> None:
        """Initial values as in the official code; the output of a new network is zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # like a linear layer
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for embedder in filter(None, (self.t_embedder, self.step_embedder, self.guidance_embedder)):
            nn.init.normal_(embedder.mlp[0].weight, std=0.02)
            nn.init.normal_(embedder.mlp[2].weight, std=0.02)
        if self.no_time is not None:
            nn.init.zeros_(self.no_time.vector)
        # adaLN-Zero: every block starts as the identity, and the network's output as zero
        for layer in (*(block.adaLN_modulation[1] for block in self.blocks), self.final_layer.adaLN_modulation[1]):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def zero_init_step_embedding(self) -> None:
        """Zero-initialise the step embedding, so the network initially ignores the step size."""
        self.add_inputs(["step"])

    def add_inputs(self, names: Iterable[str]) -> None:
        """Declare inputs new, which the pretrained weights do not know; the network initially ignores them.

        Args:
            names: arguments of the constructor, of `INPUTS`.
        """
        for name in names:
            embedder = getattr(self, INPUTS[name])
            for parameter in embedder.mlp[2].parameters() if isinstance(embedder, TimestepEmbedder) else ():
                nn.init.zeros_(parameter)
            self.new_parameter_prefixes += (f"{INPUTS[name]}.",)

    def ignore_step_at_first(self) -> None:
        """Earlier name of `zero_init_step_embedding`."""
        self.zero_init_step_embedding()

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        step: Tensor | None = None,
        w: Tensor | None = None,
        window: Tensor | None = None,
    ) -> Tensor:
        """Predict the process's target.

        Args:
            x: (N, C, H, W) noisy image or latents.
            t: (N,) timestep, in 0..999 for the official networks; NaN = unknown, for `untimed` networks.
            y: (N,) class in 0..K.
            step: (N,) step size in the unit of the process, for step-conditioned networks.
            w: (N,) or () guidance scale of the output, for `guided` networks; None = 1.
            window: (N, T) int64 rows of the position table, where x is a window of the image; None = the whole image.

        Returns:
            (N, C, H, W), or (N, 2C, H, W) with `learn_sigma`.
        """
        height = x.shape[2] // self.patch_size
        x, early, c = self.embed(x, t, y, step, w, window)  # (N, T, D), (N, D), (N, D)
        for i, block in enumerate(self.blocks):
            x = self.run_block(block, x, early if i < self.early_blocks else c)  # (N, T, D)
        return self.unpatchify(self.final_layer(x, c), height)  # (N, C_out, H, W)

    def embed(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        step: Tensor | None = None,
        w: Tensor | None = None,
        window: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (N, T, D), condition (N, D) of the early blocks, and that of all others (N, D), of `forward`'s inputs.

        The condition of the early blocks is without the step size. They are the same without `step_blocks`.
        """
        time = self.t_embedder(t) if self.no_time is None else self.no_time(self.t_embedder, t)
        early = c = time + self.y_embedder(y)
        if self.step_embedder is not None:
            c = c + self.step_embedder(step)
        if self.guidance_embedder is not None:
            w = torch.ones(len(x), device=x.device) if w is None else w.expand(len(x))
            guidance = self.guidance_embedder(w)
            early, c = early + guidance, c + guidance
        positions = self.pos_embed if window is None else self.pos_embed[0, window]  # (1 or N, T, D)
        return self.x_embedder(x) + positions, early, c

    @property
    def early_blocks(self) -> int:
        """Number of first blocks that are not conditioned on the step size."""
        late = self.config.get("step_blocks")
        return 0 if late is None else max(0, len(self.blocks) - late)

    def run_block(self, block: nn.Module, x: Tensor, c: Tensor, *time: Tensor) -> Any:
        """Run a block, with activation checkpointing if enabled.

        Args:
            block: one of `blocks`, perhaps adapted.
            x: (N, T, D) tokens.
            c: (N, D) condition.
            time: (N,) the network's time, where experts are chosen by it.
        """
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, c, *time, use_reentrant=False, context_fn=self.recompute_context)
        return block(x, c, *time)

    def unpatchify(self, x: Tensor, height: int) -> Tensor:  # (N, T, P*P*C_out) -> (N, C_out, H, W)
        """Patches back to an image of H = `height` P."""
        p = self.patch_size
        return rearrange(x, "n (h w) (p q c) -> n c (h p) (w q)", h=height, p=p, q=p)

    def compile_blocks(self) -> None:
        """Compile block by block: as fast as compiling the whole network, in half the time, with unchanged keys."""
        for block in self.blocks:
            block.compile(dynamic=False)


def inputs_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that give a network the further inputs of one with this config."""
    return {name: config[name] for name in (*INPUTS, "step_blocks") if config.get(name)}


def _use_computed_pos_embed(network: DiT, state_dict: dict, prefix: str, *_) -> None:
    """Keep the computed position table: a file of another resolution, or without a table, fits too."""
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
    """Largest difference of a stored position table from the computed one by rounding alone.

    Half a unit in the last place of the narrowest type that holds the table exactly, whatever type it is stored in. It
    is at least 5e-4: DiT's training code also applies EMA to the table, whose drift in fp32 is 1.6e-4 at decay 0.9999.

    Args:
        table: (1, T, D), as it is stored.
    """
    narrow = (torch.bfloat16, torch.float16)
    held = next((dtype for dtype in narrow if torch.equal(table, table.to(dtype).to(table.dtype))), torch.float32)
    return max(5e-4, torch.finfo(held).eps / 2 * table.float().abs().max().item())
