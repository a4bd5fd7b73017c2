"""The sweeper of `python src/train.py sweep=search_rank`. Hydra loads this file at every start, so it imports little.

After E2GAN (arXiv 2401.06127), whose abstract names a "simple yet effective rank search". How it searches is not
published; the greedy search here is ours.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hydra.core.plugins import Plugins
from hydra.errors import CompactHydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

log = logging.getLogger(__name__)

Ranks = dict[str, int]  # by the name of a group of layers
FILE = "search.json"  # in the folder of the sweep


@dataclass(frozen=True)
class Measured:
    """What a training with some ranks gave.

    Args:
        ranks: of the groups.
        loss: to be lowered.
        parameters: that train.
    """

    ranks: Ranks
    loss: float
    parameters: int


Measure = Callable[[Sequence[Ranks]], Sequence[Measured]]


def search(measure: Measure, groups: Sequence[str], largest: int, gain: float, max_jobs: int) -> list[Measured]:
    """Double the rank of one group after another, from rank 1 in all of them.

    In each round every group's rank is doubled alone. Of the doublings that lower the loss by the share `gain` or more,
    the one with the largest decrease for each parameter that it adds is kept. Without one the search has ended.

    Args:
        measure: trains with each of several ranks.
        groups: their names.
        largest: rank above which none is doubled.
        gain: tau, relative decrease of the loss that a doubling must give, in [0, 1).
        max_jobs: trainings at the most; a round that would need more is not begun.

    Returns:
        The ranks that were kept, round by round; the last ones are the result.

    Raises:
        UserError: a group has no layers, so that its rank adds no parameters.
    """
    from ditune.errors import UserError

    (best,) = measure([dict.fromkeys(groups, 1)])
    kept, jobs = [best], 1
    while True:
        doubled = [best.ranks | {name: 2 * r} for name, r in best.ranks.items() if 2 * r <= largest]
        jobs += len(doubled)
        if not doubled or jobs > max_jobs:
            return kept
        before, found_all = best, measure(doubled)
        for found in found_all:
            if found.parameters == before.parameters:
                (name,) = (name for name, rank in found.ranks.items() if rank != before.ranks[name])
                raise UserError(
                    f"The rank of hydra.sweeper.groups.{name} adds no parameters, so no layer of peft.target_modules "
                    f"is of that group. Add its layers, or leave the group out: ~hydra.sweeper.groups.{name}"
                )
        better = [found for found in found_all if before.loss - found.loss >= gain * before.loss]
        if not better:
            return kept
        best = max(better, key=lambda found: (before.loss - found.loss) / (found.parameters - before.parameters))
        kept.append(best)


class GreedyRanks(Sweeper):
    """Finds ranks of LoRA by `search`. Each training is a job of the sweep; the same command again skips those done.

    Args:
        groups: regular expression of the layers of each group, see `rank_pattern` of peft's LoraConfig.
        largest, gain, max_jobs: see `search`.
    """

    def __init__(self, groups: Mapping[str, str], largest: int, gain: float, max_jobs: int) -> None:
        self.groups, self.largest, self.gain, self.max_jobs = dict(groups), largest, gain, max_jobs

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Measured:
        from ditune.errors import UserError
        from ditune.files.atomic import write_json

        self.arguments, self.begun = arguments, 0
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        try:
            kept = search(self.measure, list(self.groups), self.largest, self.gain, self.max_jobs)
        except UserError as error:
            raise CompactHydraException(f"\nError: {error}") from None
        best, overrides = kept[-1], self.overrides(kept[-1].ranks)
        write_json(
            folder / FILE,
            {"rounds": [asdict(found) for found in kept], "trainings": self.begun, "overrides": overrides},
        )
        log.info(
            "%d trainings: loss %.4f with %s parameters, before %.4f with %s; %s",
            *(self.begun, best.loss, f"{best.parameters:,}", kept[0].loss, f"{kept[0].parameters:,}"),
            " ".join(f"'{override}'" for override in overrides),
        )
        return best

    def measure(self, several: Sequence[Ranks]) -> list[Measured]:
        """Train with each of several ranks, side by side where the machine has room."""
        from ditune.errors import UserError
        from ditune.files.atomic import read_json

        batch = [[*self.arguments, *self.overrides(ranks)] for ranks in several]
        returned = self.launcher.launch(batch, initial_job_idx=self.begun)
        self.begun += len(batch)
        found = []
        for ranks, job in zip(several, returned, strict=True):
            loss = job.return_value  # raises what the job has failed with
            if loss is None:
                raise UserError("A search compares trainings, and a plan has no loss. Leave dry_run= out.")
            parameters = read_json(Path(job.working_dir) / "result.json")["parameters"]["trainable"]
            found.append(Measured(dict(ranks), float(loss), parameters))
        return found

    def overrides(self, ranks: Ranks) -> list[str]:
        """Those of a training with these ranks; with alpha = r the scale of the change stays 1."""
        values = ",".join(f"{self.groups[name]}:{rank}" for name, rank in ranks.items())
        return [f"+peft.rank_pattern={{{values}}}", f"+peft.alpha_pattern={{{values}}}"]
