"""Running the jobs of a sweep side by side on the devices of this machine."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.table import Table

from ditune.config.grammar import hydra_value
from ditune.files.atomic import read_or_set_aside, write_json
from ditune.files.locks import alone
from ditune.launch.jobs import SUMMARY, Job
from ditune.launch.run_folder import LOCK, SWEEP
from ditune.launch.trees import STOPPED_GRACE, Tree
from ditune.progress import console

log = logging.getLogger(__name__)

PRICE = "price.json"  # in the folder of a job that has been planned, see ditune.training.price
POLL = 0.2  # seconds between two looks at the processes


def visible_gpus() -> list[str]:
    """Identifiers of the GPUs that this process may use."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return []
    return [str(k) for k in range(len(listed.splitlines()))]


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Sweep:
    """Starts jobs as devices become free; a job that fails or dies does not affect the others.

    Args:
        folder: of the sweep; gets summary.json.
        script: that every job runs.
        gpus: identifiers of the GPUs to share.
        gpus_per_job: GPUs of each job; None = one for each of its processes.
        slots: processes side by side of jobs without GPUs; None = one for each core.
    """

    def __init__(
        self, folder: Path, script: Path, gpus: list[str], gpus_per_job: int | None = None, slots: int | None = None
    ) -> None:
        self.folder, self.script, self.gpus_per_job = folder, script, gpus_per_job
        self.free_gpus, self.slots = list(gpus), slots or cores()
        self.free_slots = self.slots
        self.running: dict[int, tuple[Tree, Job, list[str], int]] = {}  # by the job's number

    def run(self, jobs: Sequence[Job]) -> None:
        """Run all jobs that are not skipped or refused; afterwards, the status of each says how it ended.

        Args:
            jobs: with their folders; changed in place.

        Raises:
            UserError: another sweep runs in the folder.
            Stopped: by Ctrl-C or SIGTERM; the jobs have saved checkpoints, and the same command resumes them.
        """
        with alone(self.folder / LOCK, *SWEEP), terminable():
            try:
                while any(job.status == "waiting" for job in jobs) or self.running:
                    self._start(jobs)
                    if self._collect():
                        write_summary(self.folder, jobs)
                    time.sleep(POLL)
            finally:
                self._stop()
                write_summary(self.folder, jobs)

    def _start(self, jobs: Sequence[Job]) -> None:
        waiting = [(number, job) for number, job in enumerate(jobs) if job.status == "waiting"]
        for number, job in waiting:
            count = (self.gpus_per_job or job.processes) if job.on_gpu else 0
            # a job with more processes than there are slots takes all of them
            slots = 0 if job.on_gpu else min(job.processes, self.slots)
            if count > len(self.free_gpus) or slots > self.free_slots:
                continue
            devices, self.free_gpus = self.free_gpus[:count], self.free_gpus[count:]
            self.free_slots -= slots
            threads = None if job.on_gpu else max(1, cores() // self.slots)
            command = [
                sys.executable,
                str(self.script),
                *job.overrides,
                f"run_dir={hydra_value(job.folder)}",
                "resume=auto",
            ]
            log.info("job %d begins in %s", number, job.folder)
            job.status = "running"
            tree = Tree(command, job.processes, job.folder, devices if job.on_gpu else None, threads)
            self.running[number] = tree, job, devices, slots

    def _collect(self) -> bool:
        """Take back the devices of jobs that have ended; whether there was one."""
        before = len(self.running)
        for number, (tree, job, devices, slots) in list(self.running.items()):
            codes = tree.poll()
            if codes is None:
                continue
            del self.running[number]
            self.free_gpus += devices
            self.free_slots += slots
            self._end(tree, job, codes)
            log.info("job %d: %s%s", number, job.status, f" ({job.error})" if job.error else "")
        return len(self.running) < before

    def _stop(self) -> None:
        """Stop the running jobs; a second signal leaves no time for checkpoints."""
        for tree, *_ in self.running.values():
            tree.poll()  # who has failed by itself shows before the others are asked
            tree.terminate()
        grace = STOPPED_GRACE
        for tree, job, *_ in self.running.values():
            try:
                codes = tree.stop(grace)
            except KeyboardInterrupt:
                grace = 0.0
                codes = tree.stop(grace)
            self._end(tree, job, codes)

    def _end(self, tree: Tree, job: Job, codes: list[int]) -> None:
        """Set a job's status by its exit codes and its result.json, and write the status into the latter."""
        job.exit_codes, job.seconds = codes, round(time.monotonic() - tree.started, 1)
        path = job.folder / "result.json"
        result = read_or_set_aside(path)
        said = result.get("status")
        if not any(codes) and (said == "finished" or job.dry_run):
            job.status = "planned" if job.dry_run else "finished"
            if job.dry_run:
                job.price = read_or_set_aside(job.folder / PRICE)
            return
        if tree.stopping and not tree.failed_first:
            job.status, job.error = "stopped", "stopped with the sweep; the same command goes on with it"
        elif said == "stopped" and max(codes) > 128:  # by this start, not by an earlier one
            job.status, job.error = "stopped", "stopped by a signal; the same command goes on with it"
        else:
            causes = tree.causes()
            killed = causes and all(codes[rank] < 0 for rank in causes)
            job.status = "killed" if killed else "failed"
            job.error = "; ".join(f"rank {rank}: {cause}" for rank, cause in causes.items()) or "it left no result"
        if said is not None:  # rank 0 knows only that another rank was gone
            write_json(path, result | {"status": job.status, "error": job.error})


def write_summary(folder: Path, jobs: Sequence[Job]) -> None:
    """Write summary.json of a sweep: status, overrides, folder, exit codes, seconds and error of every job."""
    content = [
        {
            "status": job.status,
            "method": job.method,
            "data": job.data,
            "overrides": job.overrides,
            "folder": None if job.folder is None else job.folder.name,
            "config_hash": job.key,
            "job_identity": job.identity,
            "exit_codes": job.exit_codes,
            "seconds": job.seconds,
            "error": job.error,
        }
        for job in jobs
    ]
    write_json(folder / SUMMARY, {"jobs": content})


def show_summary(jobs: Sequence[Job]) -> None:
    """Print a table of the jobs, with only those overrides that differ between them."""
    common = set.intersection(*(set(job.overrides) for job in jobs)) if jobs else set()
    done = "are planned" if any(job.dry_run for job in jobs) else "have a result"
    table = Table(title=f"{sum(job.succeeded for job in jobs)} of {len(jobs)} jobs {done}")
    for name in ("job", "folder", "status", "seconds", "error"):
        table.add_column(name, overflow="fold")
    for job in jobs:
        own = " ".join(override for override in job.overrides if override not in common)
        folder = "" if job.folder is None else job.folder.name
        table.add_row(own, folder, job.status, f"{job.seconds:.0f}", job.error[:500])
    console().print(table)
    if any(job.dry_run for job in jobs):
        console().print(total_price(jobs))


def total_price(jobs: Sequence[Job]) -> str:
    """What the planned jobs of a sweep are expected to take together; finished ones are not among them."""
    planned = [job.price for job in jobs if job.status == "planned"]
    known = [found for found in planned if found.get("seconds")]
    hours = sum(sum(found["seconds"].values()) / 3600 * found["devices"] for found in known)
    money = [found["money"] for found in known if found.get("money") is not None]
    text = f"{len(known)} of {len(planned)} missing jobs have a price: {hours:.2f} device-hours"
    return text + (f" = {sum(money):.2f}" if money else "")


class Stopped(KeyboardInterrupt):
    """A signal ends the sweep; its number is the argument."""


@contextmanager
def terminable() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise Stopped inside."""

    def interrupt(number: int, frame: object) -> None:
        raise Stopped(number)

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
