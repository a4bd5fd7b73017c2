"""The jobs of a sweep: the hash of each config, the run folder, and the processes and GPUs that a job needs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ditune.errors import UserError
from ditune.files.atomic import read_or_set_aside

SUMMARY = "summary.json"
OF_THE_SWEEP = ("hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweep", "hydra.mode", "hydra.run")


@dataclass
class Job:
    """One training of a sweep.

    Args:
        overrides: of its command line.
        key: hash of its config, of `ditune.config.roles.job_hash`.
        identity: hash of what changes its result, of `ditune.config.roles.job_identity`.
        folder: its run folder.
        method: name of its PEFT method, for reports; None = unknown.
        data: name of its dataset, likewise.
        processes: number of its ranks.
        on_gpu: whether every rank needs a GPU.
        dry_run: whether it only shows its plan, in its log.
        status: waiting, then running; in the end finished, planned, skipped, stopped, failed, killed or refused.
        error: why it has no result.
        exit_codes: one per rank.
        seconds: how long it ran.
        price: what its plan expects, the content of price.json.
    """

    overrides: list[str]
    key: str = ""
    folder: Path | None = None
    method: str | None = None
    data: str | None = None
    processes: int = 1
    on_gpu: bool = False
    dry_run: bool = False
    status: str = "waiting"
    error: str = ""
    identity: str = ""
    exit_codes: list[int] = field(default_factory=list)
    seconds: float = 0.0
    price: dict[str, Any] = field(default_factory=dict)

    @property
    def succeeded(self) -> bool:
        """Whether its result, or its plan, is there."""
        return self.status in ("finished", "planned", "skipped")


def needs(
    accelerator: str, devices: int | str | Sequence[int], gpus: int, gpus_per_job: int | None, num_nodes: int = 1
) -> tuple[int, bool]:
    """How many processes a job needs, and whether each needs a GPU.

    Args:
        accelerator: the job's trainer.accelerator: "auto", "cpu", "gpu" or "cuda".
        devices: the job's trainer.devices: a number, or "auto" or -1 for all.
        gpus: GPUs of this machine.
        gpus_per_job: GPUs that each job gets; None = as many as `devices`.
        num_nodes: the job's trainer.num_nodes, machines.

    Returns:
        (processes, whether each needs a GPU).

    Raises:
        UserError: the job needs more than it may have, or several machines.
    """
    if num_nodes > 1:
        raise UserError(
            "A job of several machines cannot be started from one of them. Use hydra/launcher=submitit_slurm, "
            "or torchrun on every machine (docs/guide/sweeps.md)."
        )
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and gpus > 0)
    if devices in ("auto", -1, "-1"):
        return (gpus_per_job or gpus, True) if on_gpu else (1, False)
    if not str(devices).isdigit():
        raise UserError(f"trainer.devices is {devices}, but a sweep chooses the devices itself. Give their number.")
    if on_gpu and int(devices) > (gpus_per_job or gpus):
        raise UserError(
            f"The job asks for trainer.devices={devices}, and may have {gpus_per_job or gpus} GPUs here. "
            "Lower trainer.devices, or raise launcher.gpus_per_job."
        )
    return int(devices), on_gpu


@dataclass(frozen=True)
class Run:
    """A run folder that a sweep finds: what job it is of, by its hashes, and how it stands."""

    folder: Path
    key: str
    identity: str
    finished: bool


def place(jobs: Sequence[Job], sweep: Path) -> None:
    """Give every job its folder: the one that holds its run, or the next free number.

    A run is a job's by the hash of its whole config, or else by its identity, and is given away once: a sweep over
    trainer.devices has a run for each of its values. A job whose run has finished gets the status `skipped`; a second
    job of the same config gets `refused`.

    Args:
        jobs: of the sweep; changed in place.
        sweep: the folder of the sweep.
    """
    seen: dict[str, int] = {}
    for number, job in enumerate(jobs):
        if job.status != "refused" and seen.setdefault(job.key, number) != number:
            job.status, job.error = "refused", f"Job {seen[job.key]} has the same config. Name every value once."
    runs, placed = runs_of(sweep), [job for job in jobs if job.status != "refused"]
    for name in ("key", "identity"):
        for job in placed:
            mine = [run for run in runs if getattr(job, name) and getattr(run, name) == getattr(job, name)]
            if job.folder is None and mine:
                run = max(mine, key=lambda run: run.finished)
                runs.remove(run)
                job.folder, job.status = run.folder, "skipped" if run.finished else job.status
    given = {job.folder for job in placed}
    free = (folder for k in range(10**6) if (folder := sweep / str(k)) not in given and not _is_taken(folder))
    for job in placed:
        if job.folder is None:
            job.folder = next(free)


def runs_of(sweep: Path) -> list[Run]:
    """The runs in a sweep's folder.

    What a run's result.json does not say, since it was damaged or never written, the sweep's summary.json may know.
    """
    summary = read_or_set_aside(sweep / SUMMARY).get("jobs", [])
    noted = {job["folder"]: job for job in summary if job["folder"] is not None and (sweep / job["folder"]).is_dir()}
    found = {path.parent.name: read_or_set_aside(path) for path in sorted(sweep.glob("*/result.json"))}
    found = {name: result for name, result in found.items() if "config_hash" in result}
    return [
        Run(
            sweep / name,
            facts.get("config_hash", ""),
            facts.get("job_identity", ""),
            name in found and facts.get("status") == "finished",
        )
        for name, facts in (noted | found).items()
    ]


def _is_taken(folder: Path) -> bool:
    """Whether a run has left something in the folder that another job's run would take for its own."""
    return any((folder / name).exists() for name in ("result.json", "result.json.damaged", "checkpoints"))


def of_the_job(overrides: Sequence[str]) -> list[str]:
    """Those of Hydra's own overrides that a job needs too; the others concern the sweep."""
    return [override for override in overrides if not override.lstrip("+~").startswith(OF_THE_SWEEP)]
