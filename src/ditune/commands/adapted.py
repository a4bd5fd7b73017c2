"""What sample.py and evaluate.py share: a run at a strength of its adapter, a sum of adapters, or experts by time."""

from omegaconf import DictConfig
from torch import nn

from ditune.config.guides import needs_base
from ditune.distributed import best_device
from ditune.errors import UserError
from ditune.run import Run, Trained, load_run, load_sum
from ditune.run_experts import load_experts


def load_weighted(cfg: DictConfig) -> Run:
    """The network of `run=` at `strength=`, or of `adapters=`.

    Raises:
        UserError: a run is missing or damaged, or there is no such strength or sum.
    """
    if cfg.adapters is not None:
        run = load_sum(weights(cfg.adapters))
        if cfg.strength is not None:
            run.network.adaptation.dial.set(cfg.strength)
        return run
    return load_run(cfg.run, cfg.strength, keep_base=needs_base(cfg) or needs_base(cfg.get("sampler") or {}))


def load_parts(cfg: DictConfig) -> Trained:
    """The runs of `experts=`, each of which runs in its part of the process.

    Raises:
        UserError: a run is missing, they do not belong together, or strength= or a guide by the base is given.
    """
    refuse_strength(cfg)
    if needs_base(cfg) or needs_base(cfg.get("sampler") or {}):
        raise UserError("experts= has several adapters, and a guide by the base needs one. Set guide=null_class.")
    return load_experts(cfg.experts)


def ready(trained: Trained, compiled: bool) -> nn.Module:
    """The network on the best device, with blocks that are compiled when they are first called if `compiled`."""
    network = trained.network.to(best_device())
    if compiled:
        network.compile_blocks()
    return network


def weights(adapters: list[str]) -> dict[str, float]:
    """Weight of each run in `adapters=[<run>:<weight>,...]`.

    Raises:
        UserError: an entry is none, or a run stands there twice.
    """
    found: dict[str, float] = {}
    for entry in adapters:
        run, _, weight = str(entry).rpartition(":")
        try:
            value = float(weight)
        except ValueError:
            run = ""
        if not run or run in found:
            what = "names a run twice" if run else f"has the entry {entry!r}, which is no <run>:<weight>"
            raise UserError(f"adapters {what}. Give it as adapters=[<run>:0.7,<run>:0.3].")
        found[run] = value
    return found


def refuse_strength(cfg: DictConfig) -> None:
    """Raises UserError where `strength=` is given and there is no adapter."""
    if cfg.strength is not None:
        raise UserError(f"strength is {cfg.strength:g}, and only run= and adapters= have an adapter. Leave it out.")


def exactly_one(cfg: DictConfig, *keys: str) -> str:
    """The one key of `keys` that is set.

    Raises:
        UserError: none is set, or several.
    """
    given = [key for key in keys if cfg[key] is not None]
    if len(given) != 1:
        choices = " or ".join(f"{key}=" for key in keys)
        what = f"{' and '.join(f'{key}=' for key in given)} are both given" if given else "Nothing is given to work on"
        raise UserError(f"{what}. Give exactly one of {choices}.")
    return given[0]
