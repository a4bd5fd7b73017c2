"""Diffusion processes: how data become noise, and how a network's output is read on the way back."""

from ditune.processes.gaussian import GaussianProcess, Prediction
from ditune.processes.schedules import BETAS, Tables, kept_timesteps

__all__ = ["BETAS", "GaussianProcess", "Prediction", "Tables", "kept_timesteps"]
