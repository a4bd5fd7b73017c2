"""The checkpoint that a run goes on from."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from ditune.errors import UserError
from ditune.progress import is_first_rank
from ditune.training.checkpoint_fit import require_fit
from ditune.training.checkpoint_io import Unusable, checkpoints_in, none_usable, read_checkpoint, unreadable
from ditune.training.components import Processes
from ditune.training.module import GenerativeModule
from ditune.training.result import read_result

log = logging.getLogger(__name__)

AUTO, NEVER = "auto", "never"
SHOWN = 4  # differences that a refusal names


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a run goes on from.

    Args:
        path: of the checkpoint; None = the run is new.
        step: optimizer steps that are done.
        seconds: of training that are behind the run.
        micro_batch: images that one process handled at once; None = the checkpoint does not say.
    """

    path: Path | None
    step: int
    seconds: float
    micro_batch: int | None = None


class OfAnotherRun(Unusable):
    """The settings of a checkpoint are others."""


def find_checkpoint(
    folder: Path, resume: str | None, max_steps: int, module: GenerativeModule, processes: Processes
) -> Resumed:
    """The newest checkpoint of a run folder that the training can go on from.

    Args:
        folder: of the run.
        resume: None = go on with what has not finished, refuse what has; "auto" = evaluate a finished run again too;
            "never" = refuse a folder that holds a run.
        max_steps: of this start.
        module: of the training; its `identity` must be that of the checkpoint.
        processes: among which the training is spread.

    Raises:
        UserError: the folder holds a run that may not, need not or cannot go on.
    """
    result, paths = read_result(folder), checkpoints_in(folder / "checkpoints")
    refuse_over(folder, resume, max_steps, result, bool(paths))
    if not paths:
        return Resumed(None, 0, 0.0)
    reasons: dict[Path, Unusable | str] = {}
    for path in paths:
        reason = unreadable(path)
        try:
            if reason is not None:
                raise Unusable(reason)  # the log has it already
            content = read_checkpoint(path)
            require_identity(content["identity"], module.identity)
            require_fit(content, module)
        except Unusable as error:
            reasons[path] = error
            if reason is None:
                log.warning("The checkpoint %s %s; trying the one before it.", path, error)
            continue
        step = content["global_step"]
        refuse_fewer_steps(folder, step, max_steps)
        refuse_other_spread(content, module, processes)
        say_changed_schedule(content, module)
        if step < max_steps:
            log.info("going on from step %d of %d, %s", step, max_steps, path)
        seconds = result.get("seconds", {}).get("fit", 0.0)
        return Resumed(path, step, seconds, content.get("micro_batch"))
    for reason in reasons.values():
        if isinstance(reason, OfAnotherRun):
            raise UserError(f"The checkpoint {reason}. Resume with the run's own settings, or start a new run folder.")
    raise none_usable(folder / "checkpoints", reasons)


def refuse_over(folder: Path, resume: str | None, max_steps: int, result: dict[str, Any], saved: bool) -> None:
    """Refuse to train over a run; `saved` = it has checkpoints. Other ranks find what the first one has begun."""
    if not is_first_rank() or not (result or saved):
        if resume == AUTO and is_first_rank():
            log.warning("nothing to resume in %s: the run begins at step 0", folder)
        return
    finished, steps = result.get("status") == "finished", result.get("steps")
    if resume == NEVER:
        raise UserError(f"The run folder {folder} holds a run, and resume=never. Choose another run_dir.")
    if not saved and finished:
        raise UserError(
            f"The run folder {folder} holds a finished run, whose checkpoints are gone or were never due. "
            "Choose another run_dir, or delete the folder to run it again."
        )
    if not saved and isinstance(steps, int) and steps > 0:
        raise UserError(
            f"The run in {folder} was at step {steps}, and its checkpoints are gone. "
            "Copy one back into checkpoints/, or choose another run_dir to train from the beginning."
        )
    if not saved:
        log.warning("the run in %s has saved no checkpoint: it begins at step 0", folder)
    if finished and resume is None and isinstance(steps, int) and steps >= max_steps:
        raise UserError(
            f"The run folder {folder} holds a finished run of {steps} steps. Set max_steps=<more> to go on with it, "
            "resume=auto to evaluate it again, or choose another run_dir."
        )


def require_identity(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises OfAnotherRun with the keys that differ and both values."""
    different = list(differences({key: theirs.get(key) for key in ours}, ours))
    if different:
        more = f" and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
        raise OfAnotherRun(f"is of another run: {', '.join(different[:SHOWN])}{more}")


def differences(theirs: Any, ours: Any, key: str = "") -> Iterator[str]:
    """The keys at which two nested values differ, with both."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in dict.fromkeys([*ours, *theirs]):
            yield from differences(theirs.get(name), ours.get(name), f"{key}.{name}" if key else str(name))
    elif theirs != ours:
        yield f"{key} ({_short(theirs)} there, {_short(ours)} now)"


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def refuse_fewer_steps(folder: Path, step: int, max_steps: int) -> None:
    """A training that is further already cannot become shorter."""
    if step > max_steps:
        raise UserError(
            f"In {folder} the run is at step {step} already; max_steps={max_steps} lies before it. "
            f"Set max_steps={step} or more, or start a new run folder."
        )


def refuse_other_spread(content: dict[str, Any], module: GenerativeModule, processes: Processes) -> None:
    """Where the experts' load is taken from micro-batches, their size decides what is learned."""
    micro, world = content.get("micro_batch"), content.get("world_size")
    if module.balance is None or not module.balance.of_micro_batches or None in (micro, world):
        return  # checkpoints of earlier versions do not say it
    theirs = {"size": micro, "steps": module.batch_size // (micro * world)}
    steps = processes.accumulate
    ours = {"size": module.batch_size // (steps * processes.world_size), "steps": steps}
    counted = "steps" if module.balance.scope == "global" else "size"  # a load of all processes does not depend on them
    if theirs[counted] == ours[counted]:
        return
    what = "in {steps} micro-steps" if counted == "steps" else "in micro-batches of {size} images"
    raise UserError(
        f"balance.scope={module.balance.scope} decides by the micro-batches what is learned. The run began "
        f"{what.format(**theirs)}, and would go on {what.format(**ours)}. Set trainer.devices and "
        "trainer.accumulate_grad_batches as it began, or start a new run folder."
    )


def say_changed_schedule(content: dict[str, Any], module: GenerativeModule) -> None:
    """Another max_steps moves a decay, so the steps so far had other learning rates than a new run would have."""
    schedule, saved = module.configure_optimizers()["lr_scheduler"]["scheduler"], content["lr_schedulers"][0]
    if not isinstance(schedule, LambdaLR) or not saved.get("_last_lr"):
        return
    then, step = saved["_last_lr"][0], content["global_step"]
    now = schedule.base_lrs[0] * schedule.lr_lambdas[0](step)
    if abs(then - now) > 1e-6 * max(abs(then), abs(now)):
        log.warning(
            "the schedule has changed with max_steps: the learning rate at step %d was %.3g, and is %.3g from here on",
            *(step, then, now),
        )
