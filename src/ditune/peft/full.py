"""Full fine-tuning: everything trains."""

from .base import PeftMethod


class Full(PeftMethod):
    def selects(self, name: str) -> bool:
        return True
