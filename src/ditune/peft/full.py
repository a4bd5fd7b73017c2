"""Full fine-tuning: everything trains."""

from ditune.peft.base import LABELS, PeftMethod


class Full(PeftMethod):
    """Every parameter trains. Arguments: see `PeftMethod`."""

    sums = "parameters"

    def selects(self, name: str) -> bool:
        """Everything but the label table, which `train_labels` decides as for every method."""
        return not name.startswith(f"{LABELS}.")
