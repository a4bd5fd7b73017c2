"""What a config leaves to the machine: the device of trainer=auto and precision=auto, settled before anything is built.

bf16-mixed where the device multiplies bf16: CUDA from Ampere on, and CPUs with AMX, AVX512-BF16 or Arm's bf16. Else
32-true: CPUs that emulate bf16 take about ten times as long for a product in it. fp16 is never chosen, because what
trains would lose small updates. MPS, ROCm and XPU get 32-true too; nothing was run on them.
"""

import logging
import os
import time
from pathlib import Path

import torch
from omegaconf import DictConfig

from ditune.errors import UserError

log = logging.getLogger(__name__)

AUTO, BF16, FP32 = "auto", "bf16-mixed", "32-true"
PRECISIONS = (BF16, FP32)
CPU_UNITS = ("amx_bf16", "avx512_bf16", "bf16")  # names in torch.cpu.get_capabilities()
WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")  # of ONEDNN_MAX_CPU_ISA
SIDE = 384  # of the matrices whose products are timed


def multiplies_bf16(device: str) -> bool:
    """Whether the device has units for products in bf16; one that only emulates them has not.

    Args:
        device: "cpu", "cuda", "mps", ...
    """
    if device == "cuda":
        return torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 0)
    if device != "cpu" or os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in WITHOUT_BF16:
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(unit) for unit in CPU_UNITS)


def device_of(accelerator: str) -> str:
    """The kind of device that Lightning chooses for `trainer.accelerator`, as torch names it.

    Raises:
        UserError: it asks for a GPU, and there is none.
    """
    if accelerator in ("gpu", "cuda"):
        if torch.cuda.is_available():
            return "cuda"
        if accelerator == "gpu" and torch.backends.mps.is_available():
            return "mps"
        raise UserError(
            f"trainer.accelerator is {accelerator}, and there is no GPU here. "
            "Set trainer=cpu, or trainer=auto, which takes a GPU where there is one."
        )
    if accelerator != AUTO:
        return accelerator
    if torch.backends.mps.is_available():
        return "mps"
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_precision(requested: str, device: str) -> str:
    """`bf16-mixed` or `32-true`.

    Args:
        requested: one of them, or "auto" = as the device computes fastest.
        device: "cpu", "cuda", ...

    Raises:
        UserError: another one is asked for.
    """
    if requested == AUTO:
        return BF16 if multiplies_bf16(device) else FP32
    if requested not in PRECISIONS:
        raise UserError(
            f"trainer.precision is {requested}, but what trains must stay in fp32. "
            f"Set one of {AUTO}, {', '.join(PRECISIONS)}."
        )
    return requested


def settle(cfg: DictConfig, checkpoint: Path | None) -> None:
    """Fill in what `trainer` leaves open in a training's config; a resumed one keeps the precision of its checkpoint.

    Args:
        cfg: its trainer.precision is set.
        checkpoint: that the training goes on from; None = it begins.

    Raises:
        UserError: there is no such device, or what trains could not be kept in fp32.
    """
    device = device_of(cfg.trainer.accelerator)
    requested = str(cfg.trainer.precision)
    if requested == AUTO and checkpoint is not None:
        from ditune.training.checkpoint_io import read_checkpoint  # with Lightning, which takes seconds to import

        requested = read_checkpoint(checkpoint)["identity"]["precision"]
    cfg.trainer.precision = resolve_precision(requested, device)
    settle_numbers(cfg.trainer.precision, device)


def settle_numbers(precision: str, device: str) -> None:
    """Make products of 32-true those of fp32 on every GPU, and say what an emulated bf16 costs."""
    if precision == FP32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    elif not multiplies_bf16(device):
        factor = f", a product takes {emulation_factor():.0f} times as long as in fp32" if device == "cpu" else ""
        log.warning(
            "bf16-mixed is emulated by this device (%s)%s. precision=32-true is faster here; "
            "a run that began in bf16 goes on in it",
            device,
            factor,
        )


def bare_precision(requested: str, bf16: bool | None) -> bool:
    """Whether networks are evaluated under bf16 autocast by a command without a trainer.

    Args:
        requested: the key `precision`.
        bf16: the earlier key, where it is set: True = bf16-mixed, False = 32-true.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if bf16 is not None:
        requested = BF16 if bf16 else FP32
    precision = resolve_precision(requested, device)
    settle_numbers(precision, device)
    return precision == BF16


def emulation_factor(repeats: int = 3) -> float:
    """How many times as long a product takes in bf16 as in fp32, on this CPU, now."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(SIDE, SIDE, dtype=dtype)
        times = []
        for _ in range(repeats + 1):  # the first one allocates
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times[1:])
    return seconds[torch.bfloat16] / seconds[torch.float32]
