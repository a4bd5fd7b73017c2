"""Muon beside AdamW: which parameters go where, stacks of experts, and a checkpoint's state."""

import pytest
import torch
from torch import nn

from ditune.errors import UserError
from ditune.networks import build_network
from ditune.training.muon import MuonAdamW, StackedMuon, orthogonal

LR = {"lr": 0.01, "weight_decay": 0.1}


@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (5, 5)])
def test_a_stack_is_stepped_as_its_matrices_are_by_torch(monkeypatch, shape):
    """torch's own steps, but for the bf16 in which it makes them orthogonal."""
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(3, *shape))
    matrices = [nn.Parameter(w.clone()) for w in stack.detach()]
    ours, torchs = StackedMuon([stack], **LR), torch.optim.Muon(matrices, **LR, adjust_lr_fn="match_rms_adamw")
    for in_bf16, tolerance in ((False, 1e-6), (True, 2e-3)):
        with monkeypatch.context() as patched:
            if not in_bf16:
                patched.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
            for _ in range(3):
                stack.grad = torch.randn_like(stack)
                for matrix, grad in zip(matrices, stack.grad, strict=True):
                    matrix.grad = grad.clone()
                ours.step()
                torchs.step()
        torch.testing.assert_close(stack, torch.stack(matrices), rtol=0, atol=tolerance)


def test_matrices_become_orthogonal():
    torch.manual_seed(0)
    group = torch.optim.Muon([nn.Parameter(torch.zeros(2, 2))]).param_groups[0]
    x = orthogonal(torch.randn(2, 5, 7), group["ns_coefficients"], group["ns_steps"], group["eps"])
    singular = torch.linalg.svdvals(x)
    assert ((singular > 0.5) & (singular < 1.3)).all()


def test_an_expert_without_tokens_stays_as_it_is():
    stack = nn.Parameter(torch.randn(2, 4, 4))
    before = stack.detach().clone()
    stack.grad = torch.stack([torch.zeros(4, 4), torch.eye(4)])
    StackedMuon([stack], lr=0.01).step()
    assert torch.equal(stack[0], before[0])
    assert not torch.equal(stack[1], before[1])


@pytest.mark.parametrize("expert", ["swiglu", "gelu"])
def test_matrices_of_experts_are_muons_and_their_biases_are_not(expert):
    network = build_network("tiny_moe", num_classes=3, input_size=8, in_channels=3, expert=expert)
    named = dict(network.named_parameters())
    muons = {id(p) for p in MuonAdamW(named.items(), lr=1e-3, muon_lr=1e-3).parts[0].param_groups[0]["params"]}
    found = {name for name, p in named.items() if id(p) in muons}
    stacks = {name for name, p in named.items() if p.ndim == 3 and name.startswith("blocks.")}
    assert stacks
    assert stacks <= found
    assert not [n for n in found if "bias" in n or "adaLN" in n or not n.startswith("blocks.")]


def test_training_goes_on_from_a_checkpoint_to_the_bit():
    def stepped(optimizer, network, steps):
        for _ in range(steps):
            for p in network.parameters():
                p.grad = p.detach().sin() + 0.1
            optimizer.step()

    def made():
        torch.manual_seed(0)
        network = build_network("tiny_moe", num_classes=3, input_size=8, in_channels=3)
        return network, MuonAdamW(network.named_parameters(), lr=1e-3, muon_lr=1e-3)

    (whole, first), (stopped, second), (resumed, third) = made(), made(), made()
    stepped(first, whole, 4)
    stepped(second, stopped, 2)
    resumed.load_state_dict(stopped.state_dict())
    third.load_state_dict(second.state_dict())
    stepped(third, resumed, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_method_without_matrices_is_sent_to_adamw():
    with pytest.raises(UserError, match="optimizer=adamw"):
        MuonAdamW([("blocks.0.norm.bias", nn.Parameter(torch.zeros(3)))], lr=1e-3, muon_lr=1e-3)
