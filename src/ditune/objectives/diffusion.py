"""Training a network on a Gaussian diffusion process.

Ho et al. 2020 (arXiv 2006.11239, "DDPM") and Nichol & Dhariwal 2021 (arXiv 2102.09672, "IDDPM").
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ditune.errors import UserError
from ditune.objectives import weighting
from ditune.objectives.base import Draws, Loss, Network, State, drop_labels
from ditune.objectives.variational_bound import bound_term, mean_flat, prior_term
from ditune.processes import GaussianProcess, Tables

LOSSES = ("mse", "rescaled_mse", "kl")
WEIGHTS = ("none", "v", *weighting.WEIGHTS)


class GaussianDiffusion:
    """The error of the predicted quantity, and the variational bound where the variance is learned.

    Args:
        process: the diffusion process.
        loss: 'mse' is L_hybrid (IDDPM eq. 16): the squared error, plus the bound's term in bits per dimension when the
            variance is learned. 'rescaled_mse' multiplies that term by T/1000. 'kl' is T times the bound's term alone,
            an estimate of the whole bound without its prior.
        weight: of the squared error. 'none' is L_simple (DDPM eq. 14). 'v' measures the error in v-space whatever the
            network predicts (x_0 prediction with v-loss: arXiv 2511.13720). 'x0', 'epsilon', 'truncated_snr' and
            'min_snr' are those that arXiv 2303.09556 compares.
        vb_weight: factor on the bound's term in 'mse' and 'rescaled_mse', at least 0.
        label_drop: share of labels replaced by the null class, in [0, 1].
        max_weight: upper limit of weight 'v'. The default holds sigma (x_0 prediction) or alpha (epsilon prediction)
            at 0.05 or more, as 2511.13720 holds its denominator.
        gamma: upper limit of the signal-to-noise ratio in 'min_snr' (section 3.4 there).

    Raises:
        UserError: an unknown name, a number out of range, or a weight with loss 'kl'.
    """

    def __init__(
        self,
        process: GaussianProcess,
        loss: str = "mse",
        weight: str = "none",
        vb_weight: float = 1.0,
        label_drop: float = 0.1,
        max_weight: float = 400.0,
        gamma: float = 5.0,
    ):
        for name, value, known in [("loss", loss, LOSSES), ("weight", weight, WEIGHTS)]:
            if value not in known:
                raise UserError(f"The diffusion objective knows no {name} {value!r}. Choose one of {', '.join(known)}.")
        if loss == "kl" and weight != "none":
            raise UserError(f"The variational bound takes no weight {weight!r}. Set weight=none, or loss=mse.")
        if not 0 <= label_drop <= 1:
            raise UserError(f"label_drop is a share of the labels, but is {label_drop}. Set it between 0 and 1.")
        if vb_weight < 0 or max_weight <= 0 or gamma <= 0:
            raise UserError(
                "A loss weight is negative or zero. Set vb_weight to 0 or more, max_weight and gamma above 0."
            )
        self.process, self.loss_name = process, loss
        self.vb_weight, self.label_drop = vb_weight, label_drop
        self.vb_scale = process.steps / 1000 if loss == "rescaled_mse" else 1.0
        self.weights = Tables(weight=error_weights(process, weight, max_weight, gamma))

    def loss(self, network: Network, batch: tuple[Tensor, Tensor], draws: Draws, state: State | None = None) -> Loss:
        """Loss of one micro-batch (x_0 (N, C, H, W), labels (N,)); `state` is not needed by this objective."""
        x0, y = batch
        noise = draws.normal("noise", x0.shape[1:]).to(x0)
        t = draws.integers("t", self.process.steps).to(x0.device)
        y = drop_labels(y, draws, self.label_drop, network.num_classes)
        losses = self.losses(network, x0, t, y, noise)
        parts = {name: values.detach() for name, values in losses.items()}
        return Loss(losses["loss"].mean(), parts, self.process.network_time(t) / self.process.timesteps)

    has_teacher = False
    scheduled = False
    forward_mode = False

    def check(self, batch_size: int) -> None:
        """Nothing of this objective depends on the batch."""

    def renews_teacher(self, step: int, max_steps: int) -> bool:
        return False

    @torch.no_grad()
    def denoising(self, network: Network, batch: tuple[Tensor, Tensor], draws: Draws) -> Tensor:  # (N,)
        """The loss of each sample."""
        return self.loss(network, batch, draws).parts["loss"]

    def losses(self, network: Network, x0: Tensor, t: Tensor, y: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Losses of each sample, (N,) each: 'loss' = weight 'mse' + vb_weight 'vb', or the bound alone for 'kl'.

        Args:
            network: (x_t, network time, y) -> raw output.
            x0: (N, C, H, W) data.
            t: (N,) int64 kept timesteps.
            y: (N,) labels, used as they are.
            noise: (N, C, H, W) standard normal.
        """
        process = self.process
        x_t = process.q_sample(x0, t, noise)
        output = network(x_t, process.network_time(t), y)
        if self.loss_name == "kl":
            return {"loss": process.steps * bound_term(process, process.predict(output, x_t, t), x0, x_t, t)}
        predicted, fraction = process.split(output, x_t)
        mse = mean_flat((process.target(x0, noise, t) - predicted) ** 2)
        losses = {"mse": mse, "loss": self.weights.at("weight", t, mse) * mse}
        if fraction is not None:
            # IDDPM section 3.1: the bound teaches the variance only, so the mean is held fixed in it.
            frozen = process.predict(torch.cat([predicted.detach(), fraction], dim=1), x_t, t)
            losses["vb"] = self.vb_scale * bound_term(process, frozen, x0, x_t, t)
            losses["loss"] = losses["loss"] + self.vb_weight * losses["vb"]
        return losses

    @torch.inference_mode()
    def bits_per_dim(
        self, network: Network, x0: Tensor, y: Tensor, noise_fn: Callable[[], Tensor], clip: float = 1.0
    ) -> dict[str, Tensor]:
        """The whole variational bound (DDPM eq. 5) in bits per dimension; every timestep costs one network call.

        Args:
            network: (x_t, network time, y) -> raw output.
            x0: (N, C, H, W) pixels in [-1, 1].
            y: (N,) labels.
            noise_fn: gives (N, C, H, W) standard normal noise, once per timestep, the noisiest first.
            clip: hold the predicted x_0 in [-clip, clip]; 0 = not.

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

    At a fixed x_t = alpha x_0 + sigma epsilon, errors d of x_0 and epsilon hang together by
    alpha d(x_0) = -sigma d(epsilon), and v = alpha epsilon - sigma x_0 by d(v) = -d(x_0) / sigma = d(epsilon) / alpha.
    """
    alpha, sigma = process.tables["alpha"].numpy(), process.tables["sigma"].numpy()
    if weight == "v":
        divisor = {"epsilon": alpha, "x0": sigma, "v": np.ones_like(alpha)}[process.prediction]
        return np.minimum(divisor**-2, max_weight)
    if weight == "none":
        return np.ones_like(alpha)
    return weighting.gaussian_weights(weight, process.prediction, (alpha / sigma) ** 2, gamma)
