"""Networks for others: diffusers, as installed, computes the same with an exported folder; DiT's keys load strictly."""

import json

import hydra
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel
from omegaconf import DictConfig
from safetensors.torch import load_file

from ditune import cli
from ditune.autoencoders import KL
from ditune.checkpoints import load_network, save_network
from ditune.commands.export import export, to_diffusers, to_dit
from ditune.commands.train import train
from ditune.errors import UserError
from ditune.generation.generator import ImageGenerator
from ditune.networks import DiT, build_network
from ditune.processes import GaussianProcess
from ditune.run import Trained, load_run
from ditune.samplers import DDIM
from helpers import GOLDEN, golden
from small_vae import small_vae

NAMES = [f"class {k}" for k in range(10)]


@pytest.fixture
def trained(tmp_path) -> Trained:
    """The tiny DiT of the golden numbers, with a small autoencoder of its latents."""
    network = DiT(**json.loads((GOLDEN / "tiny_dit_config.json").read_text()))
    network.load_state_dict(golden("tiny_dit_weights"))
    codec = KL("small", small_vae(tmp_path / "vae"))
    drawer = ImageGenerator(GaussianProcess(), codec, resolution=64, sampler=DDIM(), steps=5, bf16=False)
    return Trained(network.eval(), drawer, NAMES)


def load(folder) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=str(folder / "pipeline.py"), trust_remote_code=True
    )


def test_diffusers_computes_what_dit_computes(trained, tmp_path):
    folder = to_diffusers(trained, tmp_path / "out")
    modes = {path.stat().st_mode for path in folder.rglob("*") if path.is_file()}
    assert len(modes) == 1  # who may read one file may read all
    inputs, expected = golden("tiny_dit_forward"), golden("diffusers_tiny_forward")
    shipped = DiTTransformer2DModel.from_pretrained(folder / "transformer").eval()
    pipeline = load(folder)

    def run(transformer) -> torch.Tensor:
        with torch.no_grad():
            return transformer(inputs["x"], timestep=inputs["t"], class_labels=inputs["y"]).sample

    torch.testing.assert_close(run(pipeline.transformer), expected["out_reference"], atol=2e-5, rtol=0)
    torch.testing.assert_close(run(shipped), expected["out_diffusers_as_shipped"], atol=2e-5, rtol=0)
    assert (run(shipped) - expected["out_reference"]).abs().max() > 0.5  # why there is a pipeline.py


def test_the_pipeline_draws_by_the_null_class_of_the_network(trained, tmp_path):
    pipeline = load(to_diffusers(trained, tmp_path / "out"))
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.config.id2label == {str(k): name for k, name in enumerate(NAMES)}
    assert pipeline.vae.config.scaling_factor == pytest.approx(0.18215)

    def draw(**options):
        return pipeline([3, 7], generator=torch.Generator().manual_seed(0), num_inference_steps=3, **options).images

    assert [picture.size for picture in draw()] == [(64, 64)] * 2
    latents = draw(output_type="latent", guidance_scale=2.0)
    assert torch.isfinite(latents).all()
    # the same by hand: DDIM on the uniformly spaced timesteps, all channels guided
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    alphas = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    for t, before in ((666, 333), (333, 0), (0, None)):
        with torch.no_grad():
            time = torch.full((2,), t)
            one = trained.network(x, time, torch.tensor([3, 7]))[:, :4]
            none = trained.network(x, time, torch.tensor([10, 10]))[:, :4]
        epsilon = none + 2 * (one - none)
        x0 = (x - (1 - alphas[t]).sqrt() * epsilon) / alphas[t].sqrt()
        a = alphas[before] if before is not None else torch.tensor(1.0)
        x = (a.sqrt() * x0 + (1 - a).sqrt() * epsilon).float()
    torch.testing.assert_close(latents, x, atol=1e-3 * x.abs().max().item(), rtol=0)


def test_another_resolution_keeps_its_positions(trained, tmp_path):
    network = DiT(**(trained.network.config | {"pos_embed_scale": 0.5})).eval()
    network.load_state_dict({k: v for k, v in trained.network.state_dict().items() if k != "pos_embed"})
    pipeline = load(to_diffusers(Trained(network, trained.drawer, None), tmp_path / "out"))
    torch.testing.assert_close(pipeline.transformer.pos_embed.pos_embed, network.pos_embed, atol=1e-6, rtol=0)


def test_the_plain_file_has_dits_keys_and_loads_strictly(trained, tmp_path):
    path = to_dit(trained, tmp_path / "out")
    reference = golden("tiny_dit_weights")
    tensors = load_file(path)
    assert tensors.keys() == reference.keys()
    torch.testing.assert_close(tensors, dict(reference), atol=1e-6, rtol=0)
    assert torch.equal(load_network(path).blocks[2].mlp.fc1.weight, trained.network.blocks[2].mlp.fc1.weight)


def config(out, **given: object) -> DictConfig:
    cli.prepare()
    with hydra.initialize_config_dir(cli.CONFIGS, version_base="1.3"):
        return hydra.compose("export", [f"out={out}", *(f"{key}={value}" for key, value in given.items())])


def test_a_runs_adapter_is_merged(small, base, tmp_path):
    run = tmp_path / "run"
    assert train(small(f"pretrained={base}", "peft=difffit", "max_steps=2", folder=run)) == 0
    path = export(config(tmp_path / "dit", run=str(run), format="dit"))
    network, adapted = load_network(path).eval(), load_run(run).network
    x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([5, 900]), torch.tensor([0, 3])
    with torch.no_grad():
        torch.testing.assert_close(network(x, t, y), adapted(x, t, y), atol=1e-5, rtol=1e-5)
    assert not torch.equal(network.final_layer.linear.bias, load_network(base).final_layer.linear.bias)
    folder = export(config(tmp_path / "diffusers", run=str(run)))
    pipeline = load(folder)
    with torch.no_grad():
        out = pipeline.transformer(x, timestep=t, class_labels=y).sample
    torch.testing.assert_close(out, network(x, t, y), atol=1e-5, rtol=1e-5)
    assert pipeline.vae is None
    with pytest.raises(UserError, match="is not empty"):
        export(config(tmp_path / "diffusers", run=str(run)))


def test_what_diffusers_has_no_place_for_is_refused(trained, tmp_path):
    told = build_network("tiny", in_channels=4, input_size=8, num_classes=10, step=True)
    with pytest.raises(UserError, match="format=dit"):
        to_diffusers(Trained(told, trained.drawer, None), tmp_path / "a")
    wide = build_network("tiny", in_channels=4, input_size=8, num_classes=10, mlp_ratio=2)
    with pytest.raises(UserError, match="four times the width"):
        to_diffusers(Trained(wide, trained.drawer, None), tmp_path / "b")
    with pytest.raises(UserError, match="format is 'gguf'"):
        export(config(tmp_path / "c", checkpoint="x", format="gguf"))
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()
    path = tmp_path / "x.safetensors"
    save_network(path, wide, GaussianProcess().config, class_names=NAMES)
    with pytest.raises(UserError, match="does not say its autoencoder"):
        export(config(tmp_path / "d", checkpoint=str(path)))
