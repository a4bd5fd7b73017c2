"""Parts of a block that keep less for the backward pass: the same bits as autograd's, and less memory."""

from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from ditune.commands.parameters import build_method
from ditune.networks import DiT, DiTMoE, block

PEFT = Path(__file__).resolve().parents[2] / "configs" / "peft"
SMALL = {"input_size": 8, "hidden_size": 64, "depth": 2, "num_heads": 2, "num_classes": 3}


def adapted(method: str, cls: type[DiT] = DiT, **more) -> DiT:
    torch.manual_seed(0)
    network = cls(**SMALL, **more)
    build_method(method, PEFT).apply(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return network


def gradients(network: DiT, bf16: bool) -> dict[str, torch.Tensor]:
    """Of what trains and of the input, and the output."""
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = network(x, torch.tensor([0, 500, 999]), torch.tensor([0, 1, 2]))
    network.zero_grad()
    out.float().square().sum().backward()
    found = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    return found | {"input": x.grad, "output": out.detach()}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("method", ["full", "difffit", "lora", "norm"])
@pytest.mark.parametrize("cls", [DiT, DiTMoE])
def test_every_bit_of_output_and_gradients_is_autograds(cls, method, bf16, monkeypatch):
    network = adapted(method, cls, **({"num_experts": 2} if cls is DiTMoE else {}))
    calls = []
    for function in (block.NormModulate, block.GateScale):
        applied = function.apply
        monkeypatch.setattr(function, "apply", lambda *a, f=applied, n=function: calls.append(n) or f(*a))
    found = gradients(network, bf16)
    used = set(calls)
    assert used == {
        "norm": {block.NormModulate},  # of the last layer alone: the others have weights
        "difffit": {block.NormModulate, block.GateScale},
    }.get(method, {block.NormModulate})
    monkeypatch.setattr(block, "keeps_less", lambda x: False)
    expected = gradients(network, bf16)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_what_is_kept(monkeypatch):
    """Of each block's tokens (N, T, D): one less for each norm, and one less for each gamma of a branch."""
    network, tokens = adapted("difffit"), 3 * 16 * 64 * 4  # bytes

    def kept() -> int:
        seen = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            network(torch.randn(3, 4, 8, 8), torch.zeros(3), torch.zeros(3, dtype=torch.long))
        return sum(size for size, _ in seen.values())

    less = kept()
    monkeypatch.setattr(block, "keeps_less", lambda x: False)
    saved = kept() - less
    norms, gammas = 2 * 2 + 1, 2 * 1  # two blocks and the last layer; the first half of the blocks has gammas
    assert saved == pytest.approx((norms + gammas) * tokens, rel=0.05)


def test_forward_mode_and_transforms_see_plain_operations():
    network, x = adapted("difffit"), torch.randn(2, 4, 8, 8)
    t, y = torch.tensor([3.0, 700.0]), torch.tensor([0, 2])
    with sdpa_kernel(SDPBackend.MATH):
        _, derivative = torch.func.jvp(lambda x: network(x, t, y), (x,), (torch.ones_like(x),))
    step = 1e-2
    with torch.no_grad():
        difference = (network(x + step, t, y) - network(x - step, t, y)) / (2 * step)
    torch.testing.assert_close(derivative, difference, rtol=2e-2, atol=2e-3)
    given = torch.func.grad(lambda x: network(x, t, y).square().sum())(x)
    x.requires_grad_()
    network(x, t, y).square().sum().backward()
    torch.testing.assert_close(given, x.grad)
