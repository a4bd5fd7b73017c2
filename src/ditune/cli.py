"""What the entry points share: where the repository is, and mistakes shown as sentences."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from ditune.errors import PLACES, UserError, refusal

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = str(ROOT / "configs")
REPORT_CONFIGS = str(
    ROOT / "configs" / "reporting"
)  # apart: its key `sweep` would be taken for the group configs/sweep
USER_ERROR = 2  # exit code
# of Lightning: advertisements, and what the plan of a run says itself
CHATTER = ("litlogger", "litmodels", "`weights_only` was not set", "GPU available", "TPU available", "Precision (AMP)")
CHATTER += ("`Trainer.fit` stopped",)


def prepare() -> None:
    """Tell the configs where the repository is; quiet what the libraries say at every start."""
    os.environ.setdefault("DITUNE_ROOT", str(ROOT))
    # processes that submitit starts find the package as this one does
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    for talker in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"pytorch_lightning.{talker}").addFilter(_is_worth_reading)
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")  # between Lightning and torch
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # data.num_workers is for larger machines
    warnings.filterwarnings("ignore", message=".*module\\(s\\) in eval mode.*")  # the autoencoder is, on purpose


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in CHATTER)


def in_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def message(error: Exception, places: str = PLACES) -> str | None:
    """What a user can mend, as sentences; None for an error of the program."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return refusal(error, places)
    return f"The config is wrong: {str(error).splitlines()[0]}."


def reported(work: Callable[[], int | None], traceback: bool, places: str = PLACES) -> None:
    """Run `work` and exit with its code; a mistake of the user is one message, unless `traceback` is asked for.

    Args:
        places: keys that choose another place for files that cannot be written.
    """
    try:
        code = work()
    except (UserError, OmegaConfBaseException, OSError) as error:
        text = message(error, places)
        if traceback or in_sweep() or text is None:
            raise  # a sweep goes on with its next job and shows the error at its end
        sys.stderr.write(f"\nError: {text}\n")
        sys.exit(USER_ERROR)
    if code:
        sys.exit(code)
