"""Experts by the time alone, and routers that see tokens before their modulation."""

import math

import pytest
import torch
from torch.testing import assert_close

from ditune.checkpoints import load_network, save_network
from ditune.config import rules
from ditune.config.components import build_components
from ditune.errors import UserError
from ditune.moe.statistics import BINS, RoutingStatistics, mutual_information
from ditune.networks import DiTMoE, activated
from ditune.networks.routing import TimeRouter
from ditune.peft import build_peft, merge
from ditune.processes import FlowProcess
from ditune.samplers import Fora
from helpers import SMALL_FLOW, compose, open_gates

TINY = {"input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "depth": 2, "num_heads": 4}
TINY |= {"num_classes": 10, "num_experts": 4, "expert_ratio": 1, "shared_ratio": 0.5}
TIMES = (0.0, 0.1, 249.9, 250.0, 499.9, 500.0, 750.0, 999.9, 1000.0, 1200.0)
SLICES = (0, 0, 0, 1, 1, 2, 3, 3, 3, 3)


def network_of(**options: object) -> DiTMoE:
    torch.manual_seed(0)
    network = DiTMoE(**TINY, **options)
    open_gates(network)
    return network


def inputs(n: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, 8, 8, generator=generator)
    return x, torch.linspace(0, 999, n), torch.arange(n) % 10


@pytest.mark.parametrize(
    ("table", "nats"),
    [
        ([[1, 1], [1, 1]], 0.0),
        ([[2, 0], [0, 2]], math.log(2)),
        ([[3, 0, 0], [0, 3, 0], [0, 0, 3]], math.log(3)),
        ([[1, 0], [1, 0]], 0.0),  # one expert has it all
        # H(1/2) - H(1/4): a binary symmetric channel that errs in a quarter of the cases
        ([[3, 1], [1, 3]], math.log(2) + 0.25 * math.log(0.25) + 0.75 * math.log(0.75)),
        ([[2, 0], [0, 1], [0, 1]], math.log(2)),  # both experts are known from the row
    ],
)
def test_mutual_information_of_known_tables_in_nats(table, nats):
    counts = torch.tensor(table, dtype=torch.float64)
    for scaled in (counts, 1000 * counts, counts.T):
        assert mutual_information(scaled).item() == pytest.approx(nats, abs=1e-12)


@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (8, 2)])
def test_the_time_chooses_by_slices_alone(experts, top_k):
    router = TimeRouter(experts, top_k, scale=2.0)
    time = torch.tensor(TIMES)[:, None].expand(-1, 3)
    dispatch, routing = router(time)
    for row, part in zip(routing.chosen_NTE, SLICES, strict=True):
        expected = torch.zeros(experts, dtype=torch.bool)
        expected[part * top_k : (part + 1) * top_k] = True
        assert torch.equal(row, expected.expand(3, experts))
    assert torch.equal(dispatch.weight_S, torch.full((len(TIMES) * 3 * top_k,), 2.0 / top_k))
    assert_close(routing.scores_NTE.sum(-1), torch.ones(len(TIMES), 3))
    assert dispatch.counts_E.sum() == len(TIMES) * 3 * top_k
    assert not list(router.parameters())
    assert not list(router.buffers())


def test_no_rounding_moves_a_boundary():
    """Whole times of 1000 in ten slices: the first time of each belongs to it."""
    time = torch.arange(1000.0)[:, None]
    chosen = TimeRouter(10, 1)(time)[1].chosen_NTE[:, 0].int().argmax(dim=-1)
    assert torch.equal(chosen, torch.arange(1000) // 100)


def test_a_network_by_time_is_the_network_of_the_slices_expert():
    """In slice e the network is the dense-routed network that has expert e alone; labels and tokens choose nothing."""
    network = network_of(choice="time", top_k=1).eval()
    x, _, y = inputs()
    state = network.state_dict()
    for e, t in enumerate((100.0, 300.0, 600.0, 900.0)):
        alone = DiTMoE(**(TINY | {"num_experts": 1}), top_k=1).eval()
        own = {k: v[e : e + 1] if ".experts." in k and "shared" not in k else v for k, v in state.items()}
        router = {k: v for k, v in alone.state_dict().items() if ".router." in k}
        alone.load_state_dict(own | router)
        routing = []
        time = torch.full((len(x),), t)
        out = network(x, time, y, routing=routing)
        assert_close(out, alone(x, time, y), atol=1e-6, rtol=1e-5)  # its one score is 1
        for layer in routing:
            assert torch.equal(layer.chosen_NTE.int().argmax(-1), torch.full((len(x), 16), e))
    # rows of one batch do not depend on each other
    time = torch.tensor([100.0, 300.0, 600.0, 900.0, 999.0, 0.0])
    together = network(x, time, y)
    assert_close(together, torch.cat([network(x[i : i + 1], time[i : i + 1], y[i : i + 1]) for i in range(6)]))


def test_its_information_on_time_is_the_entropy_of_the_slices():
    network = network_of(choice="time", top_k=2).eval()  # two slices
    statistics = RoutingStatistics(network)
    process = FlowProcess()
    time = (torch.arange(4 * BINS) + 0.5) / (4 * BINS)
    x, y = torch.randn(4 * BINS, 4, 8, 8), torch.arange(4 * BINS) % 10
    routing = []
    with torch.no_grad():
        network(x, process.network_time(time), y, routing=routing)
    statistics.add(routing, time, y)
    values = statistics.per_layer()
    assert values["mi_time"].tolist() == pytest.approx([math.log(2)] * 2, abs=1e-6)
    assert values["mi_position"].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert values["max_vio"].tolist() == [0, 0]  # uniform times load evenly
    assert statistics.log()["routing/mi_time"] == pytest.approx(math.log(2))


def test_only_the_experts_of_the_slice_get_gradients():
    network = network_of(choice="time", top_k=1)
    x, _, y = inputs()
    network(x, torch.full((len(x),), 600.0), y).square().sum().backward()
    for layer in network.moe_layers.values():
        for parameter in layer.experts.parameters():
            assert [bool(g.any()) for g in parameter.grad] == [False, False, True, False]


@pytest.mark.parametrize("options", [{"choice": "time"}, {"route_on": "unmodulated"}])
def test_checkpointing_caches_and_files_know_it(options, tmp_path):
    network = network_of(**options)
    x, t, y = inputs()
    out = network(x, t, y)
    network.gradient_checkpointing = True
    again = network(x, t, y)
    assert torch.equal(out, again)
    again.square().sum().backward()
    assert all(p.grad is not None for p in network.moe_layers[0].parameters())
    network.gradient_checkpointing = False
    save_network(tmp_path / "network.safetensors", network, FlowProcess().config)
    loaded = load_network(tmp_path / "network.safetensors")
    assert loaded.config == network.config
    assert options.items() <= loaded.config.items()
    with torch.no_grad():
        expected = network.eval()(x, t, y)
        assert torch.equal(loaded.eval()(x, t, y), expected)
        with Fora(1).used(network, 1) as cached:
            assert torch.equal(cached(x, t, y), expected)


def test_unmodulated_routers_see_the_norm_and_experts_what_they_saw():
    x, t, y = inputs()
    plain, other = network_of().eval(), network_of(route_on="unmodulated").eval()
    other.load_state_dict(plain.state_dict())
    seen = {}
    layer = other.moe_layers[0]
    layer.register_forward_hook(lambda module, given, _: seen.update(tokens=given[0], by=given[1]))
    first = []
    other(x, t, y, routing=first)
    centred = seen["by"].mean(-1), seen["by"].var(-1, correction=0)
    assert_close(centred[0], torch.zeros_like(centred[0]), atol=1e-5, rtol=0)
    assert_close(centred[1], torch.ones_like(centred[1]), atol=1e-3, rtol=0)  # a LayerNorm's output, for any t
    assert_close(first[0].logits_NTE, seen["by"] @ layer.router.weight.T, atol=1e-5, rtol=1e-5)
    shift, scale = other.blocks[0].adaLN_modulation(other.t_embedder(t) + other.y_embedder(y)).chunk(6, dim=1)[3:5]
    assert_close(seen["tokens"], seen["by"] * (1 + scale[:, None]) + shift[:, None], atol=1e-5, rtol=1e-5)
    assert not torch.equal(plain(x, t, y), other(x, t, y))


def test_without_modulation_both_routers_agree_to_the_bit():
    x, t, y = inputs()
    plain, other = network_of().eval(), network_of(route_on="unmodulated").eval()
    for block in plain.blocks:
        size = block.adaLN_modulation[1].out_features // 6
        for parameter in block.adaLN_modulation[1].parameters():
            parameter.data[3 * size : 5 * size] = 0  # shift and scale of the second branch
    other.load_state_dict(plain.state_dict())
    assert torch.equal(plain(x, t, y), other(x, t, y))


def test_the_defaults_leave_configs_and_weights_as_they_were():
    plain, named = network_of(), network_of(route_on="modulated", time_range=1.0)
    assert plain.config == named.config
    assert not {"route_on", "time_range"} & plain.config.keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, named.state_dict()[name])


@pytest.mark.parametrize("method", ["full", "difffit", "adaptformer", "vpt_deep"])
def test_methods_apply_to_a_network_by_time(method):
    network = network_of(choice="time")
    x, t, y = inputs()
    before = network(x, t, y)
    adapted = build_peft(method, lr=1e-3)
    adapted.apply(network)
    after = network(x, t, y)
    if adapted.starts_as_identity:
        assert torch.equal(before, after)
    after.square().sum().backward()
    if not adapted.unmergeable:
        merge(network)
        assert_close(network(x, t, y), after, atol=1e-5, rtol=1e-5)


def test_the_cost_of_a_token_counts_its_experts():
    by_time, learned = network_of(choice="time"), network_of()
    routers = sum(layer.router.weight.numel() for layer in learned.moe_layers.values())
    assert activated(by_time) == activated(learned) - routers


@pytest.mark.parametrize(
    "wrong",
    [
        {"choice": "time", "top_k": 3},
        {"choice": "time", "renormalize": True},
        {"choice": "time", "route_on": "unmodulated"},
        {"choice": "time", "untimed": True},
        {"choice": "time", "time_range": 0.0},
        {"route_on": "shifted"},
    ],
)
def test_refuses_what_has_no_meaning(wrong):
    with pytest.raises(ValueError, match=r"route_on|time"):
        network_of(**wrong)


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ([], "balance.alpha=0"),
        (["balance.alpha=0", "+network.time_range=1"], "network.time_range is 1, and the process ends"),
        (["balance.alpha=0"], None),
    ],
)
def test_rules_of_a_training_by_time(overrides, part, tmp_path, pictures):
    network = ["network=emoji_moe_xs", "+network.choice=time", "peft=full", "balance=batch"]
    flow = [override for override in SMALL_FLOW if not override.startswith("network=")]
    cfg = compose(tmp_path, *flow, *network, f"data.root={pictures}", *overrides)
    components = build_components(cfg)
    if part is None:
        rules.check(components, rules.OF_A_TRAINING)
    else:
        with pytest.raises(UserError, match=part):
            rules.check(components, rules.OF_A_TRAINING)
