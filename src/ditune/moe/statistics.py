"""Routing statistics: load of the experts by layer, time, position and class, and numbers per layer.

Suffixes of names: L layers, B bins of time, T tokens of an image, K classes with the null class, E experts.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ditune.networks import DiTMoE
from ditune.networks.routing import Routing, load

BINS = 10  # of time, from data to noise


class RoutingStatistics:
    """Counts of the tokens of every expert, over any number of batches.

    Args:
        network: whose layers are counted.
        device: of the counts. Counting does not synchronise the device.
    """

    def __init__(self, network: DiTMoE, device: torch.device | str = "cpu"):
        layers, tokens = network.moe_layers, network.pos_embed.shape[1]
        self.layers, experts = list(layers), network.config["num_experts"]
        self.top_k = network.config["top_k"]
        self.counts = {
            name: torch.zeros(len(layers), size, experts, dtype=torch.float64, device=device)
            for name, size in (("time", BINS), ("position", tokens), ("class", network.num_classes + 1))
        }
        self.sums = torch.zeros(len(layers), 3, dtype=torch.float64, device=device)  # entropy, top score, tokens

    @torch.no_grad()
    def add(self, routing: Sequence[Routing], time: Tensor, y: Tensor) -> None:
        """Count one batch, unless it is of windows of images, which have other positions and loads.

        Args:
            routing: of every layer with experts, in order.
            time: (N,) in [0, 1], 0 = data.
            y: (N,) classes that the network was conditioned on.
        """
        if any(layer.chosen_NTE.shape[1] < self.counts["position"].shape[1] for layer in routing):
            return
        bins = (time.float() * BINS).long().clamp(0, BINS - 1)
        for i, layer in enumerate(routing):
            chosen_NTE = layer.chosen_NTE.double()
            by_image_NE = chosen_NTE.sum(dim=1)
            self.counts["time"][i].index_add_(0, bins, by_image_NE)
            self.counts["class"][i].index_add_(0, y, by_image_NE)
            # prompts (VPT) come before the tokens of the image and have no position in it
            self.counts["position"][i] += chosen_NTE[:, -self.counts["position"].shape[1] :].sum(dim=0)
            p_NTE = layer.scores_NTE / layer.scores_NTE.sum(dim=-1, keepdim=True)
            entropy = -(p_NTE * p_NTE.clamp(min=1e-20).log()).sum(dim=-1).sum()
            taken = (layer.scores_NTE * layer.chosen_NTE).sum()
            self.sums[i] += torch.stack([entropy, taken, torch.full_like(taken, p_NTE[..., 0].numel())])

    def over_processes(self) -> None:
        """Sum the counts over all processes, each of which must call it."""
        if dist.is_available() and dist.is_initialized():
            for table in (*self.counts.values(), self.sums):
                dist.all_reduce(table)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the sums over all processes, each of which must call it, on the CPU."""
        tables = {name: table.clone() for name, table in (*self.counts.items(), ("sums", self.sums))}
        if dist.is_available() and dist.is_initialized():
            for table in tables.values():
                dist.all_reduce(table)
        return {name: table.cpu() for name, table in tables.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the result of `state_dict`, in one of the processes."""
        for name, table in (*self.counts.items(), ("sums", self.sums)):
            table.copy_(state[name])

    @property
    def load_LE(self) -> Tensor:
        """(L, E) load of each expert relative to an even load, which is 1."""
        return load(self.counts["position"].sum(dim=1)).cpu()

    def per_layer(self) -> dict[str, Tensor]:
        """Numbers of every layer, (L,) each.

        max_vio: largest load over the mean load, minus 1 (arXiv 2408.15664, eq. 4).
        cv: standard deviation of the loads over their mean.
        entropy: mean entropy of a token's scores over its maximum: 1 = the router has no preference.
        top_score: mean sum of a token's chosen scores.
        dead: share of experts with less than a hundredth of an even load.
        mi_time, mi_position, mi_class: mutual information with the expert, in nats; 0 = independent.
        """
        load_LE, sums = self.load_LE, self.sums.cpu()
        experts = load_LE.shape[1]
        values = {
            "max_vio": load_LE.max(dim=1).values - 1,
            "cv": load_LE.std(dim=1, correction=0),
            "entropy": sums[:, 0] / sums[:, 2] / torch.tensor(max(experts, 2)).log(),
            "top_score": sums[:, 1] / sums[:, 2],
            "dead": (load_LE < 0.01).double().mean(dim=1),
        }
        return values | {f"mi_{name}": mutual_information(table.cpu()) for name, table in self.counts.items()}

    def log(self) -> dict[str, float]:
        """Values for metrics.csv and dashboards: means over the layers, and each layer's numbers and loads."""
        values = {}
        for name, by_layer in self.per_layer().items():
            values[f"routing/{name}"] = by_layer.mean().item()
            values |= {f"routing/layer{i:02}/{name}": v for i, v in zip(self.layers, by_layer.tolist(), strict=True)}
        for i, row in zip(self.layers, self.load_LE.tolist(), strict=True):
            values |= {f"routing/layer{i:02}/load{e:02}": value for e, value in enumerate(row)}
        return values


def mutual_information(counts: Tensor) -> Tensor:  # (..., C, E) -> (...)
    """Mutual information I(C; E) of tables of counts (..., C, E), in nats."""
    p = counts / counts.sum(dim=(-2, -1), keepdim=True).clamp(min=1)
    independent = p.sum(dim=-1, keepdim=True) * p.sum(dim=-2, keepdim=True)
    return torch.where(p > 0, p * (p / independent.clamp(min=1e-300)).log(), 0.0).sum(dim=(-2, -1))
