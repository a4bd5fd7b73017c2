"""Noise schedules, respacing, and float64 tables that follow the sample's device.

Linear schedule: Ho et al. 2020 (arXiv 2006.11239). Cosine schedule and respacing: Nichol & Dhariwal 2021 (arXiv
2102.09672).
"""

import math

import numpy as np
import torch
from torch import Tensor

from ditune.errors import UserError


def linear_betas(timesteps: int) -> np.ndarray:  # (T,) float64
    """Evenly spaced betas (Ho et al., section 4), 1e-4..0.02 at T = 1000; other T are scaled to the same noise."""
    scale = 1000 / timesteps
    return np.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=np.float64)


def cosine_betas(timesteps: int, max_beta: float = 0.999) -> np.ndarray:  # (T,) float64
    """Betas whose cumulative alpha is a squared cosine (Nichol & Dhariwal, eq. 17, offset s = 0.008).

    Args:
        timesteps: T.
        max_beta: upper limit of a beta, which the last one would exceed.
    """
    angles = [(i / timesteps + 0.008) / 1.008 * math.pi / 2 for i in range(timesteps + 1)]
    alpha_bar = np.array([math.cos(angle) ** 2 for angle in angles], dtype=np.float64)
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta)


BETAS = {"linear": linear_betas, "cosine": cosine_betas}


def kept_timesteps(respacing: str, timesteps: int) -> np.ndarray:  # (T',) int64, ascending
    """Timesteps of the full process that a respaced process keeps.

    Args:
        respacing: `''` keeps all. `'50'` spreads 50 steps from the first timestep to the last. `'10,20,30'` cuts the
            process into three equal sections and spreads 10, 20 and 30 steps over them, end to end. `'ddim50'` takes
            every (T/50)-th timestep from 0 on, without the last timesteps.
        timesteps: length T of the full process.

    Raises:
        UserError: the text has another form, or asks for more steps than there are.
    """
    if not respacing:
        return np.arange(timesteps)
    try:
        if respacing.startswith("ddim"):
            return _strided(int(respacing.removeprefix("ddim")), timesteps)
        return _sectioned([int(count) for count in respacing.split(",")], timesteps)
    except ValueError as error:
        raise UserError(
            f"The respacing {respacing!r} does not fit a process of {timesteps} timesteps. "
            "Write a number of steps ('50'), numbers per section ('10,20,30') or an integer stride ('ddim50')."
        ) from error


def _strided(steps: int, timesteps: int) -> np.ndarray:
    if steps < 1:
        raise ValueError("fewer than one step")
    stride = math.ceil(timesteps / steps)
    kept = np.arange(0, timesteps, stride)
    if len(kept) != steps:
        raise ValueError("no integer stride")
    return kept


def _sectioned(counts: list[int], timesteps: int) -> np.ndarray:
    sizes = [len(section) for section in np.array_split(np.arange(timesteps), len(counts))]
    kept, start = [], 0
    for count, size in zip(counts, sizes, strict=True):
        if not 1 <= count <= size:
            raise ValueError("more steps than timesteps")
        stride = (size - 1) / max(count - 1, 1)
        # A running sum, like the original: k * stride would round differently at halves.
        kept.append(start + np.rint(np.cumsum([0.0] + [stride] * (count - 1))).astype(np.int64))
        start += size
    return np.concatenate(kept)


def respaced_betas(betas: np.ndarray, kept: np.ndarray) -> np.ndarray:  # (T,), (T',) -> (T',)
    """Betas of the process of the kept timesteps alone, with unchanged cumulative alphas (2102.09672, eq. 19)."""
    alphas_cumprod = np.cumprod(1 - betas)[kept]
    return 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])


class Tables:
    """Named numbers per timestep, exact on the CPU and copied once per device and dtype.

    Args:
        **tables: (T,) each, float64 or int64.
    """

    def __init__(self, **tables: np.ndarray):  # each (T,)
        self._exact = {name: torch.from_numpy(table) for name, table in tables.items()}
        self._placed: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:  # (T,) on the CPU, float64 or int64
        return self._exact[name]

    def placed(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:  # (T,)
        """The whole table on a device. It is rounded before it moves, since not every device has float64."""
        key = (name, device, dtype)
        if key not in self._placed:
            with torch.inference_mode(False):  # a copy first made while sampling must also serve training
                self._placed[key] = self._exact[name].to(dtype).to(device)
        return self._placed[key]

    def at(self, name: str, t: Tensor, like: Tensor) -> Tensor:  # t (N,) -> (N, 1, 1, 1)
        """Values at each sample's timestep, in the device and dtype of `like`, shaped to broadcast against it."""
        return self.placed(name, like.device, like.dtype)[t].view(-1, *[1] * (like.ndim - 1))
