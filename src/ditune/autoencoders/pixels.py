"""No codec: the network learns pixels."""

from torch import Tensor

from ditune.autoencoders.base import Autoencoder


class Pixels(Autoencoder):
    """Pixels times `scale`, so that their variance can be brought to that of the noise."""

    kind = "Pixels"

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__(channels=3, downsample=1)
        self.scale.fill_(scale)

    def encode(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None

    def decode(self, z: Tensor) -> Tensor:
        return z
