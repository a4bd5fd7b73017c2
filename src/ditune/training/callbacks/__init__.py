"""What happens around the steps of a training."""

from ditune.training.callbacks.clock import StepClock, peak_memory_mib
from ditune.training.callbacks.progress import TrainingProgress
from ditune.training.callbacks.routing import RoutingMonitor
from ditune.training.callbacks.samples import DrawSamples
from ditune.training.callbacks.step_grids import DrawStrips
from ditune.training.callbacks.stop import StopOnSignal

__all__ = [
    "DrawSamples",
    "DrawStrips",
    "RoutingMonitor",
    "StepClock",
    "StopOnSignal",
    "TrainingProgress",
    "peak_memory_mib",
]
