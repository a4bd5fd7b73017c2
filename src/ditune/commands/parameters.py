"""How many parameters every method trains of every network, counted without their weights."""

from collections.abc import Sequence
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ditune.config.options import load_option
from ditune.errors import UserError
from ditune.networks import build_network
from ditune.peft import PeftMethod


def build_method(row: str, peft: Path) -> PeftMethod:
    """The method of a row, as in "lora r=16", by its config in the folder `peft`.

    Raises:
        UserError: there is no such method.
    """
    name, *settings = row.split()
    if not (peft / f"{name}.yaml").is_file():
        raise UserError(f"There is no method {name!r} in configs/peft/. Name one of its files in rows=.")
    own = OmegaConf.merge(load_option(peft / f"{name}.yaml"), OmegaConf.from_dotlist(settings))
    cfg = OmegaConf.create({"max_steps": 1000, "peft": own})  # the length of a training changes no count
    return instantiate(cfg.peft, _convert_="all")


def count(row: str, network: str, num_classes: int, peft: Path) -> tuple[int, int]:
    """Parameters that train, and all of the network without its position table.

    Args:
        row: see `build_method`.
        network: a name that `build_network` knows.
        num_classes: of the label table, which has a row for the null class too.
        peft: folder with the methods' configs.
    """
    method = build_method(row, peft)
    with torch.device("meta"):
        built = build_network(network, num_classes=num_classes)
        total = sum(p.numel() for p in built.parameters())
        method.apply(built)
    return sum(p.numel() for p in method.trainable(built).values()), total


def parameter_table(rows: Sequence[str], networks: Sequence[str], num_classes: int, peft: Path) -> str:
    """Markdown: methods down, networks across, a method's share of the network behind its count."""
    lines = ["| method | " + " | ".join(networks) + " |", "|---|" + "---|" * len(networks)]
    for row in rows:
        counts = [count(row, network, num_classes, peft) for network in networks]
        cells = [f"{trains:,} ({100 * trains / total:.3f} %)" for trains, total in counts]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
