"""Finding the network's tensors in a checkpoint, under their own names.

Training codes put a state dict into containers ("ema", "state_dict", "model"), and wrappers put prefixes before its
keys ("module.", "_orig_mod.", "model.diffusion_model."). Both are found as the prefix of a key that every DiT has. The
EMA of the weights is preferred to the weights.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ditune.checkpoints.inert import StoredArray, StoredTensor
from ditune.errors import UserError

# what data parallelism, compilation, sharding and recomputation put into names
WRAPPERS = re.compile(r"\b(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
# the prefix, then the key that every DiT has, with wrappers between its parts
ANCHOR = re.compile(rf"((?:.*\.)?)x_embedder\.(?:{WRAPPERS.pattern})*proj\.weight")
AVERAGE = re.compile(r"(?<![a-z])(ema|averaged?)(?![a-z])")
FIRST = ("model", "state_dict", "network", "net", "module")  # preferred containers if there is no EMA
DEPTH = 4  # of containers in containers


@dataclass(frozen=True)
class StateDict:
    """A network's tensors.

    Args:
        where: container in the file: "ema", "state_dict.model"; "" = the file itself.
        tensors: by the network's own names.
    """

    where: str
    tensors: dict[str, Tensor | StoredTensor | StoredArray]


def find(content: Any, path: Path) -> StateDict | None:
    """Find the network in the content of a file.

    Args:
        content: object of the file.
        path: of the file, for messages.

    Returns:
        The network; None if there is none.

    Raises:
        UserError: there are several networks and no rule chooses one; or an EMA is a list without names.
    """
    found = list(_candidates(content, ()))
    averages = [candidate for candidate in found if AVERAGE.search(candidate.where.lower())]
    if not averages:
        _refuse_lists(content, path)
        for name in FIRST if len(found) > 1 else ():
            named = [candidate for candidate in found if candidate.where.split(".")[0] == name]
            if len(named) == 1:
                return named[0]
    chosen = averages or found
    if len(chosen) > 1:
        names = ", ".join(f"'{candidate.where}'" for candidate in chosen)
        raise UserError(f"{path} holds several networks: {names}. Save the one that you mean in a file of its own.")
    return chosen[0] if chosen else None


def is_tensor(value: object) -> bool:
    """Whether this is a tensor, read or still in its file."""
    return isinstance(value, Tensor | StoredTensor | StoredArray)


def _candidates(content: Any, where: tuple[str, ...]) -> Iterator[StateDict]:
    if not isinstance(content, dict) or len(where) > DEPTH:
        return
    keys = [key for key in content if isinstance(key, str)]
    for anchor in filter(None, (ANCHOR.fullmatch(key) for key in keys if is_tensor(content[key]))):
        prefix = anchor[1]
        own = [key for key in keys if key.startswith(prefix) and is_tensor(content[key])]
        tensors = {WRAPPERS.sub("", key.removeprefix(prefix)): content[key] for key in own}
        yield StateDict(".".join((*where, *prefix.split(".")[:-1])), tensors)
    for key in keys:
        yield from _candidates(content[key], (*where, key))


def _refuse_lists(content: Any, path: Path, where: str = "") -> None:
    """Refuse the EMA of torch-ema and diffusers' EMAModel, a list without names; raw weights must not replace it."""
    for key, value in content.items() if isinstance(content, dict) and where.count(".") < DEPTH else ():
        if key == "shadow_params" and isinstance(value, list | tuple):
            raise UserError(
                f"{path} holds its EMA as a list without names, '{where}{key}'. In the code that made it, copy the "
                "EMA into the network (ema.copy_to) and save the network's state_dict()."
            )
        _refuse_lists(value, path, f"{where}{key}.")
