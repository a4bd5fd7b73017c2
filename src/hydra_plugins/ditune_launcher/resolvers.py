"""What configs may ask for by `${name:...}`. Hydra loads this file at every start, also in processes of submitit."""

import os
import zlib
from datetime import datetime
from pathlib import Path

from omegaconf import OmegaConf


def started(pattern: str) -> str:
    """When this run was started, as `datetime.strftime` writes it: for folders that no two starts share.

    Ranks that something else starts for one run compose one config each, and must find the same folder: they take the
    time of what has started them. (Lightning passes the folder to the ranks that it starts.)
    """
    return _moment().strftime(pattern)


def _moment() -> datetime:
    step = os.environ.get("SLURM_STEP_ID")
    if step is not None and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        seconds = int(os.environ.get("SLURM_JOB_START_TIME", datetime.now().timestamp()))
        job = f"{os.environ.get('SLURM_JOB_ID')}.{step}"
        return datetime.fromtimestamp(seconds).replace(microsecond=zlib.crc32(job.encode()) % 10**6)
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:  # torchrun's agents, which start at different times
        raise ValueError("every machine must be given the same folder. Add run_dir=<folder on a disk of all machines>")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        import psutil  # only here: every start pays for what this file imports

        launcher = psutil.Process(os.getppid())
        moment = datetime.fromtimestamp(launcher.create_time())  # in hundredths of a second
        return moment.replace(microsecond=moment.microsecond // 10**4 * 10**4 + launcher.pid % 10**4)
    return datetime.now()


def expanded(path: str) -> str:
    """`path` with ~ as the user's home folder: a shell leaves run_dir=~/x as it is."""
    return str(Path(path).expanduser())


def or_else(value: object, default: object) -> object:
    """`value`, or `default` if it is null; OmegaConf's own `oc.select` takes its default only for missing keys."""
    return default if value is None else value


OmegaConf.register_new_resolver("started", started, use_cache=True, replace=True)
OmegaConf.register_new_resolver("expanded", expanded, replace=True)
OmegaConf.register_new_resolver("or_else", or_else, replace=True)
