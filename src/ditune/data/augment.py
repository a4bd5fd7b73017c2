"""Augmentation of drawings on white, for training from scratch on few images."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ditune.rng import generator

WHITE = 255
PURPOSE = 2  # keeps these numbers apart from the stream's others


@dataclass(frozen=True)
class Augment:
    """Mirror, rotate, scale, shift, recolour and shade a share of the images; the white background stays white.

    Changed images get the null class. The network learns from them without conditioning, and no class learns rotations
    and colours that its own images lack. (EDM, arXiv 2206.00364, conditions the network on the change instead.)

    Args:
        share: of the images, in [0, 1].
        degrees: largest rotation in either direction, in degrees.
        scale: smallest and largest factor on the size.
        shift: largest shift in either direction, as a fraction of the side.
        hue: largest shift of the hue in either direction, as a fraction of the colour circle; at most 0.5.
        saturation: smallest and largest factor on the saturation.
        shading: largest change of darkness from one side of the image to the other, as a fraction of it.
    """

    share: float
    degrees: float
    scale: Sequence[float]
    shift: float
    hue: float
    saturation: Sequence[float]
    shading: float

    def __call__(
        self, images: Tensor, labels: Tensor, positions: Sequence[int], seed: int, null_class: int
    ) -> tuple[Tensor, Tensor]:
        """Augment a batch; the change of an image depends on seed and position alone.

        Args:
            images: uint8 (B, 3, R, R).
            labels: (B,).
            positions: B positions in the training's stream.
            seed: of the run.
            null_class: label of changed images.

        Returns:
            Images and labels of the same shapes.
        """
        images, labels = images.clone(), labels.clone()
        for row, position in enumerate(positions):
            numbers = generator(seed, PURPOSE, position)
            if torch.rand((), generator=numbers).item() < self.share:
                images[row] = self.changed(images[row], numbers)
                labels[row] = null_class
        return images, labels

    def changed(self, image: Tensor, numbers: torch.Generator) -> Tensor:
        """A changed copy of an image, uint8 (3, R, R), by random numbers of a generator."""
        from torchvision.transforms import InterpolationMode  # the import takes seconds
        from torchvision.transforms.v2 import functional as tv

        def between(low: float, high: float) -> float:
            return low + (high - low) * torch.rand((), generator=numbers).item()

        ink, side = 1 - image.float() / WHITE, image.shape[-1]  # uint8 would lose a step in every change
        if between(0, 1) < 0.5:
            ink = ink.flip(-1)
        move = [round(between(-self.shift, self.shift) * side) for _ in range(2)]
        turn, factor = between(-self.degrees, self.degrees), between(*self.scale)
        ink = tv.affine(ink, turn, move, factor, [0.0], InterpolationMode.BILINEAR)  # its fill= leaves seams
        image = tv.adjust_hue(1 - ink, between(-self.hue, self.hue))
        image = tv.adjust_saturation(image, between(*self.saturation))
        angle, strength = torch.tensor(between(0, 2 * torch.pi)), between(0, self.shading)
        line = torch.linspace(-1, 1, side)
        ramp = line * angle.cos() + line[:, None] * angle.sin()  # (R, R)
        shaded = 1 - (1 - image) * (1 + strength * ramp)
        return (shaded.clamp(0, 1) * WHITE).round().byte()
