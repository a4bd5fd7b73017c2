"""Processes: how data become noise, and how a network's output is read on the way back to data."""

from ditune.errors import UserError
from ditune.processes.flow import FlowProcess, expanded, shifted
from ditune.processes.gaussian import GaussianProcess, Prediction
from ditune.processes.schedules import BETAS, Tables, kept_timesteps

Process = GaussianProcess | FlowProcess


def build_process(config: dict) -> Process:
    """The process of a `config` that is stored with a network.

    Args:
        config: arguments of its class, and `kind`: "flow" for a `FlowProcess`; without a kind, a `GaussianProcess`.

    Raises:
        UserError: the process refuses an argument, or knows none of its name.
    """
    arguments = {key: value for key, value in config.items() if key != "kind"}
    try:
        return (FlowProcess if config.get("kind") == "flow" else GaussianProcess)(**arguments)
    except TypeError as error:
        raise UserError(
            f"The process {config} stored with the network is none ({error}). Copy the file again."
        ) from error


__all__ = [
    "BETAS",
    "FlowProcess",
    "GaussianProcess",
    "Prediction",
    "Process",
    "Tables",
    "build_process",
    "expanded",
    "kept_timesteps",
    "shifted",
]
