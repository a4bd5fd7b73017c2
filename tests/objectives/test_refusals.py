"""Every value that a process, objective, sampler or balance refuses is named by its key, with a remedy."""

import re

import pytest

from ditune.errors import UserError
from ditune.moe.balance import Balance
from ditune.objectives import (
    AlphaFlow,
    ConsistencyDistillation,
    FlowMatching,
    GaussianDiffusion,
    LiveReflow,
    MeanFlow,
    ProgressiveDistillation,
    Shortcut,
    SoFlow,
)
from ditune.processes import FlowProcess, GaussianProcess
from ditune.samplers import DDIM, Euler, Multistep, RungeKutta, ShortcutSampler

FLOW, ANY_STEP, HALVED = FlowProcess(), FlowProcess(step="size"), FlowProcess(step="log2", base_steps=128)
DIFFUSION = GaussianProcess()

# class, its process (None = it takes none), prefix of its keys, and refused values by argument
REFUSED = [
    (FlowProcess, None, "objective.process", {"step": "log3", "data_at": 2, "time_scale": 0.0, "sigma_min": 1.0}),
    (FlowProcess, None, "objective.process", {"base_steps": 3}),
    (GaussianProcess, None, "objective.process", {"schedule": "sine", "prediction": "y", "variance": "none"}),
    (GaussianProcess, None, "objective.process", {"timesteps": 0}),
    (GaussianDiffusion, DIFFUSION, "objective", {"loss": "l1", "weight": "snr", "label_drop": 2}),
    (GaussianDiffusion, DIFFUSION, "objective", {"vb_weight": -1.0, "max_weight": 0.0, "gamma": 0.0}),
    (FlowMatching, FLOW, "objective", {"times": "normal", "weight": "snr", "label_drop": -1}),
    (FlowMatching, FLOW, "objective", {"std": 0.0, "shift": 0.0, "gamma": 0.0}),
    (Shortcut, HALVED, "objective", {"levels": "all", "target": "mean", "bootstrap_every": 0, "clamp": 0.0}),
    (Shortcut, HALVED, "objective", {"dt_bias": True}),
    (ProgressiveDistillation, HALVED, "objective", {"label_drop": 0.1, "clamp": -1.0}),
    (ConsistencyDistillation, HALVED, "objective", {"label_drop": 0.1, "clamp": -1.0}),
    (LiveReflow, HALVED, "objective", {"reflow_every": 0, "steps": 0}),
    (MeanFlow, ANY_STEP, "objective", {"share": 2, "std": 0.0, "power": -1.0, "eps": 0.0}),
    (AlphaFlow, ANY_STEP, "objective", {"begin": 1.0, "end": 0.0, "smallest": 0.5, "alpha": 0.0}),
    (SoFlow, ANY_STEP, "objective", {"first_ratio": 2.0, "last_ratio": 0.5, "end_std": 0.0}),
    (DDIM, None, "sampler.sampler", {"eta": 2.0}),
    (Euler, None, "sampler.sampler", {"shift": -1.0, "eta": -1.0, "told": 2.0}),
    (RungeKutta, None, "sampler.sampler", {"method": "euler", "shift": 0.0}),
    (Multistep, None, "sampler.sampler", {"method": "euler", "shift": 0.0}),
    (Balance, None, "balance", {"scope": "layer", "alpha": -1.0, "z": -1.0, "bias_rate": -1.0}),
]
CASES = [(cls, process, prefix, key, value) for cls, process, prefix, row in REFUSED for key, value in row.items()]


@pytest.mark.parametrize(
    ("cls", "process", "prefix", "key", "value"), CASES, ids=lambda v: getattr(v, "__name__", None)
)
def test_value_is_named_with_its_key_and_a_remedy(cls, process, prefix, key, value):
    positional = () if process is None else (process,)
    cls(*positional)  # the defaults are not refused
    with pytest.raises(UserError) as refusal:
        cls(*positional, **{key: value})
    message = str(refusal.value)
    written = str(value).lower() if isinstance(value, bool) else repr(value)
    assert message.startswith(f"{prefix}.{key} is {written}. ")
    assert re.search(r"\b([Ss]et|Choose)\b", message), message


@pytest.mark.parametrize(
    ("refused", "key", "value"),
    [
        (lambda: FlowProcess(step="log2"), "objective.process.base_steps", "null"),
        (lambda: Shortcut(FLOW), "objective.process.step", "'none'"),
        (lambda: LiveReflow(FLOW), "objective.process.step", "'none'"),
        (lambda: MeanFlow(HALVED), "objective.process.step", "'log2'"),
        (lambda: MeanFlow(FlowProcess(step="size", base_steps=8)), "objective.process.base_steps", "8"),
        (lambda: GaussianDiffusion(DIFFUSION, loss="kl", weight="v"), "objective.weight", "'v'"),
        (lambda: FLOW.in_steps(0), "steps", "0"),
        (lambda: DIFFUSION.in_steps(1001), "steps", "1001"),
        (lambda: Multistep().check(FLOW.in_steps(1)), "steps", "1"),
        (lambda: Shortcut(HALVED, levels="code").check(8), "batch_size", "8"),
    ],
)
def test_what_does_not_go_together_is_named_with_a_remedy(refused, key, value):
    with pytest.raises(UserError, match=r"\b[Ss]et\b") as refusal:
        refused()
    assert str(refusal.value).startswith(f"{key} is {value}")


def test_a_network_without_step_sizes_is_refused_by_the_shortcut_sampler():
    with pytest.raises(UserError, match=r"objective\.process\.step is 'none'\. Set sampler=euler"):
        ShortcutSampler().check(FLOW.in_steps(4))
