"""Kills trainings at random moments, starts them again until they finish, and compares them with one left alone.

    python benchmarks/kills.py                          # 100 kills of one process
    python benchmarks/kills.py --ranks 2 --kills 20     # both ranks at once
    python benchmarks/kills.py --cli --kills 10         # by the command line, with its imports

SIGKILL strikes every process of the training at a moment that is drawn evenly over the length of an undisturbed one.
The same command follows until it finishes. Then everything that the run leaves is compared with what the undisturbed
one has left, to the bit. Imports are done once and each training is forked, unless --cli is given: then a kill may
strike them too.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("src", "tests/support", "tests/faults")]  # before an installed one

import numpy as np  # noqa: E402 - the paths come first
import torch  # noqa: E402
from comparison import PARTS, logged, saved  # noqa: E402
from PIL import Image  # noqa: E402

from helpers import SMALL, assert_same_bits  # noqa: E402
from trials import Trial, pair  # noqa: E402

STEPS = 24
SETTINGS = [*SMALL, "peft=full", f"max_steps={STEPS}", "callbacks.checkpoint.every_n_steps=4"]
SETTINGS += ["callbacks.samples.every_n_steps=8"]
TWO_RANKS = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"]
PATIENCE = 300.0  # seconds that one start may take
WEIGHTS = ("network.safetensors", "adapter/adapter_model.safetensors")
Start = Callable[[Path], "list[Trial] | list[Command]"]


class Command:
    """A training by the command line; of two ranks, the process that starts the other one.

    Args:
        folder: of the run.
        overrides: of train.py.
    """

    def __init__(self, folder: Path, overrides: list[str]):
        self.code: int | None = None
        with folder.with_name(f"{folder.name}_{time.monotonic_ns()}.log").open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, str(ROOT / "src" / "train.py"), *overrides, f"run_dir={folder}"],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._process.pid


@dataclass
class Tally:
    """What became of the runs.

    Args:
        kills: SIGKILLs that struck a training.
        restarts: starts after a kill.
        runs: trainings that came to their end.
        lost_lines: lines of metrics.csv that the undisturbed run has and a killed one has not.
        temporaries: temporary files that were left in the run folders.
        extra_checkpoints: checkpoints beyond those of the undisturbed run.
        differences: what differs, each with its run.
    """

    kills: int = 0
    restarts: int = 0
    runs: int = 0
    lost_lines: int = 0
    temporaries: int = 0
    extra_checkpoints: int = 0
    differences: list[str] = field(default_factory=list)


def make_images(folder: Path) -> None:
    """Ten training and two test images of three classes, 16 x 16 pixels of noise."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 2)):
        for i in range(count):
            path = folder / split / "abc"[i % 3] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)


def starter(images: Path, ranks: int, cli: bool) -> Start:
    """`start(folder)`: the processes of a training that has been started there."""
    overrides = [*SETTINGS, f"data.root={images}"]
    if cli:
        return lambda folder: [Command(folder, [*overrides, *(TWO_RANKS if ranks == 2 else [])])]
    if ranks == 2:
        return lambda folder: pair(folder, overrides)
    return lambda folder: [Trial(folder, overrides)]


def ended(processes: list[Any], seconds: float) -> bool:
    """Wait so long for the processes; whether all have ended, and then each has its exit code."""
    deadline = time.monotonic() + seconds
    while True:
        for process in processes:
            if process.code is None:
                pid, status = os.waitpid(process.pid, os.WNOHANG)
                process.code = os.waitstatus_to_exitcode(status) if pid else None
        if all(process.code is not None for process in processes):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)


def kill(processes: list[Any]) -> None:
    """SIGKILL to every process of the training, workers and ranks too; returns when they are gone."""
    for process in processes:
        if process.code is None:
            os.killpg(process.pid, signal.SIGKILL)
    ended(processes, PATIENCE)


def differences(struck: Path, whole: Path) -> list[str]:
    """What a killed run leaves otherwise than the undisturbed one: parts of its checkpoint, weights, log, grids."""
    found, (a, b) = [], (saved(folder, STEPS) for folder in (struck, whole))
    for part in ("global_step", *PARTS):
        try:
            assert_same_bits(a[part], b[part])
        except AssertionError:
            found.append(part)
    grids = sorted(path.relative_to(whole).as_posix() for path in (whole / "samples").rglob("*.png"))
    for name in (*WEIGHTS, *grids):
        if _content(struck / name) != _content(whole / name):
            found.append(name)
    return found if logged(struck) == logged(whole) else [*found, "metrics.csv"]


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def strike(start: Start, run: Path, tally: Tally, limit: int, moment: Callable[[], float]) -> bool:
    """Start a training again and again, killed after `moment()` seconds while kills are left; whether it finished."""
    while True:
        processes = start(run)
        seconds = moment() if tally.kills < limit else PATIENCE
        if ended(processes, seconds):
            codes = [process.code for process in processes]
            if any(codes):
                tally.differences.append(f"{run.name}: ended by itself with exit codes {codes}")
            return not any(codes)
        kill(processes)
        if tally.kills == limit:
            tally.differences.append(f"{run.name}: still there after {PATIENCE:.0f} s")
            return False
        tally.kills += 1
        if has_ended(run):
            return True  # it was about to exit; the same command would refuse to train it again
        tally.restarts += 1


def has_ended(run: Path) -> bool:
    """Whether the training has written that it is finished."""
    path = run / "result.json"
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["status"] == "finished"


def count(struck: Path, whole: Path, tally: Tally) -> None:
    """Add what a finished run has lost and left."""
    lines, checkpoints = logged(struck), [len(list((f / "checkpoints").glob("*.ckpt"))) for f in (struck, whole)]
    tally.runs += 1
    tally.lost_lines += sum(line not in lines for line in logged(whole))
    tally.temporaries += len(list(struck.rglob(".*.tmp-*")))
    tally.extra_checkpoints += max(0, checkpoints[0] - checkpoints[1])
    tally.differences += [f"{struck.name}: {name}" for name in differences(struck, whole)]


def soak(folder: Path, start: Start, kills: int, seed: int) -> tuple[Tally, float]:
    """Kill trainings until so many kills are done, and bring the last one to its end.

    Args:
        folder: for the runs; those without a difference are removed.
        start: of a training.
        kills: to be done.
        seed: of the moments.

    Returns:
        The tally, and the seconds of the undisturbed training.
    """
    tally, random_moments, begin, whole = Tally(), random.Random(seed), time.monotonic(), folder / "whole"
    undisturbed = start(whole)
    if not ended(undisturbed, PATIENCE) or any(process.code for process in undisturbed):
        kill(undisturbed)
        logs = [log.read_text(errors="replace")[-3000:] for log in folder.glob("whole_*.log")]
        raise SystemExit("The undisturbed training failed:\n" + "\n".join(logs))
    length = time.monotonic() - begin
    while tally.kills < kills:
        run, before = folder / f"run{tally.runs}", len(tally.differences)
        if strike(start, run, tally, kills, lambda: random_moments.uniform(0, length)):
            count(run, whole, tally)
        else:
            tally.runs += 1
        if len(tally.differences) == before:
            shutil.rmtree(run)
        sys.stderr.write(f"{tally.kills} kills, {tally.runs} runs, {len(tally.differences)} differences\n")
    return tally, length


def table(tally: Tally, ranks: int) -> str:
    """One row of Markdown with its head."""
    names = [item.name.replace("_", " ") for item in fields(tally)]
    values = [len(value) if isinstance(value, list) else value for value in asdict(tally).values()]
    head = f"| ranks | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}\n"
    return f"{head}| {ranks} | {' | '.join(map(str, values))} |\n"


def main() -> int:
    """Soak; 1 if anything differs, was lost or was left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--cli", action="store_true", help="start train.py for every training instead of forking")
    parser.add_argument("--folder", type=Path, help="for runs and logs, which stay; default: one that is removed")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)  # threads are not forked
    with tempfile.TemporaryDirectory() as scratch:
        folder = (given.folder or Path(scratch)).resolve()
        make_images(folder / "images")
        start, begin = starter(folder / "images", given.ranks, given.cli), time.monotonic()
        tally, length = soak(folder, start, given.kills, given.seed)
        seconds = time.monotonic() - begin
    sys.stdout.write(table(tally, given.ranks))
    sys.stdout.write(f"\n{seconds:.0f} s in all; an undisturbed training took {length:.1f} s.\n")
    sys.stdout.writelines(f"- {difference}\n" for difference in tally.differences)
    if given.out is not None:
        figures = asdict(tally) | {"ranks": given.ranks, "seed": given.seed, "cli": given.cli, "seconds": seconds}
        given.out.write_text(json.dumps(figures, indent=2) + "\n")
    return int(bool(tally.differences or tally.lost_lines or tally.temporaries or tally.extra_checkpoints))


if __name__ == "__main__":
    sys.exit(main())
