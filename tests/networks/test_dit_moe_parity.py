"""DiT-MoE gives the numbers of feizc/DiT-MoE: forward, gradients, losses, sampling, keys, sizes, files."""

import json

import pytest
import torch
from torch.testing import assert_close

from ditune.checkpoints import load_network, read_header, save_network
from ditune.checkpoints.official_dit_moe import to_ours, to_theirs
from ditune.errors import UserError
from ditune.networks import NETWORKS, DiTMoE, activated, build_network
from ditune.networks.routing import balance_loss
from ditune.networks.sizes import DIT_MOE as SIZES
from ditune.objectives import GaussianDiffusion
from ditune.processes import FlowProcess, GaussianProcess
from ditune.samplers import Euler, guided, sample
from helpers import GOLDEN, composed, golden

ALPHA = 0.01
VARIANTS = {"tiny_dit_moe": False, "tiny_dit_moe_flash": True}
TINY = {"input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 64, "depth": 2, "num_heads": 4}
TINY |= {"num_classes": 10, "num_experts": 4}


def tiny(name: str) -> DiTMoE:
    network = DiTMoE(**TINY, qk_norm=VARIANTS[name])
    theirs = {key: value.float() for key, value in golden(f"{name}_weights").items()}
    network.load_state_dict(composed(to_ours(theirs)))
    return network


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_with_intermediates_and_routing(name):
    network, expected = tiny(name).eval(), golden(f"{name}_io")
    seen = {}
    for i, block in enumerate(network.blocks):
        block.register_forward_hook(lambda _, inputs, output, i=i: seen.__setitem__(f"block{i}_out", output[0]))
    for part in ("x_embedder", "t_embedder", "y_embedder"):
        module = getattr(network, part)
        module.register_forward_hook(lambda _, inputs, output, part=part: seen.__setitem__(f"{part[0]}_embed", output))
    routing = []
    out = network(expected["x"], expected["t"], expected["y"], routing=routing)
    assert_close(out, expected["out_eval"], atol=2e-5, rtol=1e-5)
    for key, value in seen.items():
        value = value + network.pos_embed if key == "x_embed" else value
        assert_close(value, expected[key], atol=2e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    for i, (layer, decided) in enumerate(zip(network.moe_layers.values(), routing, strict=True)):
        experts_Mk, weights_Mk = layer.router.choose(decided.scores_NTE.flatten(0, 1))
        assert torch.equal(experts_Mk, expected[f"topk_idx_sorted.{i}"])
        assert_close(weights_Mk, expected[f"topk_weight_sorted.{i}"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_balance_loss_and_gradients_of_every_parameter(name):
    network, expected = tiny(name), golden(f"{name}_io")
    norms = json.loads((GOLDEN / f"{name}_gradnorms.json").read_text())
    x = expected["x"].clone().requires_grad_()
    routing = []
    out = network(x, expected["t"], expected["y"], routing=routing)
    assert_close(out, expected["out_train"], atol=2e-5, rtol=1e-5)
    aux = torch.stack([ALPHA * balance_loss(decided) for decided in routing])
    assert_close(aux, expected["aux_per_block"], atol=1e-7, rtol=1e-5)
    assert_close(aux.sum(), expected["aux_total"][0], atol=1e-7, rtol=1e-5)
    ((out * expected["grad_out"]).sum() + aux.sum()).backward()
    assert_close(x.grad, expected["grad_x"], atol=5e-5, rtol=1e-4)
    found = to_theirs({key: p.grad for key, p in network.named_parameters()}, fused_attention=VARIANTS[name])
    assert found.keys() == {key for key, norm in norms.items() if norm is not None}
    for key, gradient in found.items():
        assert gradient.norm().item() == pytest.approx(norms[key], rel=1e-4, abs=2e-5), key
        if f"grad.{key}" in expected:
            assert_close(gradient, expected[f"grad.{key}"], atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_guidance_on_three_channels(name):
    network, expected = tiny(name).eval(), golden(f"{name}_io")
    x, y, t = (expected[f"cfg_{key}"] for key in ("x", "y", "t"))
    half = len(x) // 2
    found = guided(network, y[:half], 10, scale=1.5, channels=3)(x[:half], t[:half])
    wanted = expected["cfg_out"][:half]
    assert_close(found[:, :3], wanted[:, :3], atol=2e-5, rtol=1e-5)
    assert_close(found[:, 3:], wanted[:, 3:], atol=2e-5, rtol=1e-5)


def test_rectified_flow_losses_and_sampling():
    network, expected = tiny("tiny_dit_moe"), golden("tiny_dit_moe_io")
    process = FlowProcess(time_scale=1.0)
    x, y = expected["x"], expected["y"]

    def losses(t, noise):
        velocity = process.velocity(network, process.x_t(x, noise, t), t, y)
        return velocity, (velocity - process.target(x, noise)).square().flatten(1).mean(dim=1)

    velocity, loss = losses(expected["rf_t"], expected["rf_noise"])
    assert_close(velocity, expected["rf_v"], atol=2e-5, rtol=1e-5)
    assert_close(loss, expected["rf_loss_per_sample"], atol=2e-5, rtol=1e-5)
    _, loss = losses(expected["rf_forward_t_seed99"], expected["rf_forward_noise_seed99"])
    assert_close(loss.mean(), expected["rf_forward_loss_seed99"].squeeze(), atol=2e-5, rtol=1e-5)

    trajectory = [expected["rf_sample_z"]]
    sample(
        network.eval(),
        process,
        expected["rf_sample_z"],
        torch.tensor([3, 7]),
        sampler=Euler(),
        steps=5,
        guidance=2.0,
        on_step=lambda t, x, x0: trajectory.append(x),
    )
    assert_close(torch.stack(trajectory), expected["rf_sample_steps5_cfg2"], atol=1e-4, rtol=1e-4)


def test_diffusion_losses():
    network, expected = tiny("tiny_dit_moe"), golden("tiny_dit_moe_io")
    inputs = (expected[key] for key in ("x", "ddpm_t", "y", "ddpm_noise"))
    losses = GaussianDiffusion(GaussianProcess()).losses(network, *inputs)
    for key in ("loss", "mse", "vb"):
        assert_close(losses[key], expected[f"ddpm_{key}"], atol=2e-5, rtol=1e-4)


# Sizes, keys, files


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_and_keys(name):
    size, experts = name.removeprefix("dit_moe_").upper().split("_2_")
    key = f"{size}_2_{experts}"
    published = json.loads((GOLDEN / f"keys_{key}.json").read_text())
    with torch.device("meta"):
        network = build_network(name)
        keys = to_theirs(network.state_dict(), fused_attention=published["summary"]["use_flash_attn"])
    assert {k: list(v.shape) for k, v in keys.items()} == published["keys"]
    summary = json.loads((GOLDEN / "model_sizes.json").read_text())[key]
    table = network.pos_embed.numel()  # a constant, which the original counts
    assert sum(p.numel() for p in network.parameters()) + table == summary["total_params"]
    assert activated(network) + table == summary["activated_params"]


def test_every_network_of_experts_computes():
    for name in NETWORKS:
        if name.startswith(("tiny_moe", "emoji_moe", "emoji_dense")):
            network = build_network(name, input_size=8, num_classes=3, in_channels=4)
            out = network(torch.randn(2, 4, 8, 8), torch.tensor([0.0, 500.0]), torch.tensor([0, 3]))
            assert out.shape == (2, 8, 8, 8)
        elif name.startswith("dsmoe"):
            with torch.device("meta"):
                network = build_network(name)
            assert list(network.moe_layers) == list(range(1, len(network.blocks), 2))


def test_experts_in_the_deeper_half():
    network = DiTMoE(**(TINY | {"depth": 4}), moe_from=0.5)
    assert list(network.moe_layers) == [2, 3]


@pytest.fixture
def published(tmp_path):
    """A file in the original's layout: the width of S with one block, patch 8, and 3 small experts."""

    def write(qk_norm, change=lambda tensors: tensors):
        shape = {"input_size": 16, "patch_size": 8, "hidden_size": 384, "depth": 1, "num_heads": 6}
        sizes = {"num_experts": 3, "expert_ratio": 0.25, "shared_ratio": 0.5}
        network = DiTMoE(**shape, **sizes, qk_norm=qk_norm)
        path = tmp_path / "DiT-MoE.pt"
        torch.save(change(to_theirs(network.state_dict(), fused_attention=qk_norm)), path)
        return network, path

    return write


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"ema": t, "model": {}}, lambda t: {"model": t}])
def test_published_file_loads_unchanged(published, qk_norm, wrap):
    network, path = published(qk_norm, wrap)
    loaded = load_network(path)
    assert type(loaded) is DiTMoE
    assert loaded.config == network.config
    for key, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_incomplete_published_file_is_refused(published):
    key = "blocks.0.moe.experts.1.up_proj.weight"
    _, path = published(False, lambda tensors: {k: v for k, v in tensors.items() if k != key})
    with pytest.raises(UserError, match=r"experts\.1\.up_proj"):
        load_network(path)


def test_our_own_file(tmp_path):
    network = build_network("tiny_moe", input_size=8, num_classes=3)
    network.moe_layers[0].router.bias_E[1] = 0.5
    save_network(tmp_path / "moe.safetensors", network, FlowProcess().config)
    assert read_header(tmp_path / "moe.safetensors")["class"] == "DiTMoE"
    loaded = load_network(tmp_path / "moe.safetensors")
    assert type(loaded) is DiTMoE
    assert loaded.config == network.config
    for key, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
