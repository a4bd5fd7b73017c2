"""No autoencoder: the network is trained on pixels."""

from torch import Tensor

from ditune.autoencoders.base import Autoencoder


class Pixels(Autoencoder):
    """The identity. The latents are pixels times `scale`, which can bring their variance to the noise's.

    Args:
        scale: factor on the pixels.
    """

    kind = "Pixels"

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__(channels=3, downsample=1)
        self.scale.fill_(scale)

    def encode(self, x: Tensor) -> tuple[Tensor, None]:
        """The pixels themselves."""
        return x, None

    def decode(self, z: Tensor) -> Tensor:
        """The pixels themselves."""
        return z
