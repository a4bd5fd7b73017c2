"""Commands and functions in processes of their own, forked from the tests so that the imports are paid for once."""

import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from helpers import ROOT


class Forked:
    """A process that calls a function and ends as if that were its program.

    Args:
        work: called in the new process, in which torch computes in one thread.
        out: file for what it prints.
        err: file for its errors and its log; None = `out`.
        env: its whole environment; None = that of the tests.
    """

    def __init__(
        self, work: Callable[[], object], out: Path, err: Path | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        self.out, self.err, self.code = out, err or out, None
        self.pid = os.fork()
        if self.pid == 0:
            self._run(work, env)

    def _run(self, work: Callable[[], object], env: Mapping[str, str] | None) -> None:
        code = 1
        try:
            os.setsid()
            for number, path in ((1, self.out), (2, self.err)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
            logging.root.handlers.clear()  # those of pytest
            if env is not None:
                os.environ.clear()
                os.environ.update(env)
            torch.set_num_threads(1)  # threads are not forked
            work()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:  # noqa: BLE001 - it says so, as a process does
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def wait(self, seconds: float = 400.0) -> int:
        """Exit code (-k: ended by signal k); a process that is still there after so many seconds is killed."""
        deadline = time.monotonic() + seconds
        while self.code is None:
            pid, status, self.usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"still there after {seconds} s:\n{self.err.read_text()}")
            else:
                time.sleep(0.02)
        return self.code


def script(path: str, *arguments: str, cwd: Path = ROOT) -> Callable[[], object]:
    """`python <path> <arguments>` as a function: it replaces the program of the process that calls it.

    Args:
        path: of the file, from the repository's folder.
        cwd: the folder in which it runs.
    """

    def work() -> None:
        os.chdir(cwd)
        sys.argv = [str(ROOT / path), *arguments]
        runpy.run_path(sys.argv[0], run_name="__main__")

    return work


def run(
    folder: Path, path: str, *arguments: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """The ended command, as subprocess.run gives it.

    Args:
        folder: for what it writes.
        path: of the file, from the repository's folder.
        cwd: the folder in which it runs.
        env: its whole environment; None = that of the tests.
    """
    out, err = (folder / f".{time.monotonic_ns()}.{name}" for name in ("out", "err"))
    code = Forked(script(path, *arguments, cwd=cwd), out, err, env).wait()
    texts = out.read_text(), err.read_text()
    out.unlink()
    err.unlink()
    return subprocess.CompletedProcess([path, *arguments], code, *texts)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def ranks(work: Callable[[int], object], folder: Path, count: int = 2) -> list[str]:
    """Call `work(rank)` in so many processes with the environment of torchrun; what each of them has written.

    Args:
        folder: for that.
    """
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(count)}
    processes: Sequence[Forked] = [
        Forked(
            lambda k=k: work(k),
            folder / f"rank_{k}.log",
            env=os.environ | group | {"RANK": str(k), "LOCAL_RANK": str(k)},
        )
        for k in range(count)
    ]
    codes = [process.wait() for process in processes]
    texts = [process.out.read_text() for process in processes]
    assert codes == [0] * count, "\n".join(texts)[-3000:]
    return texts
