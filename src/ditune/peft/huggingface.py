"""The methods of huggingface peft, and peft's own file format for reading and writing.

peft is imported inside of the functions: it takes seconds.
"""

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ditune.errors import UserError
from ditune.networks.moe import Experts
from ditune.peft.base import LABELS, PeftMethod
from ditune.peft.huggingface_rows import ADDED, CALLS_LAYERS, CHANGES_THE_BASE, PATHS, QKV, REMADE

PREFIX = "base_model.model."  # of every key in peft's files
ADAPTER = "default"  # peft's name of the adapter inside the network


class HuggingFace(PeftMethod):
    """One of peft's methods, by its type and the arguments of its config class.

    Args:
        peft_type: key of peft's table of methods, such as "LORA".
        lr, weight_decay, train_labels: see `PeftMethod`. The label table is in peft's `modules_to_save`.
        **arguments: of peft's config class. `target_modules` is the qkv layers by default.

    Raises:
        UserError: dropout, or a value that peft refuses.
        TypeError: an argument that peft's config class does not have.
    """

    def __init__(
        self, peft_type: str, lr: float = 0.0, weight_decay: float = 0.0, train_labels: bool = True, **arguments: Any
    ):
        from peft import get_peft_config

        super().__init__(lr, weight_decay, train_labels)
        dropout = [key for key, value in arguments.items() if key.endswith("dropout") and value]
        if dropout:
            raise UserError(
                f"peft.{dropout[0]} needs random numbers that a resumed run cannot reproduce. Leave it out, or set 0."
            )
        for key in REMADE.get(peft_type, ()):
            if arguments.setdefault(key, False):
                raise UserError(f"{REMADE[peft_type][key]} Leave peft.{key} out.")
        # own backward functions, and parametrized weights (target_parameters), have no forward derivative
        self.forward_mode = peft_type not in ("LOHA", "RANDLORA") and not arguments.get("target_parameters")
        self.whole_weights = (
            peft_type not in CALLS_LAYERS
            or bool(arguments.get("use_dora") or arguments.get("target_parameters"))
            or str(arguments.get("init_lora_weights", "")).startswith(CHANGES_THE_BASE)
        )
        arguments.setdefault("target_modules", [] if arguments.get("target_parameters") else QKV)
        if not isinstance(arguments["target_modules"], str):
            arguments["target_modules"] = list(arguments["target_modules"] or ())
        try:
            with quiet():
                self.config = get_peft_config({"peft_type": peft_type, **arguments})
        except (ValueError, ZeroDivisionError) as error:
            raise UserError(f"peft refuses these arguments: {first_line(error)}. See configs/peft/.") from error
        self.saved = [*(self.config.modules_to_save or ()), *([LABELS] if train_labels else ())]
        self.config.modules_to_save = None  # they train in place, without peft's copies
        self.path = PATHS.get(peft_type)
        self.no_path = f"none is known for peft's {peft_type}"
        self.sums = "parameters" if peft_type in ADDED else None
        if peft_type == "LORA" and not arguments.get("use_dora") and not arguments.get("target_parameters"):
            self.sums = "ranks"
        self.injected: set[str] = set()
        self.constants: dict[str, Tensor] = {}  # read from a file, and written to the next one

    def selects(self, name: str) -> bool:
        """peft's own parameters, and those of `modules_to_save`."""
        return name in self.injected or any(f".{module}." in f".{name}" for module in self.saved)

    def check_base_stays(self) -> None:
        """Refuse PiSSA and OLoRA, which subtract from the frozen weights; adapters that they have written do not.

        Raises:
            UserError: the method changes frozen weights.
        """
        if self._changes_the_base:
            raise UserError(
                f"{self.title} changes the base's frozen weights while it trains, so the base is not there to guide. "
                "Set sampler.guide=null_class here; src/sample.py of the finished run can take guide=base."
            )

    def inject(self, network: nn.Module) -> None:
        """Put peft's layers around those that `target_modules` names.

        On the meta device the layers are made on the CPU, from uninitialised memory: some of peft's methods compute at
        construction. PSOFT decomposes the weights there, for which only shapes are needed, and stays on it.

        Raises:
            UserError: peft refuses the network, a target is not a linear layer, or the rank is 0.
        """
        from peft import get_peft_model

        self.saved += [
            name for name in (prefix.rstrip(".") for prefix in network.new_parameter_prefixes) if name not in self.saved
        ]
        meta, config = next(network.parameters()).is_meta, self.config
        device = "cpu" if meta and config.peft_type != "PSOFT" else next(network.parameters()).device
        if meta and device == "cpu":
            network.to_empty(device="cpu")
            if self._changes_the_base:
                config = replace(config, init_lora_weights=True)  # there are no weights to decompose
        try:
            with quiet(), torch.device(device if meta else torch.get_default_device()):
                self.tuner = get_peft_model(network, config).base_model
        except (ValueError, ZeroDivisionError) as error:
            raise UserError(f"peft cannot adapt this network: {first_line(error)}. See configs/peft/.") from error
        if meta:
            network.to("meta")
        del network.peft_config
        linear = (nn.Linear, Experts)  # Experts by the parameters that `target_parameters` names
        odd = [name for name, layer in layers(network).items() if not isinstance(layer.get_base_layer(), linear)]
        if odd:
            raise UserError(
                f"peft.target_modules names {odd[0]}, which the network never calls as a linear layer. "
                r"Name only linear layers, as in blocks\.\d+\.attn\.(qkv|proj)."
            )
        trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        if not all(p.numel() for p in trained.values()):
            raise UserError("The method's rank is 0, so there is nothing to train. Set a rank of at least 1.")
        self.injected = set(trained)
        if self._changes_the_base and not meta:
            for layer in layers(network).values():
                for part in ("lora_A", "lora_B"):
                    initial = getattr(layer, part)[ADAPTER].weight.detach().clone()
                    layer.register_buffer(f"initial_{part}", initial, persistent=False)

    def fold(self, network: nn.Module) -> None:
        """Merge peft's layers and put their base layers back."""
        found = layers(network)
        for layer in found.values():
            layer.merge()
        for name, layer in found.items():
            parent, _, child = name.rpartition(".")
            if parent not in found:  # layers on several parameters of one module are nested
                setattr(network.get_submodule(parent), child, layer.get_base_layer())

    def to_file(self, network: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """peft's config and keys. PiSSA and OLoRA are written as a LoRA of twice the rank on the unchanged base."""
        config, state = self.config, self.state_dict(network)
        if self._changes_the_base:
            # W - s B0 A0 + s B A  =  W + s [B, -B0] [A; A0]
            for name, layer in layers(network).items():
                a, b = (f"{name}.{part}.{ADAPTER}.weight" for part in ("lora_A", "lora_B"))
                state[a] = torch.cat([state[a], layer.initial_lora_A.cpu()])
                state[b] = torch.cat([state[b], -layer.initial_lora_B.cpu()], dim=1)
            scaling = layer.scaling[ADAPTER]  # the same in all layers
            rank = 2 * config.r
            config = replace(config, r=rank, lora_alpha=scaling * rank, use_rslora=False, init_lora_weights=True)
        keys = self._keys(network)
        written = {key: list(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
        written |= {"modules_to_save": self.saved or None, "inference_mode": True}
        written["auto_mapping"] = {
            "base_model_class": type(network).__name__,
            "parent_library": type(network).__module__,
        }
        if self.constants:
            written |= dict.fromkeys(REMADE.get(written["peft_type"], ()), True)
        return written, {PREFIX + keys[name]: tensor for name, tensor in state.items()} | self.constants

    def from_file(self, network: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Load tensors by peft's keys, see `PeftMethod.from_file`."""
        names = {PREFIX + key: name for name, key in self._keys(network).items()}
        constants = {}
        for key, tensor in tensors.items():
            constant = None if key in names else self._constant(network, key)
            if constant is not None and constant.shape == tensor.shape:
                constants[key] = constant
        rest = {names.get(key, key): tensor for key, tensor in tensors.items() if key not in constants}
        self.load_state_dict(network, rest)
        for key, constant in constants.items():
            constant.copy_(tensors[key])
        self.constants = constants

    def _constant(self, network: nn.Module, key: str) -> Tensor | None:
        """A buffer in some of peft's files: SHiRA's indices, or VeRA's matrices, which layers share."""
        path, _, attribute = key.removeprefix(PREFIX).rpartition(".")
        found = layers(network)
        layer = next(iter(found.values())) if path == "base_model" else found.get(path)
        by_adapter = getattr(layer, attribute, ())
        return by_adapter[ADAPTER] if hasattr(by_adapter, "__contains__") and ADAPTER in by_adapter else None

    @property
    def _changes_the_base(self) -> bool:
        return str(getattr(self.config, "init_lora_weights", "")).startswith(CHANGES_THE_BASE)

    def _keys(self, network: nn.Module) -> dict[str, str]:
        """Key of every trainable parameter in peft's files, by its name in the network."""
        from peft import get_peft_model_state_dict

        names = {name: name for name in self.trainable(network)}
        network.peft_config = {ADAPTER: self.config}
        keys = get_peft_model_state_dict(network, names, ADAPTER, save_embedding_layers=False)
        del network.peft_config
        return names | {name: key for key, name in keys.items() if isinstance(name, str)}


def layers(network: nn.Module) -> dict[str, nn.Module]:
    """peft's layers in the network, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}


def from_peft_config(config: dict[str, Any]) -> HuggingFace:
    """The method of an adapter_config.json file of peft.

    Args:
        config: content of the file. Keys that the installed release of peft does not know are left out.

    Raises:
        UserError: peft does not know the type.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING as KNOWN

    if config["peft_type"] not in KNOWN:
        raise UserError(f"peft has no method {config['peft_type']!r}. Install the release that wrote the adapter.")
    known = KNOWN[config["peft_type"]].__dataclass_fields__
    arguments = {k: v for k, v in config.items() if k in known} | {"inference_mode": False}
    arguments |= {key: 0.0 for key in arguments if key.endswith("dropout")}  # of training
    arguments |= dict.fromkeys(REMADE.get(config["peft_type"], ()), False)  # `from_file` loads what the file has
    return HuggingFace(train_labels=False, **arguments)


def first_line(error: Exception) -> str:
    """First line of an error's text, without the full stop."""
    return str(error).splitlines()[0].rstrip(".")


def quiet() -> warnings.catch_warnings:
    """Silence peft's warnings about intended settings and optional CUDA kernels."""
    return warnings.catch_warnings(action="ignore")
