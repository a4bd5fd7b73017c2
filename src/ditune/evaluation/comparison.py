"""A trained network against its base, by one protocol."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from ditune.checkpoints import load_network
from ditune.distributed import rank
from ditune.evaluation.protocol import Evaluation, Record, gap


@dataclass(frozen=True)
class Comparison:
    """A trained network against its base, by one protocol.

    Args:
        evaluation: distance to the domain that was trained on.
        own: distance to the base's own domain; None = the gap between the domains is not asked for.
        record: values of the base that are known.
    """

    evaluation: Evaluation
    own: Evaluation | None
    record: Record

    def kept_in(self, store: Path | None) -> "Comparison":
        """The same, whose images are kept in a folder, so that several processes share the work; see `Evaluation`."""
        own = None if self.own is None else replace(self.own, store=store)
        return replace(self, evaluation=replace(self.evaluation, store=store), own=own)

    def unknown(self, base: Path | None) -> int:
        """How many networks' images have to be generated: the trained one's, and the base's that no record holds."""
        if base is None:
            return 1
        asked = [self.evaluation] if self.own is None else [self.evaluation, self.own]
        return 1 + sum(self.record.get(base, unguided_by_base(evaluation)) is None for evaluation in asked)

    def __call__(self, network: nn.Module, base: Path | None, folder: Path) -> dict[str, Any]:
        """Metrics after the training; and where there is a base, of the base before it, and how far the gap closed.

        Args:
            network: with what was trained.
            base: file of the network that the training began with.
            folder: gets grid.png and nearest.png.
        """
        metrics: dict[str, Any] = {"protocol": self.evaluation.protocol, "after": self.evaluation(network, folder)}
        if base is None:
            return metrics

        def load() -> nn.Module:
            before = load_network(base, network.config, **self.evaluation.generator.process.network)
            return before.to(next(network.parameters()).device)

        metrics["before"], metrics["before_is"] = self.record.or_measure(base, unguided_by_base(self.evaluation), load)
        if self.own is not None:
            metrics["base_domain"], metrics["base_domain_is"] = self.record.or_measure(
                base, unguided_by_base(self.own), load
            )
            if rank() != 0:
                return metrics  # only the first process has values
            key = f"kid_{self.evaluation.suite.name}"
            metrics |= gap(metrics["before"][key], metrics["after"][key], metrics["base_domain"][key])
        return metrics

    def note(self, base: Path | None, metrics: dict[str, Any]) -> None:
        """Write the base's values that were measured for `metrics` into the record's file.

        Args:
            base: see `__call__`.
            metrics: what `__call__` returned.
        """
        for name, evaluation in (("before", self.evaluation), ("base_domain", self.own)):
            if metrics.get(f"{name}_is") == "measured":
                self.record.add(base, unguided_by_base(evaluation), metrics[name])


def unguided_by_base(evaluation: Evaluation) -> Evaluation:
    """The protocol of a base network: guided by itself it is plainly guided, so `guide=base` has the same images."""
    guide = evaluation.generator.guide
    if guide is None or not guide.of_base:
        return evaluation
    return replace(evaluation, generator=replace(evaluation.generator, guide=None))
