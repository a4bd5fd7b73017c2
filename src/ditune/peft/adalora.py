"""AdaLoRA (Zhang et al., arXiv 2303.10512): LoRA as a singular value decomposition whose ranks are pruned in training.

Layers, importance scores and schedule are peft's. This file only calls them during training.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ditune.errors import UserError
from ditune.peft.huggingface import ADAPTER, HuggingFace, layers

SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # the allocator's averages, in peft's names


class AdaLora(HuggingFace):
    """Every layer starts with rank `init_r`; the mean rank is reduced to `target_r` by importance.

    Args:
        lr, weight_decay, train_labels: see `PeftMethod`.
        **arguments: of peft's AdaLoraConfig; `total_step` is the number of steps of the training.

    Raises:
        UserError: `target_r` is not below `init_r`, or peft refuses an argument.
    """

    def __init__(self, lr: float = 0.0, weight_decay: float = 0.0, train_labels: bool = True, **arguments: Any):
        arguments.pop("peft_type", None)
        super().__init__("ADALORA", lr, weight_decay, train_labels, **arguments)
        if self.config.target_r >= self.config.init_r:
            raise UserError(f"peft.target_r is {self.config.target_r}. Set it below init_r={self.config.init_r}.")

    def inject(self, network: nn.Module) -> None:
        """Put peft's layers into the network, with the ranks of the file if it is loaded from one."""
        super().inject(network)
        if self.config.rank_pattern:  # of a file with pruned ranks
            self.tuner.resize_modules_by_rank_pattern(self.config.rank_pattern, ADAPTER)

    def penalty(self, network: nn.Module) -> Tensor:
        """orth_reg_weight times the mean of ||P^T P - I||_F and ||Q Q^T - I||_F, over all P and Q (eq. 4)."""
        grams = []
        for layer in layers(network).values():
            a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
            grams += [a @ a.T, b.T @ b]
        norms = [torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)) for gram in grams]
        return self.config.orth_reg_weight * torch.stack(norms).mean()

    def after_step(self, network: nn.Module, step: int) -> None:
        """Update the importance scores and prune ranks by peft's schedule.

        Raises:
            UserError: the last pruning is due at the first step, before anything is known to be important.
        """
        if step == 1 and self.config.total_step - self.config.tfinal < 2:
            raise UserError(
                f"AdaLoRA prunes its last rank {self.config.tfinal} steps (peft.tfinal) before the end of "
                f"{self.config.total_step}, too early. Set max_steps to at least {self.config.tfinal + 2}."
            )
        self.tuner.update_and_allocate(step)

    def training_state(self) -> dict[str, Any]:
        """Importance scores and rank pattern."""
        allocator = self.tuner.rankallocator
        scores = {name: {k: v.cpu() for k, v in getattr(allocator, name).items()} for name in SCORES}
        return {"scores": scores, "rank_pattern": self.config.rank_pattern}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Restore the result of `training_state`."""
        device = next(self.tuner.parameters()).device
        for name, scores in state["scores"].items():
            setattr(self.tuner.rankallocator, name, {k: v.to(device) for k, v in scores.items()})
        self.config.rank_pattern = state["rank_pattern"]

    def _keys(self, network: nn.Module) -> dict[str, str]:
        pattern, self.config.rank_pattern = self.config.rank_pattern, None  # by which peft would cut tensors
        try:
            return super()._keys(network)
        finally:
            self.config.rank_pattern = pattern

    def to_file(self, network: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All ranks. The singular values of pruned ranks are zero, or decay to zero in the EMA weights."""
        written, tensors = super().to_file(network)
        return written | {"rank_pattern": None}, tensors
