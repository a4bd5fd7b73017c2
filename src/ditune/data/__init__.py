"""Datasets of images and the batches from them; networks are unknown here."""

from ditune.data.artbench10 import ArtBench10
from ditune.data.augment import Augment
from ditune.data.benchmark import Benchmark
from ditune.data.caltech101 import Caltech101
from ditune.data.celebahq import CelebAHQ
from ditune.data.cub import CUB
from ditune.data.df20m_mini import DF20MMini
from ditune.data.flowers102 import Flowers102
from ditune.data.food101 import Food101
from ditune.data.imagenet import ImageNet
from ditune.data.images import ImageDataset, Pictures
from ditune.data.stanford_cars import StanfordCars
from ditune.data.sun397 import SUN397
from ditune.data.transforms import center_crop, from_uint8, to_rgb, to_uint8

__all__ = [
    "CUB",
    "SUN397",
    "ArtBench10",
    "Augment",
    "Benchmark",
    "Caltech101",
    "CelebAHQ",
    "DF20MMini",
    "Flowers102",
    "Food101",
    "ImageDataset",
    "ImageNet",
    "Pictures",
    "StanfordCars",
    "center_crop",
    "from_uint8",
    "to_rgb",
    "to_uint8",
]
