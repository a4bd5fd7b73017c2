"""Time and memory of a training step, as ratios to full fine-tuning as the original does it, in the same run.

    python benchmarks/train_step.py [--device cuda] [--network dit_xl_2] [--batch 32] [--pixels 512] [--methods all]

The reference is in reference.py. `share` is the share of the rate that the products of the network's linear layers
alone reach in the same run and type (on a GPU: large square ones), by the products that a step needs: three forward
passes for full fine-tuning, and no gradient of frozen matrices (arXiv 2212.09748 counts one forward pass, in half of
these units). What a step needs beside them (adaLN, embeddings, adapters: below 1 %) is not counted.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from measuring import Step, Variant, add_shares, deliver, measured, parser
from reference import ReferenceDiT, ReferenceTraining
from torch import Tensor

from ditune.commands.parameters import build_method
from ditune.config.components import freeze_in_bf16
from ditune.networks import DiT, build_network
from ditune.objectives import GaussianDiffusion
from ditune.processes import GaussianProcess
from ditune.rng import StepRandom
from ditune.training.ema import Ema

PEFT = Path(__file__).resolve().parents[1] / "configs" / "peft"
METHODS = "full,difffit,bitfit,lora,adaptformer"
DEFAULTS = {"cpu": ("dit_s_2", 8), "cuda": ("dit_xl_2", 32)}
CLASSES = 1000
SQUARE = 8192  # side of the products whose rate is a GPU's peak
REFERENCE = "reference: full, fp32"
COLUMNS = {
    "name": ("", "text"),
    "ms": ("ms", "ms"),
    "ratio": ("speed-up", "x"),
    "least": ("least", "x"),
    "most": ("most", "x"),
    "images_per_s": ("images/s", "float"),
    "gflops_per_s": ("GFLOP/s", "int"),
    "share": ("share of bare products", "share"),
    "peak_mib": ("peak MiB", "int"),
    "memory": ("of the reference", "float"),
}


def moved_network(name: str, pixels: int, device: str) -> DiT:
    """A network whose zero-initialised layers have moved, as in any that is fine-tuned."""
    torch.manual_seed(0)
    network = build_network(name, input_size=pixels // 8, in_channels=4, num_classes=CLASSES, learn_sigma=True)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return network.to(device)


def made_batch(n: int, pixels: int, device: str) -> tuple[Tensor, Tensor]:
    """Random latents (N, 4, h, w) and labels."""
    x0 = torch.randn(n, 4, pixels // 8, pixels // 8, generator=torch.Generator().manual_seed(1))
    return x0.to(device), torch.arange(n, device=device) % CLASSES


def forward_flops(config: dict) -> tuple[float, float]:
    """FLOPs of an image's forward pass in the blocks: of linear layers, of attention."""
    tokens, size = (config["input_size"] // config["patch_size"]) ** 2, config["hidden_size"]
    per_token = 2 * size * (4 * size + 2 * size * config["mlp_ratio"])
    return config["depth"] * tokens * per_token, config["depth"] * 4 * tokens**2 * size


def step_flops(config: dict, full: bool) -> float:
    """FLOPs of an image's training step; frozen matrices need no gradient, attention has no matrices."""
    linear, attention = forward_flops(config)
    return (3 if full else 2) * linear + 3 * attention


def reference_step(network: str, batch: int, pixels: int, device: str, kept: dict, **precision: bool) -> Step:
    """A step of the reference. The variants of one run train the same weights, kept in `kept`."""
    if not kept:
        ours = moved_network(network, pixels, device)
        made = ReferenceDiT(ours.config).to(device)
        made.load_state_dict(ours.state_dict())
        kept["training"] = ReferenceTraining(made, made_batch(batch, pixels, device))
    return partial(kept["training"].step, **precision)


def our_step(
    name: str, batch: int, pixels: int, device: str, method: str, bf16: bool = False, compiled: bool = False
) -> Step:
    """A step as a training takes it: loss, backward pass, clipping, fused AdamW, EMA of what trains."""
    network = moved_network(name, pixels, device)
    peft = build_method(method, PEFT)
    peft.apply(network)
    network.to(device)  # what the method has added too
    if bf16:
        freeze_in_bf16(network)
    if compiled:
        network.compile_blocks()
    trainable = peft.trainable(network)
    optimizer = torch.optim.AdamW(list(trainable.values()), lr=1e-4, weight_decay=0.0, fused=True)
    ema = Ema(trainable, decay=0.9999)
    objective = GaussianDiffusion(GaussianProcess())
    data, random = made_batch(batch, pixels, device), StepRandom(0, 0, range(batch), device)

    def step() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = objective.loss(network, data, random)
        (loss.total + peft.penalty(network)).backward()
        torch.nn.utils.clip_grad_norm_(list(trainable.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(100)
        return loss.total

    return step


def linear_products(rows: int, size: int, dtype: torch.dtype, device: str) -> tuple[Callable[[], Step], float]:
    """The products of a block's linear layers, forward and backward; and their FLOPs."""
    shapes = [(size, 3 * size), (size, size), (size, 4 * size), (4 * size, size)]

    def build() -> Step:
        sizes = [((rows, i), (o, i), (rows, o)) for i, o in shapes]  # of input, weight and gradient
        made = [[torch.randn(*size, device=device, dtype=dtype) for size in three] for three in sizes]

        def step() -> None:
            for x, w, grad in made:
                torch.mm(x, w.T)
                torch.mm(grad, w)
                torch.mm(grad.T, x)

        return step

    return build, 3 * sum(2.0 * rows * i * o for i, o in shapes)


def square_product(side: int, dtype: torch.dtype, tf32: bool, device: str) -> Callable[[], Step]:
    """One large product."""

    def build() -> Step:
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

        def step() -> None:
            before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, tf32
            torch.mm(a, b)
            torch.backends.cuda.matmul.allow_tf32 = before

        return step

    return build


def variants(given: argparse.Namespace) -> tuple[list[Variant], dict[str, str]]:
    """Rows of the table, and the type of products -> name of the row with the products alone."""
    with torch.device("meta"):
        config = build_network(given.network, input_size=given.pixels // 8, num_classes=CLASSES).config
    place = (given.network, given.batch, given.pixels, given.device)
    kept: dict = {}
    full = given.batch * step_flops(config, full=True)
    made = [Variant(REFERENCE, partial(reference_step, *place, kept), given.batch, full)]
    for name in ("tf32", "bf16"):
        build = partial(reference_step, *place, kept, **{name: True})
        made.append(Variant(f"the same, {name}", build, given.batch, full, name, REFERENCE))
    on_gpu, methods = given.device == "cuda", given.methods.split(",")
    types = ["bf16"] if on_gpu else ["fp32", "bf16"]
    for dtype in types:
        for method in methods:
            flops = given.batch * step_flops(config, method == "full")
            for compiled in {on_gpu or given.compile}:
                name = f"{method}, {dtype}{', compiled blocks' * compiled}"
                build = partial(our_step, *place, method, dtype == "bf16", compiled)
                made.append(Variant(name, build, given.batch, flops, dtype))
    peaks = {}
    tokens = (config["input_size"] // config["patch_size"]) ** 2
    for dtype, kind in (("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)):
        peaks[dtype] = f"bare products, {dtype}"
        if on_gpu:
            build, flops = square_product(SQUARE, kind, dtype == "tf32", given.device), 2.0 * SQUARE**3
        else:
            build, flops = linear_products(given.batch * tokens, config["hidden_size"], kind, given.device)
        made.append(Variant(peaks[dtype], build, 0, flops, dtype))
    if not on_gpu:
        made = [variant for variant in made if variant.dtype != "tf32"]
    return made, peaks


def main(arguments: Sequence[str] | None = None) -> dict:
    """Measure, print, and write; returns the result."""
    options = parser(__doc__, seconds=150, rounds=7)
    options.add_argument("--network", help="default: dit_s_2 on a CPU, dit_xl_2 on a GPU")
    options.add_argument("--batch", type=int, help="default: 8 on a CPU, 32 on a GPU")
    options.add_argument("--pixels", type=int, default=256, help="side of the images; latents have an eighth of it")
    options.add_argument("--methods", default=METHODS, help="files of configs/peft, with commas; `all` is all of them")
    options.add_argument("--compile", action="store_true", help="compile blocks on a CPU too")
    given = options.parse_args(arguments)
    torch.set_num_threads(1)
    network, batch = DEFAULTS[given.device]
    given.network, given.batch = given.network or network, given.batch or batch
    if given.methods == "all":
        given.methods = ",".join(sorted(path.stem for path in PEFT.glob("[!_]*.yaml") if path.stem != "router"))
    rows_, peaks = variants(given)
    rows = measured(rows_, given, REFERENCE, memory=True)
    add_shares(rows, peaks)
    for row in rows:
        if row["name"] in peaks.values():  # of another work than a step
            for key in ("ratio", "least", "most", "memory", "peak_mib"):
                row.pop(key, None)
    size = "" if given.pixels == 256 else f"_{given.pixels}px"
    return deliver("train_step", given, COLUMNS, rows, size)


if __name__ == "__main__":
    main()
