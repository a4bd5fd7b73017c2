"""The one LightningModule: a network, an objective, a PEFT method and an autoencoder, composed by the config."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ditune.autoencoders import Autoencoder
from ditune.data import from_uint8
from ditune.data.stream import micro_batch_size
from ditune.distributed import is_spread, local, snapshot, spread_like
from ditune.errors import UserError
from ditune.moe.balance import Balance, Watched
from ditune.networks.unread import unread_of
from ditune.objectives import Loss, Objective, State
from ditune.peft import Off, PeftMethod
from ditune.rng import StepRandom
from ditune.training.checkpoint_io import rewind
from ditune.training.ema import Ema, with_weights
from ditune.training.nonfinite import NonFinite, is_maskable, norms_of
from ditune.training.random_ahead import RandomAhead
from ditune.training.sharding import Sharded
from ditune.training.sparsity import Sparsity
from ditune.training.step_losses import StepLosses


class GenerativeModule(pl.LightningModule):
    """Trains what `method` selects of `network`.

    Args:
        network: the network, with `method` applied to it.
        objective: gives the loss of a batch.
        method: what trains.
        autoencoder: pixels to latents, frozen.
        optimizer: (name, parameter) pairs -> optimizer.
        scheduler: optimizer -> learning-rate scheduler.
        ema_decay: of the EMA of the trainable parameters.
        seed: of all random numbers of the training.
        batch_size: global batch.
        identity: the resume key, plain values that a checkpoint must share with the run that resumes from it.
        balance: of the experts' load; None = the network has no experts, or nobody looks at them.
        log_every: steps between two lines of the log; 0 = none.
        nonfinite: what is done at a step whose gradient is not finite; None = the training stops.
        sparsity: which weights are zero; None = none is masked.
    """

    strict_loading = False  # checkpoints hold only what trains; on_load_checkpoint checks that it is all of it

    def __init__(
        self,
        network: nn.Module,
        objective: Objective,
        method: PeftMethod,
        autoencoder: Autoencoder,
        optimizer: Callable[[Iterable[tuple[str, nn.Parameter]]], Optimizer],
        scheduler: Callable[[Optimizer], Any],
        ema_decay: float,
        seed: int,
        batch_size: int,
        identity: dict[str, Any],
        balance: Balance | None = None,
        log_every: int = 10,
        nonfinite: NonFinite | None = None,
        sparsity: Sparsity | None = None,
    ):
        super().__init__()
        self.network, self.objective, self.method = network, objective, method
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.ema = Ema(method.trainable(network), ema_decay, unread=unread_of(network) is not None)
        self.balance, self.statistics = balance, None  # a RoutingStatistics, where a RoutingMonitor wants one
        self.routing: dict[str, float] = {}  # what it found at the end, means over the layers
        self.teacher: dict[str, Tensor] = {}  # weights of what trains, where the objective has a teacher
        self.seed, self.batch_size, self.identity, self.log_every = seed, batch_size, identity, log_every
        self.base = Off(network) if objective.needs_base else None  # of the values that no checkpoint has changed yet
        self.nonfinite, self.masks = nonfinite or NonFinite(), False
        self.sparsity, self.critic = sparsity, objective.critic
        self.random = RandomAhead(seed, batch_size)
        self.names: Callable[[list[int]], list[str]] = lambda positions: []  # files of the images at positions
        self.begun_with: int | None = None  # micro-batch of the run that this one goes on from
        self.losses = StepLosses()  # of the step that has a line in the log

    def __setattr__(self, name: str, value: Any) -> None:
        """Lightning notes the hook at hand 36 times a step, for each of which nn.Module would make 15 calls."""
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What trains, by name; asking the method walks the whole network."""
        return self.ema.parameters

    def configure_model(self) -> None:
        """The processes know each other: a strategy that spreads the network over them does it here."""
        if isinstance(self.trainer.strategy, Sharded):
            decay, self.ema = self.ema.decay, None  # which would keep the parameters as they were
            self.trainer.strategy.spread(self)
            self.ema = Ema(self.method.trainable(self.network), decay)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.make_optimizer(list(self.trained.items()))
        if self.critic is not None:
            if not isinstance(optimizer, AdamW):
                raise UserError("objective.critic needs a group of AdamW. Set optimizer=adamw.")
            optimizer.add_param_group(self.critic.group())
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), "interval": "step"},
        }

    def on_fit_start(self) -> None:
        """The network lies on its device."""
        devices = {parameter.device for parameter in self.trained.values()}
        maskable = is_maskable(self.trainer.optimizers[0], self.method, devices)
        self.masks = maskable and not is_spread(self.network)
        if self.sparsity is not None:
            self.ema.follow()
            self.sparsity.begin(self.trained, self.ema.average)

    def on_fit_end(self) -> None:
        self.random.close()

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        total, loss, parts = self.micro_step(batch)
        step = self.step_of(batch)
        self.nonfinite.add(step, batch[2], loss.parts["loss"])
        if self._is_logged(step):
            self._log_loss(step, loss, parts, last=(batch_idx + 1) % self.trainer.accumulate_grad_batches == 0)
        return total

    def _is_logged(self, step: int) -> bool:
        """Whether a step has a line in the log, for which the device is waited for."""
        return self.log_every > 0 and (step + 1) % self.log_every == 0

    def step_of(self, batch: tuple[Tensor, Tensor, Tensor]) -> int:
        """The optimizer step that a micro-batch belongs to, from 0."""
        return int(batch[2][0]) // self.batch_size

    def micro_step(self, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Loss, dict[str, Tensor]]:
        """The loss of a micro-batch to be differentiated, its parts, and those of the balance; nothing is logged."""
        (images, y, positions), step = batch, self.step_of(batch)
        places = positions.tolist()
        random = self.random.of(places, self.device)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            x0 = self.latents(images, random)
        network = self.network if self.balance is None else Watched(self.network)
        loss = self.objective.loss(network, (x0, y), random, self._state(step))
        micro_step = self.batch_size // self.trainer.accumulate_grad_batches  # images, over all processes
        self.random.prepare(random, [place + micro_step for place in places])
        added, parts = (0.0, {}) if self.balance is None else self.balance.loss(network.routing, step)
        if self.statistics is not None:
            self.statistics.add(network.routing, loss.time, network.y)
        total = loss.total + self.method.penalty(self.network) + added
        return total * (1 + 0 * total.detach()), loss, parts  # by exactly 1, or by NaN, which no gradient hides

    def _state(self, step: int) -> State:
        """Before the step's first micro-step and after it the average is the same, so that all see one teacher."""
        self.ema.follow()
        if self.objective.updates_teacher(step, self.trainer.max_steps):
            self.teacher = {name: value.clone() for name, value in self.ema.average.items()}
        if self.objective.has_teacher:  # a resumed one lies on the CPU
            self.teacher = {name: value.to(self.device) for name, value in self.teacher.items()}
        ema, teacher = (with_weights(self.network, weights) for weights in (self.ema.average, self.teacher))
        teacher = teacher if self.objective.has_teacher else ema
        return State(step, self.trainer.max_steps, self.batch_size, ema, teacher, self.base)

    def latents(self, x: Tensor, random: StepRandom) -> Tensor:
        """What is learned, (N, C, h, w): of images, or of their cached mean and log-variance, sampled anew."""

        def normal(shape: Sequence[int]) -> Tensor:
            return random.normal("posterior", shape)

        if x.dtype == torch.uint8:
            return self.autoencoder.to_latent(from_uint8(x), normal)
        mean, *logvar = x.float().unbind(1)  # (N, M, C, h, w)
        return self.autoencoder.from_moments(mean, logvar[0] if logvar else None, normal)

    def _log_loss(self, step: int, loss: Loss, parts: dict[str, Tensor], last: bool) -> None:
        """Log the losses of all micro-batches of the step, at its last one."""
        self.losses.add(step, loss, parts)
        if last:
            values, images = self.losses.values(self.trainer)
            values["train/lr"] = torch.tensor(self.lr_schedulers().get_last_lr()[0])
            self.log_dict(values, batch_size=images)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by the norm, which Lightning refuses for fused optimizers, and let no update have one not finite."""
        step = self.global_step
        if self.sparsity is not None:
            self.sparsity.of_gradients(self.trained)
        gradients = {name: p.grad for name, p in self.trained.items() if p.grad is not None}
        of_critic = {} if self.critic is None else {f"critic.{k}": p.grad for k, p in self.critic.named_parameters()}
        whole_norm, norms = norms_of([*gradients.values(), *of_critic.values()])
        # clipped apart: large gradients of the one must not shrink the steps of the other
        norm = whole_norm if self.critic is None else torch.linalg.vector_norm(norms[: len(gradients)])
        self.settle()  # the step before, which has ended while this one was handed to the device
        # a NaN on any rank is in every rank's reduced gradients, so all of them do the same
        self.nonfinite.check(step, whole_norm, [*gradients, *of_critic], norms)
        if self.masks and not self._is_logged(step) and step + 1 < self.trainer.max_steps:
            optimizer.found_inf = self.nonfinite.skipped  # the fused update leaves all as it is where this is 1
        else:
            optimizer.found_inf, self.nonfinite.skipped = None, not self.settle()
        if self.sparsity is not None:
            self.sparsity.open(self.trained, self.ema.average)
        if self.nonfinite.skipped is True:
            optimizer.zero_grad(set_to_none=True)  # optimizers leave alone what has no gradient, and its state
            return
        if gradient_clip_val is not None:
            clip([local(gradient) for gradient in gradients.values()], gradient_clip_val, norm)
            if of_critic:
                clip(list(of_critic.values()), gradient_clip_val, torch.linalg.vector_norm(norms[len(gradients) :]))
        if self._is_logged(step):
            self.log("train/grad_norm", norm)

    def settle(self) -> bool:
        """Read whether the last step was skipped, and do what follows; all ranks call it before weights are looked at.

        Returns:
            Whether it was done.

        Raises:
            UserError: it was skipped, and the training ends.
        """
        return self.nonfinite.settle(self.trained, self.trainer, self.names)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        skipped = self.nonfinite.skipped  # a number on the device where it is not known here yet
        if skipped is not True:
            skipped = None if skipped is False else skipped
            if self.balance is not None:
                self.balance.update(self.network, skipped)
            self.method.after_step(self.network, self.global_step + 1)
            self.ema.update(self.global_step, skipped)
        if self.sparsity is not None:
            self.sparsity.close(self.trained, self.ema.average, self.global_step + 1)

    # Checkpoints: only what trains, its average, and what they belong to

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.settle()
        checkpoint["state_dict"] = {f"network.{k}": v for k, v in self.method.state_dict(self.network).items()}
        checkpoint["ema"] = self.ema.state_dict()
        checkpoint["teacher"] = {name: snapshot(value) for name, value in self.teacher.items()}
        checkpoint["method"] = self.method.training_state()
        checkpoint["balance"] = Balance.state_dict(self.network)
        if self.sparsity is not None:
            checkpoint["sparsity"] = self.sparsity.state_dict()
        if self.critic is not None:
            checkpoint["critic"] = {name: snapshot(value) for name, value in self.critic.state_dict().items()}
        checkpoint["skipped"] = self.nonfinite.in_a_row
        checkpoint["identity"] = self.identity
        checkpoint["micro_batch"] = micro_batch_size(
            self.batch_size, self.trainer.accumulate_grad_batches, self.trainer.world_size
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name.removeprefix("network."): value for name, value in checkpoint["state_dict"].items()}
        self.method.load_state_dict(self.network, trained)  # refuses what Lightning, not strict here, would let pass
        self.method.load_training_state(checkpoint["method"])
        self.ema.load_state_dict(checkpoint["ema"])
        self.teacher = {k: spread_like(v, self.ema.average[k]) for k, v in checkpoint["teacher"].items()}
        if self.sparsity is not None:
            self.sparsity.load_state_dict(checkpoint["sparsity"])
        if self.critic is not None:
            self.critic.load_state_dict(checkpoint["critic"])
        self.nonfinite.in_a_row = checkpoint.get("skipped", 0)  # checkpoints of before have none
        Balance.load_state_dict(self.network, checkpoint["balance"])
        rewind(checkpoint, self.trainer.accumulate_grad_batches)


def clip(gradients: list[Tensor], limit: float, norm: Tensor) -> None:
    """Scale gradients down in place to a norm of at most `limit`, as torch.nn.utils.clip_grads_with_norm_ does."""
    torch._foreach_mul_(gradients, torch.clamp(limit / (norm + 1e-6), max=1.0))
