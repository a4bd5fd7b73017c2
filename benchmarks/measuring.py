"""What the benchmarks share: variants timed in turn, in rounds of one process, and the JSON and table made of them.

On a CPU processor time of one thread, which other work on a machine hardly changes; on a GPU time between two CUDA
events. A ratio is the median of the ratios within each round, so that a slow moment meets both of its sides.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ditune.config.hardware import multiplies_bf16

Step = Callable[[], Any]
GPU_CALLS = 5  # of a variant that are timed together, so that launches overlap as in a training
FORMATS = {"x": "{:.2f}x", "ms": "{:,.1f}", "share": "{:.0%}", "int": "{:,.0f}", "float": "{:.2f}", "text": "{}"}


@dataclass
class Variant:
    """One row of a table.

    Args:
        name: in the table.
        build: returns the step that is timed; called once, if the device can run it.
        images: of a call; 0 = the row has no images/s.
        flops: multiplications and additions of a call's matrix products; 0 = not counted.
        dtype: of those products: "fp32", "tf32" or "bf16". A device without bf16 multiplication does not run bf16.
        shares: name of the variant whose parameters it uses.
    """

    name: str
    build: Callable[[], Step]
    images: int = 0
    flops: float = 0.0
    dtype: str = "fp32"
    shares: str | None = None


def parser(text: str | None, seconds: float, rounds: int) -> argparse.ArgumentParser:
    """The options of every benchmark.

    Args:
        text: the benchmark's docstring.
        seconds: default of --seconds.
        rounds: default of --rounds.
    """
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--seconds", type=float, default=seconds, help="no round begins after so many; two always run")
    made.add_argument("--rounds", type=int, default=rounds, help="at most")
    made.add_argument("--out", type=Path, help="folder for <benchmark>_<device>.json")
    made.add_argument("--trace", type=Path, help="folder for a profiler's trace of one call of every variant")
    return made


def missing(device: str, dtype: str = "fp32") -> str | None:
    """Why a device cannot run a variant in this type; None = it can."""
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    if dtype == "tf32" and (device != "cuda" or torch.cuda.get_device_capability() < (8, 0)):
        return "no TF32 on this device"
    if dtype == "bf16" and not multiplies_bf16(device):
        return "no bf16 multiplication on this device"
    return None


def device_facts(device: str) -> dict[str, Any]:
    """Name and kind of the device, and the version of torch."""
    facts: dict[str, Any] = {"kind": device, "torch": torch.__version__}
    if device == "cuda":
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
        return facts | {"name": name}
    units = [name for name, there in torch.cpu.get_capabilities().items() if there is True]
    kept = [u for u in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "bf16") if u in units]
    return facts | {"name": cpu_name(), "units": kept, "threads": torch.get_num_threads()}


def cpu_name() -> str:
    """As Linux names it, or the architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def timed(step: Step, device: str) -> float:
    """Seconds of one call."""
    if device == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(GPU_CALLS):
        step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / GPU_CALLS


@contextmanager
def allocated(device: str, peak: dict[str, float]):
    """Bytes that the block's end holds ("held") and that its last `mark` and the end had at most ("peak").

    On a CPU the allocator's events of the profiler; what a kernel takes for a moment is in them.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        start = torch.cuda.memory_allocated()
        yield torch.cuda.reset_peak_memory_stats
        torch.cuda.synchronize()
        peak["held"] = torch.cuda.memory_allocated() - start
        peak["peak"] = torch.cuda.max_memory_allocated() - start
        return
    marks = [0]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        yield lambda: marks.append(time.time_ns())
    held = most = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            if event.start_ns() >= marks[-1]:
                most = max(most, held)
    peak["held"], peak["peak"] = held, most


def built(variants: Sequence[Variant], device: str, memory: bool) -> tuple[dict[str, Step], dict[str, float]]:
    """The steps of all variants that the device runs, called twice; and their peak bytes, with what they hold."""
    steps, peaks, held = {}, {}, {}
    for variant in variants:
        if missing(device, variant.dtype):
            continue
        found: dict[str, float] = {}
        if not memory:
            steps[variant.name] = variant.build()
            steps[variant.name]()
            continue
        with allocated(device, found) as mark:
            step = steps[variant.name] = variant.build()
            step()  # allocates, compiles
            mark()
            step()
        held[variant.name] = found["held"]
        peaks[variant.name] = found["peak"] + held.get(variant.shares, 0)
    return steps, peaks


def measured(
    variants: Sequence[Variant], given: argparse.Namespace, reference: str, memory: bool = False
) -> list[dict[str, Any]]:
    """Time all variants in turn, in rounds.

    Args:
        variants: rows of the table.
        given: `device`, `seconds`, `rounds` and `trace`.
        reference: name of the variant that ratios are against.
        memory: also find each variant's peak memory.

    Returns:
        A row for each variant: name, median seconds, ratio with its smallest and largest value, images/s, GFLOP/s and
        peak MiB. A variant that the device cannot run has the reason as "not run".
    """
    steps, peaks = built(variants, given.device, memory)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    start = time.monotonic()
    for round_ in range(max(given.rounds, 2) if steps else 0):
        if round_ >= 2 and time.monotonic() - start > given.seconds:
            break
        for name, step in steps.items():
            seconds[name].append(timed(step, given.device))
        sys.stderr.write(f"round {round_ + 1}, {time.monotonic() - start:.0f} s\n")
    if given.trace is not None:
        for name, step in steps.items():
            traced(step, given.device, given.trace / f"{''.join(c if c.isalnum() else '_' for c in name)}.json")
    return [row_of(variant, seconds, reference, peaks, given.device) for variant in variants]


def row_of(
    variant: Variant, seconds: dict[str, list[float]], reference: str, peaks: dict[str, float], device: str
) -> dict[str, Any]:
    """The row of one variant, see `measured`."""
    if variant.name not in seconds:
        return {"name": variant.name, "not run": missing(device, variant.dtype)}
    own = seconds[variant.name]
    ratios = [there / here for there, here in zip(seconds[reference], own, strict=True)]
    median = statistics.median(own)
    row = {"name": variant.name, "rounds": len(own), "ms": median * 1e3, "fastest": min(own) * 1e3}
    row |= {"slowest": max(own) * 1e3, "ratio": statistics.median(ratios)}
    row |= {"least": min(ratios), "most": max(ratios), "dtype": variant.dtype}
    if variant.images:
        row["images_per_s"] = variant.images / median
    if variant.flops:
        row["gflops_per_s"] = variant.flops / median / 1e9
    if variant.name in peaks:
        row["peak_mib"] = peaks[variant.name] / 2**20
        row["memory"] = peaks[variant.name] / peaks[reference]
    return row


def add_shares(rows: list[dict[str, Any]], peaks: dict[str, str]) -> None:
    """Add to each row its share of the rate of bare products in the same type, "share".

    Args:
        rows: of `measured`.
        peaks: type of products -> name of the row that does nothing else.
    """
    rates = {row["name"]: row.get("gflops_per_s") for row in rows}
    for row in rows:
        most = rates.get(peaks.get(row.get("dtype", ""), ""))
        if most and row.get("gflops_per_s"):
            row["share"] = row["gflops_per_s"] / most


def traced(step: Step, device: str, path: Path) -> None:
    """Write a trace of one call, for chrome://tracing or Perfetto, and its dearest operators as text beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=kinds, record_shapes=True) as recorded:
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    recorded.export_chrome_trace(str(path))
    order = f"self_{device}_time_total"
    path.with_suffix(".txt").write_text(recorded.key_averages().table(sort_by=order, row_limit=25))


def deliver(
    benchmark: str,
    given: argparse.Namespace,
    columns: dict[str, tuple[str, str]],
    rows: list[dict[str, Any]],
    suffix: str = "",
) -> dict[str, Any]:
    """Print the table, and write the JSON where --out says.

    Args:
        benchmark: name of its file, without .py.
        given: the options.
        columns: key of the rows -> (heading, one of `FORMATS`).
        rows: see `measured`.
        suffix: of the JSON file's name, for a second table of the same benchmark.
    """
    leave_out = ("out", "trace", "device")
    settings = {name: str(v) for name, v in vars(given).items() if name not in leave_out and v not in (None, False)}
    result = {"benchmark": benchmark, "device": device_facts(given.device), "settings": settings}
    result |= {"columns": columns, "rows": rows}
    sys.stdout.write(f"{benchmark}: {described(result)}\n{table(result)}")
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        path = given.out / f"{benchmark}{suffix}_{given.device}.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def described(result: dict[str, Any]) -> str:
    """Device and software of a result in one line."""
    device = result["device"]
    if device["kind"] == "cuda":
        return f"{device['name']}, torch {device['torch']}"
    units = ", ".join(device["units"])
    threads = "one thread" if device["threads"] == 1 else f"{device['threads']} threads"
    return f"{threads} of a CPU ({device['name']}: {units}), torch {device['torch']}"


def table(result: dict[str, Any]) -> str:
    """A result as a Markdown table; a row that was not run says so in every column."""
    columns = result["columns"]
    lines = ["| " + " | ".join(heading for heading, _ in columns.values()) + " |", "|" + "---|" * len(columns)]
    for row in result["rows"]:
        cells = [row["name"]]
        for key, (_, kind) in list(columns.items())[1:]:
            empty = "not run" if "not run" in row else ""
            cells.append(FORMATS[kind].format(row[key]).replace("%", " %") if key in row else empty)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
