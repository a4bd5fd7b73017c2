"""Latents and images that one process reads in a second of its processor's time.

    python benchmarks/data_loading.py [--latents 20000] [--out docs/results/speed]

Latents of 32x32x4 with mean and log-variance, plain and mirrored, in float16; batches of 256 in shuffled order, from
the system's page cache. The reference reads two .npy files a sample, as fast-DiT does. JPEG files of 500x375 pixels are
decoded and cropped to 256; time on a clock there, because several threads work. Encoding is by the architecture of
Stable Diffusion's autoencoder with random weights: the pass of src/prepare.py (JPEG files to latents of images and
mirrored images) beside the autoencoder alone on the same images.
"""

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from measuring import Step, Variant, deliver, measured, parser
from PIL import Image

from ditune.ahead import ahead
from ditune.autoencoders import Autoencoder, kl
from ditune.autoencoders.kl import KL
from ditune.data import prepare
from ditune.data.images import ImageDataset
from ditune.data.latents import FORMAT, Latents, Writer
from ditune.data.stream import ImageStream, MicroBatches, training_loader
from ditune.data.transforms import center_crop, from_uint8, to_rgb

BATCH, BATCHES, FILES, IMAGES = 256, 20, 512, 48
REFERENCE = "two .npy files a sample"
ENCODER = "the autoencoder alone"
COLUMNS = {
    "name": ("", "text"),
    "images_per_s": ("a second", "int"),
    "ratio": ("speed-up", "x"),
    "least": ("least", "x"),
    "most": ("most", "x"),
}

ENCODING = {
    "name": ("", "text"),
    "ms": ("ms a round", "ms"),
    "ratio": ("speed-up", "x"),
    "least": ("least", "x"),
    "most": ("most", "x"),
    "images_per_s": ("images/s, each with its mirror image", "float"),
}


def written(folder: Path, count: int) -> Callable[[], Latents]:
    """Write random latents, as a cache and as files of single samples; returns what opens the cache anew."""
    shape = [count, 2, 2, 4, 32, 32]
    header = {"format": FORMAT, "shape": shape}
    writer, numbers = Writer(folder / "cache", header), torch.Generator().manual_seed(0)
    for first in range(0, count, 1000):
        rows = torch.randn(min(1000, count - first), *shape[1:], generator=numbers).half()
        writer.write(first, rows)
    labels = torch.arange(count) % 100
    writer.finish(labels, header)
    writer.close()
    (folder / "files").mkdir()
    for i in range(min(count, FILES)):
        np.save(folder / "files" / f"{i}.npy", np.zeros((1, 4, 32, 32), np.float32))
        np.save(folder / "files" / f"{i}_label.npy", np.array([i]))
    return lambda: Latents(folder / "cache", header, labels)


def forever(make: Callable[[], Iterator]) -> Callable[[], Step]:
    """A variant that takes the next batches of an iterator."""

    def build() -> Step:
        batches = make()

        def step() -> None:
            for _ in range(BATCHES):
                next(batches)

        return step

    return build


def loader(latents: Latents, flip: bool) -> Iterator:
    """The training's loader after its first pass, in which it compares checksums."""
    batches = iter(training_loader(ImageStream(latents, 0, flip=flip), MicroBatches(BATCH, 1, 0, 1, 0), 0, False))
    for _ in range(8 * len(latents) // BATCH if flip else len(latents) // BATCH + 1):
        next(batches)
    return batches


def variants(folder: Path, given: argparse.Namespace) -> list[Variant]:
    """Rows of the table of latents."""
    opened, images = written(folder, given.latents), BATCH * BATCHES
    order = torch.randperm(given.latents, generator=torch.Generator().manual_seed(0)).tolist()
    batches = [order[i : i + BATCH] for i in range(0, given.latents, BATCH)][:BATCHES]

    def files() -> Step:
        def step() -> None:
            rows = []
            for i in range(min(given.latents, FILES)):
                rows.append(torch.from_numpy(np.load(folder / "files" / f"{i}.npy")))
                np.load(folder / "files" / f"{i}_label.npy")
            torch.cat(rows)

        return step

    def rows() -> Step:
        array = opened().array

        def step() -> None:
            for batch in batches:
                array[np.asarray(batch), 0]

        return step

    def taken() -> Step:
        latents = opened()

        def step() -> None:
            for batch in batches:
                latents.take(batch)

        return step

    count = sum(map(len, batches))
    return [
        Variant(REFERENCE, files, min(given.latents, FILES)),
        Variant("rows of the memory-mapped array alone", rows, count),
        Variant("the cache, `Latents.take`", taken, count),
        Variant("first pass of the loader, with checksums", forever(lambda: first_passes(opened)), images),
        Variant("the training's loader", forever(lambda: loader(opened(), False)), images),
        Variant("the same, half of them mirrored", forever(lambda: loader(opened(), True)), images),
    ]


def first_passes(opened: Callable[[], Latents]) -> Iterator:
    """Batches of caches that are opened anew before a row comes twice."""
    while True:
        latents = opened()
        batches = iter(training_loader(ImageStream(latents, 0), MicroBatches(BATCH, 1, 0, 1, 0), 0, False))
        for _ in range(max(1, len(latents) // BATCH)):
            yield next(batches)


class Untrained(KL):
    """Stable Diffusion's architecture with random weights."""

    def __init__(self) -> None:
        from diffusers import AutoencoderKL  # takes seconds

        Autoencoder.__init__(self, channels=4, downsample=8)
        torch.manual_seed(0)
        widths = [128, 256, 512, 512]
        down, up = ([f"{way}{side}Block2D"] * 4 for way, side in (("Down", "Encoder"), ("Up", "Decoder")))
        size = {"block_out_channels": widths, "down_block_types": down, "up_block_types": up, "layers_per_block": 2}
        self.vae, self._name, self.bf16 = AutoencoderKL(latent_channels=4, **size), "untrained", False


def encoding(folder: Path, given: argparse.Namespace) -> list[Variant]:
    """The autoencoder alone, in both layouts, and the pass that writes a cache."""
    for i in range(given.encoded):
        path = folder / "images" / "train" / "a" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(seed=i))
    dataset = ImageDataset(folder / "images", given.pixels, split="train", in_memory=False)
    autoencoder, device = Untrained().eval(), torch.device(given.device)
    rows = range(len(dataset))
    x = from_uint8(dataset.__getitems__(rows)[0])

    def alone(kinds: tuple[str, ...]) -> Step:
        @torch.inference_mode()
        def step() -> None:
            kl.CHANNELS_LAST = kinds
            prepare._both_sides(autoencoder, x)

        return step

    def whole() -> Step:
        def step() -> None:
            kl.CHANNELS_LAST = ()
            list(prepare._encoded(dataset, rows, autoencoder, device, held_out=False))

        return step

    return [
        Variant(ENCODER, lambda: alone(()), len(rows)),
        Variant("the same, channels-last", lambda: alone(("cpu",)), len(rows)),
        Variant("the encoding pass, from JPEG files", whole, len(rows)),
    ]


def jpeg(seed: int) -> bytes:
    """A file of 500x375 pixels."""
    file = io.BytesIO()
    noise = torch.rand(24, 32, 3, generator=torch.Generator().manual_seed(seed)).mul(255).byte().numpy()
    Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def decoding(rounds: int) -> list[dict]:
    """JPEG files to crops by this thread alone, and by the threads that encoding uses."""
    content = jpeg(seed=0)

    def decode(_: int) -> np.ndarray:
        return np.asarray(center_crop(to_rgb(Image.open(io.BytesIO(content))), 256))

    ways = {
        "JPEG files, one thread": lambda: [decode(i) for i in range(IMAGES)],
        f"JPEG files, {os.cpu_count()} threads ahead": lambda: list(ahead(decode, range(IMAGES), IMAGES)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(max(2, rounds)):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    first = next(iter(seconds.values()))
    rows = []
    for name, own in seconds.items():
        ratios = sorted(a / b for a, b in zip(first, own, strict=True))
        row = {"name": name, "images_per_s": IMAGES / float(np.median(own)), "ratio": float(np.median(ratios))}
        rows.append(row | {"least": ratios[0], "most": ratios[-1]})
    return rows


def main(arguments: Sequence[str] | None = None) -> dict:
    """Measure, print, and write; returns the result."""
    options = parser(__doc__, seconds=30, rounds=7)
    options.add_argument("--latents", type=int, default=20000, help="in the cache; 32 KB each")
    options.add_argument("--encoded", type=int, default=2, help="images that are encoded in a round")
    options.add_argument("--pixels", type=int, default=128, help="their side")
    given = options.parse_args(arguments)
    given.device = "cpu"  # where data is read
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measured(variants(Path(folder), given), given, REFERENCE)
        layouts = kl.CHANNELS_LAST
        try:
            encoded = measured(encoding(Path(folder), given), given, ENCODER)
        finally:
            kl.CHANNELS_LAST = layouts
    deliver("data_loading", given, ENCODING, encoded, "_encoding")
    return deliver("data_loading", given, COLUMNS, rows + decoding(given.rounds))


if __name__ == "__main__":
    main()
