"""Each benchmark at its smallest size, and the reference that they compare with."""

import json
import sys

import pytest
import torch

from helpers import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import caching
import data_loading
import growth
import int8
import measuring
import moe_layer
import moe_network
import sampling
import step_profile
import tables
import train_step
import trainer_overhead
from reference import Diffusion, ReferenceDiT, reference_sampling

from ditune.objectives import GaussianDiffusion
from ditune.processes import GaussianProcess
from ditune.samplers import DDPM, sample

QUICK = ["--device", "cpu", "--seconds", "0", "--rounds", "2"]
TINY = ["--network", "emoji_s"]
SMALLEST = {
    "train_step": (train_step, [*TINY, "--batch", "1", "--methods", "full,difffit"]),
    "sampling": (sampling, [*TINY, "--n", "1"]),
    "moe_layer": (moe_layer, ["--tokens", "256"]),
    "moe_network": (moe_network, ["--depth", "1", "--batch", "1"]),
    "data_loading": (data_loading, ["--latents", "300", "--pixels", "16"]),
    "step_profile": (step_profile, [*TINY, "--batch", "1"]),
    "trainer_overhead": (trainer_overhead, ["--steps", "24"]),
    "growth": (growth, ["--longest", "1", "--processes", "1"]),
    "caching": (caching, ["--n", "1", "--steps", "2"]),
}


@pytest.fixture(autouse=True)
def threads():
    """Benchmarks set the number of threads of their process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", SMALLEST)
def test_a_benchmark_at_its_smallest_size(name, tmp_path):
    module, options = SMALLEST[name]
    result = module.main([*QUICK, *options, "--out", str(tmp_path)])
    assert json.loads((tmp_path / f"{name}_cpu.json").read_text())["rows"] == json.loads(json.dumps(result["rows"]))
    ran = [row for row in result["rows"] if "not run" not in row]
    assert len(ran) >= 2
    assert all(row["ratio"] > 0 for row in ran if "ratio" in row)
    assert any("ratio" in row for row in ran) or name == "step_profile"


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what a machine without a CUDA device gets")
@pytest.mark.parametrize(
    "name", ["train_step", "sampling", "moe_layer", "moe_network", "step_profile", "growth", "caching"]
)
def test_a_missing_device_is_said_in_every_cell(name, tmp_path):
    module, _ = SMALLEST[name]
    options = ["--processes", "1"] if name == "growth" else []
    result = module.main(["--device", "cuda", *options])
    assert all(row["not run"] == "no CUDA device" for row in result["rows"])
    rows = measuring.table(result).splitlines()[2:]
    assert all(line.count("not run") == len(result["columns"]) - 1 for line in rows)


def networks() -> tuple[torch.nn.Module, ReferenceDiT]:
    ours = train_step.moved_network("dit_s_8", 128, "cpu")
    other = ReferenceDiT(ours.config)
    other.load_state_dict(ours.state_dict())
    return ours, other


def test_the_reference_has_our_loss_and_gradients():
    ours, other = networks()
    x0, y = train_step.made_batch(3, 128, "cpu")
    t, noise = torch.tensor([0, 500, 999]), torch.randn(x0.shape, generator=torch.Generator().manual_seed(2))
    expected = GaussianDiffusion(GaussianProcess()).losses(ours, x0, t, y, noise)["loss"].mean()
    found = Diffusion().loss(other, x0, t, y, noise)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    expected.backward()
    found.backward()
    for name, parameter in other.named_parameters():
        if parameter.requires_grad:
            gradient = ours.get_parameter(name).grad
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5 + 1e-4 * gradient.abs().max())


def test_the_reference_has_our_samples():
    ours, other = networks()
    noise, y = train_step.made_batch(2, 128, "cpu")
    steps = [torch.randn(noise.shape, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    given, again = iter(steps), iter(steps)
    options = {"sampler": DDPM(), "steps": 5, "guidance": 4.0, "guidance_channels": 3}
    expected = sample(ours.eval(), GaussianProcess(), noise, y, next_noise=lambda: next(given), **options)
    found = reference_sampling(other, noise, y, 5, 4.0, lambda: next(again))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_flops_are_those_of_the_paper():
    """DiT-XL/2 at 256 px has 118.6 GMAC in the paper, embeddings and adaLN included (arXiv 2212.09748, table 4)."""
    with torch.device("meta"):
        config = train_step.build_network("dit_xl_2").config
    assert sum(train_step.forward_flops(config)) == pytest.approx(2 * 118.6e9, rel=0.01)
    full, frozen = (train_step.step_flops(config, full=full) for full in (True, False))
    assert full / frozen == pytest.approx(1.474, abs=0.005)


def test_every_operator_of_a_step_has_one_kind():
    """The kinds and the rest make the whole; the products are what the FLOPs of the network need time for."""
    step = train_step.our_step("emoji_s", 1, 256, "cpu", "difffit")
    times = step_profile.times_of(step, "cpu", 1)
    rows = {row["name"]: row for row in step_profile.rows_of(times, times)}
    kinds = [rows[name] for name in (*step_profile.KINDS, step_profile.REST)]
    assert sum(row["ms"] for row in kinds) == pytest.approx(step_profile.total(times))
    assert sum(row["share"] for row in kinds) == pytest.approx(1)
    assert all(row["ms"] > 0 for row in kinds)
    assert step_profile.kind_of("aten::addmm") == "matrix products"
    assert step_profile.kind_of("aten::add_") == "products and sums of elements"
    assert step_profile.kind_of("aten::expand") == step_profile.REST


def test_peak_memory_is_what_is_allocated():
    found: dict[str, float] = {}
    with measuring.allocated("cpu", found) as mark:
        kept = torch.zeros(1 << 20)  # 4 MiB
        torch.zeros(1 << 22)  # before the mark
        mark()
        torch.zeros(1 << 21)  # 8 MiB for a moment
    assert kept.nbytes <= found["held"] < kept.nbytes + 2**16
    assert 3 * kept.nbytes <= found["peak"] < 3 * kept.nbytes + 2**16


def test_the_page_has_the_tables_of_the_json_files():
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.filled(page, tables.PAGE.with_suffix("")) == page
    written = {path.stem for path in tables.PAGE.with_suffix("").glob("*.json")}
    assert {name for _, name, _ in tables.MARKED.findall(page)} == written


@pytest.mark.slow
def test_the_benchmark_of_int8_at_its_smallest_size():
    values = int8.main(["--images", "2", "--rounds", "1", "--methods", "lora"])
    assert values["loss"]["int8"] == pytest.approx(values["loss"]["fp32"], rel=0.01)
    assert values["lora"]["int8"]["weights"] == values["lora"]["null"]["weights"] / 4
    assert values["lora"]["int8"]["kept"] == values["lora"]["null"]["kept"]
    assert values["lora"]["ratio"] > 0
