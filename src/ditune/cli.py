"""What the entry points share: where the repository is, checked configs, and mistakes shown as sentences."""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ditune.config.keys import check
from ditune.config.overrides import current, explain
from ditune.config.parse_once import parse_once
from ditune.config.swept import held_back, is_sweep
from ditune.errors import PLACES, UserError, fail, refusal
from ditune.files.atomic import keep_hashes_in
from ditune.memory import is_out_of_memory, shortage
from ditune.metrics_later import import_metrics_later
from ditune.progress import is_first_rank
from ditune.stopping import follow_first_rank

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = str(ROOT / "configs")
REPORT_CONFIGS = str(
    ROOT / "configs" / "reporting"
)  # apart: its key `sweep` would be taken for the group configs/sweep
# of Lightning: advertisements, and what the plan of a run says itself
CHATTER = ("litlogger", "litmodels", "`weights_only` was not set", "GPU available", "TPU available", "Precision (AMP)")
CHATTER += ("`Trainer.fit` stopped",)


def prepare() -> None:
    """Tell the configs where the repository is; quiet what the libraries import and say at every start."""
    follow_first_rank()
    import_metrics_later()
    os.environ.setdefault("DITUNE_ROOT", str(ROOT))
    # processes that submitit starts find the package as this one does
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    for talker in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"pytorch_lightning.{talker}").addFilter(_is_worth_reading)
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own: errors would be shown twice
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")  # between Lightning and torch
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # data.num_workers is for larger machines
    warnings.filterwarnings("ignore", message=".*module\\(s\\) in eval mode.*")  # the autoencoder is, on purpose


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in CHATTER)


def in_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def entry_point(name: str, folder: str = CONFIGS) -> Callable[[Callable[[DictConfig], int | None]], Callable[[], None]]:
    """Make a command of a function of the config: a wrong override, value or file ends it with a sentence and a 2.

    Args:
        name: of the entry point's config.
        folder: of the configs.
    """

    def command(work: Callable[[DictConfig], int | None]) -> Callable[[], None]:
        @wraps(work)  # Hydra names the job by the file of `work`
        def task(cfg: DictConfig) -> None:
            composed()
            number_as_torchrun()
            reported(lambda: check(cfg, name), traceback=False)
            keep_hashes_in(Path(cfg.paths.cache_dir) / "hashes" if "paths" in cfg else None)
            reported(lambda: work(cfg), cfg.traceback)

        main = hydra.main(version_base="1.3", config_path=folder, config_name=name)(task)

        def start() -> None:
            prepare()
            parse_once()  # Hydra composes twice at each start: it looks for hydra.mode first
            sys.argv[1:] = [current(argument, name) for argument in sys.argv[1:]]
            sys.argv[1:] += quiet(sys.argv[1:])
            with stoppable(is_sweep(sys.argv[1:])):
                with_sentences(main, folder, name)

        return start

    return command


def quiet(arguments: Sequence[str]) -> list[str]:
    """Further arguments of a rank that torchrun or Slurm has started: the first one alone writes .hydra and the log."""
    if is_first_rank() or any(argument.startswith("hydra.job.name=") for argument in arguments):
        return []  # Lightning and the launcher of sweeps have given them to their ranks
    number = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or os.environ.get("LOCAL_RANK")
    return ["hydra.output_subdir=null", f"hydra.job.name=rank_{number}"]


def number_as_torchrun() -> None:
    """Of several tasks that srun has started, each gets its numbers by torchrun's names, which all parts read."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" not in os.environ and int(tasks) > 1:
        numbers = {"RANK": os.environ["SLURM_PROCID"], "LOCAL_RANK": os.environ.get("SLURM_LOCALID", "0")}
        os.environ.update(numbers, WORLD_SIZE=tasks)


@contextmanager
def stoppable(sweep: bool) -> Iterator[None]:
    """Ctrl-C ends the command inside with a sentence and 130; SIGTERM a sweep likewise, with 143.

    Args:
        sweep: whether it is one; a sweep whose jobs have begun ends by itself.
    """

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    previous = signal.signal(signal.SIGTERM, interrupt) if sweep else None
    try:
        yield
    except KeyboardInterrupt as stopped:
        text = "Stopped while the jobs of the sweep were composed; none has begun." if sweep else "Stopped."
        sys.stderr.write(f"\n{text}\n")
        sys.exit(128 + (stopped.args or (signal.SIGINT,))[0])
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


FULL_ERROR = "HYDRA_FULL_ERROR"  # at 1 Hydra raises what is wrong with a config, instead of printing it over ten lines
_raising = False  # while it is our setting of that variable, not the user's


def with_sentences(main: Callable[[], None], folder: str, name: str) -> None:
    """Run Hydra's `main`; what keeps it from composing a config becomes a sentence of ours."""
    global _raising
    if os.environ.get(FULL_ERROR) == "1" and not _raising:
        return main()
    os.environ[FULL_ERROR], _raising = "1", True
    try:
        main()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if not _raising:
            raise  # the config was composed, and this is none of its mistakes
        if isinstance(error, OmegaConfBaseException):
            fail(config_error(error))
        if (arguments := held_back(error, sys.argv[1:])) is not None:
            sys.argv[1:] = arguments
            return with_sentences(main, folder, name)
        overrides = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
        fail(explain(error, folder, name, overrides))
    finally:
        composed()


def composed() -> None:
    """The config is there: from now on Hydra treats errors in its own way, in this process and those it starts."""
    global _raising
    if _raising:
        os.environ.pop(FULL_ERROR, None)
        _raising = False


def config_error(error: OmegaConfBaseException) -> str:
    """What OmegaConf found wrong, as a sentence."""
    text = str(error).splitlines()[0].removeprefix("ValueError raised while resolving interpolation: ")
    return f"The config is wrong: {text}."


def message(error: Exception, places: str = PLACES) -> str | None:
    """What a user can mend, as sentences; None for an error of the program."""
    if isinstance(error, UserError):
        return str(error)
    if is_out_of_memory(error):
        return shortage(error, "this command", "Free some, or take a machine that has more.")
    if isinstance(error, OSError):
        return refusal(error, places)
    return config_error(error) if isinstance(error, OmegaConfBaseException) else None


def reported(work: Callable[[], int | None], traceback: bool, places: str = PLACES) -> None:
    """Run `work` and exit with its code; a mistake of the user is one message, unless `traceback` is asked for.

    Args:
        places: keys that choose another place for files that cannot be written.
    """
    try:
        code = work()
    except (UserError, OmegaConfBaseException, OSError, MemoryError, RuntimeError) as error:
        text = message(error, places)
        if traceback or in_sweep() or text is None:
            raise  # a sweep goes on with its next job and shows the error at its end
        fail(text)
    if code:
        sys.exit(code)
