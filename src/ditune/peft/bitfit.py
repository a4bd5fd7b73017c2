"""BitFit (Ben Zaken et al., arXiv 2106.10199): only biases train, and as in the DiffFit paper's table the labels."""

from ditune.peft.base import PeftMethod


class BitFit(PeftMethod):
    def selects(self, name: str) -> bool:
        return "bias" in name
