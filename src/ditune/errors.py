"""Mistakes that a user can mend."""

import errno
import re
import shutil
import sys
from pathlib import Path
from typing import NoReturn

USER_ERROR = 2  # exit code
PLACES = "run_dir=, out= or one of paths.*="  # keys that say where files go

# what stops a file from being written, whoever wrote the program
CAUSES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than the system allows",
    errno.EIO: "the disk reports an error",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "a file stands where a folder should be",
    errno.EISDIR: "a folder stands where a file should be",
    errno.ENAMETOOLONG: "its name is longer than the file system allows",
}
FULL = (errno.ENOSPC, errno.EDQUOT)
# what a rank says when another one is gone or silent
CONSEQUENCE = re.compile(
    r"gloo/transport|Connection (closed|reset) by peer|Connection was likely closed|Broken pipe|ncclRemoteError"
    r"|remote process|Timed out (waiting|after)|[Ww]atchdog caught"
    r"|Error: rank \d+: |a rank is gone or silent"  # our own words for it
)


class UserError(Exception):
    """Says in one sentence what is wrong and in the next how to mend it; shown without a traceback.

    Args:
        text: the sentences. A worker process sends them to the training inside of a traceback, which is cut off.
    """

    def __init__(self, text: object = ""):
        _, sent, inner = str(text).partition(f"\n{__name__}.UserError: ")
        super().__init__(inner.rstrip() if sent else text)


def require(valid: bool, key: str, value: object, remedy: str) -> None:
    """Refuse a value of a config key.

    Args:
        valid: whether the value can be used.
        key: the key as it is written on the command line, such as "objective.share".
        value: what it is set to.
        remedy: what to set instead, as a sentence.

    Raises:
        UserError: the value cannot be used; names key, value and remedy.
    """
    if not valid:
        written = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
        raise UserError(f"{key} is {written}. {remedy}")


def refusal(error: OSError, places: str = PLACES) -> str | None:
    """A refusal of the file system as sentences; None where it says nothing that a user could mend.

    Args:
        error: with the name of the file.
        places: keys that choose another place for it.
    """
    if error.filename is None or error.errno not in CAUSES:
        return None
    room = "Free some space, or choose" if error.errno in FULL else "Choose"
    cause = CAUSES[error.errno] + (f", {free_space(Path(error.filename))}" if error.errno in FULL else "")
    return f"{error.filename} cannot be used: {cause}. {room} another place for it by {places}."


def free_space(path: Path) -> str:
    """How much is free on the disk of a file that may not exist, as "1,234.5 MB are free"."""
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    return f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB are free"


def fail(text: str) -> NoReturn:
    """End the process as for a mistake of the user: the sentence on stderr, exit code 2, no traceback."""
    sys.stderr.write(f"\nError: {text}\n")
    sys.exit(USER_ERROR)
