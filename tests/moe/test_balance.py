"""The balance has one weight: under loss scaling, accumulation, several processes and recomputed activations."""

import copy
import csv
import json

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import skewed_ddp
from ditune.commands.train import train
from ditune.errors import UserError
from ditune.moe.balance import Balance, Watched
from ditune.networks import DiTMoE, build_network
from ditune.networks.routing import Routing, balance_loss
from forked import ranks
from helpers import assert_same_bits, checkpoint

MOE = ["network=tiny_moe", "peft=full", "optimizer.lr=1e-3", "max_steps=4", "objective.process.variance=fixed_small"]
# of each image by itself and large, so that every part of the batch adds up and a wrong weight shows
STRONG = ["balance=sequence", "balance.alpha=1.0", "balance.z=0.01", "balance.bias_rate=0.01"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pictures):
    """`trained(*overrides)`: the network of a training of four steps."""
    from helpers import SMALL, compose

    def run(*overrides):
        folder = tmp_path_factory.mktemp("run")
        assert train(compose(folder, *SMALL, f"data.root={pictures}", *MOE, *overrides)) == 0
        return load_file(folder / "network.safetensors")

    return run


@pytest.fixture(scope="module")
def plain(trained):
    return trained(*STRONG)


def distance(a, b):
    skipped = ("qkv.bias",)  # softmax cancels a third of it: its gradient is rounding
    return max((a[name] - b[name]).abs().max().item() for name in a if not name.endswith(skipped))


@pytest.mark.parametrize("way", ["trainer.accumulate_grad_batches=2", "gradient_checkpointing=true"])
def test_the_same_network_by_another_way(trained, plain, way):
    assert distance(trained(*STRONG, way), plain) < 2e-5


def test_the_weight_shows_in_the_network(trained, plain):
    """So that the test above could fail: accumulation would have doubled it in the original."""
    assert distance(trained(*STRONG, "balance.alpha=2.0"), plain) > 1e-3
    biases = torch.stack([value for name, value in plain.items() if name.endswith("bias_E")])
    assert_close(biases.sum(dim=1), torch.zeros(2), atol=1e-6, rtol=0)
    assert biases.abs().max() > 0


def test_loss_scaling_scales_all_parts_alike():
    torch.manual_seed(0)
    network = build_network("tiny_moe", input_size=8, num_classes=3, in_channels=2)
    inputs = torch.randn(4, 2, 8, 8), torch.rand(4), torch.tensor([0, 1, 2, 3])
    found = []
    for scale in (1.0, 65536.0):
        network.zero_grad()
        watched = Watched(network)
        main = watched(*inputs).square().mean()
        total = main + Balance(alpha=0.01).loss(watched.routing, 0)[0]
        (scale * total).backward()
        found.append({name: p.grad / scale for name, p in network.named_parameters()})
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient, atol=1e-9, rtol=1e-5)
    assert found[0]["blocks.0.moe.router.weight"].any()


def test_two_processes_with_a_skewed_router(tmp_path):
    """Ranks end with the same weights and biases, those of one process, though one expert never gets a token."""
    ranks(lambda rank: skewed_ddp.train_a_part(rank, tmp_path), tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert_same_bits(first, second)
    alone = skewed_ddp.train(0, 1)
    before = skewed_ddp.network_with_an_empty_expert().state_dict()
    for name, value in alone.items():
        assert_close(first[name], value, atol=1e-5, rtol=1e-4)
    assert (alone["blocks.0.moe.router.bias_E"] - before["blocks.0.moe.router.bias_E"]).abs().max() > 0.05


def test_the_global_load_adds_up_over_micro_steps():
    def routing(experts):
        chosen = torch.nn.functional.one_hot(torch.tensor(experts), 4).bool()[None]
        logits = torch.randn(1, len(experts), 4)
        return Routing(logits, logits.softmax(dim=-1), chosen)

    balance = Balance(scope="global", alpha=1.0)
    one, two = routing([0, 0, 1]), routing([2, 3, 3])
    assert_close(balance.loss([one], 5)[0], balance_loss(one))
    assert_close(balance.loss([two], 5)[0], balance_loss(two, torch.tensor([2, 1, 1, 2])))
    assert_close(balance.loss([two], 6)[0], balance_loss(two))  # the next step begins anew


def test_biases_pull_the_load_even():
    torch.manual_seed(0)
    network = build_network("tiny_moe", input_size=8, num_classes=3, in_channels=2)
    inputs = torch.randn(16, 2, 8, 8), torch.rand(16), torch.zeros(16, dtype=torch.int64)
    balance, vio = Balance(scope="batch", alpha=0.0, bias_rate=0.01), []
    for step in range(60):
        watched = Watched(network)
        watched(*inputs)
        balance.loss(watched.routing, step)
        vio.append((balance.counts_LE.float() / balance.counts_LE.float().mean(dim=1, keepdim=True)).max().item() - 1)
        balance.update(network)
    assert vio[-1] < 0.25 * vio[0]


def test_routed_experts_learn_in_evaluation_mode_and_without_a_balance_loss():
    network = build_network("tiny_moe", input_size=8, num_classes=3, in_channels=2)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    watched = Watched(network.eval())
    x = torch.randn(2, 2, 8, 8, requires_grad=True)
    out = watched(x, torch.rand(2), torch.tensor([0, 1]))
    (out.square().sum() + Balance(alpha=0.0).loss(watched.routing, 0)[0]).backward()
    assert x.grad.any()
    assert all(p.grad.any() for layer in network.moe_layers.values() for p in layer.parameters())


def test_metrics_checkpoints_and_resume(small, tmp_path):
    overrides = [*MOE, "balance=loss_free", "balance.alpha=0.01", "callbacks.checkpoint.every_n_steps=2"]
    overrides += ["callbacks.routing.every_n_steps=2"]
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    assert train(small(*overrides, folder=whole)) == 0
    assert train(small(*overrides, "max_steps=2", folder=halved)) == 0
    assert train(small(*overrides, "resume=auto", folder=halved)) == 0
    a, b = checkpoint(whole), checkpoint(halved)
    assert_same_bits(a["state_dict"], b["state_dict"])
    assert_same_bits(a["balance"], b["balance"])
    assert any(value.any() for value in a["balance"].values())
    rows = list(csv.DictReader((whole / "metrics.csv").open()))
    assert all(1.0 - 1e-3 < float(row["train/balance"]) <= 2.0 for row in rows if row["train/balance"])  # at most E/k
    last = rows[-1]
    for layer in ("layer00", "layer01"):
        loads = [float(last[f"routing/{layer}/load{e:02}"]) for e in range(4)]
        assert sum(loads) == pytest.approx(4.0)
        assert float(last[f"routing/{layer}/max_vio"]) == pytest.approx(max(loads) - 1)
        assert float(last[f"routing/{layer}/mi_position"]) >= 0
    result = json.loads((whole / "result.json").read_text())
    assert result["routing"]["max_vio"] == pytest.approx(float(last["routing/max_vio"]))
    for name in ("load_0000002.png", "load_0000004.png", "time.png", "position.png", "class.png"):
        assert (whole / "routing" / name).stat().st_size > 1000


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["balance=batch", "network=tiny"], "no experts"),
        (["balance=batch", "balance.scope=planet"], "planet"),
        (["balance=batch", "balance.alpha=-1"], "balance.alpha is -1"),
    ],
)
def test_wrong_settings_are_refused(small, wrong, message):
    with pytest.raises(UserError, match=message):
        train(small(*MOE, *wrong))


def test_networks_are_copied_whole():
    network = build_network("tiny_moe", input_size=8, num_classes=3)
    assert isinstance(network, DiTMoE)
    other = copy.deepcopy(network)
    network.moe_layers[0].router.bias_E += 1
    assert not other.moe_layers[0].router.bias_E.any()
