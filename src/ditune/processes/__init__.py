"""Processes: how data become noise, and how a network's output is read on the way back to data."""

from ditune.errors import UserError
from ditune.processes.diffusion_path import DiffusionPath
from ditune.processes.flow import FlowProcess, expanded, shifted
from ditune.processes.gaussian import GaussianProcess, Prediction
from ditune.processes.schedules import BETAS, Tables, kept_timesteps

Process = GaussianProcess | FlowProcess


def build_process(config: dict) -> Process:
    """The process of a `config` that is stored with a network.

    Args:
        config: arguments of its class, and `kind`: "flow" for a `FlowProcess`, "diffusion_path" for a `DiffusionPath`;
            without a kind, a `GaussianProcess`.

    Raises:
        UserError: the process refuses an argument, or knows none of its name.
    """
    kinds = {"flow": FlowProcess, "diffusion_path": DiffusionPath}
    arguments = {key: value for key, value in config.items() if key != "kind"}
    try:
        return kinds.get(config.get("kind"), GaussianProcess)(**arguments)
    except TypeError as error:
        raise UserError(
            f"The process {config} stored with the network is none ({error}). Copy the file again."
        ) from error


def is_flow(config: dict) -> bool:
    """Whether a stored config is of a flow, on whatever path."""
    return config.get("kind") in ("flow", "diffusion_path")


__all__ = [
    "BETAS",
    "DiffusionPath",
    "FlowProcess",
    "GaussianProcess",
    "Prediction",
    "Process",
    "Tables",
    "build_process",
    "expanded",
    "is_flow",
    "kept_timesteps",
    "shifted",
]
