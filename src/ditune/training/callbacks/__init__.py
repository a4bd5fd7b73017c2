"""What happens around the steps of a training."""

from ditune.training.callbacks.checkpoints import Checkpoints
from ditune.training.callbacks.clock import StepClock, peak_memory_mib
from ditune.training.callbacks.compare_ranks import CompareRanks
from ditune.training.callbacks.progress import TrainingProgress
from ditune.training.callbacks.routing import RoutingMonitor
from ditune.training.callbacks.samples import SampleGrids
from ditune.training.callbacks.step_grids import StepGrids
from ditune.training.callbacks.stop import StopOnSignal
from ditune.training.callbacks.validation import Validation

__all__ = [
    "Checkpoints",
    "CompareRanks",
    "RoutingMonitor",
    "SampleGrids",
    "StepClock",
    "StepGrids",
    "StopOnSignal",
    "TrainingProgress",
    "Validation",
    "peak_memory_mib",
]
