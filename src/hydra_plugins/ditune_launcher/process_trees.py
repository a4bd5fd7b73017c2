"""The launcher of `python src/train.py -m ...`. Hydra loads this file at every start, so it imports little."""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.utils import JobReturn, JobStatus, configure_log
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

if TYPE_CHECKING:
    from ditune.launch.jobs import Job


class ProcessTreeLauncher(Launcher):
    """Every job runs as `python src/train.py <its overrides>` in processes of its own, several jobs side by side.

    Args:
        gpus_per_job: GPUs of each job; None = as many as its trainer.devices.
        slots: processes side by side on the CPU; None = one for each core.
        objective: dotted path in result.json whose value a search gets; None = nothing.
    """

    def __init__(self, gpus_per_job: int | None, slots: int | None, objective: str | None) -> None:
        self.gpus_per_job, self.slots, self.objective = gpus_per_job, slots, objective

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from ditune.cli import composed
        from ditune.errors import UserError
        from ditune.launch.jobs import of_the_job, place
        from ditune.launch.sweep import Sweep, show_summary, visible_gpus
        from ditune.progress import meter

        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        folder = Path(self.config.hydra.sweep.dir).resolve()
        gpus = visible_gpus()
        common = of_the_job(OmegaConf.to_container(self.config.hydra.overrides.hydra))
        jobs: list[Job] = []
        sweep = Sweep(folder, Path(sys.argv[0]).resolve(), gpus, self.gpus_per_job, self.slots)
        try:
            with meter("composing the jobs", len(job_overrides), "jobs") as progress:
                for overrides in job_overrides:
                    jobs.append(self._job([*overrides, *common], len(gpus)))
                    progress.advance()
            composed()
            place(jobs, folder)
            sweep.run(jobs)
        except UserError as error:
            raise CompactHydraException(f"\nError: {error}") from None
        except KeyboardInterrupt as stopped:  # of the sweep, with the signal's number; or before it
            show_summary(jobs)
            sys.exit(128 + (stopped.args or (signal.SIGINT,))[0])
        show_summary(jobs)
        return [self._returned(job, sum(not job.succeeded for job in jobs), len(jobs)) for job in jobs]

    def _job(self, overrides: list[str], gpus: int) -> "Job":
        from ditune.config.keys import check
        from ditune.config.roles import job_hash, job_identity
        from ditune.config.swept import ALONE
        from ditune.errors import UserError
        from ditune.launch.jobs import Job, needs

        job = Job([*overrides, ALONE])
        try:
            cfg = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
            check(cfg)
            job.key, job.identity = job_hash(cfg), job_identity(cfg)
            job.dry_run = bool(cfg.dry_run)
            job.method, job.data = cfg.peft.name, cfg.data.name
            trainer = cfg.trainer
            job.processes, job.on_gpu = needs(
                trainer.accelerator, trainer.devices, gpus, self.gpus_per_job, trainer.get("num_nodes", 1)
            )
        except (UserError, OmegaConfBaseException) as error:
            job.status, job.error = "refused", str(error)
        return job

    def _returned(self, job: "Job", failed: int, count: int) -> JobReturn:
        returned = JobReturn()
        returned.overrides = job.overrides
        if job.succeeded:
            returned.working_dir = str(job.folder)
            returned.status = JobStatus.COMPLETED
            if job.status == "planned":
                return returned
            from ditune.files.atomic import read_json

            result = OmegaConf.create(read_json(job.folder / "result.json"))
            returned.return_value = OmegaConf.select(result, self.objective) if self.objective else None
        else:
            returned.status = JobStatus.FAILED
            returned.return_value = CompactHydraException(
                f"\nError: {failed} of {count} jobs have no result. The table above and summary.json in the sweep's "
                "folder say why; the same command again runs only those."
            )
        return returned
