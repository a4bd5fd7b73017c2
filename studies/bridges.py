"""Two ways to read a diffusion network as a flow, compared by the images of its probability-flow ODE in few steps.

python studies/bridges.py
"""

import logging
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch

from ditune.checkpoints import load_network, read_header
from ditune.cli import prepare
from ditune.config.components import build_evaluation
from ditune.config.instantiate import instantiate
from ditune.config.trainings import compose
from ditune.files.atomic import read_json, write_json
from ditune.generation.generator import ImageGenerator
from ditune.generation.grids import before_after_sheet
from ditune.processes import DiffusionPath, FlowProcess
from ditune.samplers import Euler

log = logging.getLogger(__name__)

OUT = Path(__file__).parents[1] / "docs" / "results" / "bridges"
STEPS, GUIDANCE, N, SHOWN = (1, 2, 4, 16), (1.0, 3.0), 256, 8


def main() -> None:
    """KID of the pixel base by both bridges, without guidance and with the base's own; what is there is left out."""
    prepare()
    cfg = compose(["experiment=difffit_pixels", "data=emoji_base", f"metrics.n={N}"])
    path, results = Path(cfg.pretrained), OUT / "result.json"
    network, diffusion = load_network(path).eval(), read_header(path)["process"]
    autoencoder = instantiate(cfg.autoencoder, "autoencoder")
    suite, reference = instantiate(cfg.metrics.judge, "metrics"), instantiate(cfg.data.pictures, "data")
    bridges = {"aligned": FlowProcess(diffusion=diffusion), "path": DiffusionPath(diffusion)}
    values = read_json(results) if results.is_file() else {}
    labels, rows = torch.arange(SHOWN) * network.num_classes // SHOWN, {}
    OUT.mkdir(parents=True, exist_ok=True)
    for steps, guidance, (name, process) in product(STEPS, GUIDANCE, bridges.items()):
        key = f"{name}, guidance {guidance:g}, {steps} steps"
        settings = {"guidance": guidance, "bf16": False}
        generator = ImageGenerator(process, autoencoder, cfg.data.resolution, Euler(), steps, **settings)
        if guidance > 1:
            rows[f"{name}: {steps}"] = generator.generate(network, labels, cfg.metrics.seed)
        if key not in values:
            evaluation = build_evaluation(cfg, generator, reference, suite=suite)
            values[key] = {"protocol": evaluation.protocol, "values": evaluation(network)}
            write_json(results, values)
            log.warning("%s: %s", key, values[key]["values"])
    before_after_sheet(rows).save(OUT / "images.png")


if __name__ == "__main__":
    main()
