"""SparseDM's transfer of knowledge (arXiv 2404.10445): a sparse network also learns the output of the dense one.

L = mean |target - eps_theta|^2 + weight mean |eps_dense - eps_theta|^2, both at the same x_t, with a weight of 0.1 in
the authors' training. The dense network is the pretrained one. Ours: the second term is of the network's own prediction
whatever that is, without the weight that the first one may have over time.
"""

import torch
from torch import Tensor

from ditune.errors import UserError
from ditune.objectives.base import Loss, Network, Objective, State
from ditune.objectives.diffusion import GaussianDiffusion
from ditune.objectives.transfer import Changed, Given, Transfer
from ditune.objectives.variational_bound import mean_flat
from ditune.rng import StepRandom


class DenseTeacher(Transfer):
    """Any objective of one target, with the squared difference from the pretrained network's prediction added.

    Args:
        objective: the wrapped objective.
        weight: of the difference, above 0.

    Raises:
        UserError: the wrapped objective has several targets, or no squared error.
    """

    group, neutral = "sparsity.teacher", "0"
    needs_base = True

    def __init__(self, objective: Objective, weight: float):
        super().__init__(objective)
        if isinstance(objective, GaussianDiffusion) and objective.loss_name == "kl":
            raise UserError(
                "sparsity.teacher adds to a squared error, and objective.loss=kl has none. Set objective.loss=mse, or "
                "sparsity.teacher=0."
            )
        self.weight = weight

    def given(self, network: Network, batch: tuple[Tensor, Tensor], random: StepRandom, state: State) -> Given:
        """The network, whose prediction is compared with the base's."""
        return Given(Compared(network, state.base), batch, random)

    def loss(self, network: Network, batch: tuple[Tensor, Tensor], random: StepRandom, state: State) -> Loss:
        """Loss of the wrapped objective and the teacher's term, whose values are the part 'teacher'."""
        given = self.given(network, batch, random, state)
        loss, error = self.objective.loss(*given, state), given.network.error  # error (N,)
        parts = {"loss": loss.parts["loss"] + self.weight * error.detach(), "teacher": error.detach()}
        return loss._replace(total=loss.total + self.weight * error.mean(), parts=loss.parts | parts)


class Compared(Changed):
    """A network that keeps how far its last output is from a teacher's.

    Args:
        network: the network.
        teacher: called with the same arguments, without gradient.
    """

    def __init__(self, network: Network, teacher: Network):
        super().__init__(network, network)
        self.teacher, self.error = teacher, None  # (N,)

    def __call__(self, x: Tensor, *inputs: Tensor, **more: Tensor) -> Tensor:
        """The network's output (N, C or 2C, H, W); a learned variance has no teacher."""
        output = self.call(x, *inputs, **more)
        with torch.no_grad():
            taught = self.teacher(x, *inputs, **more)
        channels = x.shape[1]
        self.error = mean_flat((taught[:, :channels].float() - output[:, :channels].float()) ** 2)
        return output
