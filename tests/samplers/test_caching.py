"""Reuse of block outputs: numbers of FORA's and TaylorSeer's own code, exact identities, refusals."""

import json

import pytest
import torch
from torch.testing import assert_close

from ditune.errors import UserError
from ditune.networks import DiT, build_network
from ditune.processes import FlowProcess, GaussianProcess
from ditune.samplers import DDIM, DDPM, Delta, Euler, Fora, Multistep, RungeKutta, Taylor, sample
from helpers import GOLDEN, golden
from peft_helpers import build_method

PROCESS = GaussianProcess()
FORA, TAYLOR = golden("efficiency_cache_fora"), golden("efficiency_cache_taylor")
CACHES = {"fora": Fora(3), "taylor": Taylor(4, order=2), "newton": Taylor(3, order=2, form="newton"), "delta": Delta(3)}


def tiny(**changes: object) -> DiT:
    network = DiT(**json.loads((GOLDEN / "tiny_dit_config.json").read_text()) | changes)
    if not changes:
        network.load_state_dict(golden("tiny_dit_weights"))
    return network.eval().requires_grad_(False)


def moving(network: torch.nn.Module) -> torch.nn.Module:
    """Gates and outputs that are not zero, so that every block counts."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return network.eval().requires_grad_(False)


def counted(network: DiT) -> list[int]:
    """Rows of every call of the last block's attention."""
    rows: list[int] = []
    network.blocks[-1].attn.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    return rows


def walk(network, cache, steps=12, process=PROCESS, sampler=None, n=2, **options):
    torch.manual_seed(1)
    noise, states = torch.randn(n, 4, 8, 8), []
    stream = torch.Generator().manual_seed(2)
    final = sample(
        network,
        process,
        noise,
        torch.arange(n) % network.num_classes,
        sampler=sampler or DDIM(),
        steps=steps,
        next_noise=lambda: torch.randn(n, 4, 8, 8, generator=stream),
        on_step=lambda t, x, x0: states.append(x),
        cache=cache,
        **options,
    )
    return final, torch.stack(states)


@pytest.mark.parametrize("interval", [1, 2, 3, 5])
def test_fora_walks_as_its_own_code(interval):
    network, states = tiny(), []
    rows, noise = counted(network), iter(FORA["step_noise"].flip(0))
    options = {"sampler": DDPM(clip=1.0), "steps": 12, "guidance": 1.5, "guidance_channels": 3}
    options |= {"next_noise": lambda: next(noise), "on_step": lambda t, x, x0: states.append(x)}
    sample(network, PROCESS, FORA["z"], FORA["y"], cache=Fora(interval), **options)
    assert_close(torch.stack(states), FORA[f"N{interval}.samples"], atol=1e-4, rtol=0)
    full = [k for k in range(12) if Fora(interval).is_full(k, 12)]
    assert [11 - k for k in full] == FORA[f"N{interval}.full_steps"].tolist()
    assert rows == [4] * len(full)


@pytest.mark.parametrize("interval", [1, 2, 3, 5])
def test_fora_on_fixed_inputs(interval):
    with torch.inference_mode(), Fora(interval).used(tiny(), 12) as network:
        times = FORA["timestep_map"].flip(0)
        found = [network(x, t.expand(2), FORA["y"]) for x, t in zip(FORA["seq.x"].flip(0), times, strict=True)]
    assert_close(torch.stack(found), FORA[f"seq.N{interval}.out"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", ["N1_O0", "N3_O0", "N3_O3", "N4_O1", "N4_O2", "N4_O4", "N6_O2"])
def test_taylor_walks_as_its_own_code(case):
    interval, order = (int(text[1:]) for text in case.split("_"))
    cache, states = Taylor(interval, order, "taylor"), []
    network = tiny()
    rows = counted(network)
    options = {"sampler": DDIM(clip=1.0), "steps": 50, "guidance": 1.5, "guidance_channels": 3}
    sample(
        network, PROCESS, TAYLOR["z"], TAYLOR["y"], cache=cache, on_step=lambda t, x, x0: states.append(x), **options
    )
    assert_close(torch.stack(states)[TAYLOR["kept"]], TAYLOR[f"{case}.samples"], atol=1e-4, rtol=0)
    full = [k for k in range(50) if cache.is_full(k, 50)]
    assert [49 - k for k in full] == TAYLOR[f"{case}.full_steps"].tolist()
    assert rows == [4] * len(full)


@pytest.mark.parametrize("order", [0, 1, 2, 4])
def test_taylor_on_fixed_inputs(order):
    found, u = [], torch.arange(50) / 50
    with torch.inference_mode(), Taylor(4, order, "taylor").used(tiny(), 50) as network:
        for i in reversed(range(50)):
            x = TAYLOR["seq.base"] + u[i] * TAYLOR["seq.slope"] + u[i] ** 2 * TAYLOR["seq.quad"]
            found.append(network(x, TAYLOR["timestep_map"][i].expand(2), TAYLOR["y"]))
    assert_close(torch.stack(found)[TAYLOR["kept"]], TAYLOR[f"seq.N4_O{order}.out"], atol=2e-5, rtol=0)


SCALARS = {"linear": lambda i: 2 + 3 * i, "quadratic": lambda i: i**2, "cubic": lambda i: i**3}


def forecasts(cache: Taylor, name: str) -> torch.Tensor:
    """At i = 39, 38, 37, 36 from full calls at 49, 48, 44, 40, counted downwards."""
    entry = None
    for i in (49, 48, 44, 40):
        entry = cache.keep(entry, torch.tensor(float(SCALARS[name](i)), dtype=torch.float64), 49 - i)
    return torch.stack([cache.forecast(entry, 49 - i) for i in (39, 38, 37, 36)])


@pytest.mark.parametrize("order", range(4))
@pytest.mark.parametrize("name", SCALARS)
def test_forecasts_of_polynomials(name, order):
    assert_close(forecasts(Taylor(4, order, "taylor"), name), TAYLOR[f"scalar.{name}.O{order}"], rtol=1e-12, atol=0)
    degree = {"linear": 1, "quadratic": 2, "cubic": 3}[name]
    true = torch.tensor([SCALARS[name](i) for i in (39, 38, 37, 36)], dtype=torch.float64)
    exact = torch.allclose(forecasts(Taylor(4, order, "newton"), name), true, rtol=1e-12)
    assert exact == (order >= degree)


NETWORKS = {
    "dit": lambda: tiny(),
    "moe": lambda: moving(build_network("tiny_moe", in_channels=4, input_size=8, num_classes=10)),
    "lora": lambda: adapted("lora"),
    "vpt_deep": lambda: adapted("vpt_deep"),
    "vpt_shallow": lambda: adapted("vpt_shallow"),
}
CALLED_ONCE = {
    "ddim": (PROCESS, DDIM()),
    "ddpm": (PROCESS, DDPM()),
    "euler": (FlowProcess(), Euler()),
    "dpm_solver": (FlowProcess(), Multistep("dpm_solver")),
}


def adapted(method: str) -> DiT:
    network = tiny()
    build_method(method).apply(network)
    return moving(network)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("sampler", CALLED_ONCE)
@pytest.mark.parametrize("name", NETWORKS)
def test_interval_1_is_plain_sampling(name, sampler, guidance):
    process, chosen = CALLED_ONCE[sampler]
    network = NETWORKS[name]()
    plain = walk(network, None, 6, process, chosen, guidance=guidance)[0]
    for cache in (Fora(1), Taylor(1), *([] if name == "vpt_shallow" else [Delta(1)])):
        assert torch.equal(walk(network, cache, 6, process, chosen, guidance=guidance)[0], plain)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("policy", CACHES)
def test_what_was_kept_is_used_and_left_behind(policy, name):
    """The images differ from plain ones, the next plain generation does not, and image i is the same in any batch."""
    network = NETWORKS[name]()
    if (policy, name) == ("delta", "vpt_shallow"):
        with pytest.raises(UserError, match="number of tokens"):
            walk(network, CACHES[policy])
        return
    plain = walk(network, None)[0]
    cached = walk(network, CACHES[policy])[0]
    assert not torch.allclose(cached, plain, atol=1e-5)
    assert torch.equal(walk(network, None)[0], plain)
    assert torch.equal(walk(network, CACHES[policy])[0], cached)
    assert_close(walk(network, CACHES[policy], n=1)[0][0], cached[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("policy", CACHES)
def test_branches_that_do_not_see_x_are_reused_without_error(policy):
    """With weights of zero, attention and MLP are biases. Only the gates follow t, and they are never reused."""
    network = moving(tiny())
    for block in network.blocks:
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            layer.weight.data.zero_()
    plain, cached = walk(network, None)[0], walk(network, CACHES[policy])[0]
    if policy == "delta":  # it keeps what comes after the gates
        assert not torch.allclose(cached, plain, atol=1e-5)
    else:
        assert_close(cached, plain, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("policy", CACHES)
def test_guidance_that_begins_and_ends_makes_a_full_call(policy):
    network = tiny()
    rows = counted(network)
    final = walk(network, CACHES[policy], guidance=3.0, guidance_interval=(0.3, 0.7))[0]
    assert final.isfinite().all()
    sizes = [rows[k] for k in range(len(rows)) if k == 0 or rows[k] != rows[k - 1]]
    assert sizes == [2, 4, 2]


def test_the_calendar_of_delta_skips_rear_then_front():
    network = tiny()
    ran: list[list[int]] = [[] for _ in range(8)]
    calls = [0]
    network.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    for i, block in enumerate(network.blocks):
        block.attn.register_forward_pre_hook(lambda *_, i=i: ran[calls[0] - 1].append(i))
    walk(network, Delta(4, blocks=0.5, switch=0.5), steps=8)
    everything, first, last = [0, 1, 2], [0], [2]  # a range has two of three blocks
    assert ran == [everything, first, first, first, everything, last, last, everything]


def test_samplers_of_two_calls_are_refused():
    with pytest.raises(UserError, match="2 times in each step"):
        walk(tiny(), Fora(2), 4, FlowProcess(), RungeKutta())


def test_values_out_of_range_are_refused():
    for make in (lambda: Fora(0), lambda: Taylor(2, -1), lambda: Taylor(2, 1, "x"), lambda: Delta(2, 0.0)):
        with pytest.raises(UserError, match="cache"):
            make()
