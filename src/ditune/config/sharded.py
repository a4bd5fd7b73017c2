"""What `trainer=fsdp` cannot be combined with, said before anything is built."""

from collections.abc import Iterator

from hydra.utils import get_object
from omegaconf import DictConfig

from ditune.config.instantiate import instantiate
from ditune.errors import UserError
from ditune.objectives.mean_flow import JVP, MeanFlow
from ditune.objectives.reflow import FromPairs

SHARDED = "ditune.training.sharding.Sharded"
OTHER = "or trainer=ddp, where every process has the whole network"


def is_sharded(cfg: DictConfig) -> bool:
    """Whether a training's network is spread over its processes."""
    strategy = cfg.trainer.get("strategy")
    return isinstance(strategy, DictConfig) and strategy.get("_target_") == SHARDED


def refuse_unspreadable(cfg: DictConfig) -> None:
    """Raises UserError with the first thing of a training's config that a network in shares cannot have."""
    if is_sharded(cfg):
        for text, remedy in _reasons(cfg):
            raise UserError(f"trainer=fsdp cannot be combined with {text}. Set {remedy}, {OTHER}.")


def _reasons(cfg: DictConfig) -> Iterator[tuple[str, str]]:
    """What is refused and why, and what to set instead."""
    if cfg.optimizer.get("_target_", "").endswith("MuonAdamW"):
        yield "optimizer=muon, which needs whole matrices", "optimizer=adamw"
    if issubclass(get_object(cfg.objective._target_), MeanFlow) and cfg.objective.get("derivative", JVP) == JVP:
        yield (
            "an objective that differentiates by torch.func.jvp, which knows no parameters in shares",
            "objective.derivative=difference",
        )
    if cfg.get("transfer") is not None and not cfg.transfer._target_.endswith("NoiseAwareness"):
        yield "transfer=, which computes with a second copy of what trains", "transfer=none"
    if issubclass(get_object(cfg.objective._target_), FromPairs) and instantiate(cfg.objective, "objective").needs_base:
        yield (
            "an objective whose teacher is the pretrained network, a second copy of what trains",
            "objective.teacher=<run or file>",
        )
    if cfg.get("frozen_weights") is not None:
        yield "frozen_weights=int8, which is rounded from whole rows before the network is cut", "frozen_weights=null"
    if cfg.objective.get("critic") is not None:
        yield "objective.critic, whose gradients are clipped apart", "objective.critic=null"
    if cfg.get("sparsity") is not None:
        yield "sparsity=, which ranks the values of whole matrices", "sparsity=none"
    if cfg.peft.get("name") == "adalora":
        yield "peft=adalora, which prunes ranks between the steps", "peft=lora"
    if cfg.trainer.accumulate_grad_batches == "auto":
        yield (
            "trainer.accumulate_grad_batches=auto, whose trials are of the whole network on one device",
            "a number of micro-steps",
        )
    if cfg.dry_run == "measure":
        yield "dry_run=measure, which tries steps of the whole network on one device", "dry_run=true"
