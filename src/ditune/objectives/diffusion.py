"""Training a network on a Gaussian diffusion process.

Ho et al. 2020 (arXiv 2006.11239, "DDPM") and Nichol & Dhariwal 2021 (arXiv 2102.09672, "IDDPM").
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ditune.errors import UserError, require
from ditune.objectives import weighting
from ditune.objectives.base import Loss, Network, Objective, State, checked_interval, drop_labels
from ditune.objectives.variational_bound import bound_term, mean_flat, prior_term
from ditune.processes import GaussianProcess, Tables
from ditune.rng import StepRandom

LOSSES = ("mse", "rescaled_mse", "kl")
WEIGHTS = ("none", "v", *weighting.WEIGHTS)


class GaussianDiffusion(Objective):
    """The squared error of the prediction, and the variational bound if the variance is learned.

    Args:
        process: the diffusion process.
        loss: 'mse' is L_hybrid (IDDPM eq. 16): the squared error, plus the bound's term in bits per dimension if the
            variance is learned. 'rescaled_mse' multiplies that term by T/1000. 'kl' is T times the bound's term alone,
            an estimate of the whole bound without its prior.
        weight: of the squared error. 'none' is L_simple (DDPM eq. 14). 'v' measures the error in v-space for every
            prediction (x_0 prediction with v-loss: arXiv 2511.13720). 'x0', 'epsilon', 'truncated_snr' and 'min_snr'
            are the weights that arXiv 2303.09556 compares.
        vb_weight: factor on the bound's term in 'mse' and 'rescaled_mse', at least 0.
        label_drop: share of labels that are replaced by the null class, in [0, 1].
        max_weight: upper limit of weight 'v'. The default keeps sigma (x_0 prediction) or alpha (epsilon prediction)
            at 0.05 or more, as arXiv 2511.13720 limits its denominator.
        gamma: upper limit of the signal-to-noise ratio in 'min_snr' (arXiv 2303.09556, section 3.4).
        interval: part [low, high] of the timesteps that is trained, those from floor(low T) to ceil(high T) - 1 (after
            eDiff-I, arXiv 2211.01324); None = all.

    Raises:
        UserError: an unknown name, a number out of range, or a weight with loss 'kl'.
    """

    process: GaussianProcess

    def __init__(
        self,
        process: GaussianProcess,
        loss: str = "mse",
        weight: str = "none",
        vb_weight: float = 1.0,
        label_drop: float = 0.1,
        max_weight: float = 400.0,
        gamma: float = 5.0,
        interval: Sequence[float] | None = None,
    ):
        super().__init__(process, label_drop)
        require(loss in LOSSES, "objective.loss", loss, f"Choose one of {', '.join(LOSSES)}.")
        require(weight in WEIGHTS, "objective.weight", weight, f"Choose one of {', '.join(WEIGHTS)}.")
        if loss == "kl" and weight != "none":
            raise UserError(
                f"objective.weight is {weight!r}, but the variational bound (loss=kl) has no weight. "
                "Set objective.weight=none, or objective.loss=mse."
            )
        require(vb_weight >= 0, "objective.vb_weight", vb_weight, "Set it to 0 or more.")
        require(max_weight > 0, "objective.max_weight", max_weight, "Set it above 0.")
        require(gamma > 0, "objective.gamma", gamma, "Set it above 0.")
        self.loss_name, self.vb_weight, self.interval = loss, vb_weight, checked_interval(interval)
        self.vb_scale = process.steps / 1000 if loss == "rescaled_mse" else 1.0
        self.weights = Tables(weight=error_weights(process, weight, max_weight, gamma))

    def loss(
        self, network: Network, batch: tuple[Tensor, Tensor], random: StepRandom, state: State | None = None
    ) -> Loss:
        """Loss of one micro-batch, see `Objective.loss`; this objective does not need `state`."""
        low, high = self.interval or (0.0, 1.0)
        return self._loss(
            network, batch, random, math.floor(low * self.process.steps), math.ceil(high * self.process.steps)
        )

    def _loss(self, network: Network, batch: tuple[Tensor, Tensor], random: StepRandom, first: int, end: int) -> Loss:
        """The loss at timesteps first .. end - 1."""
        x0, y = batch
        noise = random.normal("noise", x0.shape[1:]).to(x0)
        t = (first + random.integers("t", end - first)).to(x0.device)
        y = drop_labels(y, random, self.label_drop, network.num_classes)
        losses = self.losses(network, x0, t, y, noise)
        parts = {name: values.detach() for name, values in losses.items()}
        return Loss(losses["loss"].mean(), parts, self.process.network_time(t) / self.process.timesteps)

    @torch.no_grad()
    def denoising(self, network: Network, batch: tuple[Tensor, Tensor], random: StepRandom) -> Tensor:  # (N,)
        """The loss of each sample, at timesteps of the whole process."""
        return self._loss(network, batch, random, 0, self.process.steps).parts["loss"]

    def losses(self, network: Network, x0: Tensor, t: Tensor, y: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Losses of each sample at given timesteps and noise.

        Args:
            network: (x_t, network time, y) -> raw output.
            x0: (N, C, H, W) data.
            t: (N,) int64 kept timesteps.
            y: (N,) labels; none is dropped here.
            noise: (N, C, H, W) standard normal.

        Returns:
            (N,) each: 'loss', and for losses other than 'kl' its parts 'mse' and (with a learned variance) 'vb'.
        """
        process = self.process
        x_t = process.q_sample(x0, t, noise)
        output = network(x_t, process.network_time(t), y)
        if self.loss_name == "kl":
            return {"loss": process.steps * bound_term(process, process.predict(output, x_t, t), x0, x_t, t)}
        predicted, fraction = process.split(output, x_t)
        mse = mean_flat((process.target(x0, noise, t) - predicted) ** 2)  # L_simple, DDPM eq. 14, for epsilon
        losses = {"mse": mse, "loss": self.weights.at("weight", t, mse) * mse}
        if fraction is not None:
            # IDDPM section 3.1: the bound teaches the variance only, so the mean is held fixed in it.
            frozen = process.predict(torch.cat([predicted.detach(), fraction], dim=1), x_t, t)
            losses["vb"] = self.vb_scale * bound_term(process, frozen, x0, x_t, t)
            losses["loss"] = losses["loss"] + self.vb_weight * losses["vb"]  # L_hybrid, IDDPM eq. 16
        return losses

    @torch.inference_mode()
    def bits_per_dim(
        self, network: Network, x0: Tensor, y: Tensor, noise_fn: Callable[[], Tensor], clip: float = 1.0
    ) -> dict[str, Tensor]:
        """The whole variational bound (DDPM eq. 5) in bits per dimension.

        Every timestep costs one network call.

        Args:
            network: (x_t, network time, y) -> raw output.
            x0: (N, C, H, W) pixels in [-1, 1].
            y: (N,) labels.
            noise_fn: gives (N, C, H, W) standard normal noise, once per timestep, the noisiest first.
            clip: clamp the predicted x_0 to [-clip, clip]; 0 = off.

        Returns:
            'total' and 'prior' (N,); 'vb', and the errors 'x0_mse' and 'mse' of x_0 and of the noise, (N, T), the
            noisiest timestep first.
        """
        process = self.process
        columns: dict[str, list[Tensor]] = {"vb": [], "x0_mse": [], "mse": []}
        for step in reversed(range(process.steps)):
            t = torch.full((len(x0),), step, device=x0.device)
            noise = noise_fn().to(x0)
            x_t = process.q_sample(x0, t, noise)
            prediction = process.predict(network(x_t, process.network_time(t), y), x_t, t, clip)
            columns["vb"].append(bound_term(process, prediction, x0, x_t, t))
            columns["x0_mse"].append(mean_flat((prediction.x0 - x0) ** 2))
            columns["mse"].append(mean_flat((prediction.epsilon - noise) ** 2))
        terms = {name: torch.stack(values, dim=1) for name, values in columns.items()}
        prior = prior_term(process, x0)
        return {"total": terms["vb"].sum(dim=1) + prior, "prior": prior, **terms}


def error_weights(process: GaussianProcess, weight: str, max_weight: float, gamma: float) -> np.ndarray:  # (T,) float64
    """Weight of the squared error at every kept timestep.

    At a fixed x_t = alpha x_0 + sigma epsilon, the errors d of the three predictions are proportional:
    alpha d(x_0) = -sigma d(epsilon), and d(v) = -d(x_0) / sigma = d(epsilon) / alpha for v = alpha epsilon - sigma x_0.

    Args:
        process: gives alpha, sigma and the prediction.
        weight: one of `WEIGHTS`.
        max_weight: upper limit of weight 'v'.
        gamma: upper limit of the signal-to-noise ratio in 'min_snr'.
    """
    alpha, sigma = process.tables["alpha"].numpy(), process.tables["sigma"].numpy()
    if weight == "v":
        divisor = {"epsilon": alpha, "x0": sigma, "v": np.ones_like(alpha)}[process.prediction]
        return np.minimum(divisor**-2, max_weight)
    if weight == "none":
        return np.ones_like(alpha)
    return weighting.gaussian_weights(weight, process.prediction, (alpha / sigma) ** 2, gamma)
