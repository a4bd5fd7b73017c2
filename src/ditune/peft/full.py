"""Full fine-tuning: everything trains."""

from ditune.peft.base import LABELS, PeftMethod


class Full(PeftMethod):
    def selects(self, name: str) -> bool:
        return not name.startswith(f"{LABELS}.")  # its label table is `train_labels`'s business, as everywhere
