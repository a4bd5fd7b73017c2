"""The mixture-of-experts layer gives the numbers of feizc/DiT-MoE, by every back end, dtype and way of calling it."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from ditune.checkpoints.official_dit_moe import to_ours, to_theirs
from ditune.networks import moe as moe_module
from ditune.networks.moe import MoE, by_grouped_mm, by_slices
from ditune.networks.routing import Router, balance_loss, z_loss
from helpers import composed, golden

LAYERS = {"moe_layer": (8, 2), "moe_layer_empty_expert": (4, 1)}
ALPHA = 0.01
BACK_ENDS = {"slices": by_slices, "grouped_mm": by_grouped_mm}


class Used(dict):
    """Golden values that remember which of them were asked for."""

    def __init__(self, values: dict[str, Tensor]):
        super().__init__(values)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.names.add(name)
        return super().__getitem__(name)


def layer_of(name: str) -> tuple[MoE, Used]:
    expected = Used(golden(name))
    num_experts, top_k = LAYERS[name]
    layer = MoE(32, num_experts, expert_size=128, shared_size=64, top_k=top_k)
    theirs = {f"moe.{key.removeprefix('w.')}": value for key, value in expected.items() if key.startswith("w.")}
    layer.load_state_dict({key.removeprefix("moe."): value for key, value in composed(to_ours(theirs)).items()})
    return layer, expected


def gradients(layer: MoE) -> dict[str, Tensor]:
    """Of every parameter, under the original's names."""
    found = {f"moe.{name}": p.grad for name, p in layer.named_parameters()}
    return {key.removeprefix("moe."): value for key, value in to_theirs(found, fused_attention=False).items()}


@pytest.fixture(params=BACK_ENDS)
def back_end(request, monkeypatch):
    monkeypatch.setattr(moe_module, "back_end", lambda *_: BACK_ENDS[request.param])
    return request.param


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("training", [True, False])
def test_layer_outputs_choices_balance_and_gradients(name, training, back_end):
    layer, expected = layer_of(name)
    layer.train(training)
    x = expected["x"].clone().requires_grad_()
    y, routing = layer(x)
    assert_close(y, expected["y_train"], atol=1e-5, rtol=1e-5)
    assert_close(y, expected["y_eval"], atol=1e-5, rtol=1e-5)
    assert_close(y, expected["y_eval_tp1"], atol=1e-5, rtol=1e-5)
    assert_close(layer.shared_experts(x), expected["y_shared_only"], atol=1e-5, rtol=1e-5)
    scores_ME = routing.scores_NTE.flatten(0, 1)
    assert_close(scores_ME, expected["scores"], atol=1e-6, rtol=1e-5)
    experts_Mk, weights_Mk = layer.router.choose(scores_ME)
    assert torch.equal(experts_Mk, expected["topk_idx_sorted"])
    assert_close(weights_Mk, expected["topk_weight_sorted"], atol=1e-6, rtol=1e-5)
    assert torch.equal(experts_Mk.sort(dim=-1).values, expected["topk_idx"].sort(dim=-1).values)
    assert_close(weights_Mk.sort(dim=-1).values, expected["topk_weight"].sort(dim=-1).values, atol=1e-6, rtol=1e-5)
    assert torch.equal(routing.chosen_NTE.sum(dim=(0, 1)), expected["load"])
    aux = ALPHA * balance_loss(routing)
    assert_close(aux, expected["aux_loss"][0], atol=1e-7, rtol=1e-5)
    assert_close(0.005 * balance_loss(routing), expected["aux_loss_alpha0005"][0], atol=1e-7, rtol=1e-5)
    assert_close(ALPHA * balance_loss(routing, per_sequence=True), expected["aux_loss_seq"][0], atol=1e-7, rtol=1e-5)
    inputs = (x, layer.router.weight)
    for found, wanted in zip(torch.autograd.grad(aux, inputs, retain_graph=True), ("x", "gate"), strict=True):
        assert_close(found, expected[f"aux_only_grad_{wanted}"], atol=1e-7, rtol=1e-4)
    ((y * expected["grad_out"]).sum() + aux).backward()  # the original adds the gradient of aux in secret
    assert_close(x.grad, expected["grad_x"], atol=1e-5, rtol=1e-4)
    for key, value in gradients(layer).items():
        assert_close(value, expected[f"grad.{key}"], atol=1e-5, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer(x)[0].float()
    wanted = expected["y_train_autocast_bf16"].float()
    assert (rounded - wanted).norm() < 0.01 * wanted.norm()
    layer.router.renormalize = True  # with one expert of several the original leaves its score
    normed = layer.router.choose(scores_ME)[1].sort(dim=-1).values
    assert_close(normed, expected["topk_weight_normed"].sort(dim=-1).values, atol=1e-6, rtol=1e-5)
    assert {key for key in expected if not key.startswith("w.")} == expected.names  # the whole file


def test_a_single_experts_weight_is_its_score_unless_it_is_asked_for():
    """A divided weight would be 1 whatever the router says, so that nothing would train the router."""
    scores = torch.tensor([[0.7, 0.2, 0.1]])
    for num_experts, renormalize, weight in ((3, False, 0.7), (3, True, 0.7), (3, "always", 1.0), (1, True, 1.0)):
        _, found = Router(4, num_experts, 1, score="sigmoid", renormalize=renormalize).choose(scores[:, :num_experts])
        assert found.item() == pytest.approx(weight)


def test_double_precision_by_numerical_differences():
    """The backward of the dispatch and of the experts, against differences."""
    torch.manual_seed(0)
    layer = MoE(4, 3, expert_size=4, shared_size=0, expert="gelu", top_k=2).double()
    layer.initialize_weights()
    x = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    dispatch, _ = layer.router(x)

    def routed(x: Tensor, *weights: Tensor) -> Tensor:
        rows = moe_module.to_rows(x.flatten(0, 1), dispatch)
        out = by_slices(layer.experts.form, rows, dispatch.counts_E, weights) * dispatch.weight_S.detach()[:, None]
        return moe_module.to_tokens(out, dispatch, 5)

    assert torch.autograd.gradcheck(routed, (x, *layer.experts.parameters()))


@pytest.mark.parametrize("expert", ["swiglu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_back_ends_agree(expert, dtype, autocast, monkeypatch):
    torch.manual_seed(0)
    layer = MoE(16, 4, expert_size=32, shared_size=16, expert=expert, top_k=2)
    layer.initialize_weights()
    layer.experts.to(dtype)
    layer.shared_experts.to(dtype)
    x = torch.randn(3, 20, 16).to(dtype)
    found = {}
    for name, run in BACK_ENDS.items():
        monkeypatch.setattr(moe_module, "back_end", lambda *_, run=run: run)
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y, _ = layer(x)
        y.float().square().sum().backward()
        assert all(p.grad.dtype == p.dtype for p in layer.parameters())
        found[name] = [y, *(p.grad for p in layer.parameters())]
    exact = dtype == torch.float32 and not autocast
    for a, b in zip(*found.values(), strict=True):
        assert_close(a, b, atol=1e-5 if exact else 2e-2, rtol=1e-5 if exact else 5e-2)


@pytest.mark.parametrize(
    ("rows", "trains", "experts", "expected"),
    [(64, True, 64, by_grouped_mm), (64, False, 64, by_slices), (256, True, 64, by_slices), (64, True, 8, by_slices)],
)
def test_many_large_experts_with_few_rows_that_train_are_computed_together(rows, trains, experts, expected):
    """On a CPU in fp32; `test_back_ends_agree` has their values."""
    with torch.device("meta"):
        weights = [torch.empty(experts, 384, 1536, requires_grad=trains)]
        x = torch.empty(rows * experts, 384)
        assert moe_module.back_end(x, weights) is expected
        with torch.no_grad():
            assert moe_module.back_end(x, weights) is by_slices
        assert moe_module.back_end(x.bfloat16(), weights) is by_slices


def test_autocast_leaves_the_choice_alone():
    layer, expected = layer_of("moe_layer")
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = layer(expected["x"])
    assert routing.scores_NTE.dtype == torch.float32
    assert torch.equal(routing.chosen_NTE.sum(dim=(0, 1)), expected["load"])
    error = (y - expected["y_train"]).norm() / expected["y_train"].norm()
    assert error < 1.5e-2  # the original's own error is 6e-3


def test_compiled_and_recomputed_layers_agree():
    layer, expected = layer_of("moe_layer")
    compiled = torch.compile(layer, dynamic=False, backend="aot_eager")
    calls = {"plain": layer, "compiled": compiled, "recomputed": partial(checkpoint, layer, use_reentrant=False)}
    for loop in range(2):  # another load must not compile again
        x0 = expected["x"].roll(loop, 0) * (1 + loop)
        found = {}
        for name, call in calls.items():
            layer.zero_grad()
            x = x0.clone().requires_grad_()
            y, routing = call(x)
            ((y * expected["grad_out"]).sum() + ALPHA * balance_loss(routing)).backward()
            found[name] = [y, x.grad, *(p.grad for p in layer.parameters())]
        for name in ("compiled", "recomputed"):
            for a, b in zip(found["plain"], found[name], strict=True):
                assert_close(a, b, atol=1e-5, rtol=1e-5)


# The options


def test_a_bias_changes_the_choice_but_not_the_weights():
    router = Router(8, 4, 2)
    torch.nn.init.normal_(router.weight)
    scores = torch.randn(6, 4).softmax(dim=-1)
    router.bias_E[3] = 10.0
    experts, weights = router.choose(scores)
    assert (experts[:, 0] == 3).all()
    assert_close(weights, scores.gather(1, experts))


def test_expert_choice_is_balanced_within_every_image():
    torch.manual_seed(0)
    layer = MoE(8, 4, expert_size=8, shared_size=0, top_k=2, choice="expert")
    layer.initialize_weights()
    x = torch.randn(3, 10, 8)
    y, routing = layer(x)
    assert (routing.chosen_NTE.sum(dim=1) == 5).all()  # T k / E
    alone, _ = layer(x[1:2])
    assert_close(alone[0], y[1])  # no image depends on the others
    weights = layer.experts.w_gate_EDF, layer.experts.w_up_EDF, layer.experts.w_down_EFD
    wanted = torch.zeros_like(x)
    for n, t, e in routing.chosen_NTE.nonzero().tolist():
        out = moe_module.swiglu_form(torch.matmul, x[n, t], *(w[e] for w in weights))
        wanted[n, t] += routing.scores_NTE[n, t, e] * out
    assert_close(y, wanted, atol=1e-6, rtol=1e-5)


def test_sigmoid_scores_sum_to_the_scale():
    torch.manual_seed(0)
    router = Router(8, 4, 2, score="sigmoid", renormalize=True, scale=2.0)
    torch.nn.init.normal_(router.weight)
    dispatch, routing = router(torch.randn(2, 5, 8))
    sums = torch.zeros(10).index_add(0, dispatch.token_S, dispatch.weight_S)
    assert_close(sums, torch.full((10,), 2.0))
    assert_close(routing.scores_NTE, routing.logits_NTE.sigmoid())
    assert_close(z_loss(routing), routing.logits_NTE.exp().sum(-1).log().square().mean())


@pytest.mark.parametrize(
    "wrong", [{"score": "cosine"}, {"choice": "expert", "renormalize": True}, {"renormalize": "yes"}, {"top_k": 5}]
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must be|renormalize"):
        Router(8, 4, **({"top_k": 2} | wrong))
