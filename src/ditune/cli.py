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

from ditune.errors import UserError

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


def reported(work: Callable[[], int | None], traceback: bool) -> None:
    """Run `work` and exit with its code; a mistake of the user is one message, unless `traceback` is asked for."""
    try:
        code = work()
    except (UserError, OmegaConfBaseException) as error:
        if traceback or in_sweep():
            raise  # a sweep goes on with its next job and shows the error at its end
        text = str(error) if isinstance(error, UserError) else f"The config is wrong: {str(error).splitlines()[0]}."
        sys.stderr.write(f"\nError: {text}\n")
        sys.exit(USER_ERROR)
    if code:
        sys.exit(code)
