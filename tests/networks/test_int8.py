"""Frozen weights in int8: the output and the gradients of the rounded network, in a quarter of the memory."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from ditune.checkpoints import load_adapter, load_network
from ditune.commands.train import train
from ditune.config.components import build_components
from ditune.errors import UserError
from ditune.files.atomic import read_json
from ditune.networks.int8 import Int8Experts, Int8Linear, dequantised, quantise, quantised
from ditune.networks.moe import Experts
from ditune.peft import merge
from ditune.run import load_run
from ditune.training.plan import expected_memory
from ditune.training.result import save_trained
from helpers import assert_same_bits, checkpoint
from peft_helpers import CASES, adapt, inputs

INT8 = "frozen_weights=int8"
STEPS = 4
ADAPTED = ["pretrained=@base", "optimizer.lr=1e-2", f"max_steps={STEPS}", f"callbacks.checkpoint.every_n_steps={STEPS}"]

# refused are all others, which compute with frozen weights or change them
WORK = {"bitfit", "difffit", "adaptformer", "adapter", "vpt_deep", "vpt_shallow", "norm", "router"}
WORK |= {"lora", "rslora", "tlora", "adalora", "loha", "lokr", "ia3", "vera", "oft", "boft", "fourierft"}
WORK |= {"miss", "deft", "road", "gralora", "psoft", "beft", "randlora", "waveft"}


def rounded(network: nn.Module) -> nn.Module:
    """A copy of a network in int8 with the same weights in floating point, in ordinary layers."""
    network = deepcopy(network)
    for module in network.modules():
        if isinstance(module, Int8Linear):
            module.weight.data, module.__class__ = module.dequantised(), nn.Linear
        elif isinstance(module, Int8Experts):
            module.__class__ = Experts
            for name, parameter in module.named_parameters():
                if parameter.dtype == torch.int8:
                    scale = getattr(module, f"{name}_scale")
                    parameter.data = dequantised(parameter.data.transpose(1, 2), scale, torch.float32).transpose(1, 2)
    return network


def moved(network: nn.Module, method) -> None:
    """Away from the start, where some factors are zero and others get no gradient."""
    generator = torch.Generator().manual_seed(0)
    for parameter in method.trainable(network).values():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)


def gradients(network: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    output = network(*inputs())
    output.square().mean().backward()
    return output.detach(), {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def test_rounding_is_by_output_channel_and_at_most_half_a_level():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 7, generator=generator) * torch.tensor([1e-3, 1, 10, 100, 0])[:, None]
    values, scale = quantised(weight)
    assert values.dtype == torch.int8
    assert values[:4].abs().amax(dim=1).tolist() == [127] * 4
    assert_close(scale[:4], weight[:4].abs().amax(dim=1) / 127)
    assert (scale[4], values[4].any()) == (1, False)
    assert ((dequantised(values, scale, torch.float32) - weight).abs() <= scale[:, None] / 2 * (1 + 1e-6)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_the_product_with_the_rounded_weight_to_the_bit(dtype):
    torch.manual_seed(0)
    layer, x = nn.Linear(48, 32), torch.randn(3, 5, 48)
    layer.weight.requires_grad_(False)
    block = nn.Module()
    block.blocks = nn.ModuleList([layer])
    quantise(block)
    plain = rounded(block).blocks[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours, theirs = layer(x), plain(x)
    assert ours.dtype == dtype
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("network", "name"), CASES)
def test_every_method_has_the_gradients_of_the_rounded_network_or_is_refused(network, name):
    adapted, method = adapt(network, name)
    moved(adapted, method)
    quantise(adapted)
    quantised_layers = [m for m in adapted.modules() if isinstance(m, Int8Linear | Int8Experts)]
    if method.whole_weights or not quantised_layers:
        assert name not in WORK
        return
    assert all(not module.weight.is_floating_point() for module in quantised_layers if hasattr(module, "weight"))
    (output, ours), (expected, theirs) = gradients(adapted), gradients(rounded(adapted))
    assert torch.equal(output, expected)
    assert ours.keys() == theirs.keys() == method.trainable(adapted).keys()
    for key, value in theirs.items():
        assert_close(ours[key], value, rtol=0, atol=1e-6 * max(1, value.abs().max().item()), msg=key)


# Memory


def test_the_linear_layers_take_a_quarter_and_autograd_keeps_no_weight():
    whole, _ = adapt("dit", "difffit")
    small, _ = adapt("dit", "difffit")
    quantise(small)
    layers = [(name, m) for name, m in small.named_modules() if isinstance(m, Int8Linear)]
    before = sum(whole.get_submodule(name).weight.nbytes for name, _ in layers)
    after = sum(m.weight.nbytes + m.scale.nbytes for _, m in layers)
    assert before / 4 < after < before / 4 * 1.2  # with the scales, of few inputs here
    assert kept_bytes(small) <= kept_bytes(whole)
    assert kept_bytes(rounded_above_autograd(small)) > kept_bytes(whole) + before * 0.9


def kept_bytes(network: nn.Module) -> int:
    """Of tensors that autograd keeps for the backward pass and that are not the network's own."""
    owned = {t.untyped_storage()._cdata for t in (*network.parameters(), *network.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            kept[storage._cdata] = storage

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(*inputs()).square().mean()
    return sum(storage.nbytes() for storage in kept.values())


def rounded_above_autograd(network: nn.Module) -> nn.Module:
    """The same products by autograd's own operations, as weight-only layers of libraries have them."""

    class Plain(Int8Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.dequantised(), self.bias)

    network = deepcopy(network)
    for module in network.modules():
        if isinstance(module, Int8Linear):
            module.__class__ = Plain
    return network


def test_a_plan_knows_what_the_weights_take(small, base):
    sizes = {}
    for key in ("frozen_weights=null", INT8):
        parts = build_components(small("peft=difffit", f"pretrained={base}", key))
        shape = parts.autoencoder.latent_shape(parts.settings.resolution)
        memory = expected_memory(parts.network, parts.objective, shape, 4, bf16=False)
        matrices = [p for p in parts.network.blocks.parameters() if p.ndim == 2]
        sizes[key] = sum(p.numel() for p in matrices), memory["parameters"], memory["saved activations"]
        assert memory["gradients, optimizer, EMA"] == pytest.approx(
            sum(16 * p.numel() for p in parts.method.trainable(parts.network).values()) / 2**20
        )
    (count, before, kept), (same, after, kept_int8) = sizes.values()
    assert same == count
    assert before - after == pytest.approx(3 * count / 2**20)
    assert kept_int8 == kept


# Trainings


@pytest.fixture
def run(small, base, tmp_path):
    """`run(name, *overrides)`: folder of a training of four steps."""

    def start(name, *overrides):
        filled = [override.replace("@base", str(base)) for override in (*ADAPTED, *overrides)]
        assert train(small(*filled, folder=tmp_path / name)) == 0
        return tmp_path / name

    return start


@pytest.mark.parametrize("method", ["difffit", "lora", "psoft"])
def test_a_run_loads_as_it_was_trained_and_its_adapter_fits_the_float_base(run, base, method, monkeypatch):
    networks = []
    monkeypatch.setattr(
        "ditune.commands.train.save_trained",
        lambda c, *rest: (save_trained(c, *rest), networks.append(deepcopy(c.network))),
    )
    folder = run("run", f"peft={method}", INT8)
    assert read_json(folder / "result.json")["frozen_weights"] == "int8"
    plain = load_network(base)
    load_adapter(plain, folder / "adapter")
    x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([3, 7]), torch.tensor([0, 1])
    with torch.no_grad():
        loaded = load_run(folder).network(x, t, y)
        assert torch.equal(loaded, networks[0].eval()(x, t, y))
        whole = load_run(folder, as_trained=False).network(x, t, y)
        assert torch.equal(whole, plain.eval()(x, t, y))
        assert 0 < (loaded - whole).norm() < 0.05 * whole.norm()
        merge(plain)
        assert_close(plain(x, t, y), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_resumed_run_has_the_same_bits(run, precision):
    overrides = ("peft=lora", INT8, f"trainer.precision={precision}")
    whole = run("whole", *overrides)
    run("halved", *overrides, f"max_steps={STEPS // 2}")
    halved = run("halved", *overrides, "resume=auto")
    for part in ("state_dict", "ema", "optimizer_states", "identity"):
        assert_same_bits(checkpoint(halved)[part], checkpoint(whole)[part], part)
    assert not any("scale" in name or ("weight" in name and "lora" not in name) for name in network_of(whole))
    with pytest.raises(UserError, match="frozen_weights"):
        run("halved", *overrides, "frozen_weights=null", "max_steps=6", "resume=auto")


def network_of(folder) -> set[str]:
    """Names of the network's values in a checkpoint, but for the label table."""
    return {name for name in checkpoint(folder)["state_dict"] if "y_embedder" not in name}


def test_forward_mode_derivatives_are_those_of_the_rounded_network():
    adapted, _ = adapt("dit", "lora")
    quantise(adapted)
    x, t, y = inputs()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # as objectives call it
        ours, theirs = (
            torch.func.jvp(lambda x, net=net: net(x, t, y), (x,), (direction,)) for net in (adapted, rounded(adapted))
        )
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


# What is refused


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["peft=full", "pretrained=@base"], "peft=full trains all of them"),
        (["peft=full"], "peft=full trains all of them"),
        (["peft=dora", "pretrained=@base"], "peft=dora computes with those of its layers"),
        (["peft=pissa", "pretrained=@base"], "peft=pissa computes with those of its layers, or changes them"),
        (["peft=lora", "pretrained=@base", "trainer=fsdp", "trainer.accelerator=cpu"], "Set frozen_weights=null"),
        (["peft=lora", "pretrained=@base", "compile=true"], "compile=true keeps the matrices"),
        (["peft=lora", "pretrained=@base", "frozen_weights=int4"], "frozen_weights"),
    ],
)
def test_what_has_no_weights_in_int8_is_refused(small, base, overrides, text):
    filled = [override.replace("@base", str(base)) for override in overrides]
    key = [] if any("frozen" in override for override in filled) else [INT8]
    with pytest.raises(UserError, match=text):
        train(small(*filled, *key))
