"""What the benchmarks compare with: DiT's network, loss, training step and sampling as the paper's code does them.

Written here after the description of facebookresearch/DiT (arXiv 2212.09748), with the state-dict keys of its files:
attention written out, tables in float64 on the CPU that are gathered at every use, torch's default AdamW, an EMA of
all weights one by one, and guided sampling that carries both halves of the batch. N batch, T tokens, D hidden size.
"""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Attention(nn.Module):
    """Softmax(q k^T / sqrt(d)) v with all weights (N, H, T, T) in memory."""

    def __init__(self, size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:  # (N, T, D)
        n, t, d = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q * (d // self.heads) ** -0.5) @ k.transpose(-2, -1)
        return self.proj((weights.softmax(dim=-1) @ v).transpose(1, 2).reshape(n, t, d))


class Mlp(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, size: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(size, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = Attention(size, heads), Mlp(size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(size, 6 * size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class Final(nn.Module):
    def __init__(self, size: int, patch: int, channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(size, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(size, 2 * size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class _Holder(nn.Module):
    """Gives its parameters the keys of the official files."""

    def __init__(self, **modules: nn.Module):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class ReferenceDiT(nn.Module):
    """The network; `config` is that of `ditune.networks.DiT`."""

    def __init__(self, config: dict):
        super().__init__()
        size, self.patch, channels = config["hidden_size"], config["patch_size"], config["in_channels"]
        self.classes, self.channels = config["num_classes"], channels
        self.x_embedder = _Holder(proj=nn.Conv2d(channels, size, self.patch, stride=self.patch))
        self.t_embedder = _Holder(mlp=nn.Sequential(nn.Linear(256, size), nn.SiLU(), nn.Linear(size, size)))
        self.y_embedder = _Holder(embedding_table=nn.Embedding(self.classes + 1, size))
        tokens = (config["input_size"] // self.patch) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, size), requires_grad=False)
        self.blocks = nn.ModuleList(Block(size, config["num_heads"]) for _ in range(config["depth"]))
        self.final_layer = Final(size, self.patch, 2 * channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        n, _, height, width = x.shape
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128).to(t.device)
        angles = t[:, None].float() * frequencies[None]
        c = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1)) + self.y_embedder.embedding_table(y)
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        p, x = self.patch, self.final_layer(x, c)
        x = x.reshape(n, height // p, width // p, p, p, -1)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(n, -1, height, width)


class Diffusion:
    """1,000 timesteps of linear betas (DDPM), with a learned variance (IDDPM)."""

    def __init__(self, steps: int = 1000):
        kept = np.unique(np.linspace(0, 999, steps).round().astype(int))
        whole = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
        self.times, bar = kept, whole[kept]
        before = np.append(1.0, bar[:-1])
        betas = 1 - bar / before
        small = betas * (1 - before) / (1 - bar)
        self.tables = {
            "alpha": np.sqrt(bar),
            "sigma": np.sqrt(1 - bar),
            "to_x0": np.sqrt(1 / bar),
            "to_noise": np.sqrt(1 / bar - 1),
            "of_x0": betas * np.sqrt(before) / (1 - bar),
            "of_x": (1 - before) * np.sqrt(1 - betas) / (1 - bar),
            "low": np.log(np.append(small[1], small[1:])),
            "high": np.log(betas),
        }

    def at(self, name: str, t: Tensor) -> Tensor:  # (N, 1, 1, 1)
        return torch.from_numpy(self.tables[name]).to(t.device)[t].float()[:, None, None, None]

    def backward(self, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of p(x_{t-1} | x_t) of a network's output (N, 2C, H, W)."""
        noise, fraction = output.chunk(2, dim=1)
        fraction = (fraction + 1) / 2
        log_variance = fraction * self.at("high", t) + (1 - fraction) * self.at("low", t)
        x0 = self.at("to_x0", t) * x - self.at("to_noise", t) * noise
        return self.at("of_x0", t) * x0 + self.at("of_x", t) * x, log_variance

    def loss(self, network: Callable, x0: Tensor, t: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        """L_hybrid, mean over the batch: squared error of the noise, and the bound's term for the variance alone."""
        x = self.at("alpha", t) * x0 + self.at("sigma", t) * noise
        output = network(x, t, y).float()
        error = (noise - output[:, : x.shape[1]]).square().mean(dim=(1, 2, 3))
        frozen = torch.cat([output[:, : x.shape[1]].detach(), output[:, x.shape[1] :]], dim=1)
        mean, log_variance = self.backward(frozen, x, t)
        true_mean, true_log = self.at("of_x0", t) * x0 + self.at("of_x", t) * x, self.at("low", t)
        squares = (true_mean - mean).square() * (-log_variance).exp()
        kl = 0.5 * (-1 + log_variance - true_log + (true_log - log_variance).exp() + squares)
        nll = -_log_likelihood(x0, mean, 0.5 * log_variance)
        bound = torch.where(t == 0, nll.mean(dim=(1, 2, 3)), kl.mean(dim=(1, 2, 3))) / math.log(2)
        return (error + bound).mean()


def _log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Of grey values in steps of 2/255 (DDPM, eq. 13)."""

    def cdf(v: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    low, high = (cdf((-log_scale).exp() * (x - mean + side / 255)) for side in (-1, 1))
    inside = torch.where(x < -0.999, high, torch.where(x > 0.999, 1 - low, high - low))
    return inside.clamp(min=1e-12).log()


class ReferenceTraining:
    """Full fine-tuning: loss, backward pass, AdamW over all weights, EMA of all weights.

    Args:
        network: is trained.
        batch: latents (N, C, H, W) and labels (N,).
    """

    def __init__(self, network: ReferenceDiT, batch: tuple[Tensor, Tensor]):
        self.network, self.batch, self.diffusion = network, batch, Diffusion()
        self.ema = copy.deepcopy(network).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0)

    def step(self, bf16: bool = False, tf32: bool = False) -> Tensor:
        """One step; returns the loss."""
        (x0, y), device = self.batch, self.batch[0].device
        t = torch.randint(0, 1000, (len(x0),), device=device)
        y = torch.where(torch.rand(len(y), device=device) < 0.1, self.network.classes, y)
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            loss = self.diffusion.loss(self.network, x0, t, y, torch.randn_like(x0))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(self.ema.parameters(), self.network.parameters(), strict=True):
                average.mul_(0.9999).add_(parameter, alpha=1 - 0.9999)
        torch.backends.cuda.matmul.allow_tf32 = before
        return loss


@torch.no_grad()
def reference_sampling(
    network: ReferenceDiT, noise: Tensor, y: Tensor, steps: int, scale: float, later: Callable[[], Tensor]
) -> Tensor:
    """DDPM sampling with guidance on the first three channels.

    Args:
        network: the network.
        noise: (N, C, H, W).
        y: (N,) labels.
        steps: of the respaced process.
        scale: of the guidance.
        later: gives the noise (N, C, H, W) of each step.
    """
    diffusion, n = Diffusion(steps), len(noise)
    x, labels = torch.cat([noise, noise]), torch.cat([y, torch.full_like(y, network.classes)])
    for i in reversed(range(steps)):
        t = torch.full((2 * n,), i, device=x.device)
        times = torch.from_numpy(diffusion.times).to(x.device)[t]
        output = network(torch.cat([x[:n], x[:n]]), times, labels)
        with_label, without = output[:, :3].split(n)
        guided = without + scale * (with_label - without)
        output = torch.cat([torch.cat([guided, guided]), output[:, 3:]], dim=1)
        mean, log_variance = diffusion.backward(output, x, t)
        x = mean + (i > 0) * (0.5 * log_variance).exp() * torch.cat([later()] * 2)
    return x[:n]
