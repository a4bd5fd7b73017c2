"""Files that a training can do without: where the disk refuses them, it goes on."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

_said: set[str] = set()  # a full disk refuses every line of a log


@contextmanager
def spared(what: str) -> Iterator[None]:
    """Let the file system refuse what is written inside of the block, with one warning for all times.

    Args:
        what: is written, as the warning names it: "metrics.csv".
    """
    try:
        yield
    except OSError as error:
        if what not in _said:
            _said.add(what)
            log.warning("%s cannot be written (%s); the training goes on", what, error.strerror or error)


class LogFile(logging.FileHandler):
    """A log file whose disk may be full: logging's own prints a traceback for every line that it cannot write."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif self.baseFilename not in _said:
            _said.add(self.baseFilename)
            sys.stderr.write(f"{self.baseFilename} cannot be written ({error.strerror}); the screen has all lines\n")
