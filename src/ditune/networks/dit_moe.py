"""DiT with mixtures of experts as feed-forward layers (DiT-MoE, Fei et al. 2024, arXiv 2407.11633)."""

from typing import Any, Literal

from torch import Tensor, nn

from ditune.networks.block import Mlp, TransformerBlock, norm_modulate
from ditune.networks.dit import DiT
from ditune.networks.moe import MoE
from ditune.networks.routing import ROUTE_ON, Routing
from ditune.networks.sizes import DIT_MOE as SIZES
from ditune.networks.sizes import MOE_NETWORKS

__all__ = ["MOE_NETWORKS", "SIZES", "DiTMoE", "MoEBlock", "activated", "of_earlier_release"]


class MoEBlock(TransformerBlock):
    """A block with experts. It returns (tokens, routing), so that activation checkpointing counts no routing twice.

    Args:
        *block: see `TransformerBlock`.
        route_on: what the router decides by: 'modulated' or 'unmodulated' tokens, or 'time'.
    """

    mlp_key = "moe"

    def __init__(self, *block: Any, route_on: str = "modulated"):
        super().__init__(*block)
        self.route_on = route_on

    def transform(self, x: Tensor, shift: Tensor, scale: Tensor, *time: Tensor) -> tuple[Tensor, Routing]:
        """The experts before their gate; x (N, T, D), shift and scale (N, D), the network's time (N,) if routed by."""
        if self.route_on == "modulated":
            return super().transform(x, shift, scale)
        by = self.norm2(x) if self.route_on == "unmodulated" else time[0][:, None].expand(x.shape[:2])
        return self.moe(norm_modulate(self.norm2, x, shift, scale), by)


class DiTMoE(DiT):
    """DiT-MoE. The defaults are the original's: routed SwiGLU experts of width 4D and shared ones of 2D in every block.

    Args:
        depth, hidden_size, num_heads, dit: see `DiT`.
        mlp_ratio: width of the MLP over D in blocks without experts.
        num_experts: E, routed experts of a layer.
        top_k: k, experts of a token.
        expert_ratio: width of a routed expert over D.
        shared_ratio: width of all shared experts together over D; 0 = none. The paper has two of width D.
        expert: 'swiglu', or 'gelu' for DiT's own MLP (networks that are upcycled from a dense one).
        score, renormalize, route_scale, choice: see `Router`, for choice='time' `TimeRouter`.
        route_on: 'modulated': the router sees what the experts see, as in the original. 'unmodulated': it sees the
            tokens before shift and scale, so that the time reaches it by attention and earlier blocks only.
            Nucleus-Image (arXiv 2604.12163) reports that routing on modulated tokens follows the time, not the content.
        time_range: at which the network's time ends, for choice='time' only: `time_scale` of a flow, the timesteps of
            a diffusion.
        moe_every: every k-th block has experts, the last of each k blocks; 2 = interleaved (arXiv 2512.01252).
        moe_from: part of the depth without experts; 0.5 = only the deeper half has them (2407.11633, Fig. 4c).
        qk_norm: LayerNorm on queries and keys, as in the published XL and G.

    Raises:
        ValueError: no block has experts, or an argument is refused by `DiT`, `Router` or `Experts`.
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
        route_on: str = "modulated",
        time_range: float = 1000.0,
        moe_every: int = 1,
        moe_from: float = 0.0,
        qk_norm: bool = False,
        **dit: Any,
    ):
        if top_k == 1 < num_experts and renormalize is True:
            renormalize = False  # the same; files with true are of an earlier release, see `of_earlier_release`
        own = {key: value for key, value in locals().items() if key not in ("self", "dit", "__class__")}
        if route_on not in ROUTE_ON:
            raise ValueError(f"route_on must be one of {', '.join(ROUTE_ON)}, not {route_on!r}")
        by_time = choice == "time"
        if by_time and (route_on != "modulated" or renormalize or dit.get("untimed")):
            raise ValueError("choice='time' has no learned router: leave route_on, renormalize and untimed out")
        # younger than files that do without them
        if not by_time:
            del own["time_range"]
        if route_on == "modulated":
            del own["route_on"]
        super().__init__(hidden_size=hidden_size, depth=0, num_heads=num_heads, mlp_ratio=mlp_ratio, **dit)
        self.config = self.config | own
        for i in range(depth):
            if i < moe_from * depth or (i + 1) % moe_every:
                mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
                self.blocks.append(TransformerBlock(hidden_size, num_heads, mlp, qk_norm))
                continue
            sizes = {"expert_size": int(hidden_size * expert_ratio), "shared_size": int(hidden_size * shared_ratio)}
            routing = {"top_k": top_k, "score": score, "renormalize": renormalize, "scale": route_scale}
            moe = MoE(hidden_size, num_experts, **sizes, expert=expert, **routing, choice=choice, time_range=time_range)
            block = MoEBlock(hidden_size, num_heads, moe, qk_norm, route_on="time" if by_time else route_on)
            self.blocks.append(block)
        if not self.moe_layers:
            raise ValueError(f"no block of {depth} has experts: lower moe_every {moe_every} or moe_from {moe_from}")
        self.initialize_weights()

    @property
    def moe_layers(self) -> dict[int, MoE]:
        """The layers with experts, by the index of their block."""
        found = ((i, module) for i, block in enumerate(self.blocks) for module in block.modules())
        return {i: module for i, module in found if isinstance(module, MoE)}

    def initialize_weights(self) -> None:
        """`DiT.initialize_weights`, then the layers with experts."""
        super().initialize_weights()
        for layer in self.moe_layers.values():
            layer.initialize_weights()

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        step: Tensor | None = None,
        w: Tensor | None = None,
        window: Tensor | None = None,
        routing: list[Routing] | None = None,
    ) -> Tensor:
        """Predict the process's target, see `DiT.forward`.

        Args:
            x, t, y, step, w, window: see `DiT.forward`.
            routing: a list to which the routing of every layer with experts is appended, in order; None = not.
        """
        height = x.shape[2] // self.patch_size
        x, early, c = self.embed(x, t, y, step, w, window)  # (N, T, D), (N, D), (N, D)
        time = (t,) if self.config["choice"] == "time" else ()
        for i, block in enumerate(self.blocks):
            output = self.run_block(block, x, early if i < self.early_blocks else c, *time)
            x, *decided = output if isinstance(output, tuple) else (output,)  # (N, T, D), routing of a MoEBlock
            if routing is not None:
                routing += decided
        return self.unpatchify(self.final_layer(x, c), height)  # (N, C_out, H, W)


def of_earlier_release(config: dict[str, Any]) -> dict[str, Any]:
    """Translate a stored config of an earlier release, in which `renormalize` also divided a single expert's weight.

    Args:
        config: arguments of `DiTMoE`, as they are stored in a file.

    Returns:
        Arguments with the same meaning today.
    """
    divided = config.get("renormalize") is True and config.get("top_k") == 1 < config.get("num_experts", 1)
    return config | {"renormalize": "always"} if divided else config


def activated(network: nn.Module) -> int:
    """Number of activated parameters: all but the routed experts that a token does not take (2407.11633, Table 1)."""
    total = sum(p.numel() for p in network.parameters())
    for layer in network.moe_layers.values() if isinstance(network, DiTMoE) else ():
        one = sum(p[0].numel() for p in layer.experts.parameters())
        total -= (layer.num_experts - layer.router.top_k) * one
    return total
