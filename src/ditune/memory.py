"""How much memory there is, and one sentence for the moment when it is not enough."""

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from ditune.errors import UserError

# what a RuntimeError says that is out of memory: of CUDA, cuBLAS and cuDNN, of torch on the CPU, of C++
SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed", "bad_alloc")
SIGNS += ("unable to allocate",)
UNITS = {"bytes": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
SIZE = r"([\d.]+) (bytes|B|KiB|MiB|GiB|TiB)"
ASKED = re.compile(f"(?:tried to allocate|unable to allocate) {SIZE}", re.IGNORECASE)  # torch; numpy
GPU = re.compile("cuda|cublas|cudnn", re.IGNORECASE)
OF_A_GPU = re.compile(rf"GPU (\d+) has a total capacity of {SIZE} of which {SIZE} is free")
UNLIMITED = 2**60  # cgroups write a number above this for "no limit"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was not enough, on any device and from any library."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):  # torch.OutOfMemoryError is one
        return any(sign in str(error).lower() for sign in SIGNS)
    return isinstance(error, MemoryError)


@contextmanager
def memory_for(place: str, remedy: str | Callable[[], str]) -> Iterator[None]:
    """Make a sentence of an error that memory was not enough inside of the block. The innermost block speaks.

    Args:
        place: what the block does, such as "the training".
        remedy: what needs less of it, as a sentence; or a function that knows it when it is needed.

    Raises:
        UserError: memory was not enough; says how much was asked for, how much is free, and the remedy.
    """
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(shortage(error, place, remedy if isinstance(remedy, str) else remedy())) from error


def shortage(error: BaseException, place: str, remedy: str) -> str:
    """The sentences of `memory_for`."""
    return f"There is not enough memory for {place}: {figures(str(error))}. {remedy}"


def figures(message: str) -> str:
    """What was asked for and what is free, from the message of the error; the host's own numbers for the CPU."""
    asked = ASKED.search(message)
    wanted = f"{size(_bytes(*asked.groups()))} more were asked for, " if asked else ""
    gpu = OF_A_GPU.search(message)
    if gpu is not None:
        number, *numbers = gpu.groups()
        return f"{wanted}{size(_bytes(*numbers[2:]))} of {size(_bytes(*numbers[:2]))} are free on GPU {number}"
    if GPU.search(message):
        return f"{wanted}and the GPU is full" if wanted else "the GPU is full"
    free, total = host_memory()
    return f"{wanted}{size(free)} of the {size(total)} that this process may use are free"


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * UNITS[unit])


def size(count: float) -> str:
    """A number of bytes to read, such as 1.5 GiB."""
    unit = next((unit for unit in ("GiB", "MiB", "KiB") if abs(count) >= UNITS[unit]), "bytes")
    return f"{count / UNITS[unit]:,.{1 if unit == 'GiB' else 0}f} {unit}"


def host_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Free and total bytes of the host's memory for this process; limits of containers, jobs and shells count.

    Args:
        root: of the file system with /proc and /sys.
    """
    machine = psutil.virtual_memory()
    bounds = [(machine.available, machine.total), *_cgroups(root)]
    try:
        import resource  # not on Windows
    except ImportError:
        return min(bounds)
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        bounds.append((limit - psutil.Process().memory_info().vms, limit))
    free, total = min(bounds)
    return max(free, 0), total


def _cgroups(root: Path) -> Iterator[tuple[int, int]]:
    """Free and total bytes of every control group around this process, of both versions of Linux's cgroups."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return  # not Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, used, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
            used, cache = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                yield from _group(folder, limit, used, cache)


def _group(folder: Path, limit: str, used: str, cache: str) -> Iterator[tuple[int, int]]:
    try:
        total = (folder / limit).read_text().strip()
        taken = int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return  # the group has no limit of memory, or lies outside of the container
    if total != "max" and int(total) < UNLIMITED:
        yield int(total) - taken + int(stat.get(cache, 0)), int(total)  # files in the cache make room when asked
