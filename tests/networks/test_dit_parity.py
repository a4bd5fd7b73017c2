"""DiT and what trains of it give the numbers of facebookresearch/DiT and of DiffFit's public re-implementations."""

import json

import pytest
import torch
from torch.testing import assert_close

from ditune.checkpoints import load_network
from ditune.errors import UserError
from ditune.networks import DiT, build_network
from ditune.networks.embeddings import sincos_2d, timestep_embedding
from ditune.objectives import GaussianDiffusion, drop_labels
from ditune.peft import BitFit, DiffFit, Full
from ditune.processes import GaussianProcess
from ditune.training import Ema
from helpers import GOLDEN, golden

OBJECTIVE = GaussianDiffusion(GaussianProcess())
LOSS_INPUTS = ("x_start", "t", "y", "noise")


def tiny() -> DiT:
    network = DiT(**json.loads((GOLDEN / "tiny_dit_config.json").read_text()))
    network.load_state_dict(golden("tiny_dit_weights"))
    return network


def with_gammas() -> tuple[DiT, DiffFit]:
    network, method = tiny(), DiffFit(lr=1e-3, gamma_depth=3)
    method.apply(network)
    gammas = {k.removeprefix("gamma."): v for k, v in golden("difffit_tiny").items() if k.startswith("gamma.")}
    method.load_state_dict(network, method.state_dict(network) | gammas)
    return network, method


def intermediates(network: DiT, x, t, y) -> dict[str, torch.Tensor]:
    """Everything between the layers of one forward, under the names of the golden file."""
    seen = {}

    def output_of(module, name):
        module.register_forward_hook(lambda _, inputs, output: seen.__setitem__(name, output))

    def input_of(module, *names):
        module.register_forward_pre_hook(lambda _, inputs: seen.update(zip(names, inputs, strict=False)))

    output_of(network.x_embedder, "x_embedder_out")
    input_of(network.t_embedder.mlp, "t_freq")
    output_of(network.t_embedder, "t_embed")
    output_of(network.y_embedder, "y_embed")
    input_of(network.blocks[0], "tokens_plus_pos", "c")
    for i, block in enumerate(network.blocks):
        output_of(block.adaLN_modulation, f"block{i}_adaLN")
        input_of(block.attn, f"block{i}_attn_in")
        output_of(block.attn, f"block{i}_attn_out")
        output_of(block, f"block{i}_out")
    output_of(network.final_layer, "final_layer_out")
    return {"out": network(x, t, y), **seen}


def test_forward_with_every_intermediate():
    expected = golden("tiny_dit_forward")
    found = intermediates(tiny(), expected["x"], expected["t"], expected["y"])
    assert set(expected) - set(found) == {"x", "t", "y", "t_frac", "t_frac_freq256", "t_frac_freq7_odd"}
    for name, value in found.items():
        atol = 1e-4 if name == "t_freq" else 2e-5  # cos(999 f) turns the last bit of f into 6e-5
        assert_close(value, expected[name], atol=atol, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_fractional_timesteps():
    expected = golden("tiny_dit_forward")
    for name, dim in (("t_frac_freq256", 256), ("t_frac_freq7_odd", 7)):
        assert_close(timestep_embedding(expected["t_frac"], dim), expected[name], atol=1e-4, rtol=0)


def test_label_drop_uses_the_last_row():
    expected = golden("tiny_dit_label_drop")

    class Forced:
        def uniform(self, purpose):
            return 1.0 - expected["force_drop_ids"]

    y = drop_labels(expected["labels"], Forced(), 0.5, 10)
    assert_close(tiny().y_embedder(y), expected["y_embed"], atol=0, rtol=0)


def test_gradients_of_every_parameter():
    expected, inputs = golden("tiny_dit_grads"), golden("diffusion_losses")
    network = tiny()
    x0, t, y, noise = (inputs[name] for name in LOSS_INPUTS)
    loss = OBJECTIVE.losses(network, x0, t, y, noise)["loss"].mean()
    loss.backward()
    assert_close(loss, expected["loss"], atol=1e-5, rtol=0)
    parameters = dict(network.named_parameters())
    assert {f"gradnorm.{name}" for name in parameters} == {k for k in expected if k.startswith("gradnorm.")}
    for name, parameter in parameters.items():
        assert_close(parameter.grad.norm(), expected[f"gradnorm.{name}"], atol=2e-5, rtol=1e-4)
        if f"grad.{name}" in expected:
            assert_close(parameter.grad, expected[f"grad.{name}"], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("method", "name"), [(Full(lr=1e-3), "full"), (BitFit(lr=1e-3), "bitfit_y")])
def test_five_steps_of_adamw(method, name):
    expected = golden(f"tiny_dit_train5_{name}")
    network = tiny()
    method.apply(network)
    trainable = method.trainable(network)
    optimizer = torch.optim.AdamW(trainable.values(), lr=method.lr, weight_decay=method.weight_decay, fused=True)
    ema = Ema(trainable, decay=0.9)
    for step in range(5):
        x0, t, y, noise = (expected[f"in.{key}"][step] for key in ("x", "t", "y", "noise"))
        loss = OBJECTIVE.losses(network, x0, t, y, noise)["loss"].mean()
        assert_close(loss, expected["losses"][step], atol=1e-5, rtol=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(step=1000)  # past its warm-up, which the reference does not have
    parts = {"model": dict(network.named_parameters()), "ema": ema.average}
    kept = [key for key in expected if key.partition(".")[0] in parts]
    assert len(kept) == (16 if name == "full" else len(trainable))
    for key in kept:
        part, _, parameter = key.partition(".")
        found, wanted = parts[part][parameter], expected[key]
        if parameter.endswith("qkv.bias"):
            # softmax cancels the bias of the keys: its gradient is rounding, which Adam blows up to whole steps
            found, wanted = (torch.cat([b[:64], b[128:]]) for b in (found, wanted))
        assert_close(found, wanted, atol=1e-5, rtol=1e-4)


# DiffFit


def test_difffit_forward_loss_and_gradients():
    expected, inputs = golden("difffit_tiny"), golden("diffusion_losses")
    network, method = with_gammas()
    assert_close(network(expected["x"], expected["t"], expected["y"]), expected["out"], atol=2e-5, rtol=1e-5)
    x0, t, y, noise = (inputs[name] for name in LOSS_INPUTS)
    loss = OBJECTIVE.losses(network, x0, t, y, noise)["loss"].mean()
    loss.backward()
    assert_close(loss, expected["loss"], atol=1e-5, rtol=0)
    gammas = {name: p for name, p in method.trainable(network).items() if "gamma" in name}
    assert {f"grad.{name}" for name in gammas} == {key for key in expected if key.startswith("grad.")}
    for name, gamma in gammas.items():
        assert_close(gamma.grad, expected[f"grad.{name}"], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("affine_norms", [False, True])
def test_difffit_starts_as_the_identity(affine_norms):
    expected = golden("tiny_dit_forward")
    inputs = [expected[name] for name in "xty"]
    network = tiny()
    before = network(*inputs)
    DiffFit(lr=1e-3, affine_norms=affine_norms).apply(network)
    assert_close(network(*inputs), before, atol=2e-6 if affine_norms else 0, rtol=0)


@pytest.mark.parametrize("affine_norms", [False, True])
def test_difffit_folds_into_a_plain_network(affine_norms):
    expected = golden("difffit_tiny")
    inputs = [expected[name] for name in "xty"]
    network, method = tiny(), DiffFit(lr=1e-3, gamma_depth=2, affine_norms=affine_norms)
    method.apply(network)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in method.trainable(network).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    adapted = network(*inputs)
    method.merge(network)
    assert network.state_dict().keys() == tiny().state_dict().keys()
    assert all(p.requires_grad for p in network.parameters())
    assert_close(network(*inputs), adapted, atol=1e-5, rtol=1e-5)
    assert (adapted - tiny()(*inputs)).abs().max() > 0.1  # the change was not nothing


def test_merge_of_the_golden_gammas():
    expected = golden("difffit_tiny")
    network, method = with_gammas()
    method.merge(network)
    assert_close(network(expected["x"], expected["t"], expected["y"]), expected["out"], atol=1e-5, rtol=1e-5)


# Position tables, keys, sizes


def test_position_tables():
    expected = golden("pos_embed")
    big = {
        "grid16_dim1152_rows_0_1_16_255": (16, [0, 1, 16, 255], 1.0),
        "grid32_dim1152_rows_0_1_32_1023": (32, [0, 1, 32, 1023], 1.0),
        "difffit_grid32_base16_dim1152_rows_0_1_2_32_33_1023": (32, [0, 1, 2, 32, 33, 1023], 0.5),
    }
    for name, (grid, rows, scale) in big.items():
        assert_close(sincos_2d(1152, grid, scale)[rows], expected[name], atol=1e-12, rtol=0)
    assert_close(sincos_2d(64, 4), expected["grid4_dim64"], atol=1e-12, rtol=0)
    assert_close(sincos_2d(64, 8, 0.5), expected["difffit_grid8_base4_dim64"], atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("name", "input_size", "file"),
    [
        ("dit_xl_2", 32, "official_keys_DiT-XL-2-256x256"),
        ("dit_xl_2", 64, "official_keys_DiT-XL-2-512x512"),
        ("dit_s_2", 32, "official_keys_DiT-S-2-256x256"),
    ],
)
def test_official_keys_and_shapes(name, input_size, file):
    expected = json.loads((GOLDEN / f"{file}.json").read_text())
    with torch.device("meta"):
        network = build_network(name, input_size=input_size)
    assert [(key, list(value.shape)) for key, value in network.state_dict().items()] == list(expected.items())


# Official files


@pytest.fixture
def official(tmp_path):
    """A file in the official layout: S's width with one block, patch 8."""
    network = DiT(input_size=16, patch_size=8, hidden_size=384, depth=1, num_heads=6)
    path = tmp_path / "DiT.pt"

    def write(change=lambda tensors: tensors):
        torch.save(change(dict(network.state_dict())), path)
        return path

    return network, write


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"ema": t, "model": {}}, lambda t: {"model": t}])
def test_official_file_loads_unchanged(official, wrap):
    network, write = official
    loaded = load_network(write(wrap))
    assert loaded.config == network.config
    for key, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_official_file_at_another_resolution(official):
    network, write = official
    loaded = load_network(write(), input_size=32)
    assert loaded.pos_embed.shape == (1, 16, 384)
    assert torch.equal(loaded.blocks[0].attn.qkv.weight, network.blocks[0].attn.qkv.weight)


def test_official_file_without_position_table(official):
    network, write = official
    path = write(lambda tensors: {k: v for k, v in tensors.items() if k != "pos_embed"})
    assert load_network(path, input_size=16).config == network.config
    with pytest.raises(UserError, match="input_size"):
        load_network(path)


def test_position_table_of_another_network_is_refused(official):
    _, write = official
    path = write(lambda tensors: tensors | {"pos_embed": tensors["pos_embed"] + 0.01})
    with pytest.raises(UserError, match="pos_embed"):
        load_network(path)


def test_pickled_code_is_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"x_embedder.proj.weight": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="more than tensors"):
        load_network(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()
