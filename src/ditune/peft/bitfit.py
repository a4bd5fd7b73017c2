"""BitFit (Ben Zaken et al., arXiv 2106.10199): biases train, and the label table as in the DiffFit paper."""

from ditune.peft.base import PeftMethod


class BitFit(PeftMethod):
    """Every bias of the network trains. Arguments: see `PeftMethod`."""

    sums = "parameters"

    def selects(self, name: str) -> bool:
        """Every bias."""
        return "bias" in name
