"""What a training leaves behind: result.json, which is right at every moment, and the trained weights."""

import json
import logging
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import pytorch_lightning as pl
import torch

import ditune
from ditune.checkpoints import save_adapter, save_network
from ditune.errors import UserError
from ditune.files.atomic import read_json, set_aside, write_json
from ditune.metrics.names import headline
from ditune.progress import is_first_rank
from ditune.stopping import Stopped
from ditune.training.callbacks import StopOnSignal
from ditune.training.components import Components
from ditune.training.plan import counts
from ditune.training.ranks import cause_of, is_consequence

log = logging.getLogger(__name__)


class RunRecord:
    """result.json of a run: its status is running, then trained, and at last finished, stopped or failed.

    Args:
        folder: of the run.
        facts: what is known before the first step.
        seconds: of training that earlier starts of the run took.
        stop: tells whether a signal has ended the training.
        trainer: of the training.
        writes: whether this process speaks for all.
        at_end: called with the values and the exit code that stands for them, when the block ends.
    """

    def __init__(
        self,
        folder: Path,
        facts: dict[str, Any],
        seconds: float,
        stop: StopOnSignal,
        trainer: pl.Trainer,
        writes: bool,
        at_end: Callable[[dict[str, Any], int], None],
    ) -> None:
        self.path, self.stop, self.trainer = folder / "result.json", stop, trainer
        self.writes, self.at_end = writes, at_end
        self.values: dict[str, Any] = {"status": "running", **facts, "seconds": {"fit": seconds}}
        self._earlier = seconds

    def __enter__(self) -> "RunRecord":
        self._start = time.perf_counter()
        self.stop.signals.last_words = self.cut_short
        self.write()
        return self

    @property
    def status(self) -> str:
        return self.values["status"]

    @property
    def fit_seconds(self) -> float:
        """Of training, over all starts of the run."""
        return self._earlier + time.perf_counter() - self._start

    def trained(self, trainer: pl.Trainer, first_step: int, batch_size: int, step_seconds: float) -> None:
        """The steps have ended: all of them, or up to a signal or the end of patience.

        Args:
            trainer: after its fit.
            first_step: that this start began with.
            batch_size: global.
            step_seconds: that this start spent in steps.
        """
        steps = trainer.global_step - first_step
        self.values |= {
            "status": "stopped" if trainer.global_step < trainer.max_steps else "trained",
            "steps": trainer.global_step,
            "micro_batch": batch_size // (trainer.accumulate_grad_batches * trainer.world_size),
            "seconds": {"fit": self.fit_seconds},
            "seconds_per_step": step_seconds / steps if steps else None,
            "images_per_second": steps * batch_size / step_seconds if steps else None,
        }

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Note how the run ended; a signal is no error, and an error of another process is named as such."""
        handled = isinstance(error, Stopped) or (self.stop.stopped_by is not None and is_consequence(error))
        cause = None if handled or error is None else cause_of(error, self.trainer, self.path.parent)
        if handled:
            self._stopped()
        elif error is not None:
            if self.status == "running":
                self.values["seconds"] = {"fit": self.fit_seconds}
            text = "interrupted" if isinstance(error, KeyboardInterrupt) else str(cause or error)
            self.values |= {"status": "failed", "error": text}
        self.write(best_effort=error is not None)
        self.at_end(self.values, 1 if self.status == "failed" else self.exit_code)
        if cause is not None:
            raise cause from error
        return handled

    def _stopped(self) -> None:
        if self.status == "trained":
            log.warning("stopped during the evaluation; the trained weights are saved, resume=auto evaluates them")
        else:
            log.warning("stopped before the next step; resume=auto in the same run folder goes on")
            self.values |= {"seconds": {"fit": self.fit_seconds}, "steps": self.trainer.global_step}
        self.values["status"] = "stopped"

    def cut_short(self, reason: str) -> None:
        """The process is ended now, from another thread."""
        if self.stop.stopped_by is None:
            self.values |= {"status": "failed", "error": reason}
        elif self.status in ("running", "trained"):
            self.values |= {"status": "stopped", "error": reason}
        self.write(best_effort=True)

    @property
    def exit_code(self) -> int:
        """128 + the signal's number for a run that a signal has stopped, else 0; the same for all processes."""
        return 128 + self.stop.stopped_by if self.status == "stopped" and self.stop.stopped_by is not None else 0

    def write(self, best_effort: bool = False) -> None:
        """Bring result.json up to date, if this process speaks for all.

        Args:
            best_effort: whatever ended the run is more important than a file that cannot be written.
        """
        if not self.writes:
            return
        try:
            write_json(self.path, self.values)
        except OSError as error:
            if not best_effort:
                raise
            if not overwrite(self.path, self.values):
                log.warning("%s cannot be written (%s): it does not say how the run ended", self.path, error.strerror)


def overwrite(path: Path, content: dict[str, Any]) -> bool:
    """Write a JSON file where its old content stands, which a full disk has room for; whether that was possible."""
    data = json.dumps(content, indent=2).encode()
    try:
        with path.open("r+b") as file:
            if len(data) > os.fstat(file.fileno()).st_blocks * 512:
                return False
            file.write(data)
            file.truncate()
    except OSError:
        return False
    return True


def read_result(folder: Path) -> dict[str, Any]:
    """What result.json says of the run so far; a damaged one is set aside, for the checkpoints hold what matters."""
    path = folder / "result.json"
    if not path.is_file():
        return {}
    try:
        result = read_json(path)
    except UserError as error:
        if is_first_rank():
            set_aside(path, str(error.__cause__ or "it holds no JSON object"))
        return {}
    seconds = result.get("seconds")
    valid = isinstance(seconds, dict) and isinstance(seconds.get("fit", 0.0), int | float)
    return result if valid else result | {"seconds": {}}


def has_finished(folder: Path, key: str, identity: str) -> bool:
    """Whether the folder holds the result of a finished run of this job; see `ditune.config.roles` for its hashes."""
    result = read_result(folder)
    known = result.get("config_hash") == key or result.get("job_identity") == identity
    return known and result.get("status") == "finished"


def describe(components: Components, key: str, identity: str) -> dict[str, Any]:
    """What is known of a run before its first step; `key` and `identity` are its hashes of `ditune.config.roles`."""
    trainable, total = counts(components.network)
    settings, base, images = components.settings, components.base, components.images
    return {
        "name": settings.name,
        "config_hash": key,
        "job_identity": identity,
        "method": components.method.title,
        "peft": components.method.arguments,
        "parameters": {"trainable": trainable, "total": total, "share": trainable / total},
        "batch_size": settings.batch_size,
        "max_steps": settings.max_steps,
        "lr": settings.lr,
        "precision": settings.precision,
        **({"frozen_weights": settings.frozen_weights} if settings.frozen_weights else {}),
        "seed": settings.seed,
        "data": {"name": settings.data_name, "fingerprint": images.fingerprint, "n": len(images)},
        "base": None if base is None else {"file": base.path.name, "sha256": base.sha256},
        "versions": {
            "ditune": ditune.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pytorch_lightning": pl.__version__,
        },
        "threads": torch.get_num_threads(),
    }


def save_trained(components: Components, folder: Path, steps: int) -> None:
    """Write adapter/ of an adapted network, or network.safetensors of one from scratch.

    Args:
        components: of the run; its network has the weights to save.
        folder: of the run.
        steps: that were trained.
    """
    autoencoder, base = components.autoencoder, components.base
    common = {
        "class_names": components.images.class_names,
        "autoencoder": autoencoder.latent_fingerprint,
        "autoencoder_name": autoencoder.name,
        "data": components.images.fingerprint,
        "resolution": components.settings.resolution,
        "steps": steps,
    }
    if components.objective.part is not None:
        common["part"] = list(components.objective.part)
    sparsity = sparsity_of(components)
    if sparsity is not None:
        common["sparsity"] = sparsity
    process = components.objective.process.config
    if base is None:
        save_network(folder / "network.safetensors", components.network, process, **common)
        return
    origin = {
        "file": base.path.name,
        "sha256": base.sha256,
        "network": base.config,
        "classes": components.settings.classes,
    }
    save_adapter(components.network, folder / "adapter", base=origin, process=process, **common)


def sparsity_of(components: Components) -> dict[str, Any] | None:
    """What the saved file says of its zeros: those that were trained, or the base's; None = there are none."""
    if components.sparsity is not None:
        return components.sparsity.facts(components.method.trainable(components.network))
    header = None if components.base is None else components.base.header
    return None if header is None else header["provenance"].get("sparsity")


def summarise(result: dict[str, Any], folder: Path) -> None:
    """The outcome in the log's last lines."""
    before, after = (result["metrics"].get(which, {}) for which in ("before", "after"))
    for name, values in (
        ("loss on held-out images", result["denoising"]),
        *((key, {"before": before.get(key), "after": value}) for key, value in after.items() if headline(key)),
    ):
        known = [f"{values[which]:.4f} {which}" for which in ("before", "after") if values.get(which) is not None]
        if known:
            log.info("%s: %s", name, ", ".join(known))
    log.info("everything of this run is in %s", folder)
