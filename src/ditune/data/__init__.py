"""Pictures in, batches out; knows nothing of models."""

from ditune.data.pictures import Pictures
from ditune.data.transforms import center_crop, from_uint8, to_rgb, to_uint8

__all__ = ["Pictures", "center_crop", "from_uint8", "to_rgb", "to_uint8"]
