"""Walks the road of the papers' tables on random files of real size, and prints time and memory of each part.

    python benchmarks/road.py                                 # DiT-XL/2, 256 px; needs 12 GB of disk
    python benchmarks/road.py --network tiny --resolution 64 # the same parts in two minutes
    python benchmarks/road.py --parts files sweep             # only the parts whose names hold one of these words

It makes the network file in the official format and the autoencoder's folder with random weights, and archives of CUB
and Flowers-102 with four classes each in the published layouts. Then it runs the commands of the README: pre-flight,
training, resume, sampling, evaluation, export and a sweep over two experiments. Images and figures mean nothing; that
the commands end well, their seconds and their memory do.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "src")]
DATASETS = ("cub", "flowers102")


@dataclass(frozen=True)
class Part:
    """What one command took.

    Args:
        name: of the part.
        seconds: from start to end.
        cpu_seconds: of all of its processes.
        peak_gb: largest resident memory of one process, in 10^9 bytes.
        code: exit code.
    """

    name: str
    seconds: float
    cpu_seconds: float
    peak_gb: float
    code: int


def measured(name: str, *command: str, log: Path) -> Part:
    """Run a command in the repository's folder; its output goes to a file."""
    start = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    cpu = usage.ru_utime + usage.ru_stime
    return Part(name, time.perf_counter() - start, cpu, peak, process.returncode)


def make_files(folder: Path, network: str, resolution: int) -> None:
    """The files that a user would have fetched, with random weights; in a process of its own, for its memory."""
    import torch

    from ditune.networks import build_network
    from small_archives import CLASSES, make_archives, use_hashes
    from small_vae import small_vae

    (folder / "cache" / "networks").mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    made = build_network(network, input_size=resolution // 8, in_channels=4, num_classes=1000, learn_sigma=True)
    torch.save(made.state_dict(), folder / "cache" / "networks" / "DiT-XL-2-256x256.pt")
    vae = folder / "data" / "autoencoders" / "sd_vae_ema"
    if network != "dit_xl_2":
        small_vae(vae)
    else:
        large_vae(vae)
    md5s = make_archives(folder / "data", images_per_class=4, classes=4, names=DATASETS)
    for name in DATASETS:
        CLASSES[name].archives = use_hashes(CLASSES[name], md5s[name])  # not the published ones
        CLASSES[name].fetch(folder / "data" / name, download=False)


def large_vae(folder: Path) -> None:
    """Stable Diffusion's autoencoder, 84 M random weights."""
    from diffusers import AutoencoderKL

    AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        sample_size=256,
    ).save_pretrained(folder)


def walk(
    folder: Path, network: str, resolution: int, words: Sequence[str] = ("",), run_part: Callable[..., Part] = measured
) -> Iterator[Part]:
    """The parts, one after the other.

    Args:
        folder: for files, runs and logs.
        network: a size of configs/network.
        resolution: in pixels.
        words: a part runs if its name holds one of them.
        run_part: runs a command as `measured` does.
    """
    run, sweep = folder / "run", folder / "sweep"
    places = [f"paths.data_dir={folder}/data", f"paths.cache_dir={folder}/cache", f"paths.log_dir={folder}/logs"]
    features = "+metrics.judge.batch_size=8"  # images at once
    judged = ["metrics_of=this", features, *places]
    small = [f"network={network}", "network.learn_sigma=true", f"data.resolution={resolution}"]
    small += ["metrics=efflite0", "metrics.n=4", features]
    small += ["batch_size=2", "sampler.batch_size=1", "sampler.steps=2", "callbacks.samples.n=1", "data.num_workers=0"]
    small += ["callbacks.checkpoint.every_n_steps=1"]
    small += ["trainer=cpu", "trainer.precision=32-true", "trainer.accumulate_grad_batches=2", *places]
    cub, trained = "experiment=difffit_cub", [f"run_dir={run}", "resume=auto"]
    bare = [f"paths.{name}={folder}/nothing/{name}" for name in ("data_dir", "cache_dir")]
    commands = {
        "(make the files)": (__file__, "--make", str(folder), "--network", network, "--resolution", str(resolution)),
        "plan with nothing on disk": ("src/train.py", cub, *small, *bare, "dry_run=true"),
        "pre-flight, latents, statistics": ("src/prepare.py", cub, *small),
        "train 2 steps, evaluate": ("src/train.py", cub, *small, *trained, "max_steps=2"),
        "resume by 1 step, evaluate": ("src/train.py", cub, *small, *trained, "max_steps=3"),
        "sample 1 image, 2 steps": ("src/sample.py", f"run={run}", "n=1", f"out={folder}/samples"),
        "evaluate by another protocol": ("src/evaluate.py", f"run={run}", *judged, "metrics.n=5"),
        "export to diffusers": ("src/export.py", f"run={run}", "format=diffusers", f"out={folder}/export"),
        "sweep of 2 experiments, 1 step each": (
            "src/train.py",
            "-m",
            "experiment=difffit_cub,difffit_flowers102",
            *small,
            "max_steps=1",
            "metrics.n=0",
            "launcher.slots=1",
            f"sweep_dir={sweep}",
        ),
        "evaluate the sweep": ("src/evaluate.py", f"sweep={sweep}", *judged, "metrics.n=4"),
        "report of the sweep": ("src/report.py", f"sweep={sweep}"),
    }
    for name, command in commands.items():
        if any(word in name for word in words):
            yield run_part(name, *command, log=folder / f"{name}.log")


def table(parts: list[Part]) -> str:
    """The parts as a Markdown table."""
    lines = ["| part | wall s | CPU s | peak GB | exit |", "|---|---|---|---|---|"]
    lines += [f"| {p.name} | {p.seconds:.0f} | {p.cpu_seconds:.0f} | {p.peak_gb:.2f} | {p.code} |" for p in parts]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Walk the road; 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="dit_xl_2", help="a size of configs/network")
    parser.add_argument("--resolution", type=int, default=256, help="pixels")
    parser.add_argument("--folder", type=Path, help="for the files and logs, which stay; default: one that is removed")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--parts", nargs="+", default=[""], metavar="WORD", help="parts with one of these words")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make is not None:
        make_files(given.make, given.network, given.resolution)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = (given.folder or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        parts = []
        for part in walk(folder, given.network, given.resolution, given.parts):
            parts.append(part)
            sys.stderr.write(f"{part.name}: {part.seconds:.0f} s, {part.peak_gb:.2f} GB, exit {part.code}\n")
            if part.code:
                log = folder / f"{part.name}.log"
                sys.stderr.write(log.read_text(errors="replace")[-3000:])
                break
    sys.stdout.write(table(parts))
    if given.out is not None:
        given.out.write_text(json.dumps([asdict(part) for part in parts], indent=2) + "\n")
    return int(any(part.code for part in parts))


if __name__ == "__main__":
    sys.exit(main())
