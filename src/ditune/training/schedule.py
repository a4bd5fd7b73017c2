"""Learning rate over the steps."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_then(optimizer: Optimizer, *, warmup_steps: int, decay_to: float, max_steps: int) -> LambdaLR:
    """Rise linearly over `warmup_steps`, then go linearly to `decay_to` of the rate at `max_steps` (1 = constant)."""

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / max(1, warmup_steps))
        progress = min(1.0, max(0, step - warmup_steps) / max(1, max_steps - warmup_steps))
        return warm * (1 + (decay_to - 1) * progress)

    return LambdaLR(optimizer, factor)
