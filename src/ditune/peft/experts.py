"""Methods on the weights of experts (`target=experts`), and on the routers."""

from collections.abc import Callable, Iterator

from torch import nn

from ditune.errors import UserError
from ditune.networks import DiTMoE
from ditune.networks.moe import FORMS, MoE
from ditune.peft.base import PeftMethod
from ditune.peft.bottleneck import Adapter, AdaptFormer
from ditune.peft.huggingface import HuggingFace
from ditune.peft.norm import ones


def moe_layers(network: nn.Module) -> Iterator[MoE]:
    """The network's layers with experts.

    Args:
        network: a DiT-MoE.

    Raises:
        UserError: the network has no experts.
    """
    if not isinstance(network, DiTMoE):
        raise UserError("The network has no experts. Leave peft.target out, or give a network that has.")
    yield from network.moe_layers.values()


class Router(PeftMethod):
    """Only the routers train: the choice of a token's experts, and the weights of their outputs."""

    sums = "parameters"

    def selects(self, name: str) -> bool:
        """The routers."""
        return ".router." in name

    def inject(self, network: nn.Module) -> None:
        """Only check that the network has experts."""
        list(moe_layers(network))


class FullExperts(Router):
    """Every weight of routed and shared experts trains."""

    def selects(self, name: str) -> bool:
        """The experts."""
        return ".experts." in name or ".shared_experts." in name


class DiffFitExperts(Router):
    """Scales per channel on the sum of the routed experts and on the shared output of every layer, initially 1."""

    path = ("gamma_",)

    def selects(self, name: str) -> bool:
        """The scales."""
        return name.endswith(("gamma_routed", "gamma_shared"))

    def inject(self, network: nn.Module) -> None:
        """Add the scales."""
        for layer in moe_layers(network):
            like = next(layer.experts.parameters())
            layer.gamma_routed = ones(layer.hidden_size, like)
            if layer.shared_experts is not None:
                layer.gamma_shared = ones(layer.hidden_size, like)

    def fold(self, network: nn.Module) -> None:
        """Multiply the scales into the experts' last layers."""
        for layer in moe_layers(network):
            for name, parameter in layer.experts.named_parameters():
                if name in ("w_down_EFD", "w_out_EFD", "bias_out_ED"):
                    parameter *= layer.gamma_routed
            if layer.shared_experts is not None:
                layer.shared_experts.down_proj.weight *= layer.gamma_shared[:, None]
            layer.gamma_routed = layer.gamma_shared = None


class LoraExperts(HuggingFace):
    """LoRA on every matrix of the routed experts, one pair of factors per expert, by peft's `target_parameters`.

    Args:
        use_rslora: scale by the root of the rank (arXiv 2312.03732).
        target_modules: ignored; it names layers of attention in the configs.
        **arguments: see `HuggingFace`.
    """

    def __init__(self, use_rslora: bool = False, target_modules: object = None, **arguments: object):
        matrices = sorted({name for _, shapes in FORMS.values() for name, shape in shapes.items() if len(shape) == 3})
        targets = [f"moe.experts.{name}" for name in matrices]
        super().__init__("LORA", use_rslora=use_rslora, target_modules=[], target_parameters=targets, **arguments)

    def inject(self, network: nn.Module) -> None:
        """Put peft's layers around the matrices that these experts have; see `HuggingFace.inject`."""
        own = {name for layer in moe_layers(network) for name, _ in layer.experts.named_parameters()}
        self.config.target_parameters = [p for p in self.config.target_parameters if p.rpartition(".")[2] in own]
        super().inject(network)


def rslora_experts(**arguments: object) -> LoraExperts:
    """`LoraExperts` with `use_rslora`."""
    return LoraExperts(use_rslora=True, **arguments)


# Adapters wrap the whole layer, with or without experts.
ON_EXPERTS: dict[str, Callable[..., PeftMethod]] = {
    "full": FullExperts,
    "difffit": DiffFitExperts,
    "lora": LoraExperts,
    "rslora": rslora_experts,
    "adaptformer": AdaptFormer,
    "adapter": Adapter,
}
# keys of configs/peft/difffit.yaml that do not apply to experts
NOT_ON_EXPERTS = {"difffit": ("gamma_depth", "gammas", "affine_norms")}


def build_on_experts(name: str, **kwargs: object) -> PeftMethod:
    """A method on the weights of experts.

    Args:
        name: one of `ON_EXPERTS`.
        **kwargs: arguments of the method; those that do not apply to experts are ignored.

    Raises:
        UserError: the method has no form for experts.
    """
    if name not in ON_EXPERTS:
        raise UserError(
            f"peft={name} has no form for the weights of experts. Choose one of {', '.join(ON_EXPERTS)}, "
            "or leave peft.target out."
        )
    return ON_EXPERTS[name](**{k: v for k, v in kwargs.items() if k not in NOT_ON_EXPERTS.get(name, ())})
