"""How far the jobs of a sweep have come: by result.json, by summary.json, and by the locks that processes hold."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditune.files.atomic import read_json
from ditune.files.locks import attempt

LOCK = ".lock"  # of a run folder and of a sweep folder, held while a process is at work there
SUMMARY = "summary.json"  # of a sweep
LONGEST = 300  # characters of a reason


@dataclass(frozen=True)
class Job:
    """A job of a sweep that has left no result.json of a training.

    Args:
        folder: its run folder; None = it never got one.
        method: name of its PEFT method; None = unknown.
        data: name of its dataset; None = unknown.
        overrides: of its command line.
        status: waiting, running, failed, killed, stopped, refused or planned.
        reason: why it has no result.
    """

    folder: Path | None
    method: str | None
    data: str | None
    overrides: str
    status: str
    reason: str


def status_of(folder: Path, result: dict[str, Any]) -> tuple[str, str]:
    """Status of a run and the reason for it.

    Args:
        folder: the run folder.
        result: content of its result.json.

    Returns:
        (status, reason). A run that calls itself running while no process holds its folder is killed.
    """
    status, steps, all_steps = result.get("status", "running"), result.get("steps"), result.get("max_steps")
    if status in ("running", "trained"):
        if not at_work(folder):
            return "killed", "no process is at work in its folder; the same command with its run_dir= goes on with it"
        return "running", "the training is done, the evaluation is not" if status == "trained" else ""
    reason = result.get("error") or ""
    if status == "stopped" and not reason:
        reason = "" if steps is None else f"after step {steps:,} of {all_steps:,}; resume=auto goes on with it"
    return status, short(reason)


def jobs_without_result(folder: Path, known: Iterable[Path]) -> list[Job]:
    """The jobs that only summary.json of their sweep tells of.

    Args:
        folder: a sweep, or several below it.
        known: folders of the runs that have a result.json.
    """
    known, found = set(known), []
    for path in sorted(folder.rglob(SUMMARY)):
        for entry in read_json(path).get("jobs", []):
            place = None if entry["folder"] is None else path.parent / entry["folder"]
            if place not in known:
                found.append(_job(entry, place, path.parent))
    return found


def at_work(folder: Path) -> bool:
    """Whether a process holds the folder's lock; taken for granted where the lock is missing or somebody else's."""
    lock = folder / LOCK
    if not lock.is_file():
        return True
    try:
        with attempt(lock) as free:
            return not free
    except PermissionError:
        return True


def short(reason: str) -> str:
    """The first line of a reason, cut to what fits into a table."""
    line = next(iter(str(reason).strip().splitlines()), "")
    return line if len(line) <= LONGEST else line[:LONGEST] + "..."


def _job(entry: dict[str, Any], place: Path | None, sweep: Path) -> Job:
    status, reason = entry["status"], short(entry["error"])
    if status in ("running", "waiting") and not at_work(sweep):
        reason = "its sweep is not running; the same command goes on with it"
        status = "killed" if status == "running" else status
    overrides = " ".join(text for text in entry["overrides"] if not text.startswith("hydra."))
    return Job(place, entry.get("method"), entry.get("data"), overrides, status, reason)
