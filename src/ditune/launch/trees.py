"""The process tree of a job: the ranks of a training, started and ended together as by torchrun."""

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

from ditune.errors import CONSEQUENCE
from ditune.stopping import end_with_parent

SETTLE = 2.0  # seconds in which the other ranks may fail by themselves after one has failed
FAILED_GRACE = 10.0  # seconds that they have to end after that, once they are asked to
STOPPED_GRACE = 120.0  # seconds for a last checkpoint when the sweep is stopped
# of torchrun, Lightning and Slurm: a job must not believe that it is a rank of the program that started the sweep
FOREIGN = ("MASTER_", "RANK", "LOCAL_", "GROUP_", "NODE_RANK", "WORLD_SIZE", "ROLE_", "TORCHELASTIC_", "SLURM_")
# what Hydra writes around an error, and torch before each line of one
NOISE = re.compile(
    r"\s*(Set the environment variable HYDRA_FULL_ERROR|See https?://|Error executing job with overrides)"
)
RANK_PREFIX = re.compile(r"^\[rank\d+\]:\s?")
ERROR = re.compile(r"[\w.]*(Error|Exception|Interrupt|Exit|Expired|Timeout)(: |$)")


class Tree:
    """The running ranks of one job.

    Args:
        command: of every rank; later ranks get arguments so that they write no second log and no second .hydra.
        processes: ranks.
        folder: gets output.log of rank 0 and output_rank_<r>.log of the others.
        devices: identifiers of the GPUs for CUDA_VISIBLE_DEVICES; None = the job runs on the CPU.
        threads: of each rank's linear algebra; None = as the environment has it.
    """

    def __init__(
        self,
        command: Sequence[str],
        processes: int,
        folder: Path,
        devices: Sequence[str] | None = None,
        threads: int | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        env = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)}
        if devices is not None:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        if threads is not None:
            env.setdefault("OMP_NUM_THREADS", str(threads))
        if processes > 1:
            env |= _rendezvous(processes)
        self.folder, self.started, self._deadline = folder, time.monotonic(), float("inf")
        self.ranks: list[subprocess.Popen] = []
        self.failed_first: list[int] = []  # ranks that failed before any was asked to stop
        self.stopping = False  # whether it was asked to stop
        self._asked = False  # whether any rank was sent a signal
        try:
            for rank in range(processes):
                self.ranks.append(self._start(command, rank, env if processes == 1 else env | _of_rank(rank)))
        except BaseException:
            self.stop(0)
            raise

    def _start(self, command: Sequence[str], rank: int, env: dict[str, str]) -> subprocess.Popen:
        quiet = ["hydra.output_subdir=null", f"hydra.job.name=rank_{rank}"] if rank else []
        with ExitStack() as stack:
            output = stack.enter_context(self.log(rank).open("wb"))
            return subprocess.Popen(
                [*command, *quiet],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # its workers can be ended with it, and Ctrl-C reaches only the sweep
                preexec_fn=end_with_parent,
            )

    def log(self, rank: int) -> Path:
        """File with the output of a rank."""
        return self.folder / (f"output_rank_{rank}.log" if rank else "output.log")

    def poll(self) -> list[int] | None:
        """Exit codes of all ranks once all have ended (-k: by signal k), else None. A failure ends the others."""
        codes = [process.poll() for process in self.ranks]
        if not self._asked:
            self.failed_first = [rank for rank, code in enumerate(codes) if code]
        if None not in codes:
            self._sweep_up()
            return codes
        if any(codes):  # neither None nor 0
            if self._deadline == float("inf"):
                self._deadline = time.monotonic() + SETTLE
            elif time.monotonic() > self._deadline:
                self._signal(signal.SIGKILL if self._asked else signal.SIGTERM)
                self._asked, self._deadline = True, time.monotonic() + FAILED_GRACE
        return None

    def stop(self, grace: float = STOPPED_GRACE) -> list[int]:
        """Ask all ranks to save and stop.

        Args:
            grace: seconds until they are killed.

        Returns:
            Their exit codes.
        """
        self.terminate()
        self._deadline = time.monotonic() + grace
        while (codes := [process.poll() for process in self.ranks]).count(None):
            if time.monotonic() > self._deadline:
                self._signal(signal.SIGKILL)
            time.sleep(0.05)
        self._sweep_up()
        return codes

    def terminate(self) -> None:
        """Ask all ranks to save and stop, without waiting for them."""
        self.stopping = self._asked = True
        self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> None:
        for process in self.ranks:
            if process.poll() is None:
                process.send_signal(number)

    def _sweep_up(self) -> None:
        """Kill the processes that a rank has started and left behind."""
        for process in self.ranks:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue  # nothing is left

    def causes(self) -> dict[int, str]:
        """Why the ranks failed that failed first, without those that only lost the connection to another one."""
        reasons = {rank: self._reason(rank) for rank in self.failed_first}
        return {rank: text for rank, text in reasons.items() if not CONSEQUENCE.search(text)} or reasons

    def _reason(self, rank: int) -> str:
        """Why a rank failed: the signal that ended it, its last error message, or the last line of its output."""
        code = self.ranks[rank].returncode
        if code < 0:
            return f"ended by {signal.Signals(-code).name}"
        return last_error(self.log(rank).read_text(encoding="utf-8", errors="replace"))


def last_error(output: str) -> str:
    """The last error message in the output of a process; its last line if there is none."""
    lines = [RANK_PREFIX.sub("", line).rstrip() for line in output.splitlines()]
    lines = [line for line in lines if line.strip() and not NOISE.match(line)]
    if errors := [line.strip() for line in lines if ERROR.match(line.strip())]:
        return errors[-1]
    # of a type whose name does not say that it is an error: the line below the last frame of its traceback
    below = [line for frame, line in pairwise(lines) if frame.startswith("  ") and not line.startswith(" ")]
    if "Traceback (most recent" in output and below:
        return below[-1]
    if not lines:
        return "it wrote nothing"
    # Hydra refuses a command line before anything else is written, and its first line says why
    return lines[0 if "HYDRA_FULL_ERROR" in output else -1].strip()


def _rendezvous(processes: int) -> dict[str, str]:
    """The environment that torchrun gives to all ranks of one machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": f"ditune-{port}",
    }


def _of_rank(rank: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)}
