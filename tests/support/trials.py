"""Trainings in processes of their own, forked from the tests so that the imports are paid for once."""

import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ditune.cli import reported
from ditune.commands.train import train
from ditune.training.module import GenerativeModule
from helpers import compose


class Trial:
    """One rank of a training.

    Args:
        folder: of the run.
        overrides: of train.py.
        inject: called in the new process before the training, to plant a fault.
        env: environment of the process.
    """

    def __init__(
        self, folder: Path, overrides: list[str], inject: Callable[[], None] = bool, env: dict[str, str] | None = None
    ):
        self.folder, self.code = folder, None
        rank = (env or {}).get("RANK", "0")
        self.log = folder.with_name(f"{folder.name}_{rank}_{time.monotonic_ns()}.log")
        self.pid = os.fork()
        if self.pid == 0:
            self._run(overrides, inject, env or {})

    def _run(self, overrides: list[str], inject: Callable[[], None], env: dict[str, str]) -> None:
        code = 1
        try:
            os.setsid()
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
            logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s", force=True)
            os.environ.update(env)
            torch.set_num_threads(1)
            inject()
            reported(lambda: train(compose(self.folder, *overrides)), traceback=False)
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:  # noqa: BLE001 - it says so, as a process does
            traceback.print_exc()
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()  # as a process does that ends by itself
            os._exit(code)

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = 60.0) -> int:
        """Exit code (-k: ended by signal k); fails if the process is still there after so many seconds."""
        deadline = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                self.end()
                raise AssertionError(f"still there after {seconds} s:\n{self.output}")
            else:
                time.sleep(0.02)
        return self.code

    def end(self) -> None:
        """Kill it if it is still there."""
        if self.code is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def pair(folder: Path, overrides: list[str], inject: Callable[[], None] = bool, trainer: str = "ddp") -> list[Trial]:
    """Two ranks with the environment of torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    common |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": f"trial-{port}"}
    two = [f"trainer={trainer}", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"]
    return [
        Trial(folder, [*overrides, *two], inject, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in (0, 1)
    ]


def finished(trials: list[Trial], seconds: float = 60.0) -> list[int]:
    """Exit codes; none is left behind when one does not end in time."""
    try:
        return [trial.wait(seconds) for trial in trials]
    finally:
        for trial in trials:
            trial.end()


def wait_for(path: Path, trials: list[Trial], seconds: float = 60.0) -> None:
    """Wait until a process has written the file."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        ended = any(os.waitid(os.P_PID, t.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for t in trials)
        if ended or time.monotonic() > deadline:
            for trial in trials:
                trial.end()
            raise AssertionError(f"{path.name} never came:\n" + "\n".join(trial.output for trial in trials))
        time.sleep(0.02)


def poison(monkeypatch: pytest.MonkeyPatch, *positions: int) -> None:
    """The images at these positions are NaN once they are latents."""
    original, micro_step = GenerativeModule.latents, GenerativeModule.micro_step

    def remember(module: GenerativeModule, batch: tuple) -> tuple:
        module.at = batch[2]
        return micro_step(module, batch)

    def latents(module: GenerativeModule, *arguments: object) -> torch.Tensor:
        x = original(module, *arguments)
        bad = torch.isin(module.at, torch.tensor(positions))
        return torch.where(bad[:, None, None, None], torch.nan, x)

    monkeypatch.setattr(GenerativeModule, "micro_step", remember)
    monkeypatch.setattr(GenerativeModule, "latents", latents)
