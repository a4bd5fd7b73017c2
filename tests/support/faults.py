"""Pictures whose loading fails as hardware does; only while FAULTS=1, so that a second try goes through."""

import os
import signal

from ditune.data import Pictures

GOOD_BATCHES = 2  # before the fault


class Faulty(Pictures):
    """Calls `fault` on rank 1 after some batches; a training of one process is spared."""

    batches = 0

    def __getitems__(self, indices):
        self.batches += 1
        if os.environ.get("FAULTS") == "1" and self.batches > GOOD_BATCHES and self.is_struck():
            self.fault()
        return super().__getitems__(indices)

    def is_struck(self) -> bool:
        return os.environ.get("RANK") == "1"


class FailsOnRank1(Faulty):
    def fault(self):
        raise RuntimeError("the disk of rank 1 is gone")


class Killed(Faulty):
    def fault(self):
        os.kill(os.getpid(), signal.SIGKILL)
